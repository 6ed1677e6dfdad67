"""Every command once on a tiny model, and every way to go wrong: one line, exit code 2, nothing lost."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import run
from tiny import tiny_model
from typer.testing import CliRunner

import mvp_ext
from mvp_ext.app import cli, demo, zoo_commands
from mvp_ext.app.comparison import Comparison
from mvp_ext.app.peers import different_shapes, prune_with_torch_pruning
from mvp_ext.model.checkpoint import load_pruned
from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.preprocessing import Preprocessing
from mvp_ext.model.surgery import prune_model
from mvp_ext.pruning.methods import method_for
from mvp_ext.pruning.prune import prune
from mvp_ext.pruning.settings import Schedule, Settings
from mvp_ext.zoo.zoo import Zoo

BUILD = "--tasks 3 --classes-per-task 3 --max-train 12 --steps 1 --steps-per-round 1 --share 0.6"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a backbone and a zoo of three entries and the universal model, all made by commands."""
    home = tmp_path_factory.mktemp("home")
    backbone = home / "backbone.safetensors"
    said = run(f"pretrain --model test_resnet --image-size 16 --steps 3 --out {backbone}")
    assert "test images of 10 classes" in said.output
    said = run(f"zoo build --universal --zoo {home}/zoo --model {backbone} {BUILD}")
    assert "3 entries, mean accuracy" in said.output
    assert Zoo(home / "zoo").shared("universal") is not None
    return home


def test_zoo_build_goes_on_where_it_was(home: Path) -> None:
    before = {e.name: e.created for e in Zoo(home / "zoo").entries()}
    Zoo(home / "zoo").remove("zoo-001")
    said = run(f"zoo build --zoo {home}/zoo --model {home}/backbone.safetensors {BUILD}")
    assert "2 of 3 entries are there already" in said.output
    after = {e.name: e.created for e in Zoo(home / "zoo").entries()}
    assert set(after) == set(before) == {"zoo-000", "zoo-001", "zoo-002"}
    assert after["zoo-000"] == before["zoo-000"]


def test_a_zoo_of_two_data_sets_with_classes_held_out(home: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 8, 8), dtype=np.uint8)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        names = np.array(["red", "fox, red", "blue", "grey"])
        np.savez(
            tmp_path / folder / "shades.npz",
            train_images=pixels,
            train_labels=np.arange(24) % 4,
            class_names=names,
        )
    data = f"--data {tmp_path}/a/shades.npz --data {tmp_path}/b/shades.npz"
    model = f"--model {home}/backbone.safetensors"
    held_out = """--exclude-classes 'shades/grey,"shades-2/fox, red"'"""
    build = BUILD.replace("--tasks 3 --classes-per-task 3", "--tasks 2 --classes-per-task 2")
    run(f"zoo build --no-refine --no-universal --zoo {tmp_path}/zoo {model} {data} {build} {held_out}")
    zoo = Zoo(tmp_path / "zoo")
    tasks = [set(entry.task["classes"]) for entry in zoo.entries()]
    assert tasks[0] < {"shades/red", "shades/fox, red", "shades/blue"}
    assert tasks[1] < {"shades-2/red", "shades-2/blue", "shades-2/grey"}
    task = """--classes '"shades/fox, red",shades/grey'"""
    said = run(f"prune {model} {data} {task} --method random --steps 0 --out {tmp_path}/small.safetensors")
    assert "outputs, in order: shades/fox, red, shades/grey" in said.output


def test_zoo_build_from_the_dense_model(home: Path, tmp_path: Path) -> None:
    run(f"zoo build --no-refine --zoo {tmp_path}/zoo --model {home}/backbone.safetensors {BUILD}")
    assert method_for(Zoo(tmp_path / "zoo")) == "mvp"
    # the control, there by default
    assert Zoo(tmp_path / "zoo").shared("universal") is not None
    run(
        f"compare --zoo {tmp_path}/zoo --model {home}/backbone.safetensors --out {tmp_path}/runs --tasks 1 "
        "--max-train 12 --classes-per-task 3 --steps 1 --neighbours 2 --arm mvp --seconds 0"
    )
    results = json.loads((tmp_path / "runs" / "results.json").read_text())
    assert [arm["name"] for arm in results["arms"]] == ["MVP"]
    assert len(results["overlap"]) == 2 * 3


