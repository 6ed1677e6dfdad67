"""Modules of others that cannot compute with fewer units than they were built for, and ours that take their place.

Ours hold the very parts, tensors and settings of the one that they take over, under its names, so that the names in the
state dict stay as they are, and compute the same with any number of units.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from mvp_ext.model.narrow.attention import NarrowBeitAttention, NarrowEvaAttention, NarrowMultiheadAttention
from mvp_ext.model.narrow.grn import NarrowGlobalResponseNorm
from mvp_ext.model.narrow.taken import Taken
from mvp_ext.model.structure import UnsupportedModelError
from mvp_ext.timm_compat import import_timm


def narrow(module: nn.Module) -> nn.Module:
    """Ours in the place of ``module``; ``module`` itself if it is ours already.

    Raises:
        UnsupportedModelError: there is none of ours for its class.
    """
    if isinstance(module, Taken):
        return module
    for known, ours in _known().items():
        if type(module).forward is known.forward:
            return ours(module)
    raise UnsupportedModelError(
        f"{type(module).__name__}: expected a module that can be narrower, and there is none of ours for it"
    )


def _known() -> dict[type[nn.Module], Callable[[nn.Module], nn.Module]]:
    """Class → what makes ours of one of its modules. Only a call imports timm."""
    timm = import_timm()
    return {
        nn.MultiheadAttention: NarrowMultiheadAttention,
        timm.models.eva.EvaAttention: NarrowEvaAttention,
        timm.models.beit.Attention: NarrowBeitAttention,
        timm.layers.grn.GlobalResponseNorm: NarrowGlobalResponseNorm,
        timm.layers.BlurPool2d: _blur_pool,
    }


def _blur_pool(pool: Any) -> nn.Module:
    """timm's own, for any number of channels: its filter is the same for each."""
    blur = type(pool)(None, pool.filt_size, pool.stride, pool.pad_mode)
    return blur.to(pool.filt.device, pool.filt.dtype).train(pool.training)
