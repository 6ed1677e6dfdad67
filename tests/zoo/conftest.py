"""What tests of zoos put into them."""

from __future__ import annotations

import pytest
import torch

from mvp_ext.model.create import create_model
from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.surgery import prune_model


@pytest.fixture(scope="module")
def small():
    """Two pruned models with their masks and structure."""
    made = []
    for seed in range(2):
        torch.manual_seed(seed)
        dense = create_model("test_resnet", num_classes=3)
        structure = find_structure(dense)
        mask = Mask.random(structure, 0.5, seed, align=1)
        made.append((prune_model(dense, mask, structure=structure).eval(), mask, structure))
    return made
