"""Modules of others that cannot compute with fewer units than they were built for, and ours that take their place.

Ours hold the very parts and tensors of the one that they take over, under its names, so that the names in the state
dict stay as they are, and compute the same with any number of units.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from mvp_ext.model.narrow.grn import GlobalResponseNorm
from mvp_ext.model.structure import UnsupportedModelError
from mvp_ext.timm_compat import import_timm

# Class → what makes ours of one of its modules; beside those of timm, which only a call imports.
NARROW: dict[type[nn.Module], Callable[[nn.Module], nn.Module]] = {}


def narrow(module: nn.Module) -> nn.Module:
    """Ours in the place of ``module``; ``module`` itself if it is ours already.

    Raises:
        UnsupportedModelError: there is none of ours for its class.
    """
    if type(module).__module__.startswith(__name__):
        return module
    for known, ours in {**NARROW, **_of_timm()}.items():
        if type(module).forward is known.forward:
            return ours(module)
    raise UnsupportedModelError(
        f"{type(module).__name__}: expected a module that can be narrower, and there is none of ours for it"
    )


def _of_timm() -> dict[type[nn.Module], Callable[[nn.Module], nn.Module]]:
    layers = import_timm().layers
    return {layers.grn.GlobalResponseNorm: GlobalResponseNorm, layers.BlurPool2d: _blur_pool}


def _blur_pool(pool: Any) -> nn.Module:
    """timm's own, for any number of channels: its filter is the same for each."""
    blur = type(pool)(None, pool.filt_size, pool.stride, pool.pad_mode)
    return blur.to(pool.filt.device, pool.filt.dtype).train(pool.training)
