"""Surgery: from a mask to real, smaller tensors, in the model and in whatever trains it, and back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mvp_ext.model import gate
from mvp_ext.model.borrowed import unwrapped
from mvp_ext.model.families import SCOPES, find_structure
from mvp_ext.model.holders import Holders, check_others, check_wrappers, is_held
from mvp_ext.model.mask import Mask, RowsCols
from mvp_ext.model.narrow import narrow
from mvp_ext.model.scatter_block import ScatterBlock
from mvp_ext.model.structure import Structure, UnsupportedModelError
from mvp_ext.ops import backend_for


def prune_model(
    model: nn.Module,
    mask: Mask,
    *,
    structure: Structure | None = None,
    optimizer: Any = None,
    ema: Any = None,
) -> nn.Module:
    """Remove, in place, every unit that ``mask`` does not keep: the tensors really become smaller.

    The result is a plain timm module (scope `all`: with ``ScatterBlock`` for the
    blocks whose last convolution was cut). It can be pruned again, with the structure found anew and
    ``Mask.compose`` to say what is left of the first model.

    Parameters that shrink are NEW ``nn.Parameter`` objects. Everything that the optimizers lead to is looked through:
    whatever has an old parameter gets the new one, in its place (groups, states, nested optimizers, lists, closures of
    hooks), and every state of a parameter's shape (momentum, exp_avg, …) is cut alike; step counts and learning
    rates stay, so training goes on as if the removed units had been masked. Groups, lists and dictionaries stay the
    same objects: a scheduler needs nothing. Gradients, hooks and marks on the parameters go over to the new ones.
    Either everything is cut or, on an error, nothing is changed. The first model of each class that is cut on an
    installation is tried before (``Structure.verify``), which takes a few forward passes.

    What torch.compile or DataParallel made is cut inside and goes on. DistributedDataParallel and FSDP are refused:
    cut first, then wrap. The page "Optimizers and surgery" says which optimizers can be cut.

    Args:
        model: dense or already pruned.
        mask: of exactly the layers that ``find_structure`` finds in the model.
        structure: of the model as it is now; None finds it.
        optimizer: whatever trains the model: an optimizer, one in a wrapper (Lookahead, SAM), or a list of them. None
            if nothing does; a live optimizer of the model is then warned of, unless this is an empty list.
        ema: a model average to cut alike: the model itself, or a wrapper with it in ``.module`` (timm's
            ModelEmaV3, torch's AveragedModel). A second one: ``prune_model(second.module, mask)``.

    Returns:
        ``model``.

    Raises:
        TypeError: the optimizer is none, or the average no model.
        ValueError: the mask does not fit the model, or an optimizer has none of its parameters.
        UnsupportedModelError: the structure is not the model's (or its average's) as it is now; the optimizer keeps
            something that cannot be cut, or another one was not given; the model is distributed; cut, it would compute
            something else than masked.
    """
    inner = unwrapped(model)
    check_wrappers(model, inner, "model")
    average = None if ema is None else _average(ema, inner)
    structure = structure or structure_for(inner, mask)
    gate.verify_once(structure, inner, _SURGERY)
    several = isinstance(optimizer, (list, tuple))
    optimizers = list(optimizer) if several else [] if optimizer is None else [optimizer]
    names = [f"optimizer[{i}]" if several else "optimizer" for i in range(len(optimizers))]
    held = is_held(inner)
    plan = _Plan(inner, structure, mask, list(zip(names, optimizers, strict=True)))
    if held and (optimizers or not several):
        check_others(plan.holders, named=bool(optimizers))
    plans = [plan, *([] if average is None else [_Plan(average, structure, mask, [])])]
    for each in plans:
        each.packing.pack()
    for each in plans:
        each.apply()
    return model


def _average(ema: Any, model: nn.Module) -> nn.Module:
    """The model that a moving average is kept in."""
    average = ema if isinstance(ema, nn.Module) else getattr(ema, "ema", None)
    inside = getattr(average, "module", None)
    average = inside if isinstance(inside, nn.Module) else average
    if not isinstance(average, nn.Module):
        raise TypeError(
            f"prune_model: ema: expected a model, or a wrapper with one in .module, got {type(ema).__name__}"
        )
    check_wrappers(average, unwrapped(average), "ema")
    if unwrapped(average) is model:
        raise ValueError(
            "prune_model: ema: expected another model than the one that is trained, got the same"
        )
    return unwrapped(average)


def structure_for(model: nn.Module, mask: Mask) -> Structure:
    """The structure of ``model`` whose layers are the mask's; ValueError if no scope has them."""
    reason = ""
    for scope in SCOPES:
        try:
            structure = find_structure(model, scope)
        except UnsupportedModelError as error:
            reason = f"; {error}"
            continue
        except ValueError:
            continue
        if set(structure.names) == set(mask.layers):
            return structure
    # A model with a part that is not understood says so.
    find_structure(model)
    raise ValueError(f"no scope of this model has the layers of the mask ({', '.join(mask.layers)}){reason}")


