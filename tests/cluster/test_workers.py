"""Workers make the zoo that one process makes, to the bit, whoever dies meanwhile: on Ray's own cluster for tests."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from command_line import run as run_command
from digits import digits_task, few_digits, tiny_backbone
from equal_zoos import assert_equal_zoos

import mvp_ext
from mvp_ext.app.comparison import Comparison, compare
from mvp_ext.cluster.workers import Workers
from mvp_ext.data.cache import clear_cache
from mvp_ext.data.images import load_data
from mvp_ext.data.tasks import Task
from mvp_ext.pruning.build import build_zoo
from mvp_ext.pruning.clusters import build_clustered_zoo
from mvp_ext.pruning.settings import Schedule, Settings
from mvp_ext.train.recipe import Recipe
from mvp_ext.zoo.zoo import Zoo

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(find_spec("ray") is None, reason="the extra ray is not installed"),
]

RECIPE = Recipe(batch_size=8, precision="float32")
SETTINGS = Settings(keep=0.5, schedule=Schedule(share=0.5, steps_per_round=1, final_steps=3), recipe=RECIPE)
CLASSES = {"a": (0, 1), "b": (2, 3), "c": (1, 4), "d": (5, 6)}


def tasks(names: str = "abcd") -> list[Task]:
    return [digits_task(CLASSES[name], name, seed=i) for i, name in enumerate(names)]


@pytest.fixture(scope="module", autouse=True)
def _environment() -> Iterator[None]:
    """What Ray reads when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        # Else Ray writes a token into the user's home.
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", os.urandom(16).hex())
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # Workers give way to whatever else runs, which may be the other half of the tests.
        patch.setenv("RAY_worker_niceness", "0")
        # A machine is dead after five questions without an answer.
        patch.setenv("RAY_health_check_period_ms", "500")
        yield


def workers_of(mark: str) -> set[int]:
    """Processes of this machine, but for Ray's agents, which wait a minute for the dead, that have this variable."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"MVP_TEST={mark}".encode() not in (process / "environ").read_bytes():
                continue
            if b"Agent" not in (process / "cmdline").read_bytes():
                found.add(int(process.name))
    return found


def test_a_killed_driver_loses_nothing_and_leaves_nobody(tmp_path: Path) -> None:
    tiny_backbone().save(tmp_path / "dense.safetensors")
    build = (
        f"zoo build --model {tmp_path}/dense.safetensors --tasks 5 --classes-per-task 2 --max-train 12 --steps 6 "
        "--steps-per-round 1 --share 0.5 --no-refine --no-universal"
    )
    run_command(f"{build} --zoo {tmp_path}/alone")
    build += f" --zoo {tmp_path}/together"
    code, mark = "from mvp_ext.app.cli import main; main()", os.urandom(8).hex()
    command = [sys.executable, "-c", code, *build.split(), "--workers", "2", "--cpus-per-task", "1"]
    with subprocess.Popen(command, env=os.environ | {"MVP_TEST": mark}, stdout=subprocess.DEVNULL) as driver:
        made: dict[str, str] = {}
        while not made:
            assert driver.poll() is None
            time.sleep(0.05)
            if (tmp_path / "together" / "index.sqlite").exists():
                made = {entry.name: entry.created for entry in Zoo(tmp_path / "together")}
        driver.kill()
    assert len(made) < 5
    end = time.monotonic() + 20
    while workers_of(mark):
        assert time.monotonic() < end
        time.sleep(0.1)
    # Goes on with or without workers.
    said = run_command(build)
    assert "entries are there already" in said.output
    together = Zoo(tmp_path / "together", create=False)
    assert_equal_zoos(Zoo(tmp_path / "alone", create=False), together)
    assert {name: together[name].created for name in made} == made


@pytest.fixture(scope="module")
def machines(_environment: None) -> Iterator[Any]:
    """Three machines of one: this process's, which makes nothing, and two with a core each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def workers(machines: Any) -> Iterator[Workers]:
    with mvp_ext.ray_workers(address=machines.address) as run:
        yield run


