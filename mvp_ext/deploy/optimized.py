"""A model for inference in PyTorch itself: batch norms folded into convolutions, weights as the kernels read them."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mvp_ext.model.borrowed import unwrapped
from mvp_ext.timm_compat import import_timm


def optimized(model: nn.Module) -> nn.Module:
    """A copy of ``model`` for inference: it computes the same in eval mode, in less time.

    Each batch norm that reads one convolution, and alone reads it, is folded into it; the activation of timm's
    BatchNormAct2d stays. Weights are in channels_last, and so is what the model computes. The copy is of the same class
    with all of its methods, in eval mode and without gradients; it is not for training, saving with ``save_pruned`` or
    more pruning. A model without batch norms (a ViT) has nothing to fold.

    Args:
        model: of any mode, on any device; not changed.

    Raises:
        ValueError: ``torch.fx`` cannot trace the model as far as its batch norms: what they read is not known.
    """
    fast: Any = copy.deepcopy(unwrapped(model)).eval()
    for conv, norm in _pairs(fast):
        old: Any = fast.get_submodule(norm)
        _replace(fast, conv, fuse_conv_bn_eval(fast.get_submodule(conv), old))
        _replace(fast, norm, getattr(old, "act", None) or nn.Identity())
    return fast.eval().requires_grad_(False).to(memory_format=torch.channels_last)


class _Tracer(fx.Tracer):
    """Looks into modules that have batch norms in them, no other: attention, say, need not be traceable."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _BatchNorm) or not _has_norms(m)


def _has_norms(module: nn.Module) -> bool:
    return any(isinstance(part, _BatchNorm) for part in module.modules())


def _pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Paths of each convolution and of the batch norm that can be folded into it."""
    if not _has_norms(model):
        return []
    try:
        graph = _Tracer().trace(model)
    except Exception as error:
        raise ValueError(f"optimized: model: torch.fx cannot trace it ({error})") from error
    parts: dict[Any, nn.Module] = dict(model.named_modules())
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    pairs = []
    for node in graph.nodes:
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or {node.op, source.op} != {"call_module"}:
            continue
        alone = len(source.users) == calls[node.target] == calls[source.target] == 1
        if alone and _is_conv(parts[source.target]) and _is_norm(parts[node.target]):
            pairs.append((str(source.target), str(node.target)))
    return pairs


def _is_conv(module: nn.Module) -> bool:
    return type(module) is nn.Conv2d and not _has_hooks(module)


def _is_norm(module: nn.Module) -> bool:
    known = (nn.BatchNorm2d, nn.SyncBatchNorm, import_timm().layers.BatchNormAct2d)
    return type(module) in known and module.running_var is not None and not _has_hooks(module)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _replace(model: nn.Module, path: str, new: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, new)
