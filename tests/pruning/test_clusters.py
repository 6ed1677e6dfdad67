"""Clustered zoos: which tasks are of one kind, experts for each kind, and when a task is given to them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from digits import digits_task, equal_weights, few_digits, tiny_backbone

from mvp_ext.app.comparison import Comparison, compare
from mvp_ext.data.tasks import Task
from mvp_ext.pruning.build import build_refined_zoo
from mvp_ext.pruning.clusters import build_clustered_zoo, cluster_tasks, of_several_kinds
from mvp_ext.pruning.job import model_for_features
from mvp_ext.pruning.methods import method_for
from mvp_ext.pruning.prune import MOST_STEPS, prune
from mvp_ext.pruning.settings import Schedule, Settings, VoteOptions
from mvp_ext.train.backbone import extract_features
from mvp_ext.train.heads import ClassStatistics
from mvp_ext.train.recipe import Recipe
from mvp_ext.train.refit import fit_head
from mvp_ext.zoo.entry import ClassMeans
from mvp_ext.zoo.known import known_classes
from mvp_ext.zoo.shared import CLUSTERS, START, UNIVERSAL
from mvp_ext.zoo.zoo import Zoo, ZooError

pytestmark = pytest.mark.usefixtures("one_thread")
TASKS = [
    digits_task((0, 1), "a", seed=1),
    digits_task((1, 2), "b", seed=2),
    digits_task((6, 7), "c", seed=3),
]
SETTINGS = Settings(
    keep=0.5,
    schedule=Schedule(share=0.5, steps_per_round=1, final_steps=9, distill=False),
    recipe=Recipe(batch_size=8, precision="float32"),
)

# ---- which tasks are of one kind


def kinds_of_classes(kinds: int, classes: int, seed: int = 0) -> torch.Tensor:
    """Means of classes that lie in heaps."""
    draw = torch.Generator().manual_seed(seed)
    heaps = 4 * torch.randn(kinds, 16, generator=draw)
    return (heaps[:, None] + torch.randn(kinds, classes, 16, generator=draw)).flatten(0, 1)


@pytest.mark.parametrize("kinds", [2, 3, 5])
def test_tasks_of_one_kind_are_found(kinds):
    means, draw = kinds_of_classes(kinds, 8), torch.Generator().manual_seed(1)
    tasks = [
        (8 * kind + torch.randperm(8, generator=draw)[:4]).tolist() for _ in range(4) for kind in range(kinds)
    ]
    assert cluster_tasks(means, tasks) == [*range(kinds)] * 4
    assert cluster_tasks(means, tasks, kinds) == [*range(kinds)] * 4


@pytest.mark.parametrize("seed", range(5))
def test_random_sets_of_classes_are_of_one_kind(seed):
    means, draw = kinds_of_classes(5, 8, seed), torch.Generator().manual_seed(seed)
    tasks = [torch.randperm(40, generator=draw)[:8].tolist() for _ in range(16)]
    found = cluster_tasks(means, tasks)
    assert found == [0] * 16


@pytest.mark.parametrize(
    ("tasks", "clusters", "found"), [(1, None, 1), (2, None, 1), (2, 2, 2), (5, 5, 5), (5, 1, 1)]
)
def test_few_tasks_and_asked_numbers(tasks, clusters, found):
    means = kinds_of_classes(tasks, 2)
    sets = [[2 * i, 2 * i + 1] for i in range(tasks)]
    assert len(set(cluster_tasks(means, sets, clusters))) == found


def test_a_number_of_clusters_that_cannot_be():
    for clusters in (0, 3):
        with pytest.raises(ValueError, match=f"cluster_tasks: clusters: expected 1 to 2, got {clusters}"):
            cluster_tasks(torch.randn(4, 3), [[0, 1], [2, 3]], clusters)


def test_kinds_are_told_before_anything_is_built():
    """Digits, and digits in negative, as tasks of each or of both."""
    data = few_digits()
    doubled = {}
    for split in ("train", "test"):
        images, labels = data.split(split)
        doubled[f"{split}_images"] = torch.cat([images, 255 - images])
        doubled[f"{split}_labels"] = torch.cat([labels, labels + 10])
    names = (*data.class_names, *(f"negative {name}" for name in data.class_names))
    both = replace(data, class_names=names, **doubled)
    sets = [(0, 1, 2), (3, 4, 5), (6, 7, 8), (10, 11, 12), (13, 14, 15), (16, 17, 18)]
    tasks = [Task(f"t{i}", both, classes, seed=i) for i, classes in enumerate(sets)]
    backbone = tiny_backbone()
    assert of_several_kinds(backbone, tasks, SETTINGS)
    mixed = [(0, 11, 2), (13, 4, 15), (6, 17, 8), (10, 1, 12), (3, 14, 5), (16, 7, 18)]
    tasks = [Task(f"t{i}", both, classes, seed=i) for i, classes in enumerate(mixed)]
    assert not of_several_kinds(backbone, tasks, SETTINGS)


# ---- which classes are known


def images_of(means: torch.Tensor, each: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(means)).repeat_interleave(each)
    return means[labels] + torch.randn(len(labels), means.shape[1], generator=draw), labels


@pytest.mark.parametrize("each", [4, 8, 32])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_known_and_new_classes_are_told_apart(each, scale):
    classes = torch.randn(24, 64, generator=torch.Generator().manual_seed(2))
    zoo = [ClassMeans("x", scale * classes[:8], 1.0), ClassMeans("y", scale * classes[6:16], 1.0)]
    features, labels = images_of(classes[[0, 1, 7, 12, 20, 21]], each)
    known = known_classes(zoo, scale * features, labels)
    assert known.share == pytest.approx(4 / 6)
    # The class 7 is of both.
    assert known.by_entry == pytest.approx({"x": 3 / 6, "y": 2 / 6})
    assert known.found == {"x": {0: 0, 1: 1, 2: 7}, "y": {3: 6}}


def test_a_class_of_the_zoo_is_one_class_of_the_task():
    classes = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    # The second lies near the first; two entries have it.
    near = classes[0] + 0.2 * classes[1]
    features, labels = images_of(torch.stack([near, classes[0], classes[3]]), 32)
    known = known_classes(
        [ClassMeans("x", classes, 1.0), ClassMeans("y", classes[:1], 1.0)], features, labels
    )
    assert known.share == pytest.approx(2 / 3)
    assert known.found == {"x": {1: 0, 2: 3}}


def test_a_zoo_without_experts_knows_nothing():
    features, labels = images_of(torch.randn(2, 4), 3)
    assert known_classes([], features, labels) == (0.0, {}, {})


# ---- the zoo


def clustered(path: Path, tasks=TASKS, **kwargs) -> Zoo:
    zoo = Zoo(path)
    build_clustered_zoo(tiny_backbone(), tasks, zoo, SETTINGS, **{"clusters": 2, **kwargs})
    return zoo


def test_experts_refine_one_model_of_all_tasks(tmp_path):
    zoo = clustered(tmp_path / "zoo", share=0.4)
    start, refined = zoo.shared(START), Zoo(tmp_path / "refined")
    build_refined_zoo(tiny_backbone(), TASKS, refined, SETTINGS, share=0.4)
    assert [entry.name for entry in zoo] == ["expert-00", "expert-01"]
    assert [entry.task["classes"] for entry in zoo] == [["0", "1", "2"], ["6", "7"]]
    assert {entry.mask for entry in zoo} == {start.load().mask}
    # Experts take the steps of their tasks' entries.
    each = refined["a"].steps
    assert [entry.steps for entry in zoo] == [2 * each, each]
    known = zoo.facts()[CLUSTERS]["tasks"]
    assert {name: row["expert"] for name, row in known.items()} == {
        "a": "expert-00",
        "b": "expert-00",
        "c": "expert-01",
    }
    assert zoo.verify() == []
    assert start.extra["result"]["cost"]["steps"] == refined.shared(START).extra["result"]["cost"]["steps"]


@pytest.mark.parametrize("own_masks", [False, True])
def test_an_expert_computes_its_features_whoever_builds_it(own_masks, tmp_path):
    zoo = clustered(tmp_path / "zoo", base_keep=1.0 if own_masks else None)
    start, stored = zoo.shared(START).load(), zoo["expert-01"].read()
    assert (stored.mask == start.mask) is not own_masks
    before = {name: tensor.clone() for name, tensor in start.model.state_dict().items()}
    images, see = few_digits().train_images[:9], tiny_backbone().preprocessing
    by_copy, by_itself = (
        extract_features(model, images, see)
        for model in (model_for_features(stored, start, torch.device("cpu")), stored.build())
    )
    assert torch.equal(by_copy, by_itself)
    torch.testing.assert_close(start.model.state_dict(), before, rtol=0, atol=0)


def test_whose_zoo_it_is_is_asked_once_a_task(tmp_path, monkeypatch):
    """All of the dense model's weights are read for that."""
    zoo, asked = clustered(tmp_path / "zoo"), []
    monkeypatch.setattr(Zoo, "check", lambda zoo, identity: asked.append(identity))
    prune(tiny_backbone(), digits_task((0, 1), "new"), zoo, SETTINGS, steps=0)
    assert len(asked) == 1


