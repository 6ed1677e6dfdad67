"""What is fitted anew, without gradients, to a model that was cut or trained: normalisation statistics and the head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mvp_ext.data.stored import Images
from mvp_ext.data.tasks import TaskData
from mvp_ext.model.borrowed import borrowed
from mvp_ext.model.ends import as_input, dtype_of
from mvp_ext.model.preprocessing import Preprocessing, to_batch
from mvp_ext.train.backbone import autocast, extract_features, set_head
from mvp_ext.train.heads import LinearHead, class_mean_head, ridge_head

# The method needs at least 100; more is cheap and steadier.
STATISTICS_IMAGES = 512


@torch.no_grad()
def reestimate_statistics(
    model: nn.Module, images: Images, preprocessing: Preprocessing, *, seed: int = 0, precision: str = "auto"
) -> int:
    """Replace the running statistics of every batch normalisation by averages over (up to 512 of) these images.

    A sub-network sees other activations than the network its statistics come from; without this a pruned model can be
    at chance. Weights and modes do not change; if a pass fails, statistics neither.

    Args:
        model: of any mode; each normalisation is estimated, also one that is kept in eval mode while the rest trains.
        images: uint8 [n, H, W, 3].
        preprocessing: how they become the model's input.
        seed: of the choice among more than 512.
        precision: as of ``autocast``.

    Returns:
        The number of images passed through the model (0 without batch normalisation).
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not layers:
        return 0
    device = next(model.parameters()).device
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:STATISTICS_IMAGES]
    momenta = [layer.momentum for layer in layers]
    before = [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers()]
    try:
        with borrowed(model) as inner, autocast(device, precision, dtype_of(inner)):
            for layer in layers:
                layer.reset_running_stats()
                # A cumulative average.
                layer.momentum = None
                layer.training = True
            for index in order.chunk(max(1, len(order) // 128)):
                p = preprocessing
                inner(as_input(inner, to_batch(images[index].to(device), p.size, p.mean, p.std)))
    except BaseException:
        for buffer, value in before:
            buffer.copy_(value)
        raise
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
    return len(order)


def fit_head(
    model: nn.Module,
    data: TaskData,
    preprocessing: Preprocessing,
    kind: str,
    precision: str = "auto",
    targets: Tensor | None = None,
) -> LinearHead:
    """Fit a classifier in closed form on the task's training images and put it on the model.

    Args:
        model: its features are taken as they are.
        data: the task's images.
        preprocessing: how they become the model's input.
        kind: "class_mean" or "ridge" (``heads.py``).
        precision: as of ``autocast``.
        targets: of a "ridge", as of ``ridge_head``.

    Returns:
        The head that is now the model's.
    """
    features = extract_features(model, data.train_images, preprocessing, precision)
    if kind == "ridge":
        head = ridge_head(features, data.train_labels, data.num_classes, targets)
    else:
        head = class_mean_head(features, data.train_labels, data.num_classes)
    set_head(model, head)
    return head
