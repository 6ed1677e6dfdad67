"""Modules of others that cannot compute with fewer units than they were built for, and ours that take their place.

Ours hold the very parts and tensors of the one that they take over, under its names, so that the names in the state
dict stay as they are, and compute the same with any number of units.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from mvp_ext.model.narrow.grn import GlobalResponseNorm
from mvp_ext.model.structure import Structure, UnsupportedModelError
from mvp_ext.timm_compat import import_timm

# Class → what makes ours of one of its modules.
NARROW: dict[type[nn.Module], Callable[[nn.Module], nn.Module]] = {}


def narrow(module: nn.Module) -> nn.Module:
    """Ours in the place of ``module``; ``module`` itself if it is ours already.

    Raises:
        UnsupportedModelError: there is none of ours for its class.
    """
    if type(module).__module__.startswith(__name__):
        return module
    # Not before it is needed: timm is imported with it.
    importlib.import_module(f"{__name__}.attentions")
    for known, ours in {**NARROW, **_of_timm()}.items():
        if type(module).forward is known.forward and isinstance(module, known):
            return ours(module)
    raise UnsupportedModelError(
        f"{type(module).__name__}: expected a module that can be narrower, and there is none of ours for it"
    )


@contextlib.contextmanager
def in_their_place(model: nn.Module, structure: Structure) -> Iterator[None]:
    """Have ours in the place of all modules that ``structure`` says can be narrower, and give them back after.

    Both compute the same and hold the same tensors, but only ours call all their parts: torch's attention reads the
    weights of its last layer, and no hook there is called.
    """
    theirs = {path: model.get_submodule(path) for layer in structure for path in layer.narrowed}
    try:
        for path, module in theirs.items():
            model.set_submodule(path, narrow(module))
        yield
    finally:
        for path, module in theirs.items():
            model.set_submodule(path, module)


def _of_timm() -> dict[type[nn.Module], Callable[[nn.Module], nn.Module]]:
    layers = import_timm().layers
    return {layers.grn.GlobalResponseNorm: GlobalResponseNorm, layers.BlurPool2d: _blur_pool}


def _blur_pool(pool: Any) -> nn.Module:
    """timm's own, for any number of channels: its filter is the same for each."""
    blur = type(pool)(None, pool.filt_size, pool.stride, pool.pad_mode)
    return blur.to(pool.filt.device, pool.filt.dtype).train(pool.training)
