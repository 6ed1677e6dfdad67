"""Settings: checked where they are made, stored in a zoo, taken from it unless told otherwise."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from digits import digits_task, tiny_backbone

from mvp_ext.model.families import find_structure
from mvp_ext.pruning.build import build_refined_zoo, build_zoo
from mvp_ext.pruning.prune import prune
from mvp_ext.pruning.settings import Schedule, Settings, VoteOptions
from mvp_ext.train.recipe import Recipe
from mvp_ext.zoo.zoo import Zoo

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = Settings(
    keep=0.5,
    scope="all",
    align=4,
    schedule=Schedule(share=0.5, steps_per_round=1, final_steps=5),
    recipe=Recipe(batch_size=8, precision="float32"),
    seed=3,
)
TASKS = [digits_task((3, 4, 5), "b", seed=1), digits_task((0, 1, 6), "a", seed=2)]


def test_settings_survive_json():
    for settings in (Settings(), SETTINGS):
        assert Settings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


@pytest.mark.parametrize(
    "stored", [{"kept": 0.5}, {"schedule": {"pace": 1}}, {"recipe": {"rate": 1}}, {"keep": 2.0}]
)
def test_what_is_no_description_of_settings(stored):
    with pytest.raises(ValueError, match="Settings"):
        Settings.from_dict(stored)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, r"keep: expected a ratio in \(0, 1\], got 0.0"),
        ({"keep": float("nan")}, "keep: expected a ratio"),
        ({"align": 0}, "align: expected at least 1, got 0"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Settings(**options)


def test_resolved_settings_leave_nothing_open():
    model = tiny_backbone("test_vit").model
    resolved = Settings().resolved(model)
    assert (resolved.scope, resolved.recipe) == ("heads", Recipe.for_model(model))
    assert SETTINGS.resolved(tiny_backbone().model) == SETTINGS


@pytest.mark.parametrize("build", [build_zoo, build_refined_zoo])
def test_a_zoo_brings_its_settings(tmp_path, build):
    """Later entries and pruned models are as the first ones, without a word; and otherwise where one says so."""
    backbone, zoo = tiny_backbone(), Zoo(tmp_path / "zoo")
    assert Settings.of_zoo(zoo) == Settings.of_zoo(None) == Settings()
    build(backbone, TASKS[:1], zoo, SETTINGS)
    # Opened again, as another process would.
    zoo = Zoo(zoo.path)
    assert Settings.of_zoo(zoo) == SETTINGS
    build(backbone, TASKS, zoo)
    assert len({tuple(entry.mask.kept.items()) for entry in zoo.entries()}) == 1
    assert Settings.of_zoo(zoo) == SETTINGS
    vote = VoteOptions(neighbours=2)
    task = digits_task((7, 8))
    result = prune(backbone, task, zoo, method="random", steps=1)
    assert result.keep == 0.5
    assert result.structure.scope == "all"
    assert result.mask.kept == zoo["a"].mask.kept
    assert prune(backbone, task, zoo, steps=1, vote=vote).mask.kept == zoo["a"].mask.kept
    other = prune(backbone, task, zoo, replace(SETTINGS, keep=0.25), method="random", steps=1)
    assert other.keep == 0.25
    assert sum(other.mask.kept.values()) < sum(result.mask.kept.values())


def test_without_a_zoo_the_family_decides():
    backbone = tiny_backbone("test_vit")
    result = prune(backbone, digits_task((7, 8)), method="random", steps=1)
    assert result.structure == find_structure(backbone.model)
    assert result.keep == Settings.keep


def test_numbers_of_numpy_are_numbers():
    settings = Settings(
        keep=np.float32(0.5),
        align=np.int64(4),
        seed=np.int32(3),
        schedule=Schedule(share=np.float16(0.25), final_steps=np.int64(7)),
        recipe=Recipe(learning_rate=np.float32(0.125), batch_size=np.int64(8)),
    )
    plain = Settings(0.5, None, 4, Schedule(0.25, final_steps=7), Recipe(0.125, batch_size=8), 3)
    assert Settings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings == plain
    assert type(VoteOptions(neighbours=np.int64(2), temperature=np.float32(1)).temperature) is float
