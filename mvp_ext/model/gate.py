"""Whether a structure is exact: on noise, the cut model has to compute what the masked one computes.

A rule can be wrong where every shape fits: units that are paired in another order, a norm across them, a tensor that
it forgot. So the first structure of each class of models that is used on an installation is tried, in eval and in
train mode, on a copy whose weights are shaken: fresh models hide mistakes behind biases and gains of zero.

A class of models is what modules it has and which of their tensors are cut, without their sizes (``_class_of``). Those
that passed are kept in the user's cache. A module that no released package has may change from run to run: a class
with one is known to its process only.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mvp_ext.model.borrowed import borrowed
from mvp_ext.model.ends import as_input, built_for, dtype_of, in_channels
from mvp_ext.model.fidelity import TRIED_SIZES
from mvp_ext.model.mask import Mask
from mvp_ext.model.structure import Structure, UnitLayer, UnsupportedModelError
from mvp_ext.storage import user_cache

# In train mode a batch norm needs two values a channel, also where one place is left of an image.
_BATCH = 2
# Of the largest output: rounding is far below, and what one wrong layer does to a deep model may not be far above.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_LOW_PRECISION = 0.05
# Weights from which on a model is tried in its own type only.
_LARGE = 50_000_000
# Their classes and functions are those of their version.
_RELEASED = ("torch", "timm", "torchvision", "transformers", "mvp_ext")

# (model, structure, mask): changes the model.
Change = Callable[[nn.Module, Structure, Mask], object]


class Surgery(NamedTuple):
    """How units are removed: ``zero`` leaves the shapes, ``cut`` does not."""

    zero: Change
    cut: Change


class _Class(NamedTuple):
    """A class of models: its key, and what of it no released package has."""

    key: str
    own: frozenset[Any]


_known: set[_Class] = set()


def verify_once(structure: Structure, model: nn.Module, surgery: Surgery) -> None:
    """``verify``, unless a model of this class has passed on this installation, or this one has no memory (meta)."""
    if not _is_meta(model) and not _is_known(_class_of(structure, model)):
        verify(structure, model, surgery)


def verify(structure: Structure, model: nn.Module, surgery: Surgery, images: Tensor | None = None) -> None:
    """Compare masked and cut model: ``Structure.verify`` says how."""
    structure.check(model)
    if _is_meta(model):
        raise ValueError("Structure.verify: model: expected one that can run, got one on meta")
    if images is not None:
        images = as_input(model, images)
    mask = Mask.random(structure, 0.5, seed=0, align=1)
    trial = _Trial(structure, model, surgery, images)
    if (found := trial.difference(mask)) is not None:
        whole = Mask.full(structure).layers
        for layer in structure:
            alone = Mask({**whole, layer.name: mask.layers[layer.name]})
            if (of_layer := trial.difference(alone)) is not None:
                raise UnsupportedModelError(f"{layer.name}: {of_layer}")
        raise UnsupportedModelError(f"{', '.join(structure.names)}, together: {found}")
    _remember(_class_of(structure, model))


def _is_meta(model: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in itertools.chain(model.parameters(), model.buffers()))


class _Trial:
    """One model, on images that it takes, in a type of number that it computes in."""

    def __init__(
        self, structure: Structure, model: nn.Module, surgery: Surgery, images: Tensor | None
    ) -> None:
        self.structure, self.model, self.surgery = structure, model, surgery
        given = [images] if images is not None else list(_noise(model))
        # Not all models compute in float64, and of a large one the copy would be larger still. What is left of these
        # are those that work.
        large = sum(p.numel() for p in model.parameters()) > _LARGE
        dtypes = dict.fromkeys((dtype_of(model),) if large else (torch.float64, dtype_of(model)))
        self.inputs = [each.to(dtype) for dtype in dtypes for each in given]

    def difference(self, mask: Mask) -> str | None:
        """What is wrong with the model that ``mask`` cuts; None if nothing is."""
        model, expected = self.masked(mask)
        try:
            self.surgery.cut(model, self.structure, mask)
        except Exception as error:
            return f"it cannot be cut as its rule says ({_words(error)})"
        for training, outputs in expected.items():
            mode = "train" if training else "eval"
            try:
                got = self.run(model, training=training)
            except Exception as error:
                return f"in {mode} mode the cut model does not run ({_words(error)}): its rule is wrong"
            wrong = _unlike(got, outputs)
            if wrong is not None and not (training and self._is_random(mask)):
                return (
                    f"in {mode} mode expected the cut model to compute what the masked one does, got {wrong}: its rule "
                    "is wrong"
                )
        return None

    def masked(self, mask: Mask) -> tuple[nn.Module, dict[bool, list[Tensor]]]:
        """A masked copy of the model, and what it puts out in train mode (True), if it can, and in eval (False)."""
        failures = []
        for number, images in enumerate(self.inputs):
            model = self.twin(images.dtype)
            self.surgery.zero(model, self.structure, mask)
            # A pass in train mode moves the statistics, and some models keep what depends on the images' size.
            before = [
                (module, {name: None if b is None else b.clone() for name, b in module._buffers.items()})
                for module in model.modules()
            ]
            outputs = {}
            # Some models cannot be trained as they are: on one process, or without labels.
            with contextlib.suppress(Exception):
                outputs[True] = self.run(model, images, training=True)
            try:
                outputs[False] = self.run(model, images, training=False)
            except Exception as error:
                failures.append(error)
                continue
            for module, buffers in before:
                module._buffers.update(buffers)
            self.inputs = self.inputs[number:]
            return model, outputs
        raise UnsupportedModelError(
            f"{type(self.model).__name__}: expected a model that takes images {list(self.inputs[0].shape)}, so that "
            f"cutting it can be tried, got {_words(failures[0])}; show by structure.verify(model, images=…) that it is "
            "exact"
        ) from failures[0]

    def twin(self, dtype: torch.dtype) -> nn.Module:
        """A copy of the model, shaken, in which nothing is left to chance in train mode."""
        noise = torch.Generator().manual_seed(1)
        fresh: dict[int, Any] = {}
        for module in self.model.modules():
            named = [*module._parameters.items(), *module._buffers.items(), *vars(module).items()]
            for name, tensor in named:
                if isinstance(tensor, Tensor) and id(tensor) not in fresh:
                    fresh[id(tensor)] = _shaken(name, tensor, dtype, noise)
        twin = copy.deepcopy(self.model, fresh)
        for module in twin.modules():
            for name, value in vars(module).items():
                if type(value) is float and 0 < value <= 1 and ("drop" in name or name in ("p", "prob")):
                    setattr(module, name, 0.0)
        return twin

    def run(
        self, model: nn.Module, images: Tensor | None = None, *, training: bool, seed: int = 0
    ) -> list[Tensor]:
        """Every tensor of floating point that comes out for these images, or those that work; an error if none does."""
        images = self.inputs[0] if images is None else images
        autocast = torch.autocast(images.device.type, enabled=False)
        with borrowed(self.model) as given, borrowed(model), torch.no_grad(), autocast:
            for module in given.modules():
                module.register_forward_pre_hook(_leads_back)
            model.train(training)
            torch.manual_seed(seed)
            outputs = [t for t in _tensors(model(images.clone())) if t.is_floating_point()]
        if not outputs or not all(bool(torch.isfinite(t).all()) for t in outputs):
            raise ArithmeticError("its outputs are not finite numbers")
        return outputs

    def _is_random(self, mask: Mask) -> bool:
        """Whether the masked model itself computes something else each time in train mode."""
        model = self.twin(self.inputs[0].dtype)
        self.surgery.zero(model, self.structure, mask)
        one, other = (self.run(model, training=True, seed=seed) for seed in (0, 1))
        return _unlike(one, other) is not None


def _leads_back(*_: Any) -> None:
    raise RuntimeError("a function put on one of its parts runs the model itself, not the copy that is tried")


def _noise(model: nn.Module) -> Iterator[Tensor]:
    """Images that a model may take, float32 [B, C, H, W] on its device: those that it was built for, or of any size."""
    channels = in_channels(model) or next(
        (m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3
    )
    said = built_for(model) or getattr(getattr(model, "config", model), "image_size", None)
    sizes = [said] if said else TRIED_SIZES
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for size in sizes:
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        noise = torch.Generator().manual_seed(2)
        yield torch.randn(_BATCH, channels, height, width, generator=noise, device="cpu").to(device)


def _shaken(name: str, tensor: Tensor, dtype: torch.dtype, noise: torch.Generator) -> Tensor:
    """A copy with memory of its own; weights and statistics with noise, so that none is zero or like its neighbours."""
    is_parameter, is_statistic = isinstance(tensor, nn.Parameter), name in ("running_mean", "running_var")
    value = tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
    if tensor.is_floating_point() and tensor.numel() and (is_parameter or is_statistic):
        value.nan_to_num_(posinf=0.0, neginf=0.0)
        fan_in = value[0].numel() if value.ndim else 1
        scale = max(0.5 * float(value.std(correction=0)), 0.1 * fan_in**-0.5)
        drawn = torch.randn(value.shape, generator=noise, dtype=torch.float32, device="cpu")
        value.add_(drawn.to(value.device), alpha=scale)
    if name == "running_var":
        value.abs_().add_(0.1)
    return nn.Parameter(value, requires_grad=False) if is_parameter else value


def _tensors(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, Mapping):
        for each in outputs.values():
            yield from _tensors(each)
    elif isinstance(outputs, (tuple, list)):
        for each in outputs:
            yield from _tensors(each)


def _unlike(got: list[Tensor], expected: list[Tensor]) -> str | None:
    """How far the one is from the other, in words; None if it is near enough."""
    shapes = [[list(t.shape) for t in side] for side in (got, expected)]
    if shapes[0] != shapes[1]:
        return f"outputs {shapes[0]} for {shapes[1]}"
    for a, b in zip(got, expected, strict=True):
        if b.numel():
            apart, largest = float((a - b).abs().max()), float(b.abs().max())
            if apart > _TOLERANCE.get(b.dtype, _LOW_PRECISION) * largest:
                return f"a difference of {apart:.1e} at outputs of up to {largest:.1e}"
    return None


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


# ---- which classes of models are known


def _is_known(known: _Class) -> bool:
    return known in _known or (not known.own and os.path.exists(_folder() / known.key))


def _remember(passed: _Class) -> None:
    _known.add(passed)
    # A folder that cannot be written is no reason to stop.
    with contextlib.suppress(OSError):
        if not passed.own:
            _folder().mkdir(parents=True, exist_ok=True)
            (_folder() / passed.key).touch()


def _folder() -> Path:
    """Has an empty file for each class that passed."""
    return user_cache("exact")


def _class_of(structure: Structure, model: nn.Module) -> _Class:
    """Modules, their flags, and where the cut tensors lie beside each other, all without sizes and depths."""
    described = _Described()
    said = [described.module(model), sorted({json.dumps(_of_layer(layer)) for layer in structure})]
    versions = {
        name: getattr(sys.modules.get(name), "__version__", None)
        for name in {"torch", "mvp_ext", *described.packages}
    }
    text = json.dumps([said, versions], sort_keys=True)
    return _Class(hashlib.sha256(text.encode()).hexdigest()[:32], frozenset(described.own))


class _Described:
    """Models in JSON values; on the way, whose classes and functions they are of."""

    def __init__(self) -> None:
        self.packages: set[str] = set()
        self.own: set[Any] = set()

    def module(self, module: nn.Module) -> list[Any]:
        values = vars(module)
        flags = {
            name: said
            for name, value in values.items()
            if name != "training" and (said := self._value(value)) is not None
        }
        absent = [
            name
            for kind in (module._parameters, module._buffers, module._modules)
            for name, part in kind.items()
            if part is None
        ]
        hooks = [
            self._value(hook)
            for kind in (module._forward_pre_hooks, module._forward_hooks)
            for hook in kind.values()
        ]
        parts = [
            [None if name.isdigit() else name, self.module(part)]
            for name, part in module._modules.items()
            if part is not None
        ]
        # Of blocks that are alike, one.
        distinct = [part for part, _ in itertools.groupby(parts)]
        return [self._name(type(module)), flags, absent, hooks, distinct]

    def _value(self, value: Any) -> Any:
        if isinstance(value, (bool, str)):
            return value
        # A size, mostly: what matters is whether there is none, one or more.
        if isinstance(value, int):
            return min(value, 2)
        if isinstance(value, partial):
            return self._value(value.func)
        if isinstance(value, (FunctionType, BuiltinFunctionType, type)):
            return self._name(value)
        return None

    def _name(self, value: Any) -> str:
        package = (value.__module__ or "torch").partition(".")[0]
        if package in _RELEASED:
            self.packages.add(package)
        else:
            self.own.add(value)
        return f"{value.__module__}.{value.__qualname__}"


def _of_layer(layer: UnitLayer) -> list[Any]:
    def beside(path: str) -> list[Any]:
        """How many parts up from the layer, and what then follows."""
        ours, theirs = layer.name.split("."), path.split(".")
        common = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
        return [len(ours) - common, *theirs[common:]]

    def count(number: int) -> int:
        return min(number, 2)

    return [
        layer.kind,
        count(layer.units),
        [
            [
                *beside(cut.tensor),
                cut.dim,
                count(cut.block),
                cut.repeat,
                count(cut.offset),
                cut.length is None,
            ]
            for cut in layer.slices
        ],
        [[*beside(each.module), each.name, count(each.per_unit)] for each in layer.attributes],
        [beside(path) for path in layer.narrowed],
        layer.scatter is not None,
    ]
