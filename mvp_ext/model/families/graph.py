"""Filters of networks of convolutions that no rule knows, by Torch-Pruning's dependency graph (extra `graph`).

The graph is traced: which channel of which tensor is which channel of the next. Channels that must go together make one
unit; units that shrink the same tensors make one layer of units. What the graph says is a conjecture: it takes every
operation that it does not know for one that looks at each channel alone. So each layer is then cut on noise, and stays
whole unless the model computes what it computes with these units masked, in eval and in train mode.
"""

from __future__ import annotations

import copy
import re
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from mvp_ext.model.ends import built_for
from mvp_ext.model.families.parts import Part
from mvp_ext.model.mask import Mask
from mvp_ext.model.structure import (
    Attribute,
    LayerCheck,
    Probe,
    Slice,
    Structure,
    UnitLayer,
    UnsupportedModelError,
)
from mvp_ext.timm_compat import import_timm

# Sides of the images that the graph is traced with: the first that the model takes, else what it was built for.
_SIDES = (64, 128)
# Of the largest output, in float64: what is left of another order of sums is a millionth of it.
_TOLERANCE = 1e-8
# What autograd calls sums; the last is one into a part of a tensor.
_SUMS = ("AddBackward", "SubBackward", "torch::autograd::CopySlices")
# A channel in the traced graph: (node, whether it is an input of the node, its index).
_Channel = tuple[Any, bool, int]


@dataclass
class GraphLayers:
    """What the graph gives.

    Attributes:
        layers: (part, layer), in the model's order.
        refused: (path of the first convolution that makes the units, part) → why they stay whole.
    """

    layers: list[tuple[Part, UnitLayer]] = field(default_factory=list)
    refused: dict[tuple[str, Part], str] = field(default_factory=dict)


# What was found in a model, and what the model was then: every scope asks again.
_FOUND: weakref.WeakKeyDictionary[nn.Module, tuple[str, GraphLayers]] = weakref.WeakKeyDictionary()


def graph_layers(model: nn.Module) -> GraphLayers:
    """The layers of units of a network of convolutions, by tracing it.

    Args:
        model: takes float images [n, c, h, w]; on any device, meta too. Not changed: a copy with random weights runs on
            the CPU in float64.

    Raises:
        UnsupportedModelError: Torch-Pruning is not installed, or cannot trace the model.
    """
    shapes = [(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]
    own = [name for name, module in model.named_modules() if "forward" in vars(module)]
    now = f"{model}{shapes}{own}"
    if model not in _FOUND or _FOUND[model][0] != now:
        _FOUND[model] = now, _find(model)
    return _FOUND[model][1]


def _find(model: nn.Module) -> GraphLayers:
    _need_plain_layers(model)
    noisy = _noisy(model)
    channels, images = _trace(noisy)
    found = GraphLayers()
    known = LayerCheck(model)
    for units in _alike(channels):
        part: Part = "stream" if any(unit.added for unit in units) else "inner"
        try:
            layer = _layer(channels, units, {layer.name for _, layer in found.layers})
            known.check(layer)
            found.layers.append((part, layer))
        except UnsupportedModelError as error:
            found.refused[units[0].writers(channels)[0], part] = str(error)
    # Layers in like places of a network fail together: next to each other, they are found sooner.
    like = sorted((layer for _, layer in found.layers), key=lambda layer: re.sub(r"\d+", "", layer.name))
    exact = {layer.name for layer in _exact(noisy, images, like)}
    for part, layer in found.layers:
        if layer.name not in exact:
            found.refused[layer.name, part] = f"{layer.name}: cutting it is not what masking it is"
    found.layers = [(part, layer) for part, layer in found.layers if layer.name in exact]
    return found


def _need_plain_layers(model: nn.Module) -> None:
    """Tracing takes seconds: UnsupportedModelError at once where no layer could make what another reads."""
    layers = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))
    ]
    plain = (*_plain_convolutions(), *_plain_linears())
    others = [(path, module) for path, module in layers if type(module).forward not in plain]
    if others and len(layers) - len(others) < 2:
        path, module = others[0]
        raise UnsupportedModelError(
            f"{path or 'the model'}: expected a plain convolution or Linear, got {type(module).__name__}"
        )


