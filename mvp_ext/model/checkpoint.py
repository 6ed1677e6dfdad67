"""Pruned models as files: one safetensors file that says by itself how to build the model that its tensors fit.

Its description (JSON, in the header) holds timm's model name and arguments, the dense model's structure, and per
layer the indices of the units that stayed. Loading builds the dense model without memory for its weights, cuts it to
the same shapes, and gives it the file's tensors: every one and no other. No pickle is read or written.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mvp_ext import storage
from mvp_ext._version import __version__
from mvp_ext.model.create import create_model
from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.structure import Structure
from mvp_ext.model.surgery import prune_model
from mvp_ext.storage import FileFormatError
from mvp_ext.timm_compat import import_timm

_FORMAT = "mvp_ext.pruned_model"
_VERSION = 1


@dataclass(frozen=True)
class PrunedState:
    """What a file of a pruned model holds, before any model is built.

    Attributes:
        state: the pruned model's state dict, on the CPU.
        mask: of the dense model it came from.
        structure: of the dense model.
        extra: as ``save_pruned`` was given it; JSON values, and tensors on the CPU.
        create_args: arguments of ``create_model`` that give the dense model.
        versions: of what wrote the file.
    """

    state: dict[str, Tensor]
    mask: Mask
    structure: Structure
    extra: dict[str, Any]
    create_args: dict[str, Any] = field(repr=False)
    versions: dict[str, str] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """The pruned model, in eval mode.

        Raises:
            ValueError: this timm builds another model from the arguments, or the tensors do not fit it.
        """
        model = _build_empty(self.create_args, self.structure, self.mask)
        # The parameters take the file's tensors as they are (dtype too), so nothing is initialised in vain.
        try:
            model.load_state_dict(self.state, strict=True, assign=True)
        except RuntimeError as error:
            raise ValueError(
                f"the tensors do not fit the model that the description says ({error})"
            ) from error
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_meta:
                raise ValueError(
                    f"buffer {name!r} is not in the file, and this model cannot be built without it"
                )
        return model.eval()


@dataclass(frozen=True)
class PrunedCheckpoint:
    """A pruned model with what it came from.

    Attributes:
        model: in eval mode.
        mask: of the dense model: which of its units stayed.
        structure: of the dense model.
        extra: as ``save_pruned`` was given it.
    """

    model: nn.Module
    mask: Mask
    structure: Structure
    extra: dict[str, Any]


def save_pruned(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    mask: Mask,
    structure: Structure,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a pruned model to one file, whole or not at all.

    Args:
        model: a timm model from ``create_model`` (or ``timm.create_model``), pruned.
        path: of the file; its folder must exist.
        mask: of the dense model (composed, if it was pruned more than once).
        structure: of the dense model.
        extra: name → JSON value or tensor, given back by ``load_pruned``.

    Raises:
        ValueError: the model could not be built again from what would be written: it is not timm's, has parts of its
            own, or is not what ``mask`` leaves. Nothing is written then.
        TypeError: a value of ``extra`` is neither JSON nor a tensor.
        OSError: the file could not be written; what was at ``path`` is untouched.
    """
    extra = dict(extra or {})
    arguments = create_args(model, structure)
    state = model.state_dict()
    _check_rebuildable(state, arguments, structure, mask)
    tensors = {f"model/{name}": tensor for name, tensor in state.items()}
    tensors |= {f"extra/{name}": value for name, value in extra.items() if isinstance(value, Tensor)}
    spec = {
        "recipe": arguments,
        "structure": structure.to_dict(),
        "kept": {name: units.tolist() for name, units in mask.indices.items()},
        "extra": {name: value for name, value in extra.items() if not isinstance(value, Tensor)},
        "versions": {
            "mvp_ext": __version__,
            "torch": torch.__version__,
            "timm": import_timm().__version__,
        },
    }
    storage.write_atomic(path, storage.to_bytes(tensors, spec, kind=_FORMAT, version=_VERSION))


def read_pruned(path: str | os.PathLike[str]) -> PrunedState:
    """Read a file of ``save_pruned`` without building its model.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: (a ValueError) it is damaged, truncated, of another kind, or from a newer version.
    """
    return parse_pruned(Path(path).read_bytes(), source=os.fspath(path))


