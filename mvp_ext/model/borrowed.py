"""A model that belongs to the caller: lent for one call, and given back as it was, also when the call fails."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

# What timm's models keep from one forward pass for the next ones in eval mode: it would outlive the weights it is of.
_CACHE = "attention_bias_cache"


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what torch or timm put around it: torch.compile, (Distributed)DataParallel, averages of weights.

    Around it names of parts and tensors have a prefix, and the model's own methods are hidden. ``model`` itself where
    there is nothing around it.
    """
    around = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)
    # By name and place, where a look at the class itself would import much.
    while True:
        if "_orig_mod" in model._modules:
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, around) or type(model).__module__ == "timm.utils.model_ema":
            model = model.module  # type: ignore[assignment]
        else:
            return model


def twin_of(model: nn.Module) -> nn.Module:
    """A copy of a model's parts, in eval mode, that shares its tensors: hooks and heads put on it are its alone."""
    memo = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo).eval()


@contextmanager
def borrowed(model: nn.Module, *, compiled: bool = False) -> Iterator[nn.Module]:
    """For a while every part of a model is in eval mode; afterwards model and caller are as they were.

    Given back are each part's own mode, which parameters require a gradient, hooks that were added, and the state of
    torch's random numbers. Gradients are the caller's: what borrows a model takes its own by ``torch.autograd.grad``,
    which leaves every ``.grad`` alone. Nothing is computed twice by gradient checkpointing meanwhile.

    Args:
        model: of any kind; wrapped ones too.
        compiled: let torch.compile's code run. Else nothing runs compiled: such code does not see new hooks, and is
            made anew for every mode.

    Yields:
        What runs: the model as it is where ``compiled``, else without what is around it (``unwrapped``).
    """
    parts = list(model.modules())
    modes = [(part, part.training) for part in parts]
    # In their dictionaries: most parts do not have these, and a look at an attribute that is not there is slow.
    flags = [
        (values, {name: values[name] for name in ("grad_checkpointing", _CACHE) if name in values})
        for values in map(vars, parts)
    ]
    hooks = [(each, set(each)) for part in parts for each in (part._forward_hooks, part._forward_pre_hooks)]
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for part in parts:
            # Not eval(): a model's own may do more than that.
            part.training = False
        for values, names in flags:
            values.update({name: {} if name == _CACHE else False for name in names})
        with own_random_numbers(), nullcontext() if compiled else _uncompiled():
            yield model if compiled else unwrapped(model)
    finally:
        for part, mode in modes:
            part.training = mode
        for values, before in flags:
            values.update(before)
        for of_part, known in hooks:
            for added in of_part.keys() - known:
                del of_part[added]
        for parameter, was in required:
            if parameter.requires_grad != was:
                parameter.requires_grad_(was)


@contextmanager
def own_random_numbers() -> Iterator[None]:
    """Torch's random numbers, on every device in use, go on afterwards as if nothing had been drawn meanwhile."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices, device_type="cuda"):
        yield


@contextmanager
def with_gradients() -> Iterator[None]:
    """Gradients can be taken, also where the caller has turned them off (no_grad, inference_mode)."""
    # Weights that autocast has cast already were cast without a gradient there.
    torch.clear_autocast_cache()
    # In this order: the end of inference mode turns gradients on, and nothing else does inside of it.
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _uncompiled() -> AbstractContextManager[Any]:
    """A context in which torch.compile's functions run as they were written."""
    # Nothing was compiled where its compiler, which takes a second to import, is not there.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