# ---- tracing


def _noisy(model: nn.Module) -> nn.Module:
    """A copy on the CPU all of whose weights matter: a fresh model has zeros and ones that hide mistakes."""
    generator = torch.Generator().manual_seed(0)

    def fill(tensor: Tensor, mean: float, std: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * std + mean)

    is_meta = any(tensor.is_meta for tensor in model.state_dict().values())
    noisy = copy.deepcopy(model).to_empty(device="cpu") if is_meta else copy.deepcopy(model).cpu()
    noisy = noisy.double().eval().requires_grad_()
    with torch.no_grad():
        for buffer in noisy.buffers() if is_meta else ():
            buffer.zero_()
        for name, parameter in noisy.named_parameters():
            if parameter.ndim > 1:
                fill(parameter, 0, (2 / max(1, parameter[0].numel())) ** 0.5)
            else:
                fill(parameter, 1.0 if name.endswith("weight") else 0.1, 0.25)
        for module in noisy.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and isinstance(module.running_var, Tensor):
                # What runs in train mode leaves them as they are.
                module.momentum = 0.0
                fill(cast(Tensor, module.running_mean), 0, 0.5)
                module.running_var.copy_(
                    torch.rand(module.running_var.shape, generator=generator, dtype=torch.float64) + 0.5
                )
    return noisy


def _trace(model: nn.Module) -> tuple[_Channels, Tensor]:
    """The traced channels, and float64 images [3, c, h, w] that the model takes."""
    try:
        import torch_pruning
    except ImportError as error:
        raise UnsupportedModelError(
            "the extra `graph` may find more in networks of convolutions: pip install 'mvp_ext[graph]'"
        ) from error
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None:
        raise UnsupportedModelError(f"{type(model).__name__}: expected convolutions, got none")
    sides = [(side, side) for side in _SIDES] + [built_for(model) or (224, 224)]
    reason = ""
    for height, width in sides:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(3, first.in_channels, height, width, generator=generator, dtype=torch.float64)
        graph = torch_pruning.DependencyGraph()
        try:
            # Models and Torch-Pruning may raise anything, and it guesses aloud.
            with warnings.catch_warnings(), torch.enable_grad():
                warnings.simplefilter("ignore")
                graph.build_dependency(
                    model, images[:2], forward_fn=lambda model, images: model(images), verbose=False
                )
            return _Channels(graph, model), images
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    raise UnsupportedModelError(f"{type(model).__name__}: Torch-Pruning cannot trace it ({reason})")


