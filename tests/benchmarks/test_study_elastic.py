"""The study's elastic weights: interrupted, where they learn, and cut at any ratio."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from digits import digits_task, tiny_backbone

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from study.elastic import ElasticOptions, build_elastic, cut_elastic

from mvp_ext.model.budget import kept_counts
from mvp_ext.model.checkpoint import load_pruned
from mvp_ext.model.families import find_structure
from mvp_ext.pruning.build import build_zoo
from mvp_ext.pruning.job import Job, find_neighbours, voted_mask
from mvp_ext.pruning.prune import prune
from mvp_ext.pruning.settings import Schedule, Settings
from mvp_ext.train.backbone import Backbone
from mvp_ext.train.recipe import Recipe
from mvp_ext.train.refit import reestimate_statistics
from mvp_ext.zoo.zoo import Zoo

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPE = Recipe(batch_size=8, precision="float32")
SCHEDULE = Schedule(share=0.5, steps_per_round=1, final_steps=2)
TASKS = [digits_task((3, 4, 5), "b", seed=1), digits_task((0, 1, 6), "a", seed=2)]
CASES = [("test_resnet", "inner"), ("test_resnet", "all"), ("test_vit", "heads"), ("test_vit", "heads+mlp")]


def sensible_backbone(name: str = "test_resnet") -> Backbone:
    """With statistics of real images, so that features say something."""
    torch.manual_seed(0)
    backbone = tiny_backbone(name)
    images = digits_task().data.train_images
    reestimate_statistics(backbone.model, images, backbone.preprocessing, precision="float32")
    return backbone


def zoo_of(backbone: Backbone, folder: Path, scope: str | None = None) -> Zoo:
    zoo = Zoo(folder)
    build_zoo(backbone, TASKS, zoo, Settings(keep=0.5, scope=scope, schedule=SCHEDULE, recipe=RECIPE))
    return zoo


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return sensible_backbone()


def state_of(path: Path) -> dict[str, torch.Tensor]:
    return load_pruned(path).model.state_dict()


def test_an_interrupted_elastic_goes_on(backbone, tmp_path, monkeypatch):
    monkeypatch.setattr("mvp_ext.train.resume.SAVE_EVERY", 2)
    masks = [entry.mask for entry in zoo_of(backbone, tmp_path / "zoo").entries()]
    assert len(masks) == 2
    paths = [tmp_path / f"{name}.safetensors" for name in ("whole", "parts")]

    def stop(done, total):
        if done == 5:
            raise KeyboardInterrupt

    options = {"steps": 7, "masks": masks, "recipe": RECIPE, "options": ElasticOptions(draws=2)}
    whole = build_elastic(backbone, TASKS, paths[0], **options)
    with pytest.raises(KeyboardInterrupt):
        build_elastic(backbone, TASKS, paths[1], progress=stop, **options)
    seen = []
    resumed = build_elastic(
        backbone, TASKS, paths[1], progress=lambda done, total: seen.append(done), **options
    )
    assert seen == [5, 6, 7]
    # What was redone was not booked.
    assert (whole.steps, whole.train_flops) == (7, resumed.train_flops)
    a, b = (state_of(path) for path in paths)
    assert a.keys() == b.keys()
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    assert build_elastic(backbone, TASKS, paths[0], **options) is None
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["parts.safetensors", "whole.safetensors"]


def test_elastic_learns_only_where_it_was_cut(backbone, tmp_path):
    """One step under one mask: weights of a unit that the mask lacks get no gradient; decay is off."""
    recipe = replace(RECIPE, weight_decay=0.0)
    path, options = tmp_path / "elastic.safetensors", ElasticOptions(smallest=0.5, largest=0.5)
    build_elastic(backbone, TASKS, path, steps=1, recipe=recipe, options=options)
    trained, dense = state_of(path), backbone.model.state_dict()
    structure = find_structure(backbone.model)
    for layer, count in zip(structure, kept_counts(structure, 0.5), strict=True):
        name = layer.slices[0].tensor
        changed = (trained[name] != dense[name]).flatten(1).any(1)
        assert 0 < int(changed.sum()) <= count


@pytest.mark.parametrize(("name", "scope"), CASES, ids="-".join)
def test_elastic_is_cut_at_any_ratio(name, scope, tmp_path):
    backbone = sensible_backbone(name)
    dense = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    zoo, path = zoo_of(backbone, tmp_path / "zoo", scope), tmp_path / "elastic.safetensors"
    masks = [entry.mask for entry in zoo.entries()]
    build_elastic(backbone, TASKS, path, masks=masks, scope=scope, steps=2, recipe=RECIPE)

    def elastic(job: Job):
        mask = voted_mask(job, find_neighbours(job, zoo))
        return cut_elastic(path, job, mask), mask

    for keep in (0.25, 0.5, 0.75):
        settings = Settings(keep=keep, scope=scope, schedule=SCHEDULE, recipe=RECIPE)
        result = prune(backbone, digits_task(), settings=settings, method=elastic, steps=2)
        expected = kept_counts(result.structure, keep)
        assert tuple(result.mask.kept.values()) == expected
        assert find_structure(result.model, scope).units_per_layer == expected
        assert result.cost.similarity_flops > 0 == result.cost.score_flops
        assert result.cost.steps == 2
        assert len(result.neighbours) == 2
    assert all(torch.equal(value, dense[name]) for name, value in backbone.model.state_dict().items())


def test_options_out_of_range() -> None:
    for options in ({"smallest": 0.5, "largest": 0.4}, {"draws": 0}, {"voters": 0}, {"voted": 1.5}):
        with pytest.raises(ValueError, match="ElasticOptions: expected"):
            ElasticOptions(**options)
