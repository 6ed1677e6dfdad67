"""What a file may say of how its model is built: a few named values, each of a known kind and range.

Nothing else of a file reaches ``timm.create_model``, some of whose arguments load and run what they are given, nor
what builds models of others (``elsewhere``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mvp_ext.model.elsewhere.arguments import arguments_of, check_elsewhere, is_elsewhere
from mvp_ext.model.elsewhere.wrapped import WrappedModel
from mvp_ext.model.ends import built_for, classifiers, in_channels
from mvp_ext.model.file_values import (
    COMMON,
    COUNT,
    RATE,
    SIDE,
    SIDES,
    Fits,
    either,
    flag,
    integer,
    number,
    several,
    word,
)
from mvp_ext.model.structure import Structure

_ALLOWED: dict[str, Fits] = {
    **COMMON,
    "name": word,
    "global_pool": word,
    # Rates that act in training alone.
    **dict.fromkeys(
        (
            *("drop_rate", "drop_path_rate", "drop_block_rate", "proj_drop_rate", "attn_drop_rate"),
            *("pos_drop_rate", "patch_drop_rate"),
        ),
        RATE,
    ),
    # Of a transformer, or of each of its stages.
    "depth": COUNT,
    **dict.fromkeys(("depths", "stages"), several(COUNT, range(1, 9))),
    "num_heads": either(COUNT, several(COUNT, range(1, 9))),
    **dict.fromkeys(("embed_dim", "embed_dims"), either(SIDE, several(SIDE, range(1, 9)))),
    **dict.fromkeys(("patch_size", "window_size"), SIDES),
    "mlp_ratio": number(0, 64),
    "init_values": number(0, 1),
    "reg_tokens": integer(0, 1024),
    "pos_embed": word,
    "weight_init": word,
    # Of a ResNet.
    "layers": several(COUNT, range(1, 9)),
    "channels": several(SIDE, range(1, 9)),
    **dict.fromkeys(("cardinality", "base_width", "stem_width", "output_stride"), SIDE),
    "stem_type": word,
    **dict.fromkeys(
        (
            *("class_token", "no_embed_class", "pre_norm", "final_norm", "fc_norm", "qkv_bias", "qk_norm"),
            *("dynamic_img_size", "dynamic_img_pad", "strict_img_size", "replace_stem_pool", "avg_down"),
            *("zero_init_last", "distillation"),
        ),
        flag,
    ),
}


def check_args(arguments: Any) -> dict[str, Any]:
    """The arguments of ``create_model`` that a file says, if it may say all of them.

    Raises:
        ValueError: names the first that it may not, or whose value is of another kind or out of its range.
    """
    if not isinstance(arguments, Mapping) or "name" not in arguments:
        raise ValueError(f"expected the arguments of a model with its name, got {type(arguments).__name__}")
    if is_elsewhere(arguments["name"]):
        return check_elsewhere(arguments)
    for name, value in arguments.items():
        if name not in _ALLOWED:
            raise ValueError(f"argument {name!r} of a model is none that a file may set")
        if not _ALLOWED[name](value):
            raise ValueError(f"argument {name!r} of a model: {value!r} is not a value that a file may set")
    return dict(arguments)


def create_args(model: Any, structure: Structure) -> dict[str, Any]:
    """The arguments of ``create_model`` that give the dense model, as it is now (the head may have been replaced).

    Raises:
        ValueError: the model does not say which of timm's it is (or nothing says how one of others is built again), or
            has an argument that a file may not set.
    """
    if isinstance(model, WrappedModel):
        return arguments_of(model)
    if structure.architecture is None:
        raise ValueError(
            f"save_pruned: {type(model).__name__} does not say which timm model it is (pretrained_cfg)"
        )
    kwargs = {
        k: v
        for k, v in getattr(model, "_model_args", {}).items()
        if v is not None and not k.startswith("pretrained")
    }
    # Several are alike.
    kwargs["num_classes"] = next((len(head.weight) for head in classifiers(model)), 0)
    kwargs["in_chans"] = in_channels(model) or 3
    # As it is now; where this does not say it, the argument does.
    size = built_for(model)
    if size is not None and getattr(getattr(model, "patch_embed", None), "img_size", None) is not None:
        kwargs["img_size"] = list(size)
    arguments = {"name": structure.architecture, **kwargs}
    try:
        return check_args(arguments)
    except ValueError as error:
        raise ValueError(f"save_pruned: the model cannot be described in a file: {error}") from error
