"""From a backbone and a task to a small model, by every method; zoos that are built, interrupted and gone on with."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace

import pytest
import torch
from digits import digits_task, equal_weights, tiny_backbone
from torch import nn

from mvp_ext.data.batches import shuffled_indices
from mvp_ext.model.budget import kept_counts
from mvp_ext.model.checkpoint import load_pruned
from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.measure import count_flops
from mvp_ext.model.preprocessing import Preprocessing, to_batch
from mvp_ext.pruning.build import build_refined_zoo, build_universal, build_zoo, pooled_task, zoo_steps
from mvp_ext.pruning.clusters import build_clustered_zoo
from mvp_ext.pruning.iterative import planned_steps
from mvp_ext.pruning.methods import METHOD_NAMES, method_for
from mvp_ext.pruning.prune import MOST_STEPS, RunOptions, prune
from mvp_ext.pruning.settings import REFINED_WEIGHTING, Schedule, Settings, VoteOptions
from mvp_ext.pruning.vote import small_model
from mvp_ext.train.backbone import extract_features
from mvp_ext.train.recipe import Recipe
from mvp_ext.train.refit import reestimate_statistics
from mvp_ext.zoo.shared import START, UNIVERSAL
from mvp_ext.zoo.zoo import Zoo, ZooError

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPE = Recipe(batch_size=8, precision="float32")
SCHEDULE = Schedule(share=0.5, steps_per_round=1, final_steps=2)
BUILD = Settings(keep=0.5, schedule=SCHEDULE, recipe=RECIPE)
VOTING = ("refined", "mvp")
TASKS = [digits_task((3, 4, 5), "b", seed=1), digits_task((0, 1, 6), "a", seed=2)]
CASES = [
    ("test_resnet", "inner"),
    ("test_resnet", "all"),
    ("test_vit", "heads"),
    ("test_vit", "heads+mlp"),
    ("test_resnet", "stream"),
]


def sensible_backbone(name="test_resnet"):
    """With statistics of real images, so that features say something."""
    torch.manual_seed(0)
    backbone = tiny_backbone(name)
    reestimate_statistics(
        backbone.model, digits_task().data.train_images, backbone.preprocessing, precision="float32"
    )
    return backbone


@pytest.fixture(scope="module")
def backbone():
    return sensible_backbone()


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request, tmp_path_factory):
    """A backbone, a scope, and a zoo of two tasks with their universal model."""
    name, scope = request.param
    backbone = sensible_backbone(name)
    zoo = Zoo(tmp_path_factory.mktemp(name) / "zoo")
    build_zoo(backbone, TASKS, zoo, replace(BUILD, scope=scope))
    build_universal(backbone, TASKS, zoo, replace(BUILD, scope=scope))
    return backbone, scope, zoo


def make(backbone, task=None, zoo=None, **options):
    """``prune`` with small settings; options of its parts are told apart by their names."""
    settings = {
        k: options.pop(k) for k in ("keep", "scope", "align", "seed", "schedule", "recipe") if k in options
    }
    run = {k: options.pop(k) for k in [f.name for f in fields(RunOptions)] if k in options}
    if "neighbours" in options:
        options["vote"] = VoteOptions(neighbours=options.pop("neighbours"))
    task = task or digits_task()
    return prune(
        backbone, task, zoo, replace(BUILD, **settings), **{"steps": 2, **options}, run=RunOptions(**run)
    )


def states_equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


# ---- every method, end to end


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_every_method(case, method, tmp_path):
    backbone, scope, zoo = case
    dense = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    structure = find_structure(backbone.model, scope)
    if method == "refined":
        zoo = Zoo(tmp_path / "zoo")
        build_refined_zoo(backbone, TASKS, zoo, replace(BUILD, scope=scope))
    elif method == "clustered":
        zoo = Zoo(tmp_path / "zoo")
        build_clustered_zoo(backbone, TASKS, zoo, replace(BUILD, scope=scope), clusters=2)
    calls, task = [], digits_task()
    result = make(
        backbone,
        task,
        method=method,
        scope=scope,
        zoo=zoo,
        evaluate_at=(2,),
        on_step=lambda done, total: calls.append((done, total)),
    )
    # the shapes are those of the mask, the mask those of the budget
    expected = structure.units_per_layer if method == "dense" else kept_counts(structure, 0.5)
    assert tuple(result.mask.kept.values()) == expected
    assert find_structure(result.model, scope).units_per_layer == expected
    # numbers
    total = planned_steps(structure, BUILD) if method == "ifp" else 2
    assert calls == [(done, total) for done in range(1, total + 1)]
    assert result.cost.steps == total
    assert (result.cost.score_flops > 0) == (method in ("ifp", "one_shot"))
    assert (result.cost.similarity_flops > 0) == (method in (*VOTING, "clustered"))
    assert result.cost.train_flops > 0
    assert result.cost.refit_flops > 0
    assert result.neighbours == sorted(result.neighbours, key=lambda n: (-n[1], n[0]))  # nearest first
    if method != "clustered":
        assert {name for name, _ in result.neighbours} == ({"a", "b"} if method in VOTING else set())
    assert [point.step for point in result.history] == [2]
    json.dumps(result.summary())
    # accuracy is that of the model as it is, on the test images, to the last answer
    data, p = task.split(), result.preprocessing
    images = to_batch(data.test_images, p.size, p.mean, p.std)
    with torch.no_grad():
        answers = result.model(images)
    assert result.accuracy == pytest.approx(float((answers.argmax(1) == data.test_labels).double().mean()))
    assert not result.model.training
    # saved and loaded, it computes the same
    result.save(tmp_path / "small.safetensors")
    loaded = load_pruned(tmp_path / "small.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded.model(images), answers)
    assert loaded.mask == result.mask
    assert loaded.card.metrics["accuracy"] == result.accuracy
    assert loaded.class_names == ("0", "1", "2")
    assert loaded.transform() == p == Preprocessing.of(loaded.model)
    assert loaded.card.made_with["method"] == method
    # and the backbone is as it was
    assert states_equal(backbone.model.state_dict(), dense)


def test_results_join_the_zoo_and_vote(backbone, tmp_path):
    zoo = Zoo(tmp_path / "zoo")
    first = make(backbone, digits_task((0, 1, 2), "first"), method="ifp")
    entry = zoo.add(first)
    assert (entry.name, entry.accuracy, entry.steps) == ("first", first.accuracy, first.cost.steps)
    assert entry.mask == first.mask
    assert entry.cost["train_flops"] == first.cost.train_flops
    second = make(backbone, digits_task((0, 1, 2), "second"), zoo=zoo, steps=0)
    assert [name for name, _ in second.neighbours] == ["first"]
    assert second.mask == first.mask
    zoo.add(second)
    third = make(backbone, digits_task((0, 1, 3), "third"), zoo=zoo, neighbours=1)
    assert len(third.neighbours) == 1
    with pytest.raises(ZooError, match="there already is an entry 'second'"):
        zoo.add(second)


def test_a_tasks_own_entry_never_votes(backbone, tmp_path):
    zoo = Zoo(tmp_path / "zoo")
    for name in ("mine", "other"):
        zoo.add(make(backbone, digits_task(name=name), method="random", steps=0))
    assert [n for n, _ in make(backbone, digits_task(name="mine"), zoo=zoo).neighbours] == ["other"]
    zoo.remove("other")
    with pytest.raises(ZooError, match=r"expected at least one entry to vote.*\['mine'\]"):
        make(backbone, digits_task(name="mine"), zoo=zoo)


@pytest.mark.parametrize("method", ["mvp", "ifp", "random"])
def test_the_seed_decides_everything(backbone, method, tmp_path):
    zoo = Zoo(tmp_path / "zoo")
    for task in TASKS if method == "mvp" else []:
        zoo.add(make(backbone, task, method="random", steps=0))
    results = []
    for seed, global_seed in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(global_seed)
        vote = VoteOptions(rule="sample")
        results.append(make(backbone, zoo=zoo, method=method, seed=seed, vote=vote))
    assert results[0].mask == results[1].mask
    assert states_equal(results[0].model.state_dict(), results[1].model.state_dict())
    assert not states_equal(results[0].model.state_dict(), results[2].model.state_dict())


def test_history_changes_nothing(backbone):
    plain = make(backbone, method="random", steps=3)
    watched = make(backbone, method="random", steps=3, evaluate_at=(0, 1, 3))
    assert states_equal(plain.model.state_dict(), watched.model.state_dict())
    assert [point.step for point in watched.history] == [0, 1, 3]
    assert watched.history[-1].refit_accuracy == watched.accuracy
    assert watched.history[-1].accuracy == watched.trained_accuracy


@pytest.mark.parametrize(("least", "steps"), [(0.0, MOST_STEPS), (1.1, 0)])
def test_steps_as_the_task_needs(backbone, monkeypatch, least, steps):
    monkeypatch.setattr("mvp_ext.pruning.prune.LEAST_ERROR", least)
    done = []
    watch = RunOptions(on_step=lambda *told: done.append(told))
    result = prune(backbone, digits_task(), None, BUILD, method="random", steps="auto", run=watch)
    assert result.cost.steps == result.choice["steps"] == steps
    assert 0.0 < result.choice["left_out_error"] < 0.5
    assert done == [(step + 1, steps) for step in range(steps)]
    same = prune(backbone, digits_task(), None, BUILD, method="random", steps=steps)
    assert equal_weights(result.model, same.model)


def test_keep_one_is_the_dense_model(backbone):
    full, dense = make(backbone, method="random", keep=1.0), make(backbone, method="dense")
    assert full.mask == dense.mask == Mask.full(full.structure)
    assert states_equal(full.model.state_dict(), dense.model.state_dict())


def test_the_ridge_head_finds_what_is_there(backbone):
    """Real digits, a random network: far better than the chance of one in three."""
    assert make(backbone, method="dense", steps=0).accuracy > 0.7
    assert make(backbone, method="random", steps=0).accuracy > 0.55


def test_the_dense_model_teaches_for_one_pass_over_what_is_drawn(backbone):
    recipes = replace(RECIPE, distillation=0.0), RECIPE
    plain, taught = (make(backbone, method="random", steps=2, recipe=recipe) for recipe in recipes)
    assert not states_equal(plain.model.state_dict(), taught.model.state_dict())
    drawn = torch.cat(list(shuffled_indices(36, RECIPE.batch_size, 2, BUILD.seed))).unique()
    assert len(drawn) == 16
    dense = count_flops(backbone.model, (3, backbone.preprocessing.size, backbone.preprocessing.size))
    assert taught.cost.refit_flops - plain.cost.refit_flops == 16 * dense
    assert taught.cost.train_flops == plain.cost.train_flops
    without = [make(backbone, method="random", steps=0, recipe=recipe) for recipe in recipes]
    assert without[0].cost.refit_flops == without[1].cost.refit_flops


def test_latency(backbone):
    measured = make(backbone, method="random", steps=0).latency((1, 2), seconds=0.02)
    assert 0 < measured.at(1).p10_ms <= measured.at(1).median_ms
    assert measured.at(2).throughput > 0


# ---- zoos


def contents(zoo):
    """Name → what an entry holds, without what differs from one build to the next (the clock)."""
    return {
        entry.name: (
            entry.mask,
            entry.accuracy,
            {k: v for k, v in entry.cost.items() if k != "seconds"},
            entry.task,
            entry.read().state,
            entry.read().extra,
        )
        for entry in zoo.entries()
    }


def assert_same_zoo(a, b):
    a, b = contents(a), contents(b)
    assert a.keys() == b.keys()
    for name, (*described, state, extra) in a.items():
        assert described == [*b[name][:-2]]
        assert states_equal(state, b[name][-2])
        assert states_equal(extra, b[name][-1])


def test_an_interrupted_build_goes_on_and_ends_the_same(backbone, tmp_path):
    whole, parts = Zoo(tmp_path / "whole"), Zoo(tmp_path / "parts")
    assert [r.task.name for r in build_zoo(backbone, TASKS, whole, BUILD)] == ["b", "a"]
    assert set(whole["b"].read().extra) >= {"class_means", "temperature", "head_weight", "head_bias"}

    def stop(name, done, total):
        if name == "a" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_zoo(backbone, TASKS, parts, BUILD, progress=stop)
    assert [entry.name for entry in parts.entries()] == ["b"]
    assert parts.verify() == []
    seen = []
    made = build_zoo(backbone, TASKS, parts, BUILD, progress=lambda *told: seen.append(told))
    assert [result.task.name for result in made] == ["a"]
    # What is there is told once, as done.
    steps = parts["b"].steps
    assert [told for told in seen if told[0] == "b"] == [("b", steps, steps)]
    assert {name for name, done, total in seen if done < total} == {"a"}
    assert_same_zoo(whole, parts)
    assert build_zoo(backbone, TASKS, parts, BUILD) == []
    # the order of the tasks does not matter either
    reversed_zoo = Zoo(tmp_path / "reversed")
    build_zoo(backbone, TASKS[::-1], reversed_zoo, BUILD)
    assert_same_zoo(whole, reversed_zoo)


@pytest.mark.parametrize("damage", [lambda data: data[:-7], lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_a_damaged_entry_is_built_again(backbone, tmp_path, damage):
    zoo = Zoo(tmp_path / "zoo")
    build_zoo(backbone, TASKS, zoo, BUILD)
    before = contents(zoo)["a"]
    path = zoo["a"].path
    path.write_bytes(damage(path.read_bytes()))
    assert [result.task.name for result in build_zoo(backbone, TASKS, zoo, BUILD)] == ["a"]
    assert states_equal(contents(zoo)["a"][-2], before[-2])


def test_universal(backbone, tmp_path):
    """One model of all classes; made once; for its keep only; in as many steps as the entries took."""
    zoo = Zoo(tmp_path / "zoo")
    build_zoo(backbone, TASKS, zoo, BUILD)
    result = build_universal(backbone, TASKS, zoo, BUILD)
    assert result.cost.steps == sum(entry.steps for entry in zoo.entries())
    stored = zoo.shared(UNIVERSAL).load()
    assert stored.extra["keep"] == 0.5
    assert stored.extra["classes"] == [0, 1, 3, 4, 5, 6]
    assert stored.mask == result.mask
    assert zoo.verify() == []
    assert build_universal(backbone, TASKS, zoo, BUILD) is None
    assert make(backbone, zoo=zoo, method="universal").mask == result.mask
    with pytest.raises(ZooError, match=r"with keep 0\.25, got .* with keep 0\.5"):
        make(backbone, zoo=zoo, method="universal", keep=0.25)
    other = build_universal(backbone, TASKS, zoo, replace(BUILD, keep=0.25))
    assert zoo.shared(UNIVERSAL).load().mask == other.mask


def test_all_classes_keep_the_limit_of_their_tasks():
    few = [replace(task, max_train_per_class=n) for task, n in zip(TASKS, (2, 5), strict=False)]
    assert pooled_task(few, "all").max_train_per_class == 5
    assert pooled_task([*few, replace(TASKS[0], name="whole")], "all").max_train_per_class is None


def test_an_interrupted_universal_goes_on(backbone, tmp_path, monkeypatch):
    monkeypatch.setattr("mvp_ext.train.resume.SAVE_EVERY", 2)
    zoos = [Zoo(tmp_path / name) for name in ("whole", "parts")]

    def stop(name, done, total):
        if done == 5:
            raise KeyboardInterrupt

    whole = build_universal(backbone, TASKS, zoos[0], BUILD, steps=7)
    with pytest.raises(KeyboardInterrupt):
        build_universal(backbone, TASKS, zoos[1], BUILD, steps=7, progress=stop)
    assert zoos[1].shared(UNIVERSAL) is None
    seen = []
    resumed = build_universal(
        backbone,
        TASKS,
        zoos[1],
        BUILD,
        steps=7,
        progress=lambda name, done, total: seen.append((done, total)),
    )
    assert seen[0][0] > 1
    assert seen[-1] == (7, 7)
    assert states_equal(whole.model.state_dict(), resumed.model.state_dict())


def test_a_zoo_that_starts_from_a_wider_model(backbone, tmp_path):
    """Its entries keep only what the start has; where no voter has a weight the start's is taken."""
    wide_zoo, zoo = Zoo(tmp_path / "wide"), Zoo(tmp_path / "zoo")
    build_universal(backbone, TASKS, wide_zoo, replace(BUILD, keep=0.75), steps=4)
    start = wide_zoo.shared(UNIVERSAL).load()
    before = {name: value.clone() for name, value in start.model.state_dict().items()}
    build_zoo(backbone, TASKS, zoo, BUILD, start=start)
    assert states_equal(before, start.model.state_dict())
    for entry in zoo.entries():
        assert entry.mask & start.mask == entry.mask
        assert entry.steps == planned_steps(find_structure(backbone.model), BUILD, start.mask)
    result = make(backbone, zoo=zoo, method="mvp", steps=0)
    assert result.mask & start.mask == result.mask
    assert method_for(zoo) == "mvp"  # its entries have masks of their own
    with pytest.raises(ZooError, match="'universal' needs"):
        make(backbone, zoo=zoo, method="universal")
    with pytest.raises(ZooError, match="got one that build_zoo was given"):
        build_refined_zoo(backbone, TASKS, zoo, BUILD)
    # The same start again: no error.
    build_zoo(backbone, TASKS, zoo, BUILD, start=zoo.shared(START).load())
    with pytest.raises(ZooError, match="start from another model"):
        build_zoo(backbone, TASKS, zoo, BUILD)
    with pytest.raises(ZooError, match="start from another model"):
        build_zoo(backbone, TASKS, zoo, BUILD, start=replace(start, mask=entry.mask))


