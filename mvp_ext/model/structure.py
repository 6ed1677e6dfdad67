"""What can be cut in a model: its layers of units, found by looking at its parts, never by its name.

A unit is a convolution filter, an attention head or an MLP hidden neuron. A layer of units lists every tensor
that shrinks when one of them goes: the unit's own weights, its normalisation, and the weights of whatever
reads it.

| scope       | units                                                                                  |
|-------------|----------------------------------------------------------------------------------------|
| `inner`     | ResNet: conv1 of a BasicBlock, conv1 and conv2 of a Bottleneck. Nothing is coupled.    |
| `all`       | ResNet: each block's last convolution too; see nn.py. Still nothing is coupled.  |
| `heads`     | ViT: attention heads.                                                                  |
| `mlp`       | ViT: hidden neurons of the MLPs.                                                       |
| `heads+mlp` | both.                                                                                  |
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from mvp_ext.model.nn import ScatterBlock
from mvp_ext.model.timm_compat import import_timm

if TYPE_CHECKING:
    from mvp_ext.model.mask import Mask

SCOPES = {"inner": "resnet", "all": "resnet", "heads": "vit", "mlp": "vit", "heads+mlp": "vit"}
_DEFAULT_SCOPE = {"resnet": "inner", "vit": "heads"}


class UnsupportedModelError(ValueError):
    """A model has a part that cannot be cut here; the message names the part and what was expected."""


@dataclass(frozen=True)
class Slice:
    """One dimension of one tensor that a layer's units index.

    ``dim`` is cut into ``repeat`` equal parts (3 for q, k and v); unit u is ``block`` consecutive places
    [u·block, (u+1)·block) in each of them. So the dimension has units · block · repeat places.
    """

    tensor: str  # its name in the model's state dict
    dim: int
    block: int = 1
    repeat: int = 1

    def places(self, units: Tensor, total: int) -> Tensor:
        """int64 [repeat · len(units) · block]: the places of these units (int64 indices) of ``total``, part by part."""
        within = (units[:, None] * self.block + torch.arange(self.block)).flatten()
        part = torch.arange(self.repeat)[:, None] * (total * self.block)
        return (part + within).flatten()


@dataclass(frozen=True)
class Probe:
    """Where the activation of a layer's units can be read: the first input, or the output, of a module.

    ``dim`` is the dimension that holds the units (in ``heads`` equal blocks if that is set), as in
    ``ops.importance``. A block adds its shortcut IN PLACE to its last norm's output, so a hook on side
    "output" must keep a clone; if it also wants the gradient, it must keep the output and return a clone.
    """

    module: str
    side: Literal["input", "output"]
    dim: int
    heads: int | None = None


@dataclass(frozen=True)
class UnitLayer:
    """Units that are voted on and budgeted together.

    ``name`` is the module that makes the units. ``scatter`` is set for a block's last convolution (scope
    `all`): the block into whose residual stream the kept channels are added.
    """

    name: str
    kind: Literal["filter", "head", "neuron"]
    units: int
    slices: tuple[Slice, ...]
    probe: Probe
    scatter: str | None = None


@dataclass(frozen=True)
class Structure:
    """All layers of units of one model in one scope, in the model's order. A value: hashable, no tensors, no model."""

    family: Literal["resnet", "vit"]
    scope: str
    architecture: str | None  # timm's name where the model knows it
    layers: tuple[UnitLayer, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(layer.name for layer in self.layers)

    @property
    def units_per_layer(self) -> tuple[int, ...]:
        return tuple(layer.units for layer in self.layers)

    @property
    def total_units(self) -> int:
        return sum(self.units_per_layer)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the scope and the layers' names, kinds and sizes: equal where masks can be compared."""
        described = [
            self.family,
            self.scope,
            [[layer.name, layer.kind, layer.units] for layer in self.layers],
        ]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]

    def __iter__(self) -> Iterator[UnitLayer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> UnitLayer:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"no layer of units named {name!r}; there are {', '.join(self.names)}")

    def check(self, mask: Mask) -> None:
        """ValueError if ``mask`` does not have exactly these layers with these numbers of units."""
        for layer in self.layers:
            if layer.name not in mask.layers:
                raise ValueError(
                    f"mask: expected layer {layer.name!r} (scope {self.scope!r}), got none of that name"
                )
            units = mask.layers[layer.name].numel()
            if units != layer.units:
                raise ValueError(f"mask: layer {layer.name!r}: expected {layer.units} units, got {units}")
        if surplus := set(mask.layers) - set(self.names):
            raise ValueError(
                f"mask: layer {sorted(surplus)[0]!r} is not in the structure (scope {self.scope!r})"
            )

    def index_of(self, mask: Mask) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        """For every tensor that changes shape: (rows, cols), int64 indices kept of dim 0 and dim 1; None
        keeps all.

        Layers that keep all their units change nothing and are left out.
        """
        self.check(mask)
        index: dict[str, list[Tensor | None]] = {}
        for layer in self.layers:
            kept = mask.layers[layer.name]
            if bool(kept.all()):
                continue
            units = kept.nonzero().flatten()
            places: dict[
                tuple[int, int], Tensor
            ] = {}  # a layer's tensors share one index tensor where they can
            for cut in layer.slices:
                if (cut.block, cut.repeat) not in places:
                    places[cut.block, cut.repeat] = cut.places(units, layer.units)
                index.setdefault(cut.tensor, [None, None])[cut.dim] = places[cut.block, cut.repeat]
        return {name: (rows, cols) for name, (rows, cols) in index.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; :meth:`from_dict` reads them back."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Structure:
        """The inverse of :meth:`to_dict`; ValueError if a field is missing, unknown or of another kind."""
        try:
            layers = tuple(
                UnitLayer(
                    **{
                        **layer,
                        "slices": tuple(Slice(**s) for s in layer["slices"]),
                        "probe": Probe(**layer["probe"]),
                    }
                )
                for layer in data["layers"]
            )
            return Structure(**{**data, "layers": layers})
        except (TypeError, KeyError) as error:
            raise ValueError(f"Structure.from_dict: not a description of a structure ({error})") from error


def find_structure(model: nn.Module, scope: str | None = None) -> Structure:
    """The layers of units of ``model``.

    Args:
        model: a timm ResNet (BasicBlock, Bottleneck), ViT or DeiT, dense or already pruned, on any device.
        scope: `inner` (default) or `all` for a ResNet; `heads` (default), `mlp` or `heads+mlp` for a ViT.

    Raises:
        ValueError: the scope is unknown, or belongs to another family than the model's.
        UnsupportedModelError: a part of the model is not understood; the message names it.
    """
    if scope is not None and scope not in SCOPES:
        raise ValueError(f"find_structure: scope: expected one of {', '.join(SCOPES)}, got {scope!r}")
    residual, transformer = _candidates(model)
    families = {"resnet": residual, "vit": transformer}
    found = [family for family in ("vit", "resnet") if families[family]]
    if not found:
        children = ", ".join(f"{n} ({type(m).__name__})" for n, m in model.named_children()) or "no parts"
        raise UnsupportedModelError(
            f"{type(model).__name__}: expected residual blocks (conv1, conv2) or transformer blocks (attn, mlp), "
            f"got {children}"
        )
    family = SCOPES[scope] if scope else found[0]
    if family not in found:
        raise ValueError(
            f"find_structure: scope {scope!r} is for the family {family!r}; this model looks like {found[0]!r}"
        )
    scope = scope or _DEFAULT_SCOPE[family]
    layers: list[UnitLayer] = []
    for path, block in families[family]:
        if family == "resnet":
            layers += _filter_layers(path, block, last=scope == "all")
        else:
            if "heads" in scope:
                layers.append(_head_layer(f"{path}.attn", block.attn))
            if "mlp" in scope:
                layers.append(_neuron_layer(f"{path}.mlp", block.mlp))
    structure = Structure(
        "resnet" if family == "resnet" else "vit", scope, _architecture(model), tuple(layers)
    )
    check_fits(model, structure)
    return structure


def _candidates(model: nn.Module) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
    """Everything that has the shape of a residual block, and of a transformer block, with its path."""
    residual, transformer = [], []
    for path, module in model.named_modules():
        children = dict(module.named_children())
        if {"conv1", "conv2"} <= children.keys():
            residual.append((path, module))
        elif {"attn", "mlp"} <= children.keys():
            transformer.append((path, module))
    return residual, transformer


def _architecture(model: nn.Module) -> str | None:
    config = getattr(model, "pretrained_cfg", None) or {}
    name = (
        config.get("architecture") if isinstance(config, Mapping) else getattr(config, "architecture", None)
    )
    return str(name) if name else None


def check_fits(model: nn.Module, structure: Structure) -> None:
    """UnsupportedModelError unless every slice names a plain tensor of ``model``, of its size, used once only."""
    state = model.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for layer in structure:
        for cut in layer.slices:
            tensor = state.get(cut.tensor)
            expected = layer.units * cut.block * cut.repeat
            if tensor is None:
                raise UnsupportedModelError(
                    f"{cut.tensor}: expected a plain tensor, got none (is it parametrised?)"
                )
            if tensor.shape[cut.dim] != expected:
                raise UnsupportedModelError(
                    f"{cut.tensor}: expected {expected} places in dimension {cut.dim} for {layer.units} units, "
                    f"got shape {tuple(tensor.shape)}"
                )
            shared = names.get(id(tensor), [])
            if len(shared) > 1:
                raise UnsupportedModelError(
                    f"{cut.tensor}: the same tensor is also {shared[-1]}; shared weights cannot be cut"
                )


def _computes_as(module: nn.Module, *known: type[nn.Module]) -> bool:
    """Whether ``module`` runs the very forward of one of these classes: its parts do not say how they are used."""
    return "forward" not in vars(module) and any(type(module).forward is cls.forward for cls in known)


# ---- ResNet


def _filter_layers(path: str, block: Any, last: bool) -> list[UnitLayer]:
    """The convolutions of one residual block: all but its last, and with ``last`` that too."""
    resnet = import_timm().models.resnet
    if not _computes_as(block, ScatterBlock, resnet.BasicBlock, resnet.Bottleneck):
        raise UnsupportedModelError(
            f"{path} ({type(block).__name__}): expected a block that computes as timm's BasicBlock or Bottleneck does"
        )
    depth = 3 if getattr(block, "conv3", None) is not None else 2
    for i in range(1, depth + 1):
        _check_convolution(f"{path}.conv{i}", getattr(block, f"conv{i}"))
        norm = getattr(block, f"bn{i}")
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
            raise UnsupportedModelError(
                f"{path}.bn{i}: expected a batch normalisation, got {type(norm).__name__}"
            )
        if (i < depth or last) and not _is_elementwise(act := getattr(block, f"act{i}")):
            raise UnsupportedModelError(
                f"{path}.act{i}: expected an activation without parameters, got {type(act).__name__}"
            )
    aa = getattr(block, "aa", None)
    if aa is not None and not isinstance(aa, (nn.Identity, nn.AvgPool2d)):
        raise UnsupportedModelError(f"{path}.aa: expected none or an average pool, got {type(aa).__name__}")
    drop = getattr(block, "drop_block", None)
    if drop is not None and not isinstance(drop, (nn.Identity, import_timm().layers.DropBlock2d)):
        raise UnsupportedModelError(
            f"{path}.drop_block: expected none or a DropBlock2d, got {type(drop).__name__}"
        )
    layers = []
    for i in range(1, depth):
        conv, reader = f"{path}.conv{i}", f"{path}.conv{i + 1}"
        layers.append(
            UnitLayer(
                conv,
                "filter",
                getattr(block, f"conv{i}").out_channels,
                (*_filter_slices(path, block, i), Slice(f"{reader}.weight", 1)),
                Probe(reader, "input", dim=1),
            )
        )
    if last:
        if block.se is not None:
            raise UnsupportedModelError(
                f"{path}.se ({type(block.se).__name__}): it mixes the channels of the residual stream, so scope `all` "
                "cannot cut them; use scope `inner`"
            )
        slices = _filter_slices(path, block, depth)
        if isinstance(block, ScatterBlock):
            slices = (*slices, Slice(f"{path}.kept", 0))
        units = getattr(block, f"conv{depth}").out_channels
        probe = Probe(f"{path}.bn{depth}", "output", dim=1)
        layers.append(UnitLayer(f"{path}.conv{depth}", "filter", units, slices, probe, scatter=path))
    return layers


def _filter_slices(path: str, block: Any, i: int) -> tuple[Slice, ...]:
    """The tensors of convolution i and its normalisation, along its filters."""
    conv, norm = getattr(block, f"conv{i}"), getattr(block, f"bn{i}")
    own = [f"conv{i}.{name}" for name in ("weight", "bias") if getattr(conv, name) is not None]
    own += [
        f"bn{i}.{n}"
        for n in ("weight", "bias", "running_mean", "running_var")
        if getattr(norm, n) is not None
    ]
    return tuple(Slice(f"{path}.{name}", 0) for name in own)


def _check_convolution(path: str, conv: nn.Module) -> None:
    if type(conv) is not nn.Conv2d:
        raise UnsupportedModelError(f"{path}: expected a plain Conv2d, got {type(conv).__name__}")
    if conv.groups != 1:
        raise UnsupportedModelError(
            f"{path}: expected groups = 1, got a grouped convolution (groups = {conv.groups})"
        )


def _is_elementwise(act: nn.Module) -> bool:
    known = type(act).__module__ in ("torch.nn.modules.activation", "timm.layers.activations")
    mixes = isinstance(
        act, (nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin, nn.GLU, nn.MultiheadAttention)
    )
    return isinstance(act, nn.Identity) or (known and not mixes and not list(act.parameters()))


# ---- ViT


def _head_layer(path: str, attn: Any) -> UnitLayer:
    """The heads of one attention module."""
    attention = import_timm().layers.Attention
    if not _computes_as(attn, attention):
        raise UnsupportedModelError(
            f"{path} ({type(attn).__name__}): expected an attention that computes as timm's Attention does"
        )
    if not hasattr(attn, "attn_dim"):
        raise UnsupportedModelError(
            f"{path}: this timm's Attention cannot be narrower than its input; a newer timm can"
        )
    if not isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity):
        raise UnsupportedModelError(
            f"{path}.norm ({type(attn.norm).__name__}): it normalises across heads (scale_norm)"
        )
    # q_norm and k_norm work inside one head and share their weights between heads: nothing of theirs is cut.
    heads, width = attn.num_heads, attn.head_dim
    _check_linear(f"{path}.qkv", attn.qkv)
    _check_linear(f"{path}.proj", attn.proj)
    slices = [Slice(f"{path}.qkv.weight", 0, width, 3)]
    if attn.qkv.bias is not None:
        slices.append(Slice(f"{path}.qkv.bias", 0, width, 3))
    if getattr(attn, "gate", None) is not None:
        _check_linear(f"{path}.gate", attn.gate)
        slices.append(Slice(f"{path}.gate.weight", 0, width))
        if attn.gate.bias is not None:
            slices.append(Slice(f"{path}.gate.bias", 0, width))
    slices.append(Slice(f"{path}.proj.weight", 1, width))
    return UnitLayer(path, "head", heads, tuple(slices), Probe(f"{path}.proj", "input", dim=-1, heads=heads))