def test_a_comparison_says_what_experts_told(tmp_path):
    zoo = clustered(tmp_path / "zoo")
    options = Comparison(SETTINGS, steps=1, arms=("clustered", "random"), seconds=0.0)
    result = compare(tiny_backbone(), [digits_task((0, 1, 6), "new", seed=5)], zoo, options)
    ours, random = (arm["tasks"][0]["choice"] for arm in result["arms"])
    assert ours["known_share"] > 0
    assert random is None


def test_a_build_goes_on_and_ends_the_same(tmp_path):
    zoo, other = clustered(tmp_path / "zoo"), clustered(tmp_path / "other")
    zoo.remove("expert-01")
    zoo = clustered(zoo.path, clusters=None)
    for entry in other:
        assert equal_weights(zoo[entry.name].load().model, entry.load().model)
    late = digits_task((7, 8), "late", seed=7)
    assert build_clustered_zoo(tiny_backbone(), [late], zoo, SETTINGS) == []
    assert zoo.facts()[CLUSTERS]["tasks"]["late"]["expert"] == "expert-01"
    zoo.remove("expert-00")
    with pytest.raises(
        ZooError, match=r"expected the tasks that its experts expert-00 are made of, a, b not among"
    ):
        build_clustered_zoo(tiny_backbone(), [late], zoo, SETTINGS)


