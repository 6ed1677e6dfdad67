"""Small models as ``load_pruned`` gives them, made without training."""

from __future__ import annotations

from typing import Any

from tiny import tiny_model

from mvp_ext.model.card import ModelCard
from mvp_ext.model.checkpoint import PrunedCheckpoint
from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.preprocessing import Preprocessing
from mvp_ext.model.surgery import prune_model

NAMES = ("ant", "bee", "cat", "dog", "élan")
MODELS = [
    ("test_resnet", "inner"),
    ("test_resnet", "all"),
    ("test_vit", "heads+mlp"),
    ("test_resnet", "stream"),
]


def small_model(name: str, scope: str, *, size: int = 32, **kwargs: Any) -> PrunedCheckpoint:
    """Half the units of ``tiny_model``; five classes; sees images of ``size`` pixels. A ViT has two blocks."""
    if "vit" in name:
        kwargs = {"depth": 2, **kwargs}
    model = tiny_model(name, img_size=size, **kwargs)
    structure = find_structure(model, scope)
    mask = Mask.random(structure, 0.5, seed=0)
    see = Preprocessing(size, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    card = ModelCard(see, NAMES, "animals", {"accuracy": 0.75}, {"method": 'a "name" & <more>\n'})
    return PrunedCheckpoint(prune_model(model, mask).eval(), mask, structure, card=card)
