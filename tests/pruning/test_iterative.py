"""Iterative pruning: what is removed when, and that nothing but the removal and the training happens."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from digits import digits_task, tiny_backbone
from tiny import tiny_images

from mvp_ext.model.budget import kept_counts
from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.surgery import masked_model
from mvp_ext.pruning import iterative
from mvp_ext.pruning.iterative import planned_steps, prune_iteratively, round_ratios
from mvp_ext.pruning.scores import score_units
from mvp_ext.pruning.settings import Schedule, Settings
from mvp_ext.train.backbone import extract_features, set_head
from mvp_ext.train.cost import Cost
from mvp_ext.train.heads import class_mean_head
from mvp_ext.train.recipe import Recipe

RECIPE = Recipe(batch_size=6, precision="float32")
STILL = replace(RECIPE, learning_rate=0.0)
pytestmark = pytest.mark.usefixtures("one_thread")
SCOPES = [("test_resnet", "inner"), ("test_resnet", "all"), ("test_vit", "heads"), ("test_vit", "heads+mlp")]
scopes = pytest.mark.parametrize(("name", "scope"), SCOPES, ids=["-".join(s) for s in SCOPES])


@pytest.fixture(scope="module")
def data():
    return digits_task().split()


def run(backbone, data, scope, keep, schedule, *, recipe=RECIPE, align=8, seed=0, **options):
    settings = Settings(keep, scope, align, schedule, recipe, seed)
    return prune_iteratively(backbone, data, settings, **options)


def equal_states(a, b) -> bool:
    other = b.state_dict()
    return a.state_dict().keys() == other.keys() and all(
        torch.equal(value, other[name]) for name, value in a.state_dict().items()
    )


# ---- how many, when


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.3, 0.1, 0.011])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_rounds_reach_the_ratio_and_no_more(keep, share):
    rounds = Schedule(share=share).rounds(keep)
    assert (1 - share) ** rounds <= keep + 1e-9
    assert (1 - share) ** (rounds - 1) > keep - 1e-9
    assert rounds == math.ceil(math.log(keep) / math.log(1 - share) - 1e-9)
    assert Schedule(share=share).rounds(1.0) == 0


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_share_outside_its_range(share):
    with pytest.raises(ValueError, match=r"share: expected a value in \(0, 1\)"):
        Schedule(share=share)


@scopes
def test_counts_after_every_round(data, name, scope):
    backbone = tiny_backbone(name)
    structure = find_structure(backbone.model, scope)
    schedule = Schedule(share=0.3, steps_per_round=1, final_steps=1, criterion="l1")
    seen, keep, align = [], 0.3, 8
    model, mask = run(
        backbone,
        data,
        scope,
        keep,
        schedule,
        align=align,
        on_step=lambda model, done: seen.append((done, find_structure(model, scope).units_per_layer)),
    )
    settings = Settings(keep, scope, align, schedule)
    ratios = round_ratios(structure, settings)
    assert ratios == sorted(ratios, reverse=True)
    expected = [kept_counts(structure, ratio, align) for ratio in ratios]
    assert [counts for _, counts in seen] == [*expected, expected[-1]]
    assert [done for done, _ in seen] == list(range(1, planned_steps(structure, settings) + 1))
    assert tuple(mask.kept.values()) == kept_counts(structure, keep, align)
    assert find_structure(model, scope).units_per_layer == kept_counts(structure, keep, align)


def test_rounds_that_would_remove_nothing_are_left_out():
    """Four heads: of the rounds at 0.9, 0.81, …, only those that change a count are run."""
    structure = find_structure(tiny_backbone("test_vit").model)
    ratios = round_ratios(structure, Settings(keep=0.25))
    assert [kept_counts(structure, ratio)[0] for ratio in ratios] == [3, 2, 1]
    assert round_ratios(structure, Settings(keep=1.0)) == []


def test_keep_everything(data):
    backbone = tiny_backbone()
    model, mask = run(backbone, data, None, 1.0, Schedule(final_steps=1))
    assert mask == Mask.full(find_structure(backbone.model))
    assert sum(p.numel() for p in model.layer1.parameters()) == sum(
        p.numel() for p in backbone.model.layer1.parameters()
    )


# ---- which


@pytest.mark.parametrize("criterion", ["l2", "fpgm"])
def test_the_lowest_units_go(data, criterion):
    """One round: exactly the mask of the scores."""
    backbone = tiny_backbone()
    structure = find_structure(backbone.model)
    schedule = Schedule(share=0.5, steps_per_round=0, final_steps=0, criterion=criterion)
    _, mask = run(backbone, data, None, 0.5, schedule)
    assert mask == Mask.from_scores(structure, score_units(backbone.model, structure, criterion), 0.5)


@scopes
def test_without_training_it_is_the_masked_dense_model(data, name, scope):
    """The composed mask tells which weights were really kept, through all rounds: outputs are equal."""
    backbone = tiny_backbone(name)
    schedule = Schedule(share=0.3, steps_per_round=0, final_steps=0)
    model, mask = run(backbone, data, scope, 0.3, schedule, align=4)
    dense = backbone.copy_model()
    features = extract_features(dense, data.train_images, backbone.preprocessing, "float32")
    set_head(dense, class_mean_head(features, data.train_labels, 3))
    images = tiny_images(dense) if name == "test_vit" else torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected = masked_model(dense.eval(), mask)(images)
        got = model.eval()(images)
        whole = dense(images)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert not torch.allclose(got, whole, rtol=1e-2)


@scopes
def test_at_learning_rate_zero_every_weight_is_a_dense_one(data, name, scope):
    backbone = tiny_backbone(name)
    structure = find_structure(backbone.model, scope)
    schedule = Schedule(share=0.4, steps_per_round=1, final_steps=2)
    model, mask = run(backbone, data, scope, 0.4, schedule, recipe=STILL)
    index, dense = mask.index_in(structure), dict(backbone.model.named_parameters())
    head = model.get_classifier()
    for key, parameter in model.named_parameters():
        if parameter is head.weight or parameter is head.bias:
            continue
        rows, cols = index.get(key, (None, None))
        expected = dense[key].detach()
        expected = expected if rows is None else expected[rows]
        expected = expected if cols is None else expected[:, cols]
        assert torch.equal(parameter, expected), key


@pytest.mark.parametrize(("name", "scope"), [("test_resnet", "all"), ("test_vit", "heads+mlp")])
@pytest.mark.parametrize("keep", [0.5, 0.02])
def test_global_ranking_shares_units_out_and_empties_no_layer(data, name, scope, keep):
    backbone = tiny_backbone(name)
    structure = find_structure(backbone.model, scope)
    schedule = Schedule(share=0.6, steps_per_round=0, final_steps=0, criterion="l2", global_ranking=True)
    model, mask = run(backbone, data, scope, keep, schedule, align=1)
    assert min(mask.kept.values()) >= 1
    assert find_structure(model, scope).units_per_layer == tuple(mask.kept.values())
    least = max(len(structure), math.floor(keep * structure.total_units + 0.5))
    assert abs(sum(mask.kept.values()) - least) <= 1
    if keep == 0.5:
        shares = [mask.kept[layer.name] / layer.units for layer in structure]
        assert max(shares) - min(shares) > 0.1


@scopes
def test_no_layer_is_emptied_at_the_smallest_ratio(data, name, scope):
    schedule = Schedule(share=0.9, steps_per_round=0, final_steps=0, criterion="random")
    _, mask = run(tiny_backbone(name), data, scope, 1e-4, schedule, align=1)
    assert set(mask.kept.values()) == {1}


# ---- what stays


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_the_backbone_is_left_as_it_was(data, name):
    backbone = tiny_backbone(name)
    before = backbone.copy_model()
    run(backbone, data, None, 0.5, Schedule(share=0.5, steps_per_round=2, final_steps=1))
    assert equal_states(backbone.model, before)


@pytest.mark.parametrize(("name", "scope"), [("test_resnet", "all"), ("test_vit", "heads+mlp")])
def test_the_optimizer_goes_on_through_the_rounds(data, name, scope, monkeypatch):
    """Adam's moments are cut with their parameters: the step count never starts again, shapes follow."""
    made = []

    class Watched(iterative.Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(iterative, "Trainer", Watched)

    def check(model, done):
        (trainer,) = made
        live = {id(p) for p in model.parameters()}
        held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in held} == live
        assert set(map(id, trainer.optimizer.state)) <= live
        for parameter in held:
            state = trainer.optimizer.state[parameter]
            assert int(state["step"]) == done
            assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape

    run(
        tiny_backbone(name),
        data,
        scope,
        0.3,
        Schedule(share=0.4, steps_per_round=2, final_steps=1),
        on_step=check,
    )