def test_a_zoo_of_experts(home: Path, tmp_path: Path) -> None:
    zoo, model = f"--zoo {tmp_path}/zoo", f"--model {home}/backbone.safetensors"
    said = run(f"zoo build --clusters 2 {zoo} {model} {BUILD}")
    assert "then experts in" in said.output
    assert [entry.name for entry in Zoo(tmp_path / "zoo")] == ["expert-00", "expert-01"]
    said = run(
        f"prune {zoo} {model} --classes 0,1 --max-train 12 --steps 0 --out {tmp_path}/small.safetensors"
    )
    assert "the zoo knows" in said.output
    said = run(f"zoo build --clusters many {zoo} {model} {BUILD}", code=2)
    assert "--clusters: expected a number or auto, got 'many'" in said.output
    said = run(f"zoo build --clusters 2 --refine {zoo} {model} {BUILD}", code=2)
    assert "--clusters makes experts of kinds of tasks" in said.output
    # Once it is one, it stays one.
    said = run(f"zoo build {zoo} {model} {BUILD}")
    assert "2 entries" in said.output


@pytest.mark.parametrize(("several", "first"), [(True, "expert-00"), (False, "zoo-000")])
def test_experts_are_the_default_where_kinds_exist(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, several: bool, first: str
) -> None:
    monkeypatch.setattr("mvp_ext.app.zoo_commands.of_several_kinds", lambda *_: several)
    run(f"zoo build --zoo {tmp_path}/zoo --model {home}/backbone.safetensors {BUILD}")
    assert next(iter(Zoo(tmp_path / "zoo"))).name == first


def test_zoo_list_show_verify(home: Path) -> None:
    listed = run(f"zoo list {home}/zoo").output
    assert "zoo-000" in listed
    assert "3 entries of test_resnet" in listed
    shown = run(f"zoo show zoo-001 {home}/zoo").output
    assert "accuracy" in shown
    assert "kept" in shown
    assert "3 entries, all sound" in run(f"zoo verify {home}/zoo").output


def test_zoo_verify_names_and_repairs_damage(home: Path, tmp_path: Path) -> None:
    zoo = tmp_path / "zoo"
    shutil.copytree(home / "zoo", zoo)
    victim = Zoo(zoo)["zoo-002"].path
    victim.write_bytes(victim.read_bytes()[:-7])
    said = run(f"zoo verify {zoo}", code=1).output
    assert victim.name in said
    assert "--repair" in said
    assert f"warning: zoo {zoo}: skipped damaged: entry 'zoo-002'" in run(f"zoo list {zoo}").stderr
    run(f"zoo verify {zoo} --repair")
    assert "2 entries, all sound" in run(f"zoo verify {zoo}").output


