"""Surgery: from a mask to real, smaller tensors, in the model and in whatever trains it, and back."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mvp_ext.model.borrowed import unwrapped
from mvp_ext.model.families import SCOPES, find_structure
from mvp_ext.model.mask import Mask, RowsCols
from mvp_ext.model.scatter_block import ScatterBlock
from mvp_ext.model.structure import Structure, UnsupportedModelError
from mvp_ext.ops import backend_for


def prune_model(
    model: nn.Module,
    mask: Mask,
    *,
    structure: Structure | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    ema: nn.Module | None = None,
) -> nn.Module:
    """Remove, in place, every unit that ``mask`` does not keep: the tensors really become smaller.

    The result is a plain timm module (scope `all`: with ``ScatterBlock`` for the
    blocks whose last convolution was cut). It can be pruned again, with the structure found anew and
    ``Mask.compose`` to say what is left of the first model.

    Parameters that shrink are NEW ``nn.Parameter`` objects. They take the old ones' place in the optimizer's
    groups, with their gradient and every state tensor of the parameter's shape (momentum, exp_avg, …) cut
    alike; step counts and learning rates stay, so training goes on as if the removed units had been masked,
    and a scheduler needs nothing. Hooks on the parameters themselves are lost. Either everything is cut or,
    on an error, nothing.

    Args:
        model: dense or already pruned.
        mask: of exactly the layers that ``find_structure`` finds in the model.
        structure: of the model as it is now; None finds it.
        optimizer: whatever trains the model; None if nothing does.
        ema: a model average to cut alike: the model itself, or a wrapper with it in ``.module`` (timm's
            ModelEmaV3, torch's AveragedModel).

    Returns:
        ``model``.

    Raises:
        ValueError: the mask does not fit the model.
        UnsupportedModelError: the structure is not the model's (or its average's) as it is now, or the optimizer keeps
            a state that cannot be cut.
    """
    structure = structure or structure_for(model, mask)
    plans = [_Plan(model, structure, mask, optimizer)]
    if ema is not None:
        inside = getattr(ema, "module", None)
        plans.append(_Plan(inside if isinstance(inside, nn.Module) else ema, structure, mask, None))
    for plan in plans:
        plan.apply()
    return model


def structure_for(model: nn.Module, mask: Mask) -> Structure:
    """The structure of ``model`` whose layers are the mask's; ValueError if no scope has them."""
    for scope in SCOPES:
        try:
            structure = find_structure(model, scope)
        except ValueError:
            continue
        if set(structure.names) == set(mask.layers):
            return structure
    # A model with a part that is not understood says so.
    find_structure(model)
    raise ValueError(f"no scope of this model has the layers of the mask ({', '.join(mask.layers)})")


