"""Pruned models as files: one safetensors file that says by itself how to build the model that its tensors fit.

Its description (JSON, in the header) holds timm's model name and arguments, the dense model's structure, per layer the
indices of the units that stayed, and the model's card: how it sees images, what its outputs mean, how good it is.
Loading builds the dense model without memory for its weights, cuts it to the same shapes, and gives it the file's
tensors: every one and no other. No pickle is read or written, and no file says more of a model than ``create_args``.
"""

from __future__ import annotations

import json
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
from mvp_ext.model.borrowed import borrowed, unwrapped
from mvp_ext.model.card import ModelCard
from mvp_ext.model.create import create_empty
from mvp_ext.model.create_args import check_args, create_args
from mvp_ext.model.ends import as_input, built_for
from mvp_ext.model.fidelity import TRIED_SIZES, difference
from mvp_ext.model.mask import Mask
from mvp_ext.model.prediction import PREDICT_BATCH, Predictions, predict
from mvp_ext.model.preprocessing import Preprocessing
from mvp_ext.model.structure import Structure, UnsupportedModelError
from mvp_ext.model.surgery import prune_model
from mvp_ext.storage import FileFormatError
from mvp_ext.timm_compat import import_timm

_FORMAT = "mvp_ext.pruned_model"
# 2: with a card. 3: layers say which attributes follow and which modules are taken over.
_VERSION = 3
# More than any layer has: what a file says must not take all memory.
_MOST_UNITS = 1_000_000


@dataclass(frozen=True)
class PrunedState:
    """What a file of a pruned model holds, before any model is built.

    Attributes:
        state: the pruned model's tensors, on the CPU (``whole_state``).
        mask: of the dense model it came from.
        structure: of the dense model.
        card: what the file says of the model beside its weights.
        extra: as ``save_pruned`` was given it; JSON values, and tensors on the CPU.
        create_args: arguments of ``create_model`` that give the dense model.
        versions: of what wrote the file.
    """

    state: dict[str, Tensor]
    mask: Mask
    structure: Structure
    card: ModelCard
    extra: dict[str, Any]
    create_args: dict[str, Any] = field(repr=False)
    versions: dict[str, str] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """The pruned model, in eval mode.

        Raises:
            ValueError: this timm builds another model from the arguments, or the tensors do not fit it.
        """
        model = _build_empty(self.create_args, self.structure, self.mask)
        fill(model, self.state)
        if self.card.preprocessing is not None:
            self.card.preprocessing.declare(model, self.card.class_names)
        return model.eval()

    def checkpoint(self, model: nn.Module) -> PrunedCheckpoint:
        """What was built of this, with what it came from."""
        return PrunedCheckpoint(model, self.mask, self.structure, self.extra, self.card)


