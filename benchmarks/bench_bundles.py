"""bundles: 1 to 1,000 tasks with one backbone as one file, beside a file for each task.

The model is resnet18, pruned to 25 %, seeing images of 64 pixels; tasks have 10 classes and differ in their
classifiers, which are random. "load" is from a file in the system's cache to a model that predicts; its name has the
sizes. One image is asked about, as bytes in memory, first for one task, then for all.

Peers: so many separate files loaded, and their models asked. There are 100 of them: with 1,000 tasks the peer does a
tenth of the work, and the bundle has each classifier ten times.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Bench
from models import small_model
from torch import Tensor

from mvp_ext.deploy.bundle import Bundle, load_bundle, save_bundle
from mvp_ext.model.card import ModelCard
from mvp_ext.model.checkpoint import PrunedCheckpoint, load_pruned, save_pruned
from mvp_ext.model.create import create_model
from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.prediction import Predictions
from mvp_ext.model.preprocessing import Preprocessing
from mvp_ext.model.surgery import prune_model

MODEL, KEEP, SIZE, CLASSES = "resnet18", 0.25, 64, 10
TASKS, SEPARATE = (1, 10, 100, 1000), 100
# Of the time of n separate models, one bundle of n tasks may take 2 / n; loading anything may take a second.
SHARE, LOAD_US = 0.5, 1e6


def make_files(folder: Path, model: str, count: int) -> list[Path]:
    """So many files of one backbone with different classifiers."""
    generator = torch.Generator().manual_seed(0)
    dense = create_model(model, num_classes=CLASSES)
    structure = find_structure(dense)
    mask = Mask.random(structure, KEEP, 0)
    small: Any = prune_model(dense, mask, structure=structure).eval()
    see = Preprocessing(SIZE)
    see.declare(small)
    files = []
    for number in range(count):
        with torch.no_grad():
            small.get_classifier().weight.normal_(0, 0.05, generator=generator)
        card = ModelCard(see, tuple(f"class {i}" for i in range(CLASSES)), f"task {number}")
        files.append(folder / f"{number}.safetensors")
        save_pruned(small, files[-1], mask=mask, structure=structure, card=card)
    return files


def ask_each(models: Sequence[PrunedCheckpoint], image: Tensor) -> list[Predictions]:
    return [model.predict(image) for model in models]


def check(bundle: Bundle, models: Sequence[PrunedCheckpoint], image: Tensor) -> None:
    """To the bit for one task, up to rounding for all."""
    everything = bundle.predict(image)
    for task, model in zip(bundle.tasks, models, strict=False):
        expected = model.predict(image).probabilities
        assert torch.equal(bundle.predict(image, task).probabilities, expected)
        torch.testing.assert_close(everything[task].probabilities, expected)


def add_tasks(bench: Bench, tasks: int, files: Sequence[Path], folder: Path, image: Tensor) -> None:
    many = f"{tasks} tasks" if tasks > 1 else "1 task"
    load, one, everything = (
        f"{many}, {what}" for what in ("load", "one image, one task", "one image, all tasks")
    )
    if not bench.wants(load, one, everything):
        return
    count, apart = bench.size(tasks), files[:tasks]
    path = folder / f"{tasks} tasks.safetensors"
    save_bundle([(f"task {i}", files[i % len(files)]) for i in range(count)], path)
    sizes = (path.stat().st_size, count * files[0].stat().st_size)
    bundle, models = load_bundle(path), [load_pruned(file) for file in apart]
    peer = f"{len(apart)} separate"
    bench.case(
        f"{load} ({sizes[0] / 1e6:.1f} MB, separate files {sizes[1] / 1e6:.1f} MB)",
        partial(load_bundle, path),
        {peer: lambda: [load_pruned(file) for file in apart]},
        most_us=LOAD_US,
    )
    bench.case(
        one,
        partial(bundle.predict, image, bundle.tasks[-1]),
        {"its own file's": partial(models[0].predict, image)},
        floors={"its own file's": 0.9},
        check=partial(check, bundle, models, image),
    )
    bench.case(
        everything,
        partial(bundle.predict, image),
        {peer: partial(ask_each, models, image)},
        floors={peer: SHARE * len(apart)} if 1 < tasks <= SEPARATE else {},
    )


def main() -> None:
    bench = Bench("bundles")
    image = torch.randint(0, 256, (1, SIZE, SIZE, 3), dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder:
        files = make_files(Path(folder), small_model(MODEL) if bench.dry else MODEL, bench.size(SEPARATE))
        for tasks in TASKS:
            add_tasks(bench, tasks, files, Path(folder), image)
    bench.finish()


if __name__ == "__main__":
    main()
