"""Modules of others that cannot compute with fewer units than they were built for, and ours that take their place.

Ours hold the very parts and tensors of the one that they take over, under its names, so that the names in the state
dict stay as they are, and compute the same with any number of units.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from torch import nn

from mvp_ext.model.structure import UnsupportedModelError

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
    for known, ours in NARROW.items():
        if type(module).forward is known.forward and isinstance(module, known):
            return ours(module)
    raise UnsupportedModelError(
        f"{type(module).__name__}: expected a module that can be narrower, and there is none of ours for it"
    )
