"""From a model's name to a model."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from torch import nn

from mvp_ext.model.elsewhere.arguments import is_elsewhere
from mvp_ext.model.elsewhere.create import create_elsewhere
from mvp_ext.model.families import find_structure
from mvp_ext.timm_compat import import_timm

# How long the weights' host may take to answer.
REACH_SECONDS = 5


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    img_size: int | None = None,
    in_chans: int = 3,
    pretrained: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """A timm model that can be cut in one scope at least, by its timm name; or one of others.

    Args:
        name: timm's model name, like ``resnet18`` or ``vit_tiny_patch16_224``; a tag after a dot picks the
            weights. ``torchvision:NAME`` is one of torchvision's; ``transformers:CLASS`` and ``own:NAME`` are what
            files say of others.
        num_classes: outputs of the head; None keeps the model's own.
        img_size: side of the square images in pixels. Convolutional models take any size and ignore it.
        in_chans: channels of an image.
        pretrained: download timm's weights (needs the network, or timm's cache).
        kwargs: further arguments of ``timm.create_model``; ``config`` of a class of transformers.

    Raises:
        ValueError: timm has no model of that name (the message lists close names), or cannot build it of these
            arguments.
        UnsupportedModelError: the model is built of parts that cannot be cut here (the message names one).
        RuntimeError: the pretrained weights cannot be had.
    """
    model = _create(
        name,
        {
            "num_classes": num_classes,
            "in_chans": in_chans,
            "img_size": img_size,
            "pretrained": pretrained,
        }
        | kwargs,
    )
    find_structure(model)
    return model


def _create(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """``create_model`` that does not ask whether the model can be cut."""
    if name.startswith("hf:"):
        raise ValueError(f"create_model: {name!r} is a folder with weights: load_backbone reads it")
    if is_elsewhere(name):
        return create_elsewhere(name, **kwargs)
    timm = import_timm()
    pretrained = kwargs.get("pretrained", False)
    base = name.split(".", 1)[0]
    if not timm.is_model(base):
        close = difflib.get_close_matches(base, timm.list_models(), n=5, cutoff=0.5)
        hint = f"; close names: {', '.join(close)}" if close else ""
        raise ValueError(f"create_model: timm {timm.__version__} has no model named {name!r}{hint}")
    try:
        with _hub() if pretrained else nullcontext():
            try:
                model = timm.create_model(name, **kwargs)
            except TypeError as error:
                if "img_size" not in str(error):
                    raise
                kwargs.pop("img_size")
                model = timm.create_model(name, **kwargs)
    except AssertionError as error:
        raise ValueError(
            f"create_model: timm builds no {name!r} of these arguments ({' '.join(str(error).split()) or kwargs})"
        ) from error
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise RuntimeError(
            f"create_model: the pretrained weights of {name!r} could not be had: they come from the network, or its "
            "cache; give weights in a local file instead (--weights), or none "
            f"({type(error).__name__}: {error})"
        ) from error
    # A checkpoint needs the arguments. A newer timm notes them itself.
    if not hasattr(model, "_model_args"):
        model._model_args = {
            key: value for key, value in kwargs.items() if key != "pretrained" and value is not None
        }
    return model


@contextmanager
def _hub() -> Iterator[None]:
    """Where the weights' host cannot be reached, only their cache is looked at: retries would take a minute."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _reachable(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _reachable(url: str) -> bool:
    try:
        with urlopen(Request(url, method="HEAD"), timeout=REACH_SECONDS):
            return True
    except HTTPError:
        return True
    # No route, no name, no answer in time.
    except OSError:
        return False


def create_empty(arguments: Mapping[str, Any]) -> nn.Module:
    """What ``create_model`` makes of these arguments, with tensors that have shapes but no memory.

    Whether it can be cut is not asked: what loads a model knows how it was cut. torch's random numbers go on as if
    nothing had been initialised.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return _create(arguments["name"], {key: value for key, value in arguments.items() if key != "name"})
