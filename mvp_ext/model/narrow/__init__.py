"""Modules of others that cannot compute with fewer units than they were built for, and ours that take their place.

Ours hold the very parts, tensors and settings of the one that they take over, under its names, so that the names in the
state dict stay as they are, and compute the same with any number of units.
"""

from __future__ import annotations

from torch import nn

from mvp_ext.model.narrow.attention import NarrowBeitAttention, NarrowEvaAttention, NarrowMultiheadAttention
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
    models = import_timm().models
    ours: tuple[tuple[type[nn.Module], type[Taken]], ...] = (
        (models.eva.EvaAttention, NarrowEvaAttention),
        (models.beit.Attention, NarrowBeitAttention),
        (nn.MultiheadAttention, NarrowMultiheadAttention),
    )
    for theirs, taken in ours:
        if type(module).forward is theirs.forward:
            return taken(module)
    raise UnsupportedModelError(
        f"{type(module).__name__}: expected a module that can be narrower, and there is none of ours for it"
    )
