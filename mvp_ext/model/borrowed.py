"""A model that belongs to the caller: lent for one call, and given back as it was, also when the call fails."""

from __future__ import annotations

import torch
from torch import nn


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
