"""The two ends of a timm model: which images it takes, and which linear layers its outputs come from."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any, TypeGuard

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


# A convolution of 1 × 1 of pooled features is a linear layer whose weight has two axes more.
Classifier = nn.Linear | nn.Conv2d


def classifiers(model: nn.Module) -> tuple[Classifier, ...]:
    """The linear layers that make a model's outputs: one, or two (a distilled transformer); none without classes."""
    found: Any = model.get_classifier()  # type: ignore[operator]
    # Some models answer with their whole head, which may hold hidden layers, too.
    parts = found if isinstance(found, (tuple, nn.ModuleList)) else (found,)
    outputs = getattr(model, "num_classes", None)
    return tuple(
        m
        for part in parts
        for m in part.modules()
        if _is_classifier(m) and (m is part or outputs in (None, len(m.weight)))
    )


class Features(nn.Module):
    """What a model's classifiers read: float [B, 3, S, S] → float [B, F], of two classifiers the mean.

    Everything but the classifiers is shared with the model. What they read may be something else than what timm calls
    features: there may be a norm or hidden layers between. Of a model without classifiers, or with such of different
    features, it is those.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        known = classifiers(model)
        ends = [name for name, part in model.named_modules() if any(part is each for each in known)]
        # Of such a model's outputs nothing is one linear layer.
        if hidden_classifiers(model) or len({linear_weight(each).shape[1] for each in known}) != 1:
            ends = []
        self.pooled_only = not ends
        self.model = model
        for end in ends:
            self.model = _with_identity(self.model, end.split("."))

    def forward(self, images: Tensor) -> Tensor:
        model: Any = self.model
        if self.pooled_only:
            return model.forward_head(model.forward_features(images), pre_logits=True)
        found = model(images)
        # A distilled transformer may keep its outputs apart while it is trained.
        return torch.stack(found).mean(0) if isinstance(found, tuple) else found


def _with_identity(model: nn.Module, path: Sequence[str]) -> nn.Module:
    """A model that shares all parts with this one but what lies on the way to ``path``, where it has an identity."""
    first, *rest = path
    twin = copy.copy(model)
    inner = nn.Identity() if not rest else _with_identity(model.get_submodule(first), rest)
    twin.__dict__["_modules"] = {**twin._modules, first: inner}
    return twin


def hidden_classifiers(model: nn.Module) -> list[Classifier]:
    """What timm's description calls a classifier, and the model does not: a head for each token, say."""
    known = classifiers(model)
    return [m for m in _named(model, "classifier") if _is_classifier(m) and m not in known]


def linear_weight(classifier: Classifier) -> Tensor:
    """Its weight [k, F], one row an output: a view."""
    return classifier.weight.flatten(1)


def _is_classifier(module: nn.Module) -> TypeGuard[Classifier]:
    return isinstance(module, nn.Linear) or (
        isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
    )


def _named(model: nn.Module, key: str) -> Iterator[nn.Module]:
    """The parts of a model that its ``pretrained_cfg`` names by this key."""
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    names = config.get(key) or ()
    for name in (names,) if isinstance(names, str) else names:
        with contextlib.suppress(AttributeError):
            yield model.get_submodule(name)
