"""Training batches from a folder of JPEGs: seconds to the first, images a second after it, and memory.

    python benchmarks/images.py                        # benchmarks/results/cpu/images.json
    python benchmarks/images.py --images 20000 --work FOLDER

The JPEGs are synthetic (500 × 375, of noise in patches) and written into a temporary folder. Each contender runs in a
process of its own, the first time and again: ``cache`` decodes into a file first, and finds it the second time;
``memory`` decodes everything each time; ``torchvision`` is ImageFolder and a DataLoader with a worker a core, which
decode for every batch. All give shuffled, mirrored, normalised float32 batches. ``peak_mb`` is the most resident memory
of the process, ``worker_peak_mb`` that of its largest worker.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mvp_ext.app.environment import command, commit, environment
from mvp_ext.data.batches import augment, shuffled_indices
from mvp_ext.data.cache import clear_cache
from mvp_ext.data.images import load_data
from mvp_ext.data.tasks import Task
from mvp_ext.model.preprocessing import Preprocessing
from mvp_ext.storage import write_atomic
from mvp_ext.timm_compat import import_timm

ROOT = Path(__file__).resolve().parent.parent
SIZE, BATCH, CLASSES = 224, 64, 10
# Different contents; the files are many more.
PICTURES = 64


def write_images(folder: Path, count: int) -> None:
    """``count`` JPEGs in folders of classes."""
    random = np.random.default_rng(0)
    pictures = []
    for _ in range(PICTURES):
        patches = Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        file = io.BytesIO()
        patches.resize((500, 375), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        pictures.append(file.getvalue())
    for number in range(count):
        place = folder / f"class{number % CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:07}.jpg").write_bytes(pictures[number % PICTURES])


def of_mvp(folder: Path, cache: bool) -> Iterator[torch.Tensor]:
    data = load_data(folder, image_size=SIZE, cache=cache)
    task = Task("all", data, data.classes).split()
    generator, see = torch.Generator().manual_seed(0), Preprocessing(SIZE)
    for index in shuffled_indices(len(task.train_labels), BATCH, sys.maxsize, seed=0):
        yield see.batch(augment(task.train_images[index], generator, pad=0))


def of_torchvision(folder: Path) -> Iterator[torch.Tensor]:
    from torchvision import datasets, transforms

    see = Preprocessing(SIZE)
    steps = [
        transforms.Resize(SIZE),
        transforms.CenterCrop(SIZE),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(see.mean, see.std),
    ]
    loader = torch.utils.data.DataLoader(
        datasets.ImageFolder(str(folder), transforms.Compose(steps)),
        batch_size=BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=len(os.sched_getaffinity(0)),
        persistent_workers=True,
        # As in a program that was not spawned itself.
        multiprocessing_context="fork",
    )
    while True:
        yield from (images for images, _ in loader)


CONTENDERS: dict[str, Callable[[Path], Iterator[torch.Tensor]]] = {
    "cache": lambda folder: of_mvp(folder, cache=True),
    "memory": lambda folder: of_mvp(folder, cache=False),
    "torchvision": of_torchvision,
}


def measure(name: str, folder: Path, seconds: float) -> dict[str, Any]:
    """One contender, from nothing to the first batch, and then for about so many seconds."""
    # Makes torchvision importable beside a CPU-only torch. All contenders begin with the same libraries.
    import_timm()
    importlib.import_module("torchvision.datasets")
    before = _peak_mb(resource.RUSAGE_SELF)
    start = time.perf_counter()
    batches = CONTENDERS[name](folder)
    first = next(batches)
    assert first.shape == (BATCH, 3, SIZE, SIZE), first.shape
    begun = time.perf_counter()
    made, passed = 0, 0.0
    while not made or passed < seconds:
        made += len(next(batches))
        passed = time.perf_counter() - begun
    # Ends the workers, whose memory is known only then.
    batches.close()  # type: ignore[attr-defined]
    return {
        "first_batch_seconds": round(begun - start, 2),
        "images_per_second": round(made / passed, 1),
        "peak_mb": _peak_mb(resource.RUSAGE_SELF),
        "peak_mb_before": before,
        "worker_peak_mb": _peak_mb(resource.RUSAGE_CHILDREN),
    }


def _peak_mb(who: int) -> int:
    return resource.getrusage(who).ru_maxrss >> 10


def main() -> None:
    options = _parse()
    runs: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        folder = Path(work) / "photos"
        write_images(folder, options.images)
        for name in (each for each in CONTENDERS if each not in options.without):
            for _ in range(2):
                # A pool's processes may have no workers of their own; an executor's may.
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    run = pool.submit(measure, name, folder, options.seconds).result()
                runs.setdefault(name, []).append(run)
                print(f"{name}: {run}", flush=True)
            clear_cache(folder)
    setting = {
        "images": options.images,
        "size": SIZE,
        "batch": BATCH,
        "seconds": options.seconds,
        "decoded_mb": options.images * SIZE * SIZE * 3 >> 20,
        "threads": torch.get_num_threads(),
        "command": command(ROOT),
        "commit": commit(ROOT, "csrc", "mvp_ext", "benchmarks/*.py"),
    }
    result = {"setting": setting, "environment": environment(), "runs": runs}
    options.out.mkdir(parents=True, exist_ok=True)
    write_atomic(options.out / "images.json", f"{json.dumps(result, indent=1)}\n".encode())


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Images a second and memory of training batches from a folder"
    )
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each run, after its first batch")
    parser.add_argument("--without", nargs="+", default=[], choices=list(CONTENDERS), help="contenders")
    parser.add_argument("--work", type=Path, help="where the temporary folder is; default: the system's")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/cpu", help="a folder")
    parser.add_argument("--dry-run", action="store_true", help="few images, for a moment")
    options = parser.parse_args()
    if options.dry_run:
        options.images, options.seconds = 200, 0.0
    return options


if __name__ == "__main__":
    main()