def test_tasks_of_one_kind_have_one_expert(tmp_path):
    zoo = clustered(tmp_path / "zoo", clusters=1)
    assert [entry.task["classes"] for entry in zoo] == [["0", "1", "2", "6", "7"]]
    result = prune(tiny_backbone(), digits_task((3, 4)), zoo, SETTINGS, steps=0)
    assert result.method == "clustered" == method_for(zoo)
    assert result.choice == {
        "known_share": 0.0,
        "known_by_expert": {"expert-00": 0.0},
        "told_by_experts": 0.0,
    }


def test_experts_with_masks_of_their_own(tmp_path):
    zoo = clustered(tmp_path / "zoo", base_keep=0.75)
    a, b = (entry.mask for entry in zoo)
    start = zoo.shared(START).load().mask
    assert a != b
    assert a.kept == b.kept == zoo.shared(UNIVERSAL).load().mask.kept
    for mask in (a, b):
        assert bool((mask.to_vector() <= start.to_vector()).all())
    # The vote decides between them.
    result = prune(tiny_backbone(), digits_task((1, 2)), zoo, SETTINGS, steps=0)
    assert result.mask.kept == a.kept


def test_an_expert_says_what_it_knows_of_the_classes(tmp_path, monkeypatch):
    zoo = clustered(tmp_path / "zoo")
    backbone, fitted = tiny_backbone(), []
    monkeypatch.setattr(
        "mvp_ext.pruning.prune.fit_head", lambda *args: fitted.append(args[-1]) or fit_head(*args)
    )
    # 1 is one expert's, 6 and 7 are another's, and nobody knows 4.
    task = digits_task((1, 4, 6, 7), "some", seed=5)
    result = prune(backbone, task, zoo, SETTINGS, steps=0)
    assert result.choice["known_by_expert"] == {"expert-00": 0.25, "expert-01": 0.5}
    assert result.choice["told_by_experts"] == 0.5
    assert result.summary()["choice"] == result.choice
    (targets,), data = fitted, task.split()
    one_hot = torch.nn.functional.one_hot(data.train_labels, 4).float()
    alone = data.train_labels < 2
    assert torch.equal(targets[alone], one_hot[alone])
    # What the expert itself says, with a head of all its images, mixed with the labels.
    expert, known = zoo["expert-01"].load().model, replace(TASKS[2], max_train_per_class=None).split()
    features, theirs = (
        extract_features(expert, images, backbone.preprocessing, "float32")
        for images in (data.train_images[~alone], known.train_images)
    )
    head = ClassStatistics.of(theirs, known.train_labels, 2).head((0, 1))
    said = head(features)
    share = (targets[~alone] - one_hot[~alone])[:, 2:] / (said - one_hot[~alone][:, 2:])
    torch.testing.assert_close(share, share.mean().expand_as(share), atol=1e-2, rtol=0)
    assert 0.5 <= float(share.mean()) <= 1.0
    assert torch.equal(targets[~alone][:, :2], torch.zeros(len(features), 2))
    torch.testing.assert_close(targets.sum(1), torch.ones(len(targets)), atol=1e-4, rtol=0)
    # Where nothing is known the labels are all there is.
    assert prune(backbone, digits_task((4, 9)), zoo, SETTINGS, steps=0).choice["known_share"] == 0.0
    assert fitted[-1] is None


