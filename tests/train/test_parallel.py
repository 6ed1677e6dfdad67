"""Two processes of torchrun against one: the same weights, masks and zoo; also where one is killed, and all restart."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import command_line
import pytest
import torch
from digits import digits_task, tiny_backbone

from mvp_ext.data.batches import augment
from mvp_ext.train import parallel
from mvp_ext.train.backbone import load_backbone
from mvp_ext.train.recipe import Recipe
from mvp_ext.train.trainer import Trainer
from mvp_ext.zoo.shared import START
from mvp_ext.zoo.zoo import Zoo

pytestmark = pytest.mark.usefixtures("one_thread")
TESTS = Path(__file__).resolve().parents[1]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")

# argv: folder for results. In its files kill-*: the steps after which the second process kills itself, each once.
SCRIPT = """
    import os, signal, sys
    from contextlib import nullcontext
    from pathlib import Path
    import torch
    from digits import digits_task, few_digits, tiny_backbone
    from mvp_ext.pruning.build import build_refined_zoo
    from mvp_ext.pruning.settings import Schedule, Settings
    from mvp_ext.train import parallel, resume
    from mvp_ext.train.pretrain import pretrain
    from mvp_ext.train.recipe import Recipe
    from mvp_ext.zoo.zoo import Zoo

    torch.set_num_threads(1)
    resume.SAVE_EVERY = 2
    out = Path(sys.argv[1])
    recipe = Recipe(batch_size=8, precision="float32", learning_rate=0.02, optimizer="sgd")

    def stepped(what, done):
        kill = out / f"kill-{what}-{done}"
        if parallel.rank() == 1 and kill.exists():
            kill.unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    # In float64: rounding grows from step to step where a ReLU or a maximum changes its mind.
    with parallel.data_parallel() if "RANK" in os.environ else nullcontext():
        for name in ("test_resnet", "test_vit"):
            path = out / f"{name}.pt"
            if path.exists():
                continue
            backbone, accuracy, cost = pretrain(
                tiny_backbone(name).model.double(), few_digits(), steps=5, image_size=32, recipe=recipe,
                on_step=lambda done, _: stepped(name, done), resume=path.with_suffix(".partial"),
            )
            if parallel.rank() == 0:
                path.with_suffix(".txt").write_text(f"{cost.steps} {cost.train_flops} {accuracy}")
                torch.save(backbone.model.state_dict(), path)
            parallel.wait()
        tasks = [digits_task((2 * i, 2 * i + 1), f"task-{i}", seed=i) for i in range(2)]
        schedule = Schedule(share=0.5, steps_per_round=2, final_steps=4)
        zoo, settings = Zoo(out / "zoo"), Settings(0.5, schedule=schedule, recipe=recipe.with_rate(1e-3))
        build_refined_zoo(
            tiny_backbone("test_resnet").to(torch.float64), tasks, zoo, settings,
            progress=lambda what, done, _: stepped(what, done),
        )
"""


def run(*words: str) -> str:
    """What ``python words`` prints, with the package that this process imports."""
    paths = (str(TESTS), *sys.path[1:])
    done = subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes_are_as_one(tmp_path: Path) -> None:
    """Although one of them is killed, in the pre-training and in the middle of the model of all tasks."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    single, pair = tmp_path / "single", tmp_path / "pair"
    for folder in (single, pair):
        folder.mkdir()
    run(str(script), str(single))
    for kill in ("test_vit-3", f"{START}-5"):
        (pair / f"kill-{kill}").touch()
    run(*TORCHRUN, "--max-restarts", "2", str(script), str(pair))
    assert not list(pair.glob("kill-*"))
    assert not list(pair.glob("**/*.partial"))
    for name in ("test_resnet", "test_vit"):
        one, two = (torch.load(folder / f"{name}.pt") for folder in (single, pair))
        torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-11)
        assert (pair / f"{name}.txt").read_text() == (single / f"{name}.txt").read_text()
    one, two = (Zoo(folder / "zoo") for folder in (single, pair))
    assert two.verify() == []
    assert [entry.name for entry in two] == [entry.name for entry in one]
    for a, b in zip([one.shared(START), *one], [two.shared(START), *two], strict=True):
        small, same = a.load(), b.load()
        assert small.mask == same.mask
        ours, theirs = (checkpoint.model.state_dict() for checkpoint in (same, small))
        # The ridge head is fitted to float32 features.
        heads = [[state.pop(name) for name in ("fc.weight", "fc.bias")] for state in (ours, theirs)]
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(*heads, rtol=1e-4, atol=1e-3)


def test_the_command_line_shares_its_work(tmp_path: Path) -> None:
    """Two processes write one file and speak with one voice."""
    out = tmp_path / "backbone.safetensors"
    options = "pretrain --model test_vit --image-size 32 --steps 1 --batch-size 4 --device cpu --out"
    printed = run(*TORCHRUN, "-m", "mvp_ext", *options.split(), str(out))
    assert printed.count("% on") == 1
    assert load_backbone(out).classes == tuple("0123456789")
    assert list(tmp_path.iterdir()) == [out]


def test_other_commands_share_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = command_line.run(f"prune --out {tmp_path / 'x.safetensors'}", code=2)
    assert "torchrun: `pretrain` and `zoo build` share their work" in result.output


def test_parts_are_augmented_as_the_whole() -> None:
    images = torch.arange(6 * 8 * 8 * 3).view(6, 8, 8, 3)
    whole = augment(images, torch.Generator().manual_seed(0))
    parts = [
        augment(part, torch.Generator().manual_seed(0), part=(number, 3))
        for number, part in enumerate(images.chunk(3))
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_what_cannot_be_shared_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="RANK"), parallel.data_parallel():
        pass
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with (
        pytest.raises(ValueError, match="several machines: expected TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"),
        parallel.data_parallel(),
    ):
        pass
    assert parallel.world() == 1
    backbone, data = tiny_backbone(), digits_task().split()
    monkeypatch.setattr(parallel, "world", lambda: 3)
    with pytest.raises(ValueError, match="batch_size: expected a multiple of the 3 processes, got 8"):
        Trainer(backbone.model, data, backbone.preprocessing, Recipe(batch_size=8), seed=0)
