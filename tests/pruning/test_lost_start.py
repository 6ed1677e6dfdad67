"""A refined zoo whose universal model is damaged or gone: it is made again as it was, and the build goes on."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from digits import digits_task, tiny_backbone

from mvp_ext.model.checkpoint import PrunedState
from mvp_ext.pruning.build import build_refined_zoo, build_zoo
from mvp_ext.pruning.settings import Schedule, Settings
from mvp_ext.train import resume
from mvp_ext.train.recipe import Recipe
from mvp_ext.zoo.shared import START, is_refined
from mvp_ext.zoo.zoo import Zoo, ZooError

pytestmark = pytest.mark.usefixtures("one_thread")
TASKS = [digits_task((3, 4, 5), "b", seed=1), digits_task((0, 1, 6), "a", seed=2)]
MORE = digits_task((2, 7), "c", seed=3)
SETTINGS = Settings(
    keep=0.5,
    schedule=Schedule(share=0.5, steps_per_round=1, final_steps=4, distill=False),
    recipe=Recipe(batch_size=8, precision="float32"),
)


def start_of(zoo: Zoo) -> PrunedState:
    start = zoo.shared(START)
    assert start is not None
    return start.read()


def same(a: PrunedState, b: PrunedState) -> bool:
    return a.mask == b.mask and all(torch.equal(value, b.state[name]) for name, value in a.state.items())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(("damage", "repair"), [(cut, True), (Path.unlink, False)], ids=["cut", "gone"])
def test_the_build_goes_on(tmp_path: Path, damage: Callable[[Path], None], repair: bool) -> None:
    backbone, zoo = tiny_backbone(), Zoo(tmp_path / "zoo")
    build_refined_zoo(backbone, TASKS, zoo, SETTINGS)
    before, entries = start_of(zoo), {entry.name: entry.sha256 for entry in zoo}
    start = zoo.shared(START)
    assert start is not None
    damage(start.path)
    if repair:
        zoo.verify(repair=True)
        assert zoo.shared(START) is None
        assert zoo.verify() == []
    # Other tasks than the model was made of: it is made of those of that time.
    made = build_refined_zoo(backbone, [MORE], Zoo(zoo.path), SETTINGS)
    assert [result.task.name for result in made] == ["c"]
    assert same(start_of(zoo), before)
    assert is_refined(zoo)
    assert {entry.name: entry.sha256 for entry in zoo if entry.name != "c"} == entries
    assert zoo.verify() == []
    # What was in use of the damaged one's name is in use no more.
    assert len(list((zoo.path / "shared").iterdir())) == 1


def test_another_model_is_not_put_in_its_place(tmp_path: Path) -> None:
    zoo = Zoo(tmp_path / "zoo")
    build_refined_zoo(tiny_backbone(), TASKS, zoo, SETTINGS)
    start = zoo.shared(START)
    assert start is not None
    start.path.unlink()
    zoo.verify(repair=True)
    other = replace(SETTINGS, seed=5, schedule=replace(SETTINGS.schedule, criterion="random"))
    with pytest.raises(ZooError, match="the model that its entries refine was lost, and is another one"):
        build_refined_zoo(tiny_backbone(), TASKS, zoo, other)


def test_a_zoo_that_never_had_one_is_refused_as_ever(tmp_path: Path) -> None:
    zoo = Zoo(tmp_path / "zoo")
    build_zoo(tiny_backbone(), TASKS[:1], zoo, SETTINGS)
    zoo.verify(repair=True)
    with pytest.raises(ZooError, match="refine no universal model"):
        build_refined_zoo(tiny_backbone(), TASKS, zoo, SETTINGS)


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _link(path: Path) -> None:
    path.symlink_to(path.parent.parent / "victim.txt")


def _other_kind(path: Path) -> None:
    from mvp_ext.storage import to_bytes

    path.write_bytes(to_bytes({"x": torch.ones(1)}, {}, kind="mvp_ext.run", version=1))


@pytest.mark.parametrize(
    "leave",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes((10**5).to_bytes(8, "little") + b"[" * 10**5),
        _other_kind,
        Path.mkdir,
        _pipe,
        _link,
    ],
    ids=["empty", "deep", "other", "folder", "pipe", "link"],
)
def test_what_lies_where_a_run_is_saved_does_not_stop_it(
    tmp_path: Path, leave: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "SAVE_EVERY", 1)
    (tmp_path / "victim.txt").write_text("dear to somebody")
    zoo = Zoo(tmp_path / "zoo")
    leave(zoo.path / "start.partial")
    build_refined_zoo(tiny_backbone(), TASKS[:1], zoo, SETTINGS)
    assert len(zoo) == 1
    assert (tmp_path / "victim.txt").read_text() == "dear to somebody"
