"""Neighbours: against the definition one by one, by the index alone, and without what is damaged."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
from digits import digits_task, tiny_backbone

from mvp_ext.model.families import find_structure
from mvp_ext.pruning.prune import prune
from mvp_ext.pruning.settings import Settings
from mvp_ext.train.backbone import extract_features
from mvp_ext.train.cost import Cost
from mvp_ext.train.heads import nearest_mean_head
from mvp_ext.train.recipe import Recipe
from mvp_ext.zoo.entry import ClassMeans, NewEntry
from mvp_ext.zoo.neighbours import Target, nearest_entries, proxy_leep
from mvp_ext.zoo.similarity import SIMILARITIES, leep
from mvp_ext.zoo.zoo import Zoo, ZooError

pytestmark = pytest.mark.usefixtures("one_thread")
TASKS = {"low": (0, 1, 2), "middle": (3, 4, 5), "high": (6, 7, 8)}


@pytest.fixture(scope="module")
def neighbourhood(tmp_path_factory):
    """A backbone, its structure, and a zoo of one entry for each of three disjoint tasks."""
    torch.manual_seed(0)
    backbone = tiny_backbone()
    zoo = Zoo(tmp_path_factory.mktemp("neighbours") / "zoo")
    settings = Settings(keep=0.5, recipe=Recipe(precision="float32"))
    for name, classes in TASKS.items():
        zoo.add(prune(backbone, digits_task(classes, name), settings=settings, steps=0, method="random"))
    return backbone, find_structure(backbone.model), zoo


@pytest.fixture
def copied(neighbourhood, tmp_path):
    """The same with a zoo of its own, that a test may spoil."""
    backbone, structure, zoo = neighbourhood
    shutil.copytree(zoo.path, tmp_path / "zoo")
    return backbone, structure, Zoo(tmp_path / "zoo")


def nearest(neighbourhood, classes, n=5, **options):
    backbone, structure, zoo = neighbourhood
    data = digits_task(classes, "target").split()
    features = extract_features(backbone.model, data.train_images, backbone.preprocessing, "float32")
    target = Target(backbone, structure, data, features, data.train_labels)
    return nearest_entries(zoo, target, n, **options)


def names(neighbours):
    return [neighbour.entry.name for neighbour in neighbours]


# ---- proxy-LEEP


def random_means(count, width, classes=None):
    sizes = [classes or int(size) for size in torch.randint(2, 9, (count,))]
    return [
        ClassMeans(f"e{i}", torch.randn(k, width), float(torch.rand(()) + 0.5)) for i, k in enumerate(sizes)
    ]


def one_by_one(known, features, labels):
    """LEEP of ``nearest_mean_head``'s softmax, in float64."""
    values = []
    for entry in known:
        head = nearest_mean_head(entry.means.double(), entry.temperature)
        values.append(leep(torch.softmax(head(features.double()), 1), labels))
    return torch.tensor(values, dtype=torch.float64)


def test_proxy_leep_is_leep_of_the_nearest_mean_classifier():
    means, features, labels = torch.randn(3, 5), torch.randn(12, 5), torch.arange(12) % 2
    distances = (features[:, None] - means[None]).square().sum(2)
    expected = leep(torch.softmax(-distances / 1.7, 1), labels)
    (got,) = proxy_leep([ClassMeans("e", means, 1.7)], features, labels).tolist()
    assert got == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("count", [0, 1, 2, 37, 700])
def test_all_at_once_is_each_alone(count):
    """Entries of several numbers of classes, more of them than one block holds; labels that skip a class."""
    known, features = random_means(count, 16), torch.randn(29, 16)
    labels = torch.randint(0, 5, (29,)) * 2
    got = proxy_leep(known, features, labels)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, one_by_one(known, features, labels), rtol=1e-12, atol=1e-12)


def test_far_features_and_a_small_temperature_are_finite():
    known, features = random_means(8, 16), 1e3 * torch.randn(20, 16)
    known = [entry._replace(temperature=1e-3) for entry in known]
    labels = torch.arange(20) % 3
    got = proxy_leep(known, features, labels)
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got, one_by_one(known, features, labels), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (torch.full((3, 4), float("nan")), torch.arange(3), "expected finite values"),
        (torch.randn(3, 4), torch.arange(2), r"expected \[n, width\] and labels \[n\]"),
        (torch.randn(0, 4), torch.arange(0), r"expected \[n, width\] and labels \[n\]"),
    ],
)
def test_bad_features(features, labels, message):
    with pytest.raises(ValueError, match=f"proxy_leep: {message}"):
        proxy_leep(random_means(2, 4), features, labels)


# ---- ranking


def features_alone(features, head, labels):
    """A measure of one's own: how far apart the class means of the features are."""
    means = torch.stack([features[labels == label].mean(0) for label in labels.unique()])
    return float(torch.pdist(means).mean() / features.std())


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("name", TASKS)
def test_the_entry_of_the_same_classes_is_nearest(neighbourhood, similarity, name):
    found = nearest(neighbourhood, TASKS[name], 3, similarity=similarity)
    assert found[0].entry.name == name
    values = [n.similarity for n in found]
    assert values == sorted(values, reverse=True)
    assert len(found) == 3