def _neuron_layer(path: str, mlp: Any) -> UnitLayer:
    """The hidden neurons of one MLP."""
    if not _computes_as(mlp, import_timm().layers.Mlp):
        raise UnsupportedModelError(
            f"{path} ({type(mlp).__name__}): expected an MLP that computes as timm's Mlp does"
        )
    if not isinstance(mlp.norm, nn.Identity):
        raise UnsupportedModelError(
            f"{path}.norm ({type(mlp.norm).__name__}): it normalises across hidden neurons"
        )
    if not _is_elementwise(mlp.act):
        raise UnsupportedModelError(
            f"{path}.act: expected an activation without parameters, got {type(mlp.act).__name__}"
        )
    _check_linear(f"{path}.fc1", mlp.fc1)
    _check_linear(f"{path}.fc2", mlp.fc2)
    slices = [Slice(f"{path}.fc1.weight", 0)]
    if mlp.fc1.bias is not None:
        slices.append(Slice(f"{path}.fc1.bias", 0))
    slices.append(Slice(f"{path}.fc2.weight", 1))
    return UnitLayer(
        path, "neuron", mlp.fc1.out_features, tuple(slices), Probe(f"{path}.fc2", "input", dim=-1)
    )


def _check_linear(path: str, linear: nn.Module) -> None:
    if type(linear) is not nn.Linear:
        raise UnsupportedModelError(f"{path}: expected a plain Linear, got {type(linear).__name__}")