@dataclass(frozen=True)
class PrunedCheckpoint:
    """A pruned model with what it came from.

    Attributes:
        model: in eval mode. Its ``pretrained_cfg`` says how it sees images, where the card does.
        mask: of the dense model: which of its units stayed.
        structure: of the dense model.
        extra: as ``save_pruned`` was given it.
        card: how the model sees images, what its outputs mean, how good it is and how it was made.
    """

    model: nn.Module
    mask: Mask
    structure: Structure
    extra: dict[str, Any] = field(default_factory=dict)
    card: ModelCard = field(default_factory=ModelCard)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the outputs, in their order; empty where nobody said."""
        return self.card.class_names

    def transform(self) -> Preprocessing:
        """What makes an image (a path, a Pillow image, uint8 [H, W, 3]) the model's input, float32 [3, S, S].

        Raises:
            ValueError: nobody said how the model sees images.
        """
        return self.card.need_preprocessing("transform")

    def predict(self, images: Any, *, batch: int = PREDICT_BATCH) -> Predictions:
        """Class names with probabilities.

        Args:
            images: one image, or a sequence of them: paths, Pillow images, uint8 arrays [H, W(, 3)]; or a tensor uint8
                [n, H, W, 3].
            batch: images a pass.

        Raises:
            ValueError: nobody said how the model sees images, or an image is of another kind. OSError: no image.
        """
        with borrowed(self.model, compiled=True) as model:
            return predict(lambda x: model(as_input(model, x)), images, self.card, batch=batch)


def save_pruned(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    mask: Mask,
    structure: Structure,
    card: ModelCard | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a pruned model to one file, whole or not at all.

    What the file says is built, run and compared with the model first: what ``load_pruned`` gives back computes the
    same in eval mode. (Rates of dropout and momenta, which act in training alone, are those of timm's arguments.)

    Args:
        model: a timm model from ``create_model`` (or ``timm.create_model``), pruned.
        path: of the file; its folder must exist.
        mask: of the dense model (composed, if it was pruned more than once).
        structure: of the dense model.
        card: what the file says of the model beside its weights; without one it cannot ``predict``.
        extra: name → JSON value or tensor, given back by ``load_pruned``.

    Raises:
        ValueError: the model could not be built again from what would be written: it is not timm's, has parts of its
            own or a part that was changed (named), is not what ``mask`` leaves, or has weights that are not finite.
            Nothing is written then.
        TypeError: a value of ``extra`` is neither JSON nor a tensor, or a tensor without plain memory (sparse, meta).
        OSError: the file could not be written; what was at ``path`` is untouched.
    """
    described = describe(model, mask=mask, structure=structure, card=card, extra=extra)
    extra = described.extra
    for name, value in extra.items():
        try:
            json.dumps(None if isinstance(value, Tensor) else value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"save_pruned: extra: {name!r}: expected a tensor or JSON values ({error})") from error
    tensors = {f"model/{name}": tensor for name, tensor in described.state.items()}
    tensors |= {f"extra/{name}": value for name, value in extra.items() if isinstance(value, Tensor)}
    spec = {
        "recipe": described.create_args,
        **cut_to_dict(structure, mask),
        "card": described.card.to_dict(),
        "extra": {name: value for name, value in extra.items() if not isinstance(value, Tensor)},
        "versions": described.versions,
    }
    storage.write(path, tensors, spec, kind=_FORMAT, version=_VERSION)


def describe(
    model: nn.Module,
    *,
    mask: Mask,
    structure: Structure,
    card: ModelCard | None = None,
    extra: Mapping[str, Any] | None = None,
) -> PrunedState:
    """What a file of ``save_pruned``, whose arguments these are, would hold; ValueError as there."""
    model, card = unwrapped(model), card or ModelCard()
    arguments = create_args(model, structure)
    _check_rebuildable(model, arguments, structure, mask, card)
    versions = {"mvp_ext": __version__, "torch": torch.__version__, "timm": import_timm().__version__}
    return PrunedState(whole_state(model), mask, structure, card, dict(extra or {}), arguments, versions)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, and the buffers that it leaves out: tables of positions and the like, made with the model."""
    state = model.state_dict()
    made = {n: b for n, b in model.named_buffers(remove_duplicate=False) if n not in state}
    # One that several parts share is each one's own in a file.
    return {**state, **{name: buffer.detach().clone() for name, buffer in made.items()}}


def fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a model the tensors of another's ``whole_state``, as they are: type, memory and all.

    Args:
        model: may have tensors without memory; those of ``state`` take their places, so nothing is initialised in vain.
        state: name → tensor; all of the model's, but for buffers that were made with it.

    Raises:
        ValueError: a tensor is missing, is none of the model's, or is in its state dict with another shape.
    """
    saved = model.state_dict().keys()
    buffers = {n: b for n, b in model.named_buffers(remove_duplicate=False) if n not in saved}
    try:
        model.load_state_dict({n: t for n, t in state.items() if n not in buffers}, strict=True, assign=True)
    except RuntimeError as error:
        text = " ".join(str(error).split())
        raise ValueError(f"the tensors do not fit the model that the description says ({text})") from error
    for name, buffer in buffers.items():
        if name not in state:
            if buffer.is_meta:
                raise ValueError(
                    f"buffer {name!r} is not in the file, and this model cannot be built without it"
                )
            continue
        # Of any shape: some models make theirs anew for the images that they get.
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = state[name]


def cut_to_dict(structure: Structure, mask: Mask) -> dict[str, Any]:
    """The dense model's structure and the units that stayed, as JSON values of a file's description."""
    return {
        "structure": structure.to_dict(),
        "kept": {name: units.tolist() for name, units in mask.indices.items()},
    }