@pytest.mark.parametrize("similarity", [*SIMILARITIES, features_alone])
def test_every_similarity_ranks(neighbourhood, similarity):
    cost = Cost()
    options = {"similarity": similarity, "shortlist": 3, "images": 9}
    first = nearest(neighbourhood, (0, 1, 5), 2, cost=cost, **options)
    again = nearest(neighbourhood, (0, 1, 5), 2, **options)
    assert [(n.entry.name, n.similarity) for n in first] == [(n.entry.name, n.similarity) for n in again]
    assert len(first) == 2
    assert cost.seconds > 0
    assert (cost.similarity_flops > 0) == (similarity != "proxy_leep")


def test_a_measure_sees_the_entrys_own_model_and_head(neighbourhood):
    backbone, _, zoo = neighbourhood
    seen = []

    def measure(features, head, labels):
        seen.append((features, head, labels))
        return float(len(seen))

    found = nearest(neighbourhood, (0, 1, 2), 3, similarity=measure, images=10**6)
    assert [n.similarity for n in found] == [3.0, 2.0, 1.0]
    data = digits_task((0, 1, 2), "target").split()
    order = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(0))
    stored = zoo[found[-1].entry.name].read()
    expected = extract_features(stored.build(), data.train_images[order], backbone.preprocessing)
    features, head, labels = seen[0]
    torch.testing.assert_close(features, expected)
    assert torch.equal(head.weight, stored.extra["head_weight"])
    assert torch.equal(head.bias, stored.extra["head_bias"])
    assert torch.equal(labels, data.train_labels[order])


def test_only_the_shortlist_is_run(neighbourhood):
    costs = {shortlist: Cost() for shortlist in (1, 3)}
    for shortlist, cost in costs.items():
        nearest(neighbourhood, (0, 1, 2), 1, similarity="leep", shortlist=shortlist, images=6, cost=cost)
    assert costs[3].similarity_flops == pytest.approx(3 * costs[1].similarity_flops, rel=0.2)


def test_ties_go_by_name(neighbourhood, monkeypatch):
    monkeypatch.setattr(
        "mvp_ext.zoo.neighbours.proxy_leep", lambda known, *_: torch.full((len(known),), -1.0)
    )
    assert names(nearest(neighbourhood, (0, 1, 2))) == ["high", "low", "middle"]
    assert names(nearest(neighbourhood, (0, 1, 2), similarity=lambda *_: 0.5)) == ["high", "low", "middle"]


def test_excluded_entries_do_not_vote(neighbourhood):
    found = nearest(neighbourhood, (0, 1, 2), similarity="leep", exclude=["low"])
    assert set(names(found)) == {"middle", "high"}
    with pytest.raises(ZooError, match="expected at least one entry to vote, got none"):
        nearest(neighbourhood, (0, 1, 2), exclude=list(TASKS))


def test_entries_of_another_structure_are_refused(neighbourhood):
    backbone, structure, zoo = neighbourhood
    other = dataclasses.replace(structure, scope="all")
    with pytest.raises(ZooError, match="of another backbone: expected structure fingerprint"):
        nearest((backbone, other, zoo), (0, 1, 2))


def test_an_unknown_similarity_is_refused(neighbourhood):
    with pytest.raises(
        ValueError, match="similarity: expected one of proxy_leep, leep or a function, got 'nce'"
    ):
        nearest(neighbourhood, (0, 1, 2), similarity="nce")


# ---- what is read


def test_no_file_is_read_to_find_neighbours(copied):
    """With files of the right size and no content, everything is found that does not need their weights."""
    before = nearest(copied, (0, 1, 2))
    zoo = copied[2]
    for path in (zoo.path / "entries").iterdir():
        path.write_bytes(bytes(path.stat().st_size))
    after = nearest(copied, (0, 1, 2), read_weights=False)
    assert [(n.entry.name, n.similarity) for n in after] == [(n.entry.name, n.similarity) for n in before]
    assert [n.entry.mask for n in after] == [n.entry.mask for n in before]
    with pytest.raises(ZooError, match=r"entry 'low': .*damaged"):
        after[0].read()
    with (
        pytest.warns(UserWarning, match="passed over"),
        pytest.raises(ZooError, match="at least one entry to vote, got none"),
    ):
        nearest(copied, (0, 1, 2))


def spoil(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_a_damaged_entry_never_votes(copied, similarity):
    """It is named, and the next nearest takes its place."""
    zoo = copied[2]
    order = names(nearest(copied, (0, 1, 2), 3, similarity=similarity))
    spoil(zoo[order[0]].path)
    with pytest.warns(UserWarning, match=f"entry '{order[0]}': .*damaged: expected SHA-256"):
        found = nearest(copied, (0, 1, 2), 2, similarity=similarity, shortlist=2)
    assert set(names(found)) == set(order[1:])


def test_an_entry_without_class_means_does_not_vote(copied):
    _, structure, zoo = copied
    entry = zoo["low"]
    loaded = entry.load()
    zoo.add_model(NewEntry("bare", loaded.model, entry.mask, structure, {"name": "bare"}))
    for wrong in (
        torch.full((3, 4), 0.5),
        torch.full((3, zoo.class_means()[0].means.shape[1]), float("nan")),
    ):
        tensors = {"class_means": wrong, "temperature": torch.tensor(1.0)}
        new = NewEntry("odd", loaded.model, entry.mask, structure, {"name": "odd"}, tensors=tensors)
        zoo.add_model(new, replace=True)
        with pytest.warns(UserWarning, match="entry 'odd' cannot vote: expected finite class means of"):
            assert set(names(nearest(copied, (0, 1, 2)))) == set(TASKS)
    assert {"bare", "odd"} < {e.name for e in zoo.entries()}