class _Channels:
    """The channels of a traced model, and which of them go together: sets that are joined."""

    def __init__(self, graph: Any, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.names: dict[Any, str] = {module: name for name, module in model.named_modules()}
        self.names |= {parameter: name for name, parameter in model.named_parameters()}
        self.order = {name: i for i, name in enumerate(self.names.values())}
        self.sizes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self._graph = graph
        _say_places(graph)
        self._seen: set[_Channel] = set()
        self._parent: dict[_Channel, _Channel] = {}
        for module, node in graph.module2node.items():
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
                pruner = graph.get_pruner_of_module(module)
                self._follow(node, pruner.prune_out_channels, range(module.weight.shape[0]))
        for channel in list(self._parent):
            for other in _tied(*channel):
                self._join(channel, other)

    def units(self) -> Iterator[list[_Channel]]:
        """Sets of channels that must go together."""
        sets: dict[_Channel, list[_Channel]] = {}
        for channel in self._parent:
            sets.setdefault(self._root(channel), []).append(channel)
        yield from sets.values()

    def _follow(self, node: Any, handler: Any, indices: Iterable[int]) -> None:
        """Join channels of a node with all that the graph's edges lead to."""
        from torch_pruning._helpers import _HybridIndex

        waiting = [(node, handler, set(indices))]
        while waiting:
            node, handler, indices = waiting.pop()
            side = not self._graph.is_out_channel_pruning_fn(handler)
            new = [i for i in sorted(indices) if (node, side, i) not in self._seen]
            self._seen.update((node, side, i) for i in new)
            for i in new:
                self._parent.setdefault((node, side, i), (node, side, i))
            for edge in node.dependencies if new else ():
                if not edge.is_triggered_by(handler):
                    continue
                mapped = [_HybridIndex(idx=i, root_idx=i) for i in new]
                for mapping in edge.index_mapping:
                    mapped = mapped if mapping is None else mapping(mapped)
                target = not self._graph.is_out_channel_pruning_fn(edge.handler)
                for index in mapped:
                    self._join((node, side, index.root_idx), (edge.target, target, index.idx))
                waiting.append((edge.target, edge.handler, {index.idx for index in mapped}))

    def _join(self, one: _Channel, other: _Channel) -> None:
        self._parent[self._root(other)] = self._root(one)

    def _root(self, channel: _Channel) -> _Channel:
        self._parent.setdefault(channel, channel)
        while self._parent[channel] != channel:
            self._parent[channel] = channel = self._parent[self._parent[channel]]
        return channel


def _tied(node: Any, is_input: bool, index: int) -> Iterator[_Channel]:
    """Channels that go with this one though nothing leads from one to the other."""
    module = node.module
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.groups > 1:
        # A group goes as a whole. Of a depthwise convolution the graph has no inputs.
        width = (module.in_channels if is_input else module.out_channels) // module.groups
        yield node, False, index // width * (module.out_channels // module.groups)
    elif sizes := _split_sizes(node):
        # The parts of one tensor stay equally large.
        yield node, is_input, index % sizes[0]


def _say_places(graph: Any) -> None:
    """Say where parts of split tensors and of concatenations lie: Torch-Pruning guesses it from the layers around."""
    kinds = graph.ops.OPTYPE
    for reader in graph.module2node.values():
        edges = [(f, n) for f, n in reader.grad_fn.next_functions if f in {i.grad_fn for i in reader.inputs}]
        if [f for f, _ in edges] != [node.grad_fn for node in reader.inputs]:
            continue
        offsets = None
        if reader.type == kinds.CONCAT and len(edges) == len(reader.grad_fn.next_functions):
            offsets = _starts(reader, [f._input_metadata[n].shape for f, n in edges])
        for k, (node, (_, number)) in enumerate(zip(reader.inputs, edges, strict=True)):
            parts = None
            if node.type == kinds.SPLIT:
                shapes = [each.shape for each in node.grad_fn._input_metadata]
                if parts := _starts(node, shapes):
                    node.module.split_sizes = [shape[1] for shape in shapes]
            if not offsets and not parts:
                continue
            nth = sum(each is node for each in reader.inputs[:k])
            back = reader.dependencies[k]
            to_reader = [i for i, each in enumerate(node.outputs) if each is reader][nth]
            forth = node.dependencies[len(node.inputs) + to_reader]
            out_of = (
                _shift(parts[number], parts[number + 1], -parts[number]) if parts else forth.index_mapping[0]
            )
            into = _shift(0, None, parts[number]) if parts else back.index_mapping[0]
            forth.index_mapping = [out_of, _shift(0, None, offsets[k]) if offsets else forth.index_mapping[1]]
            apart = _shift(offsets[k], offsets[k + 1], -offsets[k]) if offsets else back.index_mapping[1]
            back.index_mapping = [apart, into]


def _starts(node: Any, shapes: Sequence[Sequence[int]]) -> list[int] | None:
    """Where parts of a tensor start along its channels, and its end; None if they are parts along another dimension."""
    ndim = len(shapes[0])
    if node.grad_fn._saved_dim not in (1, 1 - ndim, 2**64 + 1 - ndim):
        return None
    return [sum(shape[1] for shape in shapes[:i]) for i in range(len(shapes) + 1)]


def _shift(low: int, high: int | None, by: int) -> Callable[[Any], Any]:
    """Torch-Pruning's indices in [low, high), moved."""
    return lambda indices: [
        index._replace(idx=index.idx + by)
        for index in indices
        if low <= index.idx and (high is None or index.idx < high)
    ]


def _split_sizes(node: Any) -> list[int] | None:
    """Of the parts that a node makes of its channels; None if it makes none."""
    return getattr(node.module, "split_sizes", None) or None


@dataclass
class _Unit:
    """A set of channels that go together: where they lie, and what stands in the way."""

    places: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    groups: dict[str, set[int]] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    parts: set[int] = field(default_factory=set)
    added: bool = False
    problem: str = ""

    def add(self, channels: _Channels, node: Any, is_input: bool, index: int) -> None:
        """Take a channel in."""
        module, name = node.module, channels.names.get(node.module, "")
        path = name or "the model"
        if not node.outputs and not is_input:
            self.problem = f"{path}: the model's output is never cut"
        elif isinstance(module, nn.Parameter):
            self._place(channels, name, node.pruning_dim, index)
        elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            if type(module).forward not in _plain_convolutions():
                self.problem = f"{path}: expected a plain convolution, got {type(module).__name__}"
            if module.groups > 1 and not is_input:
                self.groups.setdefault(name, set()).add(index // (module.out_channels // module.groups))
            if module.groups == 1 or not is_input:
                self._module(channels, name, module, is_input, index)
        elif isinstance(module, nn.Linear):
            if type(module).forward not in _plain_linears():
                self.problem = f"{path}: expected a plain Linear, got {type(module).__name__}"
            self._module(channels, name, module, is_input, index)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            self._module(channels, name, module, False, index)
        elif isinstance(module, nn.PReLU):
            if module.num_parameters > 1:
                self._module(channels, name, module, False, index)
        elif name and node.type in _refused_types():
            self.problem = f"{path} ({type(module).__name__}): it normalises, or mixes, across channels"
        elif sizes := _split_sizes(node):
            self.parts |= {sizes[0], sum(sizes)}
            if len(set(sizes)) > 1:
                self.problem = "its channels are split into parts of different sizes"
        elif str(getattr(module, "_grad_fn", "")).startswith(_SUMS) and len(node.inputs) > 1:
            self.added = True

    def _module(self, channels: _Channels, path: str, module: nn.Module, is_input: bool, index: int) -> None:
        self.modules[path] = module
        names = ("weight",) if is_input else ("weight", "bias", "running_mean", "running_var")
        for name in names:
            if isinstance(getattr(module, name, None), Tensor):
                self._place(channels, f"{path}.{name}", int(is_input), index)

    def _place(self, channels: _Channels, tensor: str, dim: int, index: int) -> None:
        if dim > 1 or tensor not in channels.sizes:
            self.problem = f"{tensor}: expected a plain tensor with channels in dimension 0 or 1"
        self.places.setdefault((tensor, dim), []).append(index)

    def writers(self, channels: _Channels) -> list[str]:
        """Paths of the layers that make its channels, in the model's order; depthwise ones come last."""
        made = [
            path
            for path, module in self.modules.items()
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))
            and (f"{path}.weight", 0) in self.places
        ]
        return sorted(made, key=lambda path: (path in self.groups, channels.order[path]))


