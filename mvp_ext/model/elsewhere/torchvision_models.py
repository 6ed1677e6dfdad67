"""torchvision's classification models."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mvp_ext.model.elsewhere.adapter import Adapter
from mvp_ext.model.elsewhere.wrapped import WrappedModel
from mvp_ext.model.preprocessing import Preprocessing
from mvp_ext.timm_compat import import_timm

# Their outputs while they train are of two classifiers.
_NOT = ("googlenet", "inception_v3")


def names() -> list[str]:
    """Of the models that torchvision can build for classification."""
    models = _models()
    return [name for name in models.list_models(module=models) if name not in _NOT]


def build_torchvision(name: str, *, img_size: int | None = None, **options: Any) -> nn.Module:
    """torchvision's model of this name.

    Args:
        name: as torchvision lists it.
        img_size: of a model that is built for one size of images; others ignore it.
        options: of torchvision's builder.

    Raises:
        ValueError: torchvision has no such model, or cannot build it for images of this size.
    """
    if name not in names():
        raise ValueError(f"create_model: torchvision has no classification model named {name!r}")
    builder = _models().get_model_builder(name)
    # The only one that can be told.
    if img_size is not None and builder.__module__.endswith(".vision_transformer"):
        options["image_size"] = img_size
    try:
        return builder(**options).eval()
    except (ValueError, AssertionError) as error:
        text = " ".join(str(error).split()) or str(options)
        raise ValueError(
            f"create_model: torchvision builds no {name!r} of these arguments ({text})"
        ) from error


def wrap_torchvision(module: nn.Module, name: str | None) -> WrappedModel:
    """A model of torchvision's as a backbone.

    Args:
        module: of a class of ``torchvision.models``.
        name: as torchvision lists it; None: it is looked for among the models of its kind.

    Raises:
        ValueError: it has no linear classifier.
    """
    name = name or _name_of(module)
    head = head_of(module)
    if head is None:
        raise ValueError(f"Backbone: {type(module).__name__}: expected a linear classifier, got none")
    built = _built_size(module)
    seen = _preprocessing(name, built)
    adapter = Adapter(seen, head, any_size=built is None)
    return WrappedModel(module, adapter, None if name is None else f"torchvision:{name}")


def head_of(module: nn.Module) -> str | None:
    """Path of a model's classifier: the last linear layer."""
    paths = [path for path, part in module.named_modules() if isinstance(part, nn.Linear)]
    return paths[-1] if paths else None


def is_torchvision(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torchvision.models.")


def _models() -> Any:
    # What lets torchvision be imported beside any build of torch.
    import_timm()
    from torchvision import models

    return models


def _built_size(module: nn.Module) -> int | None:
    """Side of the images that a model was built for; None where it takes others, too."""
    models = _models()
    if isinstance(module, models.VisionTransformer):
        return int(module.image_size)
    if isinstance(module, models.MaxVit):
        return 224
    return None


def _preprocessing(name: str | None, built: int | None) -> Preprocessing:
    """As torchvision's own weights see images; ImageNet's usual numbers where there is no name."""
    if name is None:
        return Preprocessing(built or 224)
    seen = _models().get_model_weights(name).DEFAULT.transforms()
    return Preprocessing(built or int(seen.crop_size[0]), tuple(seen.mean), tuple(seen.std))


def _name_of(module: nn.Module) -> str | None:
    """The model whose tensors have the names and shapes of this one's, but for the classifier; None: there is none."""
    models, head = _models(), f"{head_of(module)}."
    shapes = {n: t.shape for n, t in module.state_dict().items() if not n.startswith(head)}
    for name in names():
        if models.get_model_builder(name).__module__ != type(module).__module__:
            continue
        try:
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                other = build_torchvision(name, img_size=_built_size(module))
        # Not of this size.
        except ValueError:
            continue
        state = other.state_dict().items()
        if {n: t.shape for n, t in state if not n.startswith(head)} == shapes:
            return name
    return None