def parse_pruned(data: bytes, *, source: str = "these bytes") -> PrunedState:
    """What ``read_pruned`` does, from a file's bytes; FileFormatError names ``source``."""
    tensors, spec = storage.from_bytes(data, kind=_FORMAT, version=_VERSION, source=source)
    try:
        structure = Structure.from_dict(spec["structure"])
        layers = {}
        for layer in structure:
            layers[layer.name] = torch.zeros(layer.units, dtype=torch.bool)
            layers[layer.name][torch.tensor(spec["kept"][layer.name], dtype=torch.int64)] = True
        extra = dict(spec["extra"])
        extra |= {n.removeprefix("extra/"): t for n, t in tensors.items() if n.startswith("extra/")}
        state = {n.removeprefix("model/"): t for n, t in tensors.items() if n.startswith("model/")}
        return PrunedState(state, Mask(layers), structure, extra, spec["recipe"], spec["versions"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise FileFormatError(f"{source}: its description is damaged ({error})") from error


def read_extra(path: str | os.PathLike[str], names: Sequence[str]) -> dict[str, Tensor]:
    """Those of a file's extra tensors that it has, without reading the others, and so without its checksum.

    Raises:
        FileNotFoundError: there is no such file. FileFormatError: it is no safetensors file, or truncated.
    """
    try:
        with safe_open(path, "pt") as file:
            known = set(file.keys())
            return {n: file.get_tensor(f"extra/{n}") for n in names if f"extra/{n}" in known}
    except SafetensorError as error:
        raise FileFormatError(f"{os.fspath(path)}: damaged, or no safetensors file ({error})") from error


def load_pruned(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> PrunedCheckpoint:
    """Read a file of ``save_pruned``; its model computes exactly what the saved one did.

    Args:
        path: of the file.
        device: where the model goes.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: (a ValueError) it is damaged, truncated, of another kind or from a newer version, or this
            timm builds another model than the one that was saved.
    """
    stored = read_pruned(path)
    try:
        model = stored.build()
    except ValueError as error:
        raise FileFormatError(f"{os.fspath(path)}: {error}") from error
    return PrunedCheckpoint(model.to(device), stored.mask, stored.structure, stored.extra)


def create_args(model: Any, structure: Structure) -> dict[str, Any]:
    """The arguments of create_model that give the dense model, as it is now (the head may have been replaced)."""
    if structure.architecture is None:
        raise ValueError(
            f"save_pruned: {type(model).__name__} does not say which timm model it is (pretrained_cfg)"
        )
    kwargs = {k: v for k, v in getattr(model, "_model_args", {}).items() if not k.startswith("pretrained")}
    for name, value in kwargs.items():
        if not _is_json(value):
            raise ValueError(
                f"save_pruned: the model was created with {name}={value!r}, which cannot be written as JSON"
            )
    head = model.get_classifier()
    # A distilled DeiT has two heads, alike.
    head = head[0] if isinstance(head, tuple) else head
    kwargs["num_classes"] = head.out_features if isinstance(head, nn.Linear) else 0
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    kwargs["in_chans"] = first.in_channels
    if hasattr(model, "patch_embed"):
        kwargs["img_size"] = list(model.patch_embed.img_size)
    return {"name": structure.architecture, **kwargs}


def _is_json(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_json(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _build_empty(arguments: Mapping[str, Any], structure: Structure, mask: Mask) -> nn.Module:
    """The pruned model's modules with tensors that have shapes but no memory."""
    with torch.device("meta"):
        dense = create_model(**arguments)
    found = find_structure(dense, structure.scope)
    if found.fingerprint != structure.fingerprint:
        raise ValueError(
            f"timm {import_timm().__version__} builds {arguments['name']!r} with another structure "
            f"({_first_difference(structure, found)})"
        )
    return prune_model(dense, mask, structure=found)


def _first_difference(wanted: Structure, found: Structure) -> str:
    for a, b in zip(wanted, found, strict=False):
        if (a.name, a.kind, a.units) != (b.name, b.kind, b.units):
            return f"expected {a.name} with {a.units} units, got {b.name} with {b.units}"
    return f"expected {len(wanted)} layers in scope {wanted.scope!r}, got {len(found)} in {found.scope!r}"


def _check_rebuildable(
    state: Mapping[str, Tensor], arguments: Mapping[str, Any], structure: Structure, mask: Mask
) -> None:
    """A file that could not be loaded again must not be written: build its model now, without memory, and compare."""
    built = _build_empty(arguments, structure, mask).state_dict()
    if surplus := state.keys() ^ built.keys():
        name = min(surplus)
        side = "is not in timm's" if name in state else "of timm's is missing in the"
        raise ValueError(
            f"save_pruned: tensor {name!r} {side} model {arguments['name']!r}: it could not be loaded again"
        )
    for name, tensor in state.items():
        if tensor.shape != built[name].shape:
            raise ValueError(
                f"save_pruned: {name}: the mask leaves shape {tuple(built[name].shape)}, "
                f"the model has {tuple(tensor.shape)}"
            )