@cache
def _plain_convolutions() -> tuple[Any, ...]:
    return (
        nn.Conv1d.forward,
        nn.Conv2d.forward,
        nn.Conv3d.forward,
        import_timm().layers.Conv2dSame.forward,
    )


@cache
def _plain_linears() -> tuple[Any, ...]:
    return nn.Linear.forward, import_timm().layers.Linear.forward


def _refused_types() -> tuple[Any, ...]:
    from torch_pruning.ops import OPTYPE

    names = ("LN", "GN", "IN", "EMBED", "MHA", "LSTM", "CUSTOMIZED")
    return tuple(getattr(OPTYPE, name) for name in names)


# ---- from sets of channels to layers of units


def _alike(channels: _Channels) -> list[list[_Unit]]:
    """Units that shrink the same tensors by as much, each list in the order of its first writer's filters; the lists in
    the model's order."""
    alike: dict[Any, list[_Unit]] = {}
    for members in channels.units():
        unit = _Unit()
        for channel in members:
            unit.add(channels, *channel)
        if not unit.writers(channels):
            continue
        for places in unit.places.values():
            places.sort()
        signature = tuple(sorted((*key, len(places)) for key, places in unit.places.items()))
        alike.setdefault(signature, []).append(unit)

    def first(unit: _Unit) -> tuple[int, int]:
        path = unit.writers(channels)[0]
        return channels.order[path], unit.places[f"{path}.weight", 0][0]

    return sorted((sorted(units, key=first) for units in alike.values()), key=lambda units: first(units[0]))


