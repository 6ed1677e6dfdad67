"""Vision models of Hugging Face's transformers: from a folder, or of a class and a few values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from mvp_ext.model.elsewhere.adapter import Adapter
from mvp_ext.model.elsewhere.wrapped import WrappedModel
from mvp_ext.model.file_values import (
    COUNT,
    RATE,
    SIDE,
    SIDES,
    Fits,
    flag,
    integer,
    number,
    several,
)
from mvp_ext.model.preprocessing import Preprocessing

# Class → mean and std of the images that its published weights were trained on.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
CLASSES: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "ViTModel": _HALF,
    "Dinov2Model": _IMAGENET,
    "Dinov2WithRegistersModel": _IMAGENET,
    "CLIPVisionModel": _CLIP,
    "SiglipVisionModel": _HALF,
    "SwinModel": _IMAGENET,
    "ConvNextModel": _IMAGENET,
    "ResNetModel": _IMAGENET,
    "ViTForImageClassification": _HALF,
    "Dinov2ForImageClassification": _IMAGENET,
    "Dinov2WithRegistersForImageClassification": _IMAGENET,
    "SwinForImageClassification": _IMAGENET,
    "ConvNextForImageClassification": _IMAGENET,
    "ResNetForImageClassification": _IMAGENET,
}
# A folder's kind → the class of its image encoder.
_ENCODERS = {
    "vit": "ViTModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "clip": "CLIPVisionModel",
    "clip_vision_model": "CLIPVisionModel",
    "siglip": "SiglipVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "swin": "SwinModel",
    "convnext": "ConvNextModel",
    "resnet": "ResNetModel",
}
# Those that take images of any size.
_ANY_SIZE = ("Dinov2", "ConvNext", "ResNet")
_ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "swish")
_WIDTHS, _COUNTS = several(SIDE, range(1, 9)), several(COUNT, range(1, 9))
# The values of a configuration that a file may hold; all others are transformers' defaults.
CONFIG: dict[str, Fits] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "embedding_size", "projection_dim"), SIDE),
    "intermediate_size": integer(1, 4 * 16384),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_stages", "window_size"), COUNT),
    "num_register_tokens": integer(0, 1024),
    **dict.fromkeys(("depths", "num_heads"), _COUNTS),
    "hidden_sizes": _WIDTHS,
    **dict.fromkeys(("image_size", "patch_size"), SIDES),
    "mlp_ratio": number(0, 64),
    "hidden_act": lambda value: value in _ACTIVATIONS,
    "layer_type": lambda value: value in ("basic", "bottleneck"),
    "layer_norm_eps": RATE,
    **dict.fromkeys(("layerscale_value", "layer_scale_init_value"), number(0, 1)),
    # What acts in training alone.
    **dict.fromkeys(
        ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "drop_path_rate"), RATE
    ),
    **dict.fromkeys(
        (
            *("qkv_bias", "use_swiglu_ffn", "use_mask_token", "use_absolute_embeddings", "vision_use_head"),
            *("downsample_in_first_stage", "downsample_in_bottleneck"),
        ),
        flag,
    ),
}


def import_transformers() -> ModuleType:
    """transformers; ImportError with the remedy where it is not there."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"models of Hugging Face need transformers: pip install 'mvp_ext[hf]' ({error})"
        ) from error
    return transformers


def is_transformers(module: nn.Module) -> bool:
    return type(module).__module__.startswith("transformers.models.")


def build_transformers(
    name: str, config: Mapping[str, Any], *, in_chans: int = 3, num_classes: int = 0
) -> nn.Module:
    """A model of one of ``CLASSES``, with random weights.

    Args:
        name: of the class.
        config: values of its configuration, some of ``CONFIG``.
        in_chans: channels of an image.
        num_classes: outputs of a class that has a classifier.

    Raises:
        ImportError: transformers is not installed.
        ValueError: transformers builds no model of these values.
    """
    kind = getattr(import_transformers(), name)
    # A strict configuration has errors of its own kinds, and so have models of values that do not go together.
    try:
        described = kind.config_class(**config, num_channels=in_chans, num_labels=num_classes)
        return _made(kind, described).eval()
    except Exception as error:
        text = " ".join(str(error).split())
        raise ValueError(f"create_model: transformers builds no {name} of these values ({text})") from error


def wrap_transformers(module: nn.Module, seen: Preprocessing | None = None) -> WrappedModel:
    """A model of transformers as a backbone.

    Args:
        module: of one of ``CLASSES``; a ViTModel's pooler, which its classifier does not read, is left out.
        seen: how images become its input; default: as the published weights of its class have it.

    Raises:
        ValueError: of another class.
    """
    name = type(module).__name__
    if name not in CLASSES or type(module) is not getattr(import_transformers(), name):
        raise ValueError(
            f"Backbone: expected a class of transformers that is known here ({', '.join(CLASSES)}), got {name}; "
            "others go with an adapter: Backbone.wrap(model, adapter=Adapter(…))"
        )
    described: Any = module.config
    values: dict[str, Any] = described.to_dict()
    # As a file has them.
    config = {
        key: list(value) if isinstance(value := values[key], tuple) else value
        for key in CONFIG
        if values.get(key) is not None
    }
    size = values.get("image_size") or 224
    if seen is None:
        seen = Preprocessing(int(size if isinstance(size, int) else size[0]), *CLASSES[name])
    heads = [path for path, part in module.named_modules() if isinstance(part, nn.Linear)]
    is_classifier = name.endswith("ForImageClassification")
    head = heads[-1] if is_classifier and heads[-1].startswith("classifier") else None
    features = _outputs if is_classifier else _class_token if name == "ViTModel" else _pooled
    adapter = Adapter(seen, head, features, any_size=name.startswith(_ANY_SIZE))
    wrapped = WrappedModel(module, adapter, f"transformers:{name}", config)
    if name == "ViTModel":
        wrapped.model._modules["pooler"] = None
    return wrapped


