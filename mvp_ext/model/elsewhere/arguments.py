"""What a file may say of how a model of others is built, and what says it of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mvp_ext.model.elsewhere.adapter import registered
from mvp_ext.model.elsewhere.transformers_models import CLASSES, CONFIG
from mvp_ext.model.elsewhere.wrapped import WrappedModel
from mvp_ext.model.file_values import COMMON, word

PLACES = ("torchvision", "transformers", "own")


def is_elsewhere(name: Any) -> bool:
    """Whether a model's name says that it is none of timm's."""
    return isinstance(name, str) and name.partition(":")[0] in PLACES and ":" in name


def check_elsewhere(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``create_elsewhere`` that a file says, if it may say all of them.

    Raises:
        ValueError: names the first that it may not, or whose value is of another kind or out of its range.
    """
    place, _, which = arguments["name"].partition(":")
    known = which in CLASSES if place == "transformers" else word(which) and which != ""
    allowed = {**COMMON, "name": lambda _: known}
    if place == "transformers":
        allowed |= {"config": lambda value: isinstance(value, Mapping)}
    for name, value in arguments.items():
        if name not in allowed:
            raise ValueError(f"argument {name!r} of a model is none that a file may set")
        if not allowed[name](value):
            raise ValueError(f"argument {name!r} of a model: {value!r} is not a value that a file may set")
    for name, value in arguments.get("config", {}).items():
        if name not in CONFIG:
            raise ValueError(f"argument 'config' of a model: {name!r} is none that a file may set")
        if not CONFIG[name](value):
            raise ValueError(
                f"argument 'config' of a model: {name}: {value!r} is not a value that a file may set"
            )
    return dict(arguments)


def arguments_of(model: WrappedModel) -> dict[str, Any]:
    """The arguments of ``create_elsewhere`` that give the dense model, with the head as it is now.

    Raises:
        ValueError: nothing says how the model is built again, or it has a value that a file may not set.
    """
    name = model.architecture
    if name is None:
        raise ValueError(
            f"save: {type(model.model).__name__}: nothing says how it is built again: give Backbone.wrap an Adapter "
            "with a name and build, and register it (register_backbone)"
        )
    if name.startswith("own:"):
        registered(name.partition(":")[2])
    arguments = {"name": name, "num_classes": model.num_classes, "in_chans": model.in_chans}
    if model.config:
        arguments["config"] = dict(model.config)
    if name.startswith("torchvision:") and not model.adapter.any_size:
        arguments["img_size"] = model.adapter.preprocessing.size
    try:
        return check_elsewhere(arguments)
    except ValueError as error:
        raise ValueError(f"save: the model cannot be described in a file: {error}") from error