class _Plan:
    """Everything that one model's surgery replaces, checked and cut before the first change."""

    def __init__(
        self, model: nn.Module, structure: Structure, mask: Mask, optimizer: torch.optim.Optimizer | None
    ) -> None:
        self.model, self.structure, self.mask, self.optimizer = model, structure, mask, optimizer
        self.index = mask.index_in(structure)
        structure.check(model)
        self.tensors: list[Tensor] = []
        self.kept: list[RowsCols] = []
        state = model.state_dict(keep_vars=True)
        for name, kept in self.index.items():
            tensor = state[name]
            self._add(tensor.detach(), kept)
            if tensor.grad is not None:
                self._add(tensor.grad, kept)
            for _, value in self._state_tensors(name, tensor):
                self._add(value, kept)
        self.old = {name: state[name] for name in self.index}
        with torch.no_grad():
            self.packed = _pack(self.tensors, self.kept)

    def _add(self, tensor: Tensor, kept: RowsCols) -> None:
        self.tensors.append(tensor)
        self.kept.append(kept)

    def _state_tensors(self, name: str, parameter: Tensor) -> list[tuple[str, Tensor]]:
        """The optimizer's state tensors of a parameter that have its shape."""
        if self.optimizer is None:
            return []
        found = []
        for key, value in self.optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor) or value.ndim == 0:
                continue
            if value.shape != parameter.shape:
                raise UnsupportedModelError(
                    f"optimizer {type(self.optimizer).__name__}: state {key!r} of {name}: expected a number or shape "
                    f"{tuple(parameter.shape)}, got {tuple(value.shape)}, which cannot be cut"
                )
            found.append((key, value))
        return found

    @torch.no_grad()
    def apply(self) -> None:
        """Put every packed tensor in its place: a parameter, then its gradient and states, as they were listed."""
        packed = iter(self.packed)
        replaced: dict[Tensor, nn.Parameter] = {}
        for name, old in self.old.items():
            states = self._state_tensors(name, old)
            tensor = next(packed)
            owner, leaf = _owner(self.model, name)
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(tensor, requires_grad=old.requires_grad)
                # Marks that others left on it, like "no weight decay".
                new.__dict__.update(old.__dict__)
                new.grad = next(packed) if old.grad is not None else None
                if self.optimizer is not None and old in self.optimizer.state:
                    state = self.optimizer.state.pop(old)
                    state.update({key: next(packed) for key, _ in states})
                    self.optimizer.state[new] = state
                replaced[old] = new
                owner._parameters[leaf] = new
            else:
                owner._buffers[leaf] = tensor
        if self.optimizer is not None:
            for group in self.optimizer.param_groups:
                group["params"] = [replaced.get(parameter, parameter) for parameter in group["params"]]
        for path in {name.rpartition(".")[0] for name in self.index}:
            _set_sizes(self.model.get_submodule(path))
        for layer in self.structure:
            kept = self.mask.layers[layer.name]
            if layer.kind == "head":
                attention: Any = self.model.get_submodule(layer.name)
                # The scale depends on head_dim only, and stays.
                attention.num_heads = int(kept.sum())
                attention.attn_dim = attention.num_heads * attention.head_dim
            elif layer.scatter is not None and not bool(kept.all()):
                _scatter(self.model, layer.scatter, kept)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _set_sizes(module: Any) -> None:
    """Make a module's own numbers say what its tensors are."""
    if isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels = module.weight.shape[:2]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
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
    owner, leaf = _owner(model, path)
    device = next(block.parameters()).device
    owner._modules[leaf] = ScatterBlock(block, kept.nonzero().flatten().to(device))


def _pack(tensors: Sequence[Tensor], kept: Sequence[RowsCols]) -> list[Tensor]:
    """The kept rows and columns of each tensor, in its own memory format: one native call for a model."""
    if not tensors:
        return []
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
    state = masked.state_dict(keep_vars=True)
    with torch.no_grad():
        for layer in structure:
            removed = (~mask.layers[layer.name]).nonzero().flatten()
            for cut in layer.slices:
                tensor = state[cut.tensor]
                # An index buffer of scope `all` stays: zeroed filters add zeros there.
                if tensor.is_floating_point():
                    value = 1.0 if cut.tensor.endswith("running_var") else 0.0
                    tensor.index_fill_(cut.dim, cut.places(removed, layer.units).to(tensor.device), value)
    return masked


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
            running variances), as in ``masked_model``.

    Returns:
        New tensors on ``state``'s devices; names as in the dense model.

    Raises:
        ValueError: a tensor is missing or does not have the shape that the mask says.
    """
    index = mask.index_in(structure)
    # Only a pruned model has these buffers.
    own = {f"{layer.scatter}.kept" for layer in structure if layer.scatter is not None}
    full = {name: tensor.clone() for name, tensor in state.items() if name not in index and name not in own}
    sizes = {
        (cut.tensor, cut.dim): layer.units * cut.block * cut.repeat
        for layer in structure
        for cut in layer.slices
    }
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
        if base is not None:
            full[name] = base[name].detach().to(small.device, small.dtype, copy=True)
        else:
            full[name] = small.new_full(shape, 1.0 if name.endswith("running_var") else 0.0)
        to_device = [None if index is None else index.to(small.device) for index in (rows, cols)]
        backend_for(small.device).unpack([small], [full[name]], to_device[:1], to_device[1:])
    return full