def _layer(channels: _Channels, units: Sequence[_Unit], taken: set[str]) -> UnitLayer:
    """One layer of units of the same shape; UnsupportedModelError if something is in the way."""
    one = units[0]
    path = one.writers(channels)[0]
    problem = next((unit.problem for unit in units if unit.problem), "")
    if problem:
        raise UnsupportedModelError(problem)
    name = next((each for each in one.writers(channels) if each not in taken), None)
    if name is None:
        raise UnsupportedModelError(f"{path}: its filters go different ways")
    slices = []
    for (tensor, dim), _ in sorted(one.places.items(), key=lambda item: _position(channels, *item[0])):
        places = [unit.places[tensor, dim] for unit in units]
        slices += _slices(tensor, dim, places, channels.sizes[tensor][dim])
    attributes = []
    for conv, groups in one.groups.items():
        total, module = len(groups) * len(units), one.modules[conv]
        if isinstance(module, nn.Conv2d) and total == module.groups:
            attributes.append(Attribute(conv, "groups", len(groups)))
        else:
            raise UnsupportedModelError(f"{conv}: its groups are not all of one layer of units")
    attributes += _part_sizes(channels, one, len(units))
    kind: Any = "neuron" if isinstance(one.modules[name], nn.Linear) else "filter"
    probe = _probe(one, slices, len(units))
    return UnitLayer(name, kind, len(units), tuple(slices), probe, attributes=tuple(attributes))