# ---- zoos that refine a universal model


def refined_zoo(backbone, path, share=0.8, **changes):
    zoo = Zoo(path)
    build_refined_zoo(
        backbone,
        TASKS,
        zoo,
        replace(BUILD, schedule=replace(SCHEDULE, final_steps=19), **changes),
        share=share,
    )
    return zoo


def test_a_refined_zoo_takes_the_steps_of_an_ordinary_one(backbone, tmp_path):
    zoo, ordinary = refined_zoo(backbone, tmp_path / "zoo"), Zoo(tmp_path / "ordinary")
    build_zoo(backbone, TASKS, ordinary, replace(BUILD, schedule=replace(SCHEDULE, final_steps=19)))
    assert zoo_steps(zoo, TASKS) == zoo_steps(ordinary, TASKS) == 40
    start = zoo.shared(START).load()
    assert start.extra["result"]["cost"]["steps"] == 32
    assert all(entry.mask == start.mask and entry.steps == 4 for entry in zoo.entries())
    assert len(refined_zoo(backbone, zoo.path)) == 2  # again: nothing is left to do
    assert zoo.verify() == []


def test_neighbours_of_a_refined_zoo_vote_by_their_weights(backbone, tmp_path):
    zoo = refined_zoo(backbone, tmp_path / "zoo")
    result = make(backbone, zoo=zoo, steps=0)
    assert (method_for(zoo), result.method) == ("refined", "refined")
    assert result.mask == zoo.shared(START).load().mask
    near = torch.tensor([similarity for _, similarity in result.neighbours], dtype=torch.float64)
    shares = torch.softmax(near / REFINED_WEIGHTING, 0)
    states = [zoo[name].read().state for name, _ in result.neighbours]
    name = "layer1.0.conv1.weight"
    expected = sum(share * state[name].double() for share, state in zip(shares, states, strict=True))
    torch.testing.assert_close(result.model.state_dict()[name].double(), expected, rtol=1e-4, atol=1e-6)
    nearest = make(backbone, zoo=zoo, steps=0, neighbours=1)
    assert torch.equal(nearest.model.state_dict()[name], states[0][name])
    alike = make(backbone, zoo=zoo, steps=0, method="mvp")
    mean = sum(state[name] for state in states) / len(states)
    torch.testing.assert_close(alike.model.state_dict()[name], mean, rtol=1e-4, atol=1e-6)