def load_folder(folder: Path) -> tuple[WrappedModel, tuple[str, ...]]:
    """The image encoder (or classifier) in a folder of transformers' format, and the names of its classes.

    Only safetensors and JSON files of the folder are read. Its configuration picks one of ``CLASSES``, and sets values
    of ``CONFIG``: no code of the folder, or of the network, runs.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: there is no such folder, or a file is missing in it.
        ValueError: a model of another kind, a configuration that is not understood, or weights that are not whole.
    """
    transformers = import_transformers()
    described = _json(folder / "config.json")
    name = next((n for n in described.get("architectures") or () if n in CLASSES), None)
    name = name or _ENCODERS.get(str(described.get("model_type")))
    if name is None:
        raise ValueError(
            f"{folder}: expected a model of kind {', '.join(_ENCODERS)}, got {described.get('model_type')!r}"
        )
    if not any((folder / f"model.safetensors{end}").is_file() for end in ("", ".index.json")):
        raise FileNotFoundError(f"{folder}: expected its weights as model.safetensors, and there are none")
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder}: expected whole weights, got an adapter of some: merge them first")
    # That of its image encoder, where it describes one of texts, too.
    own = described.get("vision_config") or described
    config = {key: own[key] for key in CONFIG if own.get(key) is not None}
    for key, value in config.items():
        if not CONFIG[key](value):
            raise ValueError(f"{folder}: config.json: {key}: {value!r} is not a value that can be set here")
    classes, outputs = _classes(folder, described) if name.endswith("ForImageClassification") else ((), 0)
    kind = getattr(transformers, name)
    options: dict[str, Any] = {"add_pooling_layer": False} if name == "ViTModel" else {}
    try:
        module, report = kind.from_pretrained(
            str(folder),
            config=kind.config_class(**config, num_channels=own.get("num_channels", 3), num_labels=outputs),
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            **options,
        )
    except Exception as error:
        raise ValueError(f"{folder}: not a {name}: {' '.join(str(error).split())}") from error
    if missing := sorted((*report["missing_keys"], *map(str, report.get("mismatched_keys", ())))):
        raise ValueError(f"{folder}: its weights are not whole: {missing[0]} is missing, or of another shape")
    return wrap_transformers(module.eval(), _seen(folder, name, config)), classes


def _classes(folder: Path, described: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    """Names of a classifier's outputs, and how many they are; without names, transformers has two."""
    labels = described.get("id2label")
    if labels is None:
        return (), 2
    if not isinstance(labels, Mapping) or sorted(labels) != sorted(map(str, range(len(labels)))):
        raise ValueError(
            f"{folder}: config.json: id2label: expected a name for each of 0, 1, …, got {labels!r}"
        )
    return tuple(str(labels[str(number)]) for number in range(len(labels))), len(labels)


def _made(kind: Any, described: Any) -> nn.Module:
    if kind.__name__ == "ViTModel":
        return kind(described, add_pooling_layer=False)
    return kind(described)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def _seen(folder: Path, name: str, config: Mapping[str, Any]) -> Preprocessing:
    """As the folder's preprocessor_config.json says; what it does not say, as the published weights have it."""
    path = folder / "preprocessor_config.json"
    said = _json(path) if path.is_file() else {}
    mean, std = (
        said.get(key) or usual for key, usual in zip(("image_mean", "image_std"), CLASSES[name], strict=True)
    )
    # A model that is built for one size takes no other.
    sizes = [config.get("image_size"), said.get("crop_size"), said.get("size"), 224]
    if name.startswith(_ANY_SIZE):
        sizes = [*sizes[1:3], sizes[0], 224]
    try:
        return Preprocessing(next(filter(None, map(_side, sizes))), tuple(mean), tuple(std))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a description of preprocessing ({error})") from error


def _side(size: Any) -> int | None:
    """Of the images that a size of a folder's JSON files means; None where it says none."""
    if isinstance(size, Mapping):
        size = size.get("height") or size.get("shortest_edge")
    if isinstance(size, (list, tuple)) and size:
        size = size[0]
    return size if isinstance(size, int) else None


def _outputs(module: nn.Module, images: Tensor) -> Tensor:
    """Of a classifier without its last layer."""
    return module(pixel_values=images).logits


def _class_token(module: nn.Module, images: Tensor) -> Tensor:
    return module(pixel_values=images).last_hidden_state[:, 0]


def _pooled(module: nn.Module, images: Tensor) -> Tensor:
    """What a model pools to; the mean of its tokens where it does not pool."""
    out = module(pixel_values=images)
    if out.pooler_output is None:
        return out.last_hidden_state.mean(1)
    return out.pooler_output.flatten(1)