def cut_from_dict(spec: Mapping[str, Any]) -> tuple[Structure, Mask]:
    """The inverse of ``cut_to_dict``; KeyError, TypeError, ValueError or IndexError where the values are others."""
    structure = Structure.from_dict(spec["structure"])
    layers = {}
    for layer in structure:
        if not isinstance(layer.units, int) or not 0 < layer.units <= _MOST_UNITS:
            raise ValueError(f"layer {layer.name!r}: expected 1 to {_MOST_UNITS} units, got {layer.units!r}")
        layers[layer.name] = torch.zeros(layer.units, dtype=torch.bool)
        layers[layer.name][torch.tensor(spec["kept"][layer.name], dtype=torch.int64)] = True
    return structure, Mask(layers)


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
        structure, mask = cut_from_dict(spec)
        extra = dict(spec["extra"])
        extra |= {n.removeprefix("extra/"): t for n, t in tensors.items() if n.startswith("extra/")}
        state = {n.removeprefix("model/"): t for n, t in tensors.items() if n.startswith("model/")}
        card = ModelCard.from_dict(spec["card"]) if "card" in spec else _card_of_version_1(extra)
        recipe = check_args(spec["recipe"])
        return PrunedState(state, mask, structure, card, extra, recipe, spec["versions"])
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise FileFormatError(f"{source}: its description is damaged ({error})") from error


def _card_of_version_1(extra: Mapping[str, Any]) -> ModelCard:
    """Files of version 1 kept what a card says among their extra values, where ``Result.save`` wrote them."""
    if "preprocessing" not in extra or "result" not in extra:
        return ModelCard()
    result = extra["result"]
    return ModelCard(
        Preprocessing.from_dict(extra["preprocessing"]),
        tuple(extra.get("class_names", ())),
        result.get("task"),
        {"accuracy": result["accuracy"]},
        {name: value for name, value in result.items() if name not in ("task", "accuracy")},
    )


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
    return stored.checkpoint(model.to(device))


def _build_empty(arguments: Mapping[str, Any], structure: Structure, mask: Mask) -> nn.Module:
    """The pruned model's modules with tensors that have shapes but no memory."""
    dense = create_empty(arguments)
    try:
        # The stored one, not what the rules of today would find: those grow.
        return prune_model(dense, mask, structure=structure)
    except UnsupportedModelError as error:
        raise ValueError(
            f"timm {import_timm().__version__} builds {arguments['name']!r} with another structure ({error})"
        ) from error


def _check_rebuildable(
    model: nn.Module, arguments: Mapping[str, Any], structure: Structure, mask: Mask, card: ModelCard
) -> None:
    """A file that could not be loaded again, or as another function, must not be written: build and compare it."""
    state = whole_state(model)
    built = _build_empty(arguments, structure, mask)
    empty, cut = whole_state(built), built.state_dict().keys()
    if surplus := state.keys() ^ empty.keys():
        name = min(surplus)
        side = "is not in timm's" if name in state else "of timm's is missing in the"
        raise ValueError(
            f"save_pruned: tensor {name!r} {side} model {arguments['name']!r}: it could not be loaded again"
        )
    for name, tensor in state.items():
        if name in cut and tensor.shape != empty[name].shape:
            raise ValueError(
                f"save_pruned: {name}: the mask leaves shape {tuple(empty[name].shape)}, "
                f"the model has {tuple(tensor.shape)}"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"save_pruned: {name}: expected finite numbers, got NaN or infinity")
    check_fidelity("save_pruned", model, built, arguments)
    if card.class_names and len(card.class_names) != arguments["num_classes"]:
        raise ValueError(
            f"save_pruned: card: expected a name for each of {arguments['num_classes']} outputs, got "
            f"{len(card.class_names)}"
        )
    if card.preprocessing is not None and arguments["in_chans"] != 3:
        raise ValueError(
            f"save_pruned: card: expected no preprocessing, which makes images of 3 channels: the model takes "
            f"{arguments['in_chans']}"
        )


def check_fidelity(what: str, model: nn.Module, built: nn.Module, arguments: Mapping[str, Any]) -> None:
    """ValueError where ``built``, given the tensors of ``model``, is another function; it names the part."""
    fill(built, whole_state(model))
    said = built_for(built)
    sizes = [said] if said else [(size, size) for size in TRIED_SIZES]
    if found := difference(model, built, arguments["in_chans"], sizes):
        raise ValueError(
            f"{what}: {found}: what would be loaded is another model than this one. Set it by an argument of "
            "timm.create_model that a file may hold, or put the part back"
        )
