"""What one ``prune`` reads of a zoo: the files of those that vote, once each, and nothing of the others."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import safetensors
import torch
from digits import digits_task, tiny_backbone

from mvp_ext.pruning.build import build_refined_zoo
from mvp_ext.pruning.prune import prune
from mvp_ext.pruning.settings import Schedule, Settings, VoteOptions
from mvp_ext.train.recipe import Recipe
from mvp_ext.zoo import files, neighbours
from mvp_ext.zoo.neighbours import proxy_leep
from mvp_ext.zoo.shared import START
from mvp_ext.zoo.zoo import Zoo

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = [(0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 4, 8), (1, 5, 9)]
SETTINGS = Settings(
    keep=0.5,
    schedule=Schedule(share=0.5, steps_per_round=1, final_steps=6),
    recipe=Recipe(batch_size=8, precision="float32"),
)
watched: Counter[str] | None = None


def _note(event: str, arguments: tuple) -> None:
    if watched is not None and event == "open" and str(arguments[0]).endswith(".safetensors"):
        watched[os.path.basename(arguments[0])] += 1


# For the life of the process: Python has no way to take an audit hook away.
sys.addaudithook(_note)


@contextmanager
def reading(monkeypatch):
    """Counts of opened model files by name, and of bytes hashed as "hashed"."""
    global watched
    watched = Counter()

    def sha256(data):
        assert watched is not None
        watched["hashed"] += 1
        return hashlib.sha256(data)

    def refuse(*arguments, **options):
        pytest.fail(f"a part of {arguments[0]} was read")

    with monkeypatch.context() as patch:
        patch.setattr(files, "hashlib", SimpleNamespace(sha256=sha256))
        patch.setattr(safetensors, "safe_open", refuse)
        patch.setattr("mvp_ext.model.checkpoint.safe_open", refuse)
        yield watched
    watched = None


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A backbone and a refined zoo of five entries."""
    torch.manual_seed(0)
    backbone, zoo = tiny_backbone(), Zoo(tmp_path_factory.mktemp("reads") / "zoo")
    tasks = [digits_task(classes, f"task-{i}", seed=i) for i, classes in enumerate(CLASSES)]
    build_refined_zoo(backbone, tasks, zoo, SETTINGS)
    return backbone, zoo.path


@pytest.mark.parametrize("similarity", ["proxy_leep", "leep"])
def test_one_prune_reads_each_voter_once_and_no_other(made, similarity, monkeypatch):
    backbone, path = made
    monkeypatch.setattr(files, "_sound", {})
    vote = VoteOptions(neighbours=2, similarity=similarity, shortlist=3)
    with reading(monkeypatch) as seen:
        result = prune(backbone, digits_task((0, 1, 8)), Zoo(path), steps=0, vote=vote)
    assert result.method == "refined"
    zoo = Zoo(path)
    voters = {zoo[name].path.name for name, _ in result.neighbours}
    start = zoo.shared(START).path.name
    hashed = seen.pop("hashed")
    assert len(voters) == 2
    assert seen.pop(start) == 1
    assert {name: seen.pop(name) for name in voters} == dict.fromkeys(voters, 1)
    # "leep" has run the model of one more.
    assert sum(seen.values()) == (similarity == "leep")
    assert hashed == 3 + (similarity == "leep")


def test_content_is_hashed_once_a_process(made, monkeypatch):
    backbone, path = made
    monkeypatch.setattr(files, "_sound", {})
    vote = VoteOptions(neighbours=2, similarity="proxy_leep")
    prune(backbone, digits_task((0, 1, 8)), Zoo(path), steps=0, vote=vote)
    with reading(monkeypatch) as seen:
        prune(backbone, digits_task((0, 1, 8)), Zoo(path), steps=0, vote=vote)
    assert seen["hashed"] == 0


def test_a_zoo_is_ranked_once(made, monkeypatch, tmp_path):
    """By those whose weight counts as by all; again only where one of them is damaged, and the next comes in."""
    backbone, path = made
    ranked = []
    monkeypatch.setattr(neighbours, "proxy_leep", lambda *known: ranked.append(1) or proxy_leep(*known))

    def voters():
        ranked.clear()
        vote = VoteOptions(similarity="proxy_leep")
        result = prune(backbone, digits_task((0, 1, 8)), Zoo(path), steps=0, vote=vote)
        return [name for name, _ in result.neighbours]

    path = shutil.copytree(path, tmp_path / "zoo")
    first, *others = voters()
    assert ranked == [1]
    file = Zoo(path)[first].path
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.warns(UserWarning, match="passed over for the vote"):
        assert voters()[: len(others)] == others
    assert ranked == [1, 1]


def test_a_zoo_is_described_without_reading_it(made, monkeypatch):
    _, path = made
    with reading(monkeypatch) as seen:
        zoo = Zoo(path)
        assert len(zoo) == len(zoo.entries()) == len(zoo.class_means()) == 5
        assert "task-0" in zoo
        assert zoo.shared(START).extra["keep"] == 0.5
    assert seen == {}