def test_zoos_travel(home: Path, tmp_path: Path, monkeypatch: Any) -> None:
    said = run(f"zoo push {home}/zoo {tmp_path}/shelf").output
    assert "push: files 5/5" in said
    assert f"3 entries are at {tmp_path}/shelf" in said
    assert "zoo-001" in (tmp_path / "shelf" / "README.md").read_text()
    assert "3 entries of" in run(f"zoo pull {tmp_path}/shelf {tmp_path}/pulled").output
    assert "3 entries, all sound" in run(f"zoo verify {tmp_path}/pulled").output
    Zoo(tmp_path / "pulled").remove("zoo-001")
    run(f"zoo merge {home}/zoo {tmp_path}/pulled --out {tmp_path}/merged")
    assert "3 entries, all sound" in run(f"zoo verify {tmp_path}/merged").output
    run(f"zoo push {tmp_path}/pulled {tmp_path}/shelf")
    assert "3 entries are at" in run(f"zoo push {tmp_path}/merged {tmp_path}/shelf --force").output

    def stopped(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(zoo_commands, "pull_zoo", stopped)
    assert "goes on from there" in run(f"zoo pull {tmp_path}/shelf {tmp_path}/pulled", code=130).stderr


def test_prune_writes_a_model_that_loads(home: Path, tmp_path: Path) -> None:
    common = f"--zoo {home}/zoo --model {home}/backbone.safetensors --steps 1 --neighbours 2 --max-train 12"
    out, task = tmp_path / "new" / "small.safetensors", tmp_path / "task.json"
    said = run(f"prune {common} --classes 3,5,8 --keep 0.3 --save-task {task} --out {out}")
    assert "voters: zoo-" in said.output
    small = load_pruned(out)
    assert small.model(torch.zeros(1, 3, 16, 16)).shape == (1, 3)
    assert small.card.made_with["method"] == "refined"
    assert small.class_names == ("3", "5", "8")
    run(f"prune {common} --task {task} --out {tmp_path}/again.safetensors")
    again = load_pruned(tmp_path / "again.safetensors")
    assert again.mask == small.mask
    assert again.card.metrics == small.card.metrics


def test_compare_writes_results_and_page_and_goes_on(home: Path, tmp_path: Path, monkeypatch: Any) -> None:
    runs = tmp_path / "runs"
    command = (
        f"compare --zoo {home}/zoo --model {home}/backbone.safetensors --out {runs} --tasks 2 --classes-per-task 3 "
        "--max-train 12 --steps 1 --neighbours 2 --steps-per-round 1 --share 0.6 --final-steps 1 "
        "--rate random=0.002 --seconds 0"
    )
    assert "universal" in run(command).output
    results = json.loads((runs / "results.json").read_text())
    assert results["arms"][0]["name"] == "MVP, refined"
    assert all(len(arm["tasks"]) == 2 for arm in results["arms"])
    assert len({json.dumps(arm["tasks"][0]["kept"]) for arm in results["arms"]}) == 1, (
        "arms of different shapes"
    )
    assert results["overlap"] == []  # entries that refine one model have its mask
    assert "<picture>" in (runs / "report.html").read_text()
    assert (runs / "figures" / "accuracy.png").exists()
    finished = (runs / "runs.jsonl").read_text()

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a finished run was repeated")

    with (runs / "runs.jsonl").open("a") as file:
        file.write('{"identity": {"op')  # killed while writing
    monkeypatch.setattr("mvp_ext.app.comparison.prune", never)
    run(command)
    assert (runs / "runs.jsonl").read_text().startswith(finished)
    run(f"report {runs}/results.json --out {tmp_path}/page.html --figures {tmp_path}/figures")
    assert (tmp_path / "page.html").stat().st_size > 10_000


def test_demo_is_the_whole_job(tmp_path: Path, monkeypatch: Any) -> None:
    tiny = demo.DemoSize(
        model="test_resnet",
        image_size=16,
        pretrain_steps=2,
        zoo_tasks=2,
        held_out_tasks=2,
        max_train=12,
        steps=1,
        neighbours=2,
        seconds=0,
        schedule=Schedule(share=0.8, steps_per_round=1, final_steps=1),
    )
    monkeypatch.setattr(cli, "QUICK", tiny)
    asked = set()

    def noting(*args: Any, **options: Any) -> Any:
        asked.add((options["method"], args[2].path.name))
        return prune(*args, **options)

    monkeypatch.setattr("mvp_ext.app.comparison.prune", noting)
    said = run(f"demo --quick --out {tmp_path}")
    assert "1. pre-training" in said.output
    assert {("refined", "zoo"), ("mvp", "unrefined-zoo"), ("universal", "zoo")} < asked
    page = (tmp_path / "report.html").read_text()
    assert "flatters voting" in page
    assert "Experts, which `zoo build` makes where tasks are of several kinds" in page
    assert "chance" in page
    assert "another size or seed" in run(f"demo --quick --seed 1 --out {tmp_path}", code=2).stderr


def test_bench_saves_what_it_prints(tmp_path: Path) -> None:
    out = tmp_path / "new" / "bench.json"
    command = (
        "bench --model test_resnet --image-size 32 --keep 0.5 --keep 0.25 --batch 1 --batch 4 --seconds 0"
    )
    said = run(f"{command} --threads 1 --out {out}")
    saved = json.loads(out.read_text())
    assert list(saved["models"]) == ["dense", "keep 0.5", "keep 0.25"]
    small = saved["models"]["keep 0.25"]
    assert small["flops"] < saved["models"]["dense"]["flops"]
    assert [x["batch"] for x in small["latency"]] == [1, 4]
    assert {"p10_ms", "median_ms", "p90_ms", "throughput", "speed_up"} <= set(small["latency"][0])
    saved_share = small["latency"][0]["share_of_saving"]
    assert f"{saved_share:.0%}" in said.output
    assert saved["setting"]["threads"] == 1
    assert "torch" in saved["environment"]


def test_bench_takes_what_a_pruned_file_says(home: Path, tmp_path: Path) -> None:
    """Its size of images, its dense model, its classes."""
    file, out = tmp_path / "small.safetensors", tmp_path / "bench.json"
    run(f"prune --classes 3,5,8 --method random --steps 0 --model {home}/backbone.safetensors --out {file}")
    bench = f"bench --pruned {file} --batch 1 --seconds 0 --threads 1"
    said = run(f"{bench} --data digits --runtime eager,optimized --out {out}")
    saved = json.loads(out.read_text())
    assert list(saved["models"]) == ["dense", file.name]
    assert saved["input_shape"] == [3, 16, 16]
    assert saved["setting"]["model"] == "test_resnet"
    kept = load_pruned(file).card.metrics["accuracy"]
    assert [x["accuracy"] for x in saved["models"][file.name]["latency"]] == pytest.approx([kept] * 2)
    assert "test_resnet at 16 pixels" in said.output
    wrong = run(f"{bench} --image-size 32", code=2).stderr
    assert "one size of images for all models, got small.safetensors 16, --image-size 32" in wrong


needs_torch_pruning = pytest.mark.skipif(
    find_spec("torch_pruning") is None, reason="torch-pruning is not installed (extra bench)"
)


@needs_torch_pruning
def test_bench_against_torch_pruning() -> None:
    command = "bench --model test_resnet --image-size 32 --batch 1 --seconds 0 --against-torch-pruning"
    assert "torch-pruning" in run(command).output
    assert "no counterpart" in run(f"{command} --scope all", code=2).stderr


@needs_torch_pruning
@pytest.mark.parametrize(("name", "scope"), [("test_resnet", "inner"), ("test_vit", "heads+mlp")])
def test_torch_pruning_makes_the_same_model(name: str, scope: str) -> None:
    model = tiny_model(name).eval()
    structure = find_structure(model, scope)
    mask = Mask.random(structure, 0.5, seed=1)
    shape = Preprocessing.of(model).size
    peer = prune_with_torch_pruning(model, structure, mask, (3, shape, shape))
    ours = prune_model(model, mask, structure=structure)
    assert different_shapes(ours, peer) == []
    x = torch.randn(2, 3, shape, shape)
    torch.testing.assert_close(ours(x), peer(x))


# command: what the one line on stderr says
MISTAKES = {
    "zoo list no/such/zoo": "no zoo at no/such/zoo; build one first",
    "zoo verify no/such/zoo": "no zoo at",
    "zoo show zoo-009 {zoo}": "no entry 'zoo-009'",
    "zoo build --zoo {zoo} --model {other} --tasks 4 --classes-per-task 3 --max-train 12": "another backbone",
    "zoo build --zoo {home} --model {backbone}": "is not a zoo and not empty",
    "zoo build --zoo {zoo} --model {backbone} --classes-per-task 11": "classes",
    "zoo build --zoo {zoo} --model {backbone} --tasks 3 --classes-per-task 4": "is of another task",
    "prune": "which task? Give either --classes",
    "prune --classes 1,2 --zoo no/such/zoo": "no zoo at",
    "prune --classes 1,2 --method random": "which weights? Give --weights FILE",
    "prune --classes 1 --method random --model {backbone}": "at least 2 classes",
    "prune --classes 1,x --method random --model {backbone}": "'x'",
    "prune --classes 1,2 --keep 0 --zoo {zoo} --model {backbone}": "keep: expected a",
    "prune --classes 1,2 --keep nan --zoo {zoo} --model {backbone}": "keep: expected a",
    "prune --classes 1,2 --method magic --model {backbone}": "method: expected one of",
    "prune --classes 1,2 --similarity x --zoo {zoo} --model {backbone}": "similarity: expected one of",
    "prune --classes 1,2 --zoo {zoo} --model test_vit --weights no.safetensors": "no.safetensors",
    "prune --classes 1,2 --zoo {zoo} --model {backbone} --pretrained": "own weights",
    "prune --task {home}/no.json --zoo {zoo} --model {backbone}": "no.json",
    "bench --model resnet19": "no model named 'resnet19'; close names: resnet18",
    "bench --model nf_resnet26": "StdConv2d",
    "bench --model test_resnet --keep 1.5": "keep: expected a",
    "bench --model test_resnet --scope heads": "scope",
    "bench --model test_resnet --runtime eager,magic": "--runtime: expected some of eager, optimized",
    "bench --model test_resnet --precision float8": "--precision: expected some of float32",
    "bench --model test_resnet --threads 1,x": "--threads: expected numbers like 1,2",
    "bench --model test_resnet --batch 0": "--batch: expected at least 1",
    "bench --model test_resnet --data digits": "expected a --pruned file that says which classes",
    "bench --model test_resnet --pruned {backbone}": "backbone.safetensors",
    "pretrain --model test_resnet --data no/such/folder": "no/such/folder",
    "pretrain --model test_resnet --steps 0": "steps: expected at least 1",
    "compare --arm magic --zoo {zoo} --model {backbone}": "arms: expected some of",
    "compare --rate mvp=fast --zoo {zoo} --model {backbone}": "--rate: expected METHOD=RATE",
    "report {backbone}": "is not a results file",
    "report {home}/no.json": "No such file",
    "zoo push {zoo} {zoo}": "it is the directory of a zoo",
    "zoo pull {home}/nowhere {home}/new": "no zoo there",
    "zoo merge {zoo} --out {home}/new": "at least two zoos",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line(home: Path, tmp_path: Path, command: str) -> None:
    other = tmp_path / "other.safetensors"
    if "{other}" in command:
        run(f"pretrain --model test_resnet --image-size 16 --steps 1 --seed 5 --out {other}")
    result = run(
        command.format(backbone=home / "backbone.safetensors", zoo=home / "zoo", home=home, other=other),
        code=2,
    )
    assert MISTAKES[command] in result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.output
    assert len(Zoo(home / "zoo")) == 3, "a mistake cost an entry"


def test_an_error_of_ours_says_so(monkeypatch: Any) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise KeyError("oops")

    monkeypatch.setattr(cli, "load_results", broken)
    assert (
        "error in mvp_ext itself (KeyError; MVP_DEBUG=1 shows where): 'oops'"
        in run("report x", code=1).stderr
    )
    monkeypatch.setenv("MVP_DEBUG", "1")
    assert isinstance(CliRunner().invoke(cli.app, ["report", "x"]).exception, KeyError)


def test_ctrl_c(monkeypatch: Any, home: Path) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(zoo_commands, "build_refined_zoo", interrupted)
    result = run(f"zoo build --zoo {home}/zoo --model {home}/backbone.safetensors {BUILD}", code=130)
    assert "goes on from there" in result.stderr


def test_help_names_every_command() -> None:
    words = run("--help").output
    for command in ("demo", "pretrain", "prune", "compare", "report", "bench", "zoo", "zoo build"):
        assert command.split()[0] in words
        run(f"{command} --help")


def test_the_console_script() -> None:
    code = "import sys; sys.argv = ['mvp-ext', '--version']; from mvp_ext.app.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"mvp-ext {mvp_ext.__version__}\n"


def test_evaluation_steps_start_at_zero_and_end_with_the_last() -> None:
    settings = Settings(keep=0.3, schedule=Schedule(share=0.1, steps_per_round=10, final_steps=60))
    options = Comparison(settings, steps=60)
    structure = find_structure(tiny_model("test_resnet"))
    assert options.evaluate_at("mvp", structure) == (0, 11, 30, 60)
    from_scratch = options.evaluate_at("ifp", structure)
    assert from_scratch[0] == 0
    assert 60 < from_scratch[-1] <= 12 * 10 + 60


@pytest.mark.parametrize(
    ("command", "patched", "kept"),
    [
        (
            "prune --classes 0,1 --zoo {home}/zoo --model {home}/backbone.safetensors --out {out}/a",
            "run_prune",
            False,
        ),
        ("pretrain --model test_resnet --image-size 16 --out {out}/b", "run_pretraining", True),
        ("bench --model test_resnet --seconds 0", "run_bench", False),
    ],
)
def test_ctrl_c_promises_only_what_holds(
    command: str, patched: str, kept: bool, home: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    def stopped(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, patched, stopped)
    said = run(command.format(home=home, out=tmp_path), code=130).stderr
    assert ("goes on from there" in said) == kept
    assert ("begins anew" in said) != kept
    assert not list(tmp_path.iterdir())


def test_ctrl_c_while_the_command_starts_shows_no_traceback() -> None:
    """From the first import of this package on, whenever it comes."""
    script = (
        "import sys, os, signal; sys.argv = ['/somewhere/mvp-ext', '--help']\n"
        "class Killer:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'torch': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Killer())\n"
        "from mvp_ext.app.cli import main\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGINT
    assert ended.stderr == ""


def test_no_network_is_found_in_seconds_and_named(monkeypatch: Any) -> None:
    """Nothing listens at the hub's address: no retries, and the way out is said."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    before = constants.HF_HUB_OFFLINE
    began = time.monotonic()
    said = run("bench --model resnet18 --pretrained --seconds 0", code=2).stderr
    assert time.monotonic() - began < 10
    assert "could not be had" in said
    assert "--weights" in said
    assert len(said.splitlines()) == 1
    assert before == constants.HF_HUB_OFFLINE
