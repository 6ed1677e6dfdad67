"""The file of a run: what it gives back, to whom, and what happens to it in a kill."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from digits import digits_task, equal_weights, tiny_backbone

from mvp_ext.train.cost import Cost
from mvp_ext.train.recipe import Recipe
from mvp_ext.train.refit import fit_head
from mvp_ext.train.resume import RunFile
from mvp_ext.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPE = Recipe(batch_size=8, precision="float32")
IDENTITY = {"steps": 5, "shapes": (3, 4), "task": "a"}


@pytest.fixture(autouse=True)
def _often(monkeypatch):
    monkeypatch.setattr("mvp_ext.train.resume.SAVE_EVERY", 2)


def new_trainer(name: str = "test_resnet") -> Trainer:
    backbone, data = tiny_backbone(name), digits_task().split()
    fit_head(backbone.model, data, backbone.preprocessing, "class_mean", "float32")
    return Trainer(backbone.model, data, backbone.preprocessing, RECIPE, seed=0, cost=Cost())


def interrupted(path: Path, name: str = "test_resnet", at: int = 3) -> Trainer:
    """A run of 5 steps that is stopped after ``at``; its state is saved after every second step."""
    trainer, run = new_trainer(name), RunFile(path, IDENTITY)

    def stepped(done: int) -> None:
        run.save_if_due(trainer, done, history=[done, "x"])
        if done == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.run(5, on_step=stepped)
    return trainer


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_run_goes_on_to_the_same_weights(tmp_path, name):
    straight = new_trainer(name)
    straight.run(5)
    killed = interrupted(tmp_path / "run.partial", name)
    saved = RunFile(tmp_path / "run.partial", IDENTITY).load()
    assert saved is not None
    assert saved.done == 2
    assert saved.values == {"history": [2, "x"]}
    again = new_trainer(name)
    saved.restore(again)
    again.run(5, done=saved.done)
    assert equal_weights(again.model, straight.model)
    # What was done before the state was saved is booked on the run that goes on; what came after it is lost.
    assert again.cost.steps == 5
    assert again.cost.train_flops == straight.cost.train_flops
    assert saved.cost.steps == 2
    assert 0 < saved.cost.seconds < killed.cost.seconds


def test_the_identity_is_compared_as_it_is_stored(tmp_path):
    """A tuple comes back from JSON as a list, and is the same run; any other value is another one."""
    path = tmp_path / "run.partial"
    interrupted(path)
    assert RunFile(path, {**IDENTITY, "shapes": [3, 4]}).load() is not None
    for other in ({**IDENTITY, "steps": 6}, {**IDENTITY, "more": 1}, {"steps": 5}):
        assert RunFile(path, other).load() is None


def test_no_file_or_a_damaged_one_is_no_beginning(tmp_path):
    path = tmp_path / "run.partial"
    run = RunFile(path, IDENTITY)
    assert run.load() is None
    interrupted(path)
    whole = path.read_bytes()
    for damaged in (b"", b"no such file", whole[:-9], whole[:200] + bytes([whole[200] ^ 1]) + whole[201:]):
        path.write_bytes(damaged)
        assert run.load() is None
    path.write_bytes(whole)
    assert run.load() is not None


def test_a_kill_while_saving_leaves_the_state_before(tmp_path, monkeypatch):
    path = tmp_path / "run.partial"
    trainer = interrupted(path)
    before = path.read_bytes()

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("mvp_ext.storage.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        RunFile(path, IDENTITY).save_if_due(trainer, 4)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_states_are_saved_when_they_are_due_and_removed_at_the_end(tmp_path):
    trainer, run = new_trainer(), RunFile(tmp_path / "run.partial", IDENTITY)
    run.save_if_due(trainer, 1)
    assert list(tmp_path.iterdir()) == []
    run.save_if_due(trainer, 2)
    assert [file.name for file in tmp_path.iterdir()] == ["run.partial"]
    for _ in range(2):
        run.remove()
        assert list(tmp_path.iterdir()) == []


def test_without_a_path_nothing_is_saved_or_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer, run = new_trainer(), RunFile(None, IDENTITY)
    run.save_if_due(trainer, 2)
    assert run.load() is None
    run.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_restored_state_is_the_trainers_own(tmp_path):
    """Training on does not write into what was loaded: it can be restored again."""
    interrupted(tmp_path / "run.partial")
    saved = RunFile(tmp_path / "run.partial", IDENTITY).load()
    assert saved is not None
    weights = []
    for _ in range(2):
        trainer = new_trainer()
        saved.restore(trainer)
        trainer.run(5, done=saved.done)
        weights.append(copy.deepcopy(trainer.model))
    assert equal_weights(*weights)
