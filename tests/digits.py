"""A tiny task of real images and a tiny backbone that looks at them: what the tests of the method work on."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from tiny import tiny_model
from torch import Tensor, nn

from mvp_ext.data.images import ImageData, load_data
from mvp_ext.data.tasks import Task, TaskData
from mvp_ext.model.preprocessing import Preprocessing, to_batch
from mvp_ext.train.backbone import Backbone


@functools.cache
def few_digits(train: int = 12, test: int = 10) -> ImageData:
    """scikit-learn's digits (8 × 8 pixels), but only so many training and test images a class."""
    data = load_data("digits")
    first = {}
    for which, count in (("train", train), ("test", test)):
        images, labels = data.split(which)
        index = torch.cat([torch.nonzero(labels == label).flatten()[:count] for label in range(10)])
        first |= {f"{which}_images": images[index], f"{which}_labels": labels[index]}
    return replace(data, **first)


def digits_task(classes: tuple[int, ...] = (0, 1, 2), name: str = "digits", seed: int = 0) -> Task:
    return Task(name, few_digits(), classes, seed)


def tiny_backbone(name: str = "test_resnet") -> Backbone:
    """``tiny_model`` in eval mode, looking at images of 32 px (``test_vit``: 2 × 2 patches of them)."""
    model = tiny_model(name, img_size=32).eval()
    return Backbone(model, Preprocessing(32, (0.3, 0.3, 0.3), (0.35, 0.35, 0.35)))


def equal_weights(a: nn.Module, b: nn.Module) -> bool:
    other = b.state_dict()
    return all(torch.equal(value, other[name]) for name, value in a.state_dict().items())


def train_batch(data: TaskData, backbone: Backbone) -> Tensor:
    """All of a task's training images as the backbone sees them, without augmentation."""
    p = backbone.preprocessing
    return to_batch(data.train_images, p.size, p.mean, p.std)
