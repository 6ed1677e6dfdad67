"""Scoring, cutting, saving and loading a large model: seconds, and memory beside the model's own.

    python benchmarks/large.py                    # benchmarks/results/<machine>/large.json
    python benchmarks/large.py --models vit_huge_patch14_224:heads+mlp

Every model is created with random weights in a process of its own. ``peak_mb`` is the most resident memory during a
step, above what there was before it; ``after_mb`` is what of that is left when it ends. A model that was cut is
smaller: ``after_mb`` is negative there.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from results import machine_folder

from mvp_ext.app.environment import command, commit, environment
from mvp_ext.model.checkpoint import load_pruned, save_pruned
from mvp_ext.model.create import create_model
from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.surgery import prune_model
from mvp_ext.pruning.scores import score_units
from mvp_ext.storage import write_atomic

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("vit_large_patch16_224:heads+mlp", "convnext_large:mlp", "resnet152:inner")
KEEP = 0.5
_MB = 1 << 20

T = TypeVar("T")


class Steps:
    """Seconds and memory of one step after another."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, float]] = {}

    def run(self, name: str, step: Callable[[], T]) -> T:
        """The step's result."""
        gc.collect()
        before = _resident()
        with _peak() as peaks:
            start = time.perf_counter()
            result = step()
            seconds = time.perf_counter() - start
        self.rows[name] = {
            "seconds": round(seconds, 2),
            "peak_mb": round((max(peaks) - before) / _MB),
            "after_mb": round((_resident() - before) / _MB),
        }
        print(f"  {name}: {self.rows[name]}", flush=True)
        return result


def _resident() -> int:
    """Bytes of this process that lie in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise OSError("/proc/self/status: expected a line VmRSS")


@contextmanager
def _peak() -> Iterator[list[int]]:
    """Resident memory, read every few milliseconds."""
    seen, done = [_resident()], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            seen.append(_resident())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()
        seen.append(_resident())


def measure(name: str, scope: str) -> dict[str, Any]:
    """One model from its creation to its file and back."""
    steps = Steps()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.safetensors"
        weights = _to_file(steps, name, scope, path)
        steps.run("load", lambda: load_pruned(path))
        saved = path.stat().st_size
    return {"weights_mb": round(weights / _MB), "file_mb": round(saved / _MB), "steps": steps.rows}


def _to_file(steps: Steps, name: str, scope: str, path: Path) -> int:
    """Bytes of the dense model's weights; nothing of the model is left."""
    model = steps.run("create", lambda: create_model(name, num_classes=10).eval())
    weights = sum(p.numel() * p.itemsize for p in model.parameters())
    structure = steps.run("find", lambda: find_structure(model, scope))
    scores = steps.run("score", lambda: score_units(model, structure, "l1"))
    mask = Mask.from_scores(structure, scores, KEEP)
    steps.run("cut", lambda: prune_model(model, mask, structure=structure))
    steps.run("save", lambda: save_pruned(model, path, mask=mask, structure=structure))
    return weights


def main() -> None:
    options = _parse()
    models = {}
    for each in options.models:
        name, _, scope = each.partition(":")
        print(f"{name}, scope {scope}", flush=True)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            models[each] = pool.apply(measure, (name, scope))
    setting = {
        "keep": KEEP,
        "threads": torch.get_num_threads(),
        "command": command(ROOT),
        "commit": commit(ROOT, "csrc", "mvp_ext", "benchmarks/*.py"),
    }
    result = {"setting": setting, "environment": environment(), "models": models}
    options.out.mkdir(parents=True, exist_ok=True)
    write_atomic(options.out / "large.json", f"{json.dumps(result, indent=1)}\n".encode())


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Seconds and memory of pruning large models")
    parser.add_argument("--models", nargs="+", metavar="NAME:SCOPE")
    parser.add_argument("--out", type=Path, default=machine_folder(), help="a folder")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model instead")
    options = parser.parse_args()
    options.models = options.models or (["test_vit:heads+mlp"] if options.dry_run else MODELS)
    return options


if __name__ == "__main__":
    main()