def test_two_workers_build_what_one_process_does(workers: Workers, tmp_path: Path) -> None:
    """Experts: they have all that an entry can have, a start and features of that."""
    alone, together = Zoo(tmp_path / "alone"), Zoo(tmp_path / "together")
    build_clustered_zoo(tiny_backbone(), tasks(), alone, SETTINGS, clusters=2)
    told: dict[str, list[tuple[int, int]]] = {}
    results = build_clustered_zoo(
        tiny_backbone(),
        tasks(),
        together,
        SETTINGS,
        clusters=2,
        run=workers,
        progress=lambda what, *steps: told.setdefault(what, []).append(steps),
    )
    assert [result.task.name for result in results] == ["expert-00", "expert-01"]
    assert_equal_zoos(alone, together)
    for name in ("expert-00", "expert-01"):
        steps = together[name].steps
        # Once from the worker, however late that is heard of, and at the end.
        assert len(told[name]) >= 2
        assert told[name][-1] == (steps, steps)
    # It is all there.
    assert build_clustered_zoo(tiny_backbone(), tasks(), together, SETTINGS, clusters=2, run=workers) == []


def test_a_comparison_with_workers_has_the_numbers_of_one_process(workers: Workers, tmp_path: Path) -> None:
    zoo, backbone, asked = Zoo(tmp_path / "zoo"), tiny_backbone(), tasks("ab")
    build_zoo(backbone, tasks("cd"), zoo, SETTINGS)
    options = Comparison(SETTINGS, steps=2, arms=("mvp", "random"), batches=(1,), seconds=0.0)
    told: dict[str, list[tuple[int, int]]] = {}
    alone, together = (
        compare(backbone, asked, zoo, options, journal=tmp_path / name, workers=those, progress=progress)
        for name, those, progress in (
            ("alone.jsonl", None, None),
            ("together.jsonl", workers, lambda what, *steps: told.setdefault(what, []).append(steps)),
        )
    )

    def numbers(result: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            {**run, "cost": {key: value for key, value in run["cost"].items() if "seconds" not in key}}
            for arm in result["arms"]
            for run in arm["tasks"]
        ]

    assert numbers(alone) == numbers(together)
    assert alone["dense_accuracy"] == together["dense_accuracy"]
    assert told["a, MVP"][-1] == told["b, random sub-network"][-1] == (2, 2)

    class Idle(Workers):
        def map(self, function: Any, jobs: Any, progress: Any = None) -> Iterator[Any]:
            assert not list(jobs)
            return iter(())

    # What is finished is not computed again.
    again = compare(backbone, asked, zoo, options, journal=tmp_path / "together.jsonl", workers=Idle(1, 0.0))
    assert numbers(again) == numbers(together)


def test_a_task_that_fails_is_named_and_the_others_are_kept(workers: Workers, tmp_path: Path) -> None:
    """Images in a file that this process has open, and that no other finds."""
    from PIL import Image

    for label, name in enumerate("xy"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number, pixels in enumerate(few_digits().train_images[label * 12 : label * 12 + 8]):
            Image.fromarray(pixels.numpy()).save(tmp_path / "photos" / name / f"{number}.png")
    photos = load_data(tmp_path / "photos", cache=True)
    first, bad, last = (*tasks("a"), Task("photos", photos, (0, 1)), *tasks("b"))
    zoo = Zoo(tmp_path / "zoo")
    build_zoo(tiny_backbone(), [bad], Zoo(tmp_path / "sound"), SETTINGS, run=workers)
    assert clear_cache(tmp_path / "photos")
    with pytest.raises(RuntimeError, match=r"task 'photos' failed: .*expected the decoded images to be"):
        build_zoo(tiny_backbone(), [first, bad, last], zoo, SETTINGS, run=workers)
    assert [entry.name for entry in zoo] == ["a", "b"]


def test_a_machine_that_dies_costs_its_task_alone(machines: Any, workers: Workers, tmp_path: Path) -> None:
    longer = replace(SETTINGS, schedule=replace(SETTINGS.schedule, final_steps=30))
    alone, together = Zoo(tmp_path / "alone"), Zoo(tmp_path / "together")
    build_zoo(tiny_backbone(), tasks("abc"), alone, longer)
    told: dict[str, tuple[int, int]] = {}

    def progress(what: str, *steps: int) -> None:
        told[what] = steps[0], steps[1]
        # Each has one that it is at.
        if sum(done < total for done, total in told.values()) == 2 and len(machines.worker_nodes) == 2:
            machines.remove_node(next(iter(machines.worker_nodes)), allow_graceful=False)

    build_zoo(tiny_backbone(), tasks("abc"), together, longer, progress=progress, run=workers)
    assert len(machines.worker_nodes) == 1
    assert_equal_zoos(alone, together)