def test_the_seed_decides_everything(data):
    schedule = Schedule(share=0.5, steps_per_round=1, final_steps=2)
    results = []
    for seed, global_seed in ((0, 3), (0, 4), (1, 3)):
        torch.manual_seed(global_seed)
        results.append(run(tiny_backbone(), data, None, 0.4, schedule, seed=seed))
    assert results[0][1] == results[1][1]
    assert equal_states(results[0][0], results[1][0])
    assert not equal_states(results[0][0], results[2][0])


def test_given_features_change_nothing_but_the_cost(data):
    backbone = tiny_backbone()
    features = extract_features(backbone.model, data.train_images, backbone.preprocessing, "float32")
    schedule = Schedule(share=0.5, steps_per_round=1, final_steps=1)
    costs = [Cost(), Cost()]
    first = run(backbone, data, None, 0.4, schedule, cost=costs[0])
    second = run(backbone, data, None, 0.4, schedule, cost=costs[1], features=features)
    assert equal_states(first[0], second[0])
    assert costs[0].refit_flops > costs[1].refit_flops
    for field in ("steps", "train_flops", "score_flops"):
        assert getattr(costs[0], field) == getattr(costs[1], field) > 0


# ---- interrupted


class Stop(Exception):
    pass


@pytest.fixture
def interrupted(data, tmp_path, monkeypatch):
    """``interrupted(at, **options)``: start a run that is stopped after so many steps; returns its file."""
    monkeypatch.setattr("mvp_ext.train.resume.SAVE_EVERY", 2)
    path = tmp_path / "run.partial"
    schedule = Schedule(share=0.5, steps_per_round=1, final_steps=4)

    def go(name="test_resnet", scope="inner", *, at=None, keep=0.4, seed=0, seen=None):
        def stepped(model, done):
            if seen is not None:
                seen.append(done)
            if done == at:
                raise Stop

        return run(tiny_backbone(name), data, scope, keep, schedule, seed=seed, on_step=stepped, resume=path)

    go.path = path
    return go


