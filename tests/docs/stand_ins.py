"""What the pages' examples get instead of the network and of hours. The calls are the reader's own, word for word.

timm's large models are its tiny ones, with the same random weights wherever pre-trained ones are asked for; `photos/`
are scikit-learn's digits under other names; of a training run's steps only the first is computed, of many tasks only
three are made, and nothing is timed for long.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import mvp_ext
from mvp_ext.data import images
from mvp_ext.model import families, measure
from mvp_ext.timm_compat import import_timm
from mvp_ext.train.trainer import Trainer

CLASSES = ("ant", "bat", "bee", "cat", "cow", "dog", "fox", "hen", "owl", "pig")
IMAGES_A_CLASS, TASKS = 12, 3
TINY = {"resnet18": "test_resnet"}


def make_photos(folder: Path) -> None:
    """``folder/<class>/1.png`` and so on."""
    digits = load_digits()
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number, pixels in enumerate(digits.images[digits.target == label][:IMAGES_A_CLASS], 1):
            Image.fromarray((pixels * 15).astype("uint8")).save(folder / name / f"{number}.png")


def make_small(path: str, classes: Sequence[str] = ("cat", "dog", "fox"), steps: int = 1) -> None:
    """A small model for some of the photos' classes, named as its file, as a reader of ``deploying`` has one."""
    task = mvp_ext.Task.of(Path(path).stem, mvp_ext.load_data("photos/"), classes)
    backbone = mvp_ext.load_backbone("resnet18", pretrained=True)
    mvp_ext.prune(backbone, task, method="random", steps=steps).save(path)


def install(patch: pytest.MonkeyPatch) -> None:
    timm = import_timm()
    create_model, read_digits, sample_tasks = timm.create_model, images.read_digits, mvp_ext.sample_tasks
    step, time_in_turn = Trainer._step, measure.time_in_turn

    def tiny_model(name: str, *, pretrained: bool = False, **options: Any) -> Any:
        overlay = {"input_size": (3, 32, 32)}
        with torch.random.fork_rng(devices=[], enabled=pretrained):
            if pretrained:
                torch.manual_seed(0)
            return create_model(TINY.get(name, name), pretrained_cfg_overlay=overlay, **options)

    def first_step(self: Trainer, batch: Any, labels: Any, number: int) -> None:
        if number == 0:
            step(self, batch, labels, number)

    def few_digits() -> dict[str, Any]:
        raw = read_digits()
        few = 20 * len(CLASSES)
        return {**raw, "train_images": raw["train_images"][:few], "train_labels": raw["train_labels"][:few]}

    def few_tasks(data: Any, count: int, *args: Any, **options: Any) -> Any:
        return sample_tasks(data, min(count, TASKS), *args, **options)

    patch.setattr(timm, "create_model", tiny_model)
    # A page may register rules.
    patch.setattr(families, "RULES", list(families.RULES))
    patch.setattr(mvp_ext, "sample_tasks", few_tasks)
    patch.setattr("mvp_ext.app.data_options.sample_tasks", few_tasks)
    patch.setattr(Trainer, "_step", first_step)
    patch.setattr(measure, "time_in_turn", lambda runs, **how: time_in_turn(runs, **{**how, "seconds": 0.0}))
    patch.setattr(images, "read_digits", few_digits)