def test_what_a_refined_zoo_starts_from_serves_as_its_universal_model(backbone, tmp_path):
    zoo = refined_zoo(backbone, tmp_path / "zoo")
    start = zoo.shared(START).load()
    universal = make(backbone, zoo=zoo, method="universal", steps=0)
    name = "layer1.0.conv1.weight"
    assert torch.equal(universal.model.state_dict()[name], start.model.state_dict()[name])
    build_universal(backbone, TASKS, zoo, replace(BUILD, schedule=replace(SCHEDULE, final_steps=19)))
    assert zoo.shared(UNIVERSAL).extra["result"]["cost"]["steps"] == 40  # the control's whole cost
    control = make(backbone, zoo=zoo, method="universal", steps=0)
    assert not torch.equal(control.model.state_dict()[name], start.model.state_dict()[name])


def test_zoos_are_not_mixed(backbone, tmp_path):
    ordinary = Zoo(tmp_path / "ordinary")
    build_zoo(backbone, TASKS, ordinary, BUILD)
    assert method_for(ordinary) == method_for(None) == "mvp"
    assert make(backbone, zoo=ordinary).method == "mvp"
    with pytest.raises(ZooError, match="refine no universal model"):
        build_refined_zoo(backbone, TASKS, ordinary, BUILD)
    with pytest.raises(ZooError, match="'refined' needs a zoo whose entries refine"):
        make(backbone, zoo=ordinary, method="refined")
    zoo = refined_zoo(backbone, tmp_path / "zoo")
    with pytest.raises(ZooError, match=r"expected a universal model with keep 0\.25, got 0\.5"):
        refined_zoo(backbone, zoo.path, keep=0.25)
    with pytest.raises(ValueError, match="share: expected a value in"):
        refined_zoo(backbone, tmp_path / "other", share=1.0)