def test_an_expert_of_classes_that_only_look_alike_is_not_heard(tmp_path, monkeypatch):
    zoo, task = clustered(tmp_path / "zoo"), TASKS[2]
    heard = prune(tiny_backbone(), task, zoo, SETTINGS, steps=0)
    assert heard.choice["told_by_experts"] == 1.0

    def mistaken(*args):
        known = known_classes(*args)
        (name, (first, second)), *_ = known.found.items()
        return known._replace(
            found={name: {first: known.found[name][second], second: known.found[name][first]}}
        )

    monkeypatch.setattr("mvp_ext.pruning.methods.known_classes", mistaken)
    result = prune(tiny_backbone(), task, zoo, SETTINGS, steps=0)
    assert (result.choice["known_share"], result.choice["told_by_experts"]) == (1.0, 0.0)


def test_who_was_told_needs_no_steps_and_results_tell_nobody(tmp_path, monkeypatch):
    # However few errors there are.
    monkeypatch.setattr("mvp_ext.pruning.prune.LEAST_ERROR", 0.0)
    zoo, backbone = clustered(tmp_path / "zoo"), tiny_backbone()
    result = prune(backbone, TASKS[2], zoo, SETTINGS, steps="auto")
    assert (result.choice["told_by_experts"], result.cost.steps) == (1.0, 0)
    new = prune(backbone, digits_task((3, 9), "new"), zoo, SETTINGS, steps="auto")
    assert (new.choice["told_by_experts"], new.cost.steps) == (0.0, MOST_STEPS)
    # It votes from now on, but knows no more than a task brings.
    zoo.add(new)
    again = prune(backbone, digits_task((3, 9), "again"), zoo, SETTINGS, steps=0)
    assert "new" in dict(again.neighbours)
    assert again.choice["known_by_expert"] == {"expert-00": 0.0, "expert-01": 0.0}


@pytest.mark.parametrize(("weighting", "voters"), [(1e-4, 1), (100.0, 2)])
def test_a_voter_of_no_weight_is_not_read(tmp_path, recwarn, weighting, voters):
    zoo = clustered(tmp_path / "zoo")
    vote = VoteOptions(weighting=weighting, similarity="proxy_leep")
    if voters == 1:
        path = zoo["expert-00"].path
        path.write_bytes(bytes(path.stat().st_size))
    result = prune(tiny_backbone(), TASKS[2], zoo, SETTINGS, steps=0, vote=vote)
    assert [name for name, _ in result.neighbours] == ["expert-01", "expert-00"][:voters]
    assert not [warning for warning in recwarn if "passed over" in str(warning.message)]


def test_other_zoos_are_refused(tmp_path):
    refined = Zoo(tmp_path / "refined")
    build_refined_zoo(tiny_backbone(), TASKS, refined, SETTINGS)
    with pytest.raises(ZooError, match=r"build_clustered_zoo: .*: its 3 entries are no experts"):
        build_clustered_zoo(tiny_backbone(), TASKS, refined, SETTINGS)
    with pytest.raises(ZooError, match=r"build_refined_zoo: .*: its entries are experts"):
        build_refined_zoo(tiny_backbone(), TASKS, clustered(tmp_path / "zoo"), SETTINGS)
    with pytest.raises(ZooError, match="prune: method 'clustered' needs a zoo of experts"):
        prune(tiny_backbone(), TASKS[0], refined, SETTINGS, method="clustered", steps=0)
    for kwargs, message in (
        ({"share": 1.0}, r"share: expected a value in \(0, 1\), got 1.0"),
        ({"base_keep": 0.3}, r"base_keep: expected a ratio in \[0.5, 1\], got 0.3"),
    ):
        with pytest.raises(ValueError, match=f"build_clustered_zoo: {message}"):
            build_clustered_zoo(tiny_backbone(), TASKS, Zoo(tmp_path / "new"), SETTINGS, **kwargs)