def _part_sizes(channels: _Channels, unit: _Unit, units: int) -> list[Attribute]:
    """Numbers, of the next module around the first writer that has any, that may say how large parts of a split are."""
    around = unit.writers(channels)[0] if unit.parts else ""
    while around:
        around = around.rpartition(".")[0]
        found = [
            Attribute(around, name, value // units)
            for name, value in vars(channels.modules[around]).items()
            if type(value) is int and value in unit.parts and value % units == 0
        ]
        # Those of the layers themselves follow anyway.
        if found and not isinstance(channels.modules[around], (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
            return found
    return []


def _position(channels: _Channels, tensor: str, dim: int) -> tuple[int, int, int]:
    """Writers before readers, in the model's order."""
    path, _, leaf = tensor.rpartition(".")
    leaves = ("weight", "bias", "running_mean", "running_var")
    order = channels.order.get(tensor, channels.order.get(path, 0))
    return dim, order, leaves.index(leaf) if leaf in leaves else 0


def _slices(tensor: str, dim: int, places: Sequence[Sequence[int]], size: int) -> list[Slice]:
    """What says that unit u has ``places[u]`` of a dimension; UnsupportedModelError if nothing does."""
    units = len(places)
    runs: list[list[int]] = []
    for place in places[0]:
        if runs and place == runs[-1][-1] + 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    for u, own in enumerate(places):
        if list(own) != [place + u * len(run) for run in runs for place in run]:
            raise UnsupportedModelError(f"{tensor}: dimension {dim}: the units' places are in no plain order")
    if max(map(max, places)) >= size or min(map(min, places)) < 0:
        raise UnsupportedModelError(f"{tensor}: dimension {dim}: units have places outside of it")
    start, block = runs[0][0], len(runs[0])
    even = all(len(run) == block and run[0] == start + r * units * block for r, run in enumerate(runs))
    if even and units * block * len(runs) == size:
        return [Slice(tensor, dim, block, len(runs))]
    if even:
        return [Slice(tensor, dim, block, len(runs), start, size)]
    return [Slice(tensor, dim, len(run), 1, run[0], size) for run in runs]


def _probe(unit: _Unit, slices: Iterable[Slice], units: int) -> Probe:
    """Where the units' activation is alone: what a layer reads, else what a norm or a layer puts out."""
    found: list[tuple[int, Probe]] = []
    for cut in slices:
        path, _, leaf = cut.tensor.rpartition(".")
        if leaf != "weight" or cut.length is not None or cut.repeat > 1 or path not in unit.modules:
            continue
        module = unit.modules[path]
        dim = -1 if isinstance(module, nn.Linear) else 1
        heads = units if cut.block > 1 else None
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        rank = 0 if cut.dim == 1 else 1 if norm else 2
        found.append((rank, Probe(path, "input" if cut.dim == 1 else "output", dim, heads)))
    if not found:
        raise UnsupportedModelError(f"{next(iter(unit.modules))}: its activation is nowhere alone")
    return min(found, key=lambda each: each[0])[1]


# ---- proof


def _exact(model: nn.Module, images: Tensor, layers: Sequence[UnitLayer]) -> list[UnitLayer]:
    """The layers all of which can be cut together: halves of what cannot are tried alone."""
    if not layers or _is_exact(model, images, layers):
        return list(layers)
    if len(layers) == 1:
        return []
    half = len(layers) // 2
    parts = [_exact(model, images, part) for part in (layers[:half], layers[half:])]
    both = [layer for part in parts for layer in part]
    return both if not all(parts) or _is_exact(model, images, both) else max(parts, key=len)


@torch.no_grad()
def _is_exact(model: nn.Module, images: Tensor, layers: Sequence[UnitLayer]) -> bool:
    """Whether the model cut by random masks computes what it computes masked, in eval mode and with the batch norms of
    train mode."""
    structure = Structure("graph", "stream", None, tuple(layers))
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        bits = {}
        for layer in layers:
            share = 0.3 + 0.6 * torch.rand(1, generator=generator)
            bits[layer.name] = torch.rand(layer.units, generator=generator) < share
            bits[layer.name][0] |= not bits[layer.name].any()
        mask = Mask(bits)
        masked = _run(model, images, _masked(model, structure, mask))
        try:
            cut = _run_cut(model, images, structure, mask)
        # Cut where it cannot be, a model may raise anything.
        except Exception:
            return False
        for expected, got in zip(masked, cut, strict=True):
            largest = float(expected.abs().max())
            if got.shape != expected.shape or not 0 < largest < float("inf"):
                return False
            if not float((got - expected).abs().max()) <= _TOLERANCE * largest:
                return False
    return True


def _run(model: nn.Module, images: Tensor, state: dict[str, Tensor]) -> list[Tensor]:
    """What the model computes with other tensors, in eval mode and with the batch norms of train mode."""
    outputs = []
    for train in (False, True):
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train(train)
        outputs.append(torch.func.functional_call(model, state, (images,)))
    return outputs


def _masked(model: nn.Module, structure: Structure, mask: Mask) -> dict[str, Tensor]:
    """The tensors of ``surgery.masked_model`` that differ from the model's."""
    state = model.state_dict()
    masked: dict[str, Tensor] = {}
    for layer in structure:
        removed = (~mask.layers[layer.name]).nonzero().flatten()
        for cut in layer.slices:
            value = 1.0 if cut.tensor.endswith("running_var") else 0.0
            tensor = masked.setdefault(cut.tensor, state[cut.tensor].clone())
            tensor.index_fill_(cut.dim, cut.places(removed, layer.units), value)
    return masked


def _run_cut(model: nn.Module, images: Tensor, structure: Structure, mask: Mask) -> list[Tensor]:
    """What the model with the cut tensors computes; it is left as it was."""
    state, cut = model.state_dict(), {}
    for name, kept in mask.index_in(structure).items():
        cut[name] = state[name]
        for dim, index in enumerate(kept):
            if index is not None:
                cut[name] = cut[name].index_select(dim, index)
    attributes = [(layer, each) for layer in structure for each in layer.attributes]
    try:
        for layer, each in attributes:
            kept_units = int(mask.layers[layer.name].sum())
            setattr(model.get_submodule(each.module), each.name, kept_units * each.per_unit)
        return _run(model, images, cut)
    finally:
        for layer, each in attributes:
            setattr(model.get_submodule(each.module), each.name, layer.units * each.per_unit)