def test_only_refined_votes_are_weighted():
    assert VoteOptions().for_method("refined").weighting == REFINED_WEIGHTING
    assert VoteOptions().for_method("mvp").weighting is None
    assert VoteOptions(weighting=None).for_method("refined").weighting is None
    assert VoteOptions(weighting=2.0).for_method("mvp").weighting == 2.0


# ---- what a job looks at


def test_sampled_features_are_of_a_few_images_of_each_class(backbone, monkeypatch):
    """It costs its own images alone, and gives way to all features where these have been paid for."""
    monkeypatch.setattr("mvp_ext.pruning.job.SAMPLE_IMAGES", 6)
    seen = {}

    def look(job):
        features, labels = job.sampled_features("similarity_flops")
        seen["sample"] = (len(features), sorted(labels.tolist()), job.cost.similarity_flops / job.image_flops)
        assert job.sampled_features()[0] is features
        everything = job.features()
        seen["all"] = (len(everything), job.cost.refit_flops / job.image_flops)
        assert job.sampled_features()[0] is everything
        mask = Mask.full(job.structure)
        return small_model(job.backbone, job.structure, mask), mask

    make(backbone, method=look, steps=0)
    images = len(digits_task().split().train_labels)
    assert seen == {"sample": (6, [0, 0, 1, 1, 2, 2], 6.0), "all": (images, float(images))}