class _Packing:
    """Tensors that are cut together; it knows nobody who waits for them, so that the large ones go with the last."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._kept: list[RowsCols] = []
        self._small: list[Tensor] = []

    def add(self, tensor: Tensor, kept: RowsCols) -> Callable[[], Tensor]:
        """Have a tensor cut; what is returned gives it, once it is."""
        number = len(self._tensors)
        self._tensors.append(tensor)
        self._kept.append(kept)
        return lambda: self._small[number]

    @torch.no_grad()
    def pack(self) -> None:
        """Make the small tensors. Changes nothing."""
        self._small = _pack(self._tensors, self._kept)


class _Plan:
    """Everything that one model's surgery replaces, checked before the first change."""

    def __init__(
        self, model: nn.Module, structure: Structure, mask: Mask, optimizers: Sequence[tuple[str, Any]]
    ) -> None:
        self.model, self.structure, self.mask = model, structure, mask
        self.index = mask.index_in(structure)
        structure.check(model)
        # They share their parts with those that they will replace.
        self.narrowed = {
            path: narrow(model.get_submodule(path))
            for layer in structure
            if not bool(mask.layers[layer.name].all())
            for path in layer.narrowed
        }
        self.packing = _Packing()
        state = model.state_dict(keep_vars=True)
        self.old = {name: state[name] for name in self.index}
        self.holders = Holders(model, self.index, self.packing.add)
        self.holders.search(optimizers)
        # Of every old tensor: its values, its gradient, and what others left on it, like "no weight decay".
        self.cut = {
            name: (
                self.packing.add(old.detach(), self.index[name]),
                None if old.grad is None else self.packing.add(old.grad, self.index[name]),
                self.holders.marks(name, old),
            )
            for name, old in self.old.items()
        }

    @torch.no_grad()
    def apply(self) -> None:
        """Put every small tensor, once they are packed, in its place."""
        for path, module in self.narrowed.items():
            _replace(self.model, path, module)
        for name, old in self.old.items():
            tensor, grad, marks = self.cut[name]
            owner, leaf = _owner(self.model, name)
            new: Tensor
            if isinstance(old, nn.Parameter):
                owner._parameters[leaf] = new = nn.Parameter(tensor(), requires_grad=old.requires_grad)
                new.grad = None if grad is None else grad()
            else:
                new = owner._buffers[leaf] = tensor()
            self.holders.replace(old, new, marks)
        self.holders.apply()
        for layer in self.structure:
            kept = self.mask.layers[layer.name]
            if bool(kept.all()):
                continue
            for attribute in layer.attributes:
                counted: Any = self.model.get_submodule(attribute.module)
                setattr(counted, attribute.name, int(kept.sum()) * attribute.per_unit)
                if attribute.name in ("groups", "num_groups"):
                    # Also with one group left its units are groups: the structure that is found next has to see that.
                    counted.had_groups = True
            if layer.scatter is not None:
                _scatter(self.model, layer.scatter, kept)
        for path in {name.rpartition(".")[0] for name in self.index}:
            _set_sizes(self.model.get_submodule(path))


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _set_sizes(module: Any) -> None:
    """Make a module's own numbers say what its tensors are."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        module.out_channels = module.weight.shape[0]
        module.in_channels = module.weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = module.weight.shape[0]
    elif isinstance(module, nn.modules.batchnorm._BatchNorm) or hasattr(module, "running_mean"):
        # A frozen one is no _BatchNorm, but may have the number, too.
        sized = module.weight if module.weight is not None else module.running_mean
        if sized is not None:
            module.num_features = sized.shape[0]


def _scatter(model: nn.Module, path: str, kept: Tensor) -> None:
    """Put a ScatterBlock in the place of a block whose last convolution has just been cut for the first time.

    One that is there already had its index cut with its tensors.
    """
    block = model.get_submodule(path)
    if isinstance(block, ScatterBlock):
        return
    device = next(block.parameters()).device
    _replace(model, path, ScatterBlock(block, kept.nonzero().flatten().to(device)))


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    owner, leaf = _owner(model, path)
    owner._modules[leaf] = module


def _pack(tensors: Sequence[Tensor], kept: Sequence[RowsCols]) -> list[Tensor]:
    """The kept rows and columns of each tensor, in its own memory format: one native call for a model."""
    if not tensors:
        return []
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        # An optimizer's states may lie elsewhere.
        packed: list[Any] = [None] * len(tensors)
        for device in devices:
            there = [i for i, tensor in enumerate(tensors) if tensor.device == device]
            for i, small in zip(
                there, _pack([tensors[i] for i in there], [kept[i] for i in there]), strict=True
            ):
                packed[i] = small
        return packed
    # The tensors of a model share few index tensors: each is moved once.
    moved: dict[int, Tensor] = {}
    for index in (index for pair in kept for index in pair if index is not None):
        if id(index) not in moved:
            moved[id(index)] = index.to(tensors[0].device)
    rows, cols = (
        [None if index is None else moved[id(index)] for index in side] for side in zip(*kept, strict=True)
    )
    packed = backend_for(tensors[0].device).pack(tensors, rows, cols)
    # The kernels keep the format; torch's own indexing (for meta tensors, say) does not.
    return [
        small.contiguous(memory_format=torch.channels_last) if _is_channels_last(tensor) else small
        for small, tensor in zip(packed, tensors, strict=True)
    ]


def _is_channels_last(tensor: Tensor) -> bool:
    return (
        tensor.ndim == 4
        and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=torch.channels_last)
    )


def masked_model(model: nn.Module, mask: Mask, *, structure: Structure | None = None) -> nn.Module:
    """A copy of ``model`` at full shapes that computes what the pruned model computes, in eval and train mode.

    Everything that a removed unit owns is zeroed: its weights, its bias, its normalisation's scale and shift
    AND its column in whatever reads it, so that it adds nothing anywhere. For comparing and teaching; it
    saves no time.

    Args:
        model: dense or already pruned; not changed.
        mask: of exactly the layers that ``find_structure`` finds in the model.
        structure: of the model as it is now; None finds it.

    Raises:
        ValueError: the mask does not fit the model.
    """
    model = unwrapped(model)
    structure = structure or structure_for(model, mask)
    mask.check(structure)
    masked = copy.deepcopy(model)
    _zero(masked, structure, mask)
    return masked


@torch.no_grad()
def _zero(model: nn.Module, structure: Structure, mask: Mask) -> None:
    """Zero, in place, what every removed unit owns."""
    state = model.state_dict(keep_vars=True)
    for layer in structure:
        removed = (~mask.layers[layer.name]).nonzero().flatten()
        for cut in layer.slices:
            tensor = state[cut.tensor]
            # An index buffer of scope `all` stays: zeroed filters add zeros there.
            if tensor.is_floating_point():
                value = 1.0 if cut.tensor.endswith("running_var") else 0.0
                tensor.index_fill_(cut.dim, cut.places(removed, layer.units).to(tensor.device), value)


def _cut(model: nn.Module, structure: Structure, mask: Mask) -> None:
    """Remove, in place, what every removed unit owns, of a model that nothing trains."""
    plan = _Plan(model, structure, mask, [])
    plan.packing.pack()
    plan.apply()


_SURGERY = gate.Surgery(_zero, _cut)


def _verify(structure: Structure, model: nn.Module, images: Tensor | None) -> None:
    gate.verify(structure, unwrapped(model), _SURGERY, images)


Structure.verifier = _verify


def expand_state(
    state: Mapping[str, Tensor],
    structure: Structure,
    mask: Mask,
    base: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """A pruned model's state dict at the dense model's shapes.

    Args:
        state: of the pruned model.
        structure: of the dense model.
        mask: of the dense model (composed, if it was pruned more than once).
        base: a dense state dict whose values stand at the removed places; None puts zeros there (ones for
            running variances), as in ``masked_model``. So they do where ``base`` has another shape, as the head of
            another task.

    Returns:
        New tensors on ``state``'s devices; names as in the dense model.

    Raises:
        ValueError: a tensor is missing or does not have the shape that the mask says.
    """
    index = mask.index_in(structure)
    # Only a pruned model has these buffers.
    own = {f"{layer.scatter}.kept" for layer in structure if layer.scatter is not None}
    full = {name: tensor.clone() for name, tensor in state.items() if name not in index and name not in own}
    sizes = {(cut.tensor, cut.dim): cut.size(layer.units) for layer in structure for cut in layer.slices}
    for name, (rows, cols) in index.items():
        if name not in state:
            raise ValueError(f"expand_state: expected a tensor {name!r}, got none")
        small = state[name].detach()
        wanted, shape = list(small.shape), list(small.shape)
        for dim, kept in enumerate((rows, cols)):
            if kept is not None:
                wanted[dim], shape[dim] = kept.numel(), sizes[name, dim]
        if list(small.shape) != wanted:
            raise ValueError(
                f"expand_state: {name}: expected shape {tuple(wanted)}, got {tuple(small.shape)}"
            )
        if base is not None and list(base[name].shape) == shape:
            full[name] = base[name].detach().to(small.device, small.dtype, copy=True)
        else:
            full[name] = small.new_full(shape, 1.0 if name.endswith("running_var") else 0.0)
        to_device = [None if index is None else index.to(small.device) for index in (rows, cols)]
        backend_for(small.device).unpack([small], [full[name]], to_device[:1], to_device[1:])
    return full
