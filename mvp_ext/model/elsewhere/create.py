"""From the name of a model of others, or a module of them, to a backbone's model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from mvp_ext.model.elsewhere.adapter import Adapter, registered
from mvp_ext.model.elsewhere.torchvision_models import build_torchvision, is_torchvision, wrap_torchvision
from mvp_ext.model.elsewhere.transformers_models import (
    build_transformers,
    is_transformers,
    wrap_transformers,
)
from mvp_ext.model.elsewhere.wrapped import WrappedModel


def create_elsewhere(
    name: str,
    *,
    num_classes: int | None = None,
    img_size: int | None = None,
    in_chans: int = 3,
    pretrained: bool = False,
    config: Mapping[str, Any] | None = None,
) -> WrappedModel:
    """A model by its name: ``torchvision:NAME``, ``transformers:CLASS`` or ``own:NAME``.

    Args:
        name, num_classes, img_size, in_chans, pretrained: as of ``create_model``.
        config: values of a class of transformers.

    Raises:
        ValueError: there is no such model, or none of these arguments. ImportError: transformers is not installed.
        RuntimeError: the pretrained weights cannot be had.
    """
    place, _, which = name.partition(":")
    if place == "torchvision":
        model = _torchvision(which, img_size, pretrained)
    elif pretrained:
        raise ValueError(f"create_model: {name}: expected no pretrained weights of its name, got pretrained")
    elif place == "transformers":
        built = build_transformers(which, config or {}, in_chans=in_chans, num_classes=num_classes or 0)
        model = wrap_transformers(built)
    else:
        adapter = registered(which)
        assert adapter.build is not None
        model = wrap(adapter.build().eval(), adapter)
    if model.in_chans != in_chans:
        raise ValueError(f"create_model: {name}: in_chans: expected {model.in_chans}, got {in_chans}")
    if num_classes is not None and num_classes != model.num_classes:
        model.reset_classifier(num_classes)
    return model


def wrap(module: nn.Module, adapter: Adapter | None = None) -> WrappedModel:
    """A backbone's model around a module of others, which is not changed.

    Args:
        adapter: of a module that is neither torchvision's nor one of the classes of transformers that are known here.

    Raises:
        TypeError: nothing says how the module is used.
        ValueError: the adapter does not fit the module.
    """
    if adapter is not None:
        return WrappedModel(module, adapter, None if adapter.name is None else f"own:{adapter.name}")
    if is_torchvision(module):
        return wrap_torchvision(module, None)
    if is_transformers(module):
        return wrap_transformers(module)
    raise TypeError(
        f"Backbone: expected a timm model (with forward_features and forward_head), one of torchvision or "
        f"transformers, or an adapter beside the model, got {type(module).__name__}"
    )


def _torchvision(name: str, img_size: int | None, pretrained: bool) -> WrappedModel:
    options = {"weights": "DEFAULT"} if pretrained else {}
    try:
        return wrap_torchvision(build_torchvision(name, img_size=img_size, **options), name)
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise RuntimeError(
            f"create_model: the pretrained weights of 'torchvision:{name}' could not be had: they come from the "
            "network, or its cache; give weights in a local file instead (--weights), or none "
            f"({type(error).__name__}: {error})"
        ) from error