def test_a_start_as_small_as_the_goal_is_only_trained(backbone):
    first = make(backbone, method="ifp")
    again = make(backbone, method="ifp", start=_checkpoint(first))
    assert again.mask == first.mask
    assert again.cost.steps == 2


def _checkpoint(result):
    from mvp_ext.model.checkpoint import PrunedCheckpoint

    return PrunedCheckpoint(result.model, result.mask, result.structure, {})


def test_a_method_of_ones_own_goes_the_same_way(backbone):
    def first_half(job):
        mask = Mask.random(job.structure, job.settings.keep, job.settings.seed, job.settings.align)
        return small_model(job.backbone, job.structure, mask), mask

    own, known = make(backbone, method=first_half), make(backbone, method="random")
    assert own.method == "first_half"
    assert own.mask == known.mask
    assert states_equal(own.model.state_dict(), known.model.state_dict())


def test_given_features_save_time_and_nothing_else(backbone, tmp_path):
    zoo, data = Zoo(tmp_path / "zoo"), digits_task().split()
    build_zoo(backbone, TASKS, zoo, BUILD)
    features = extract_features(backbone.model, data.train_images, backbone.preprocessing, "float32")
    for method in ("mvp", "one_shot", "ifp", "random"):
        with_, without = (
            make(backbone, zoo=zoo, method=method, features=f) for f in ((features, 100.0), None)
        )
        assert states_equal(with_.model.state_dict(), without.model.state_dict())
        assert replace(with_.cost, seconds=0) == replace(without.cost, seconds=0)
        assert (with_.cost.seconds > 100) == (method != "random")  # which has no use for them


