"""The two ends of a timm model: which images it takes, and which linear layers its outputs come from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def built_for(model: nn.Module) -> tuple[int, int] | None:
    """(height, width) in pixels of the images that a timm model was built for; None where it takes others, too."""
    model_args: dict[str, Any] = getattr(model, "_model_args", None) or {}
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    size: Any = getattr(getattr(model, "patch_embed", None), "img_size", None) or model_args.get("img_size")
    if size is None and config.get("fixed_input_size"):
        size = config["input_size"][-2:]
    if size is None:
        return None
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return int(height), int(width)


def in_channels(model: nn.Module) -> int | None:
    """Channels of the images that a timm model takes; None where nothing says how many."""
    for conv in _named(model, "first_conv"):
        if isinstance(conv, nn.Conv2d):
            return conv.in_channels
    declared = getattr(model, "in_chans", (getattr(model, "_model_args", None) or {}).get("in_chans"))
    return declared if isinstance(declared, int) else None


def dtype_of(model: nn.Module) -> torch.dtype:
    """In which a model computes: that of its first parameter of floating point, float32 where it has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def as_input(model: nn.Module, images: Tensor) -> Tensor:
    """Images as the model takes them: on its device, in its type.

    Args:
        model: of any floating type; what torch's own modules take is not known, and not checked.
        images: float [B, C, H, W].

    Raises:
        ValueError: the model takes images with another number of channels.
    """
    channels = in_channels(model)
    if channels is not None and images.ndim == 4 and images.shape[1] != channels:
        raise ValueError(
            f"{type(model).__name__}: images: expected [B, {channels}, H, W], as the model takes them, got "
            f"{list(images.shape)}"
        )
    like = next(model.parameters(), images)
    return images.to(device=like.device, dtype=dtype_of(model))


def classifiers(model: nn.Module) -> tuple[nn.Linear, ...]:
    """The linear layers that make a model's outputs: one, or two (a distilled transformer); none without classes."""
    found: Any = model.get_classifier()  # type: ignore[operator]
    # Some models answer with their whole head.
    parts = found if isinstance(found, (tuple, nn.ModuleList)) else (found,)
    return tuple(m for part in parts for m in part.modules() if isinstance(m, nn.Linear))


def hidden_classifiers(model: nn.Module) -> list[nn.Linear]:
    """What timm's description calls a classifier, and the model does not: a head for each token, say."""
    known = classifiers(model)
    return [m for m in _named(model, "classifier") if isinstance(m, nn.Linear) and m not in known]


def _named(model: nn.Module, key: str) -> Iterator[nn.Module]:
    """The parts of a model that its ``pretrained_cfg`` names by this key."""
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    names = config.get(key) or ()
    for name in (names,) if isinstance(names, str) else names:
        with contextlib.suppress(AttributeError):
            yield model.get_submodule(name)