@pytest.mark.parametrize(("name", "scope"), [("test_resnet", "all"), ("test_vit", "heads")])
def test_an_interrupted_run_goes_on_with_the_same_numbers(interrupted, name, scope):
    whole = interrupted(name, scope)
    assert not interrupted.path.exists()
    steps, at = [], 5
    with pytest.raises(Stop):
        interrupted(name, scope, at=at)
    assert interrupted.path.exists()
    resumed = interrupted(name, scope, seen=steps)
    assert resumed[1] == whole[1]
    assert equal_states(resumed[0], whole[0])
    last = 4 + len(
        round_ratios(
            find_structure(tiny_backbone(name).model, scope), Settings(keep=0.4, schedule=Schedule(share=0.5))
        )
    )
    assert 1 < steps[0] <= at  # not from the beginning
    assert steps == list(range(steps[0], last + 1))
    assert not interrupted.path.exists()


@pytest.mark.parametrize("other", [{"keep": 0.7}, {"name": "test_vit", "scope": "heads"}])
def test_the_state_of_another_run_is_not_taken_up(interrupted, other):
    whole = interrupted(**other)
    with pytest.raises(Stop):
        interrupted(at=5)
    assert interrupted.path.exists()
    result = interrupted(**other)
    assert result[1] == whole[1]
    assert equal_states(result[0], whole[0])