def test_the_targets_own_score_joins_the_vote(backbone, tmp_path):
    """With a large weight the score alone decides; as a prior it decides among equal votes."""
    zoo = Zoo(tmp_path / "zoo")
    build_zoo(backbone, TASKS, zoo, BUILD)
    alone = make(backbone, method="one_shot")
    options = {"zoo": zoo, "method": "mvp"}
    heavy = make(backbone, vote=VoteOptions(score_weight=1e6), **options)
    assert heavy.mask == alone.mask
    assert heavy.cost.score_flops == alone.cost.score_flops
    masks = {
        make(backbone, vote=VoteOptions(neighbours=2, prior=p), **options).mask for p in ("l2", "taylor")
    }
    kept_by_both = zoo["a"].mask & zoo["b"].mask
    for mask in masks:
        assert mask & kept_by_both == kept_by_both


def test_the_zoo_of_another_backbone(backbone, tmp_path):
    zoo = Zoo(tmp_path / "zoo")
    build_zoo(backbone, TASKS[:1], zoo, BUILD)
    vit = sensible_backbone("test_vit")
    with pytest.raises(ZooError, match="of another backbone"):
        build_zoo(vit, TASKS, zoo, BUILD)
    with pytest.raises(ZooError, match="of another backbone"):
        make(vit, zoo=zoo)
    with pytest.raises(ZooError, match="of another backbone"):
        make(backbone, zoo=zoo, scope="all")
    retrained = sensible_backbone()
    with torch.no_grad():
        retrained.model.layer1[0].conv1.weight.mul_(1.01)
    with pytest.raises(ZooError, match="weights"):
        build_zoo(retrained, TASKS, zoo, BUILD)
    with pytest.raises(ZooError, match="weights"):
        make(retrained, zoo=zoo)
    assert [entry.name for entry in zoo.entries()] == ["b"]


