"""Groups of options: each field is an option of the command, and the command gets its groups back."""

from __future__ import annotations

import dataclasses
import random
import sys
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import torch
import typer
from digits import few_digits, tiny_backbone
from typer.testing import CliRunner

from mvp_ext.app import data_options, options
from mvp_ext.pruning.settings import Schedule, Settings, VoteOptions


@dataclass(frozen=True)
class Size:
    width: Annotated[int, typer.Option(help="How wide.")] = 3
    tall: Annotated[bool, typer.Option(help="Whether it is.")] = False


@pytest.fixture
def made() -> tuple[typer.Typer, list[Any]]:
    app, seen = typer.Typer(), []

    @app.command()
    @options.grouped
    def draw(size: Size, name: Annotated[str, typer.Argument()], colour: str = "red") -> None:
        """Draw something."""
        seen.append((size, name, colour))

    return app, seen


def test_a_command_gets_its_groups(made: tuple[typer.Typer, list[Any]]) -> None:
    app, seen = made
    for line in (["cat"], ["cat", "--width", "5", "--tall", "--colour", "blue"]):
        result = CliRunner().invoke(app, line)
        assert result.exit_code == 0, result.output
    assert seen == [(Size(), "cat", "red"), (Size(5, True), "cat", "blue")]
    assert "Draw something" in CliRunner().invoke(app, ["--help"]).output
    assert CliRunner().invoke(app, ["cat", "--width", "x"]).exit_code == 2


def test_an_option_is_declared_once() -> None:
    """Two groups with one option, or a group and the command itself, are a mistake that shows at import."""

    def draw(size: Size, width: int = 1) -> None: ...

    with pytest.raises(ValueError, match="duplicate parameter name: 'width'"):
        options.grouped(draw)


def test_defaults_are_those_of_the_dataclasses() -> None:
    """An option that is not given changes nothing."""
    backbone = tiny_backbone()
    settings = options.CutOptions().settings(None, backbone, Settings.seed)
    assert options.ScheduleOptions().applied(settings, Schedule.final_steps) == Settings()
    assert options.NeighbourOptions().vote() == VoteOptions()


def test_what_is_given_takes_the_place_of_the_zoos() -> None:
    backbone = tiny_backbone()
    cut = options.CutOptions(keep=0.1, align=1, criterion="l2")
    settings = cut.settings(None, backbone, seed=7)
    assert settings == Settings(keep=0.1, align=1, schedule=Schedule(criterion="l2"), seed=7)
    schedule = options.ScheduleOptions(share=0.5).applied(settings, 9).schedule
    assert schedule == Schedule(share=0.5, final_steps=9, criterion="l2")


def test_a_device_that_is_not_there() -> None:
    assert options.ExecutionOptions(device="cpu").begin() == torch.device("cpu")
    with pytest.raises(ValueError, match="--device: expected cpu, cuda, cuda:N or auto, got 'abacus'"):
        options.ExecutionOptions(device="abacus").begin()


def test_workers_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ({"cpus_per_task": 2}, {"gpus_per_task": 1.0}):
        with pytest.raises(ValueError, match="expected --workers N or --ray ADDRESS, got neither"):
            options.WorkerOptions(**wrong).begin()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="--workers 2 --ray auto: expected one of them"):
        options.WorkerOptions(workers=2, ray="auto").begin()
    with options.WorkerOptions().begin() as run:
        assert run is None
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(ImportError, match=r"workers need Ray: pip install 'mvp_ext\[ray\]'"),
        options.WorkerOptions(workers=2).begin(),
    ):
        raise AssertionError


def written(name: str, rng: random.Random) -> str:
    """A name as one may write it: in quotes where it must be, or for no reason."""
    plain = name == name.strip() and "," not in name and not name.startswith('"')
    if plain and rng.random() < 0.5:
        return rng.choice(("", " ")) + name + rng.choice(("", "  "))
    return rng.choice(("", " ")) + '"' + name.replace('"', '""') + '"' + rng.choice(("", " "))


@pytest.mark.parametrize("seed", range(50))
def test_any_name_can_be_asked_for(seed: int) -> None:
    rng = random.Random(seed)
    names = ["".join(rng.choices("ab\",' é/=", k=rng.randint(1, 6))) for _ in range(4)]
    names = [name for name in names if name.strip()] or ["a"]
    assert data_options.names_in("classes", ",".join(written(name, rng) for name in names)) == names


@pytest.mark.parametrize(
    ("text", "names"),
    [("3,5, 8", ["3", "5", "8"]), ("a b ,,c,", ["a b", "c"]), ("19\" rack,5'", ['19" rack', "5'"])],
)
def test_plain_names_need_no_quotes(text: str, names: list[str]) -> None:
    assert data_options.names_in("classes", text) == names


@pytest.mark.parametrize("text", ['"fox, red', 'cat,"fox, red"x', ""])
def test_names_that_are_not_closed(text: str) -> None:
    with pytest.raises(ValueError, match="--exclude-classes: expected"):
        data_options.names_in("exclude-classes", text)


def test_tasks_of_some_classes() -> None:
    data = few_digits()
    some = data_options.SamplingOptions(classes_per_task=3, classes="1,2,3,4,5", exclude_classes="2")
    tasks = some.tasks(data, 4, "t", data_options.DataOptions(), [], seed=0)
    assert {name for task in tasks for name in task.class_names} == set("1345")
    for wrong in (
        data_options.SamplingOptions(classes="1,x"),
        data_options.SamplingOptions(exclude_classes="x"),
    ):
        with pytest.raises(ValueError, match="unknown class 'x'"):
            wrong.tasks(data, 1, "t", data_options.DataOptions(), [], seed=0)


def test_a_name_with_a_comma_is_suggested() -> None:
    data = dataclasses.replace(few_digits(), class_names=("fox, red", *"123456789"))
    task = data_options.TaskOptions(classes='"fox, red",3').of(data, data_options.DataOptions(), 0)
    assert task.class_names == ("fox, red", "3")
    with pytest.raises(ValueError, match=r"unknown class 'fox' in .*; did you mean 'fox, red'"):
        data_options.TaskOptions(classes="fox, red,3").of(data, data_options.DataOptions(), 0)