def test_entries_of_another_keep_are_not_passed_over_in_silence(backbone, tmp_path):
    zoo = Zoo(tmp_path / "zoo")
    build_zoo(backbone, TASKS[:1], zoo, BUILD)
    with pytest.raises(ZooError, match=r"entry 'b' was made with keep 0\..* of all units, not 0\.25"):
        build_zoo(backbone, TASKS[:1], zoo, replace(BUILD, keep=0.25))


# ---- bad input


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.0001, float("nan"), math.inf])
def test_keep_outside_its_range(backbone, keep):
    with pytest.raises(ValueError, match=r"keep: expected a ratio in \(0, 1\]"):
        make(backbone, method="random", keep=keep)


def test_unknown_method_and_negative_steps(backbone):
    with pytest.raises(
        ValueError, match=r"expected one of auto, clustered, refined, mvp, .*, ifp, got 'magic'"
    ):
        make(backbone, method="magic")
    for steps in (-1, "some"):
        with pytest.raises(ValueError, match=f"steps: expected 'auto' or at least 0, got {steps!r}"):
            make(backbone, method="random", steps=steps)
    with pytest.raises(ValueError, match="neighbours: expected at least 1, got 0"):
        make(backbone, neighbours=0)


def test_auto_is_the_schedules_own_number_after_iterative_pruning(backbone):
    auto, told = (make(backbone, method="ifp", steps=steps) for steps in ("auto", SCHEDULE.final_steps))
    assert auto.cost.steps == told.cost.steps > SCHEDULE.final_steps
    assert auto.accuracy == told.accuracy


def test_a_task_of_one_class(backbone):
    data = replace(digits_task().split(), class_names=("0",))
    with pytest.raises(ValueError, match="expected at least 2 classes, got 1"):
        make(backbone, data, method="random")


def test_a_class_without_training_images(backbone):
    data = digits_task().split()
    some = data.train_labels != 1
    data = replace(data, train_images=data.train_images[some], train_labels=data.train_labels[some])
    with pytest.raises(ValueError, match=r"images of all 3 classes, got counts \[12, 0, 12\]"):
        make(backbone, data, method="random")


@pytest.mark.parametrize("method", ["mvp", "universal"])
def test_no_zoo_or_an_empty_one(backbone, method, tmp_path):
    with pytest.raises(ZooError, match=f"method '{method}' needs a zoo; got none"):
        make(backbone, method=method)
    message = "at least one entry to vote, got none" if method == "mvp" else f"needs an? {method} model"
    with pytest.raises(ZooError, match=message):
        make(backbone, method=method, zoo=Zoo(tmp_path / "empty"))


def test_models_that_cannot_be_cut(backbone):
    with pytest.raises(TypeError, match="expected a timm model"):
        make(nn.Sequential(nn.Linear(2, 2)), method="random")
    with pytest.raises(ValueError, match="scope: expected one of"):
        make(backbone, method="random", scope="everything")
    with pytest.raises(ValueError, match="scope 'heads': expected a part with heads units"):
        make(backbone, method="random", scope="heads")
