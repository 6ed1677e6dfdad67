"""Dense against pruned, in one runtime or several: size, speed, and what share of the FLOP saving became time."""

from __future__ import annotations

import copy
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mvp_ext.app.environment import environment
from mvp_ext.app.results import count_text, flops_text
from mvp_ext.app.tables import Side, Table
from mvp_ext.data.tasks import TaskData, few_of_each
from mvp_ext.deploy.metadata import Precision
from mvp_ext.deploy.runtimes import Prepared, peak_memory, prepare
from mvp_ext.model import measure
from mvp_ext.model.card import ModelCard
from mvp_ext.model.checkpoint import PrunedCheckpoint
from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.measure import (
    Latency,
    Measurement,
    count_flops,
    count_parameters,
    share_of_saving,
    torch_threads,
)
from mvp_ext.model.preprocessing import Preprocessing, resize
from mvp_ext.model.surgery import prune_model
from mvp_ext.train.evaluate import accuracy_of

DENSE = "dense"
# Images that int8 is calibrated on where there is no task: noise, which is enough for a time.
NOISE = 32
# For the threads of one model to fall asleep before another is timed: those of each ONNX Runtime session spin for tens
# of milliseconds, which halved the speed of OpenVINO, and of the next session, on two cores.
PAUSE_SECONDS = 0.1
OWN_THREADS = ("onnxruntime", "openvino")
# Of a task's test images, in passes of so many.
ACCURACY_ON, ACCURACY_BATCH = 1000, 32


def pruned_copies(
    model: nn.Module, keeps: Sequence[float], *, scope: str | None = None, align: int = 8, seed: int = 0
) -> dict[str, nn.Module]:
    """Copies of ``model`` at the shapes that each keep ratio gives (which units stay does not matter for speed)."""
    structure = find_structure(model, scope)
    copies = {}
    for keep in keeps:
        mask = Mask.random(structure, keep, seed, align)
        copies[f"keep {keep:g}"] = prune_model(copy.deepcopy(model), mask, structure=structure)
    return copies


@dataclass(frozen=True)
class Grid:
    """In what models are timed: every combination.

    Attributes:
        runtimes: some of ``deploy.runtimes.RUNTIMES``.
        precisions: some of "float32", "bfloat16", "int8".
        batches: batch sizes, ascending.
        threads: numbers of CPU threads; None leaves each runtime its own choice.
        seconds: about how long the slowest model is timed in each.
        channels_last: layout of input and weights in eager mode and under torch.compile.
        memory: also measure peak memory, in a process of its own for each.
        budget: seconds after which nothing more is begun; what is slow is left out first. None: no limit.
    """

    runtimes: tuple[str, ...] = ("eager",)
    precisions: tuple[Precision, ...] = ("float32",)
    batches: tuple[int, ...] = (1, 32)
    threads: tuple[int | None, ...] = (None,)
    seconds: float = 2.0
    channels_last: bool = False
    memory: bool = False
    budget: float | None = None


class _Key(NamedTuple):
    model: str
    runtime: str
    precision: Precision


@dataclass(frozen=True)
class _Cell:
    """One model in one runtime: what was measured at one batch size."""

    key: _Key
    threads: int
    latency: Latency
    bytes: int
    peak_memory_bytes: int | None
    accuracy: float | None


def checkpoint_of(model: nn.Module, preprocessing: Preprocessing | None) -> PrunedCheckpoint:
    """A model that no file holds, as one of which all is kept that it has."""
    structure = find_structure(model)
    return PrunedCheckpoint(model, Mask.full(structure), structure, card=ModelCard(preprocessing))


def bench(
    dense: PrunedCheckpoint,
    others: Mapping[str, PrunedCheckpoint],
    input_shape: Sequence[int],
    grid: Grid | None = None,
    *,
    peers: Mapping[str, nn.Module] | None = None,
    data: TaskData | None = None,
    device: torch.device | str = "cpu",
    setting: Mapping[str, Any] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure all models in turn; the result is JSON values, with machine, versions and setting.

    Models of equal precision are timed in one loop, runtime beside runtime. What cannot be measured is among the
    model's "left_out", with the reason.

    Args:
        dense: the model that the others are compared with, in the same runtime, precision, batch and threads.
        others: name → smaller model for the same input.
        input_shape: of one image, (C, H, W).
        grid: in what they are timed. Default: eager mode.
        peers: name → model made by others, timed in eager mode and float32 alone.
        data: a task's images: int8 is calibrated on them, and models of its classes are tested on them. Without it
            int8 is calibrated on noise, and no accuracy is measured.
        device: where PyTorch computes.
        setting: what else a reader must know, stored as it is.
        progress: told (what is done, its steps done, its steps in all).

    Raises:
        ValueError: another model has the dense model's name.
    """
    grid, peers = grid or Grid(), dict(peers or {})
    if DENSE in others or DENSE in peers:
        raise ValueError(f"bench: others: {DENSE!r} is the dense model's own name")
    made_by_others = {name: checkpoint_of(model, None) for name, model in peers.items()}
    session = _Session({DENSE: dense, **others, **made_by_others}, grid, input_shape, data, device)
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(session.models):
            session.prepare(name, Path(folder) / str(number), eager_alone=name in peers)
            if progress is not None:
                progress("making files", number + 1, len(session.models))
        # Large batches last: a budget may end before them.
        settings = list(itertools.product(grid.batches, grid.threads, grid.precisions))
        for number, (batch, threads, precision) in enumerate(settings, 1):
            with torch_threads(threads):
                session.measure(precision, threads, batch)
            if progress is not None:
                progress("timing", number, len(settings))
    # Results travel; where this run's files lay says nothing elsewhere.
    for cell in session.left_out:
        cell["why"] = cell["why"].replace(f"{folder}{os.sep}", "")
    return {
        "setting": dict(setting or {}),
        "input_shape": list(input_shape),
        "channels_last": grid.channels_last,
        "int8_calibrated_on": "noise" if data is None else data.name,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(),
        "models": session.described(),
    }


class _Session:
    """The models as files of all runtimes; what was measured of them, and what could not be."""

    def __init__(
        self,
        models: Mapping[str, PrunedCheckpoint],
        grid: Grid,
        input_shape: Sequence[int],
        data: TaskData | None,
        device: torch.device | str,
    ) -> None:
        self.models, self.grid, self.data = models, grid, data
        self.shape, self.device = tuple(input_shape), torch.device(device)
        self.flops = {name: count_flops(small.model, input_shape) for name, small in models.items()}
        self.prepared: dict[_Key, Prepared] = {}
        self.cells: list[_Cell] = []
        self.left_out: list[dict[str, Any]] = []
        self.accuracy: dict[_Key, float | None] = {}
        self.began = time.perf_counter()

    def prepare(self, name: str, folder: Path, *, eager_alone: bool) -> None:
        """Make one model's files, in a new folder."""
        folder.mkdir()
        small = self.models[name]
        data = self.data or _noise(small, self.shape)
        for runtime, precision in itertools.product(self.grid.runtimes, self.grid.precisions):
            if eager_alone and (runtime, precision) != ("eager", "float32"):
                continue
            key = _Key(name, runtime, precision)
            with self._noting(key):
                self._check_budget()
                self.prepared[key] = prepare(
                    small,
                    runtime,
                    folder,
                    precision=precision,
                    data=data if precision == "int8" else self._task_of(name),
                    channels_last=self.grid.channels_last,
                )

    def measure(self, precision: Precision, threads: int | None, batch: int) -> None:
        """Time all models of one precision in turn."""
        number = threads or torch.get_num_threads()
        images = torch.randn(batch, *self.shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        # A program is compiled for each shape and number of threads; of too many torch keeps none.
        torch.compiler.reset()
        runs: dict[_Key, Callable[[], object]] = {}
        took: dict[_Key, float] = {}
        for key, prepared in self.prepared.items():
            if key.precision == precision:
                with self._noting(key, threads=number, batch=batch):
                    self._check_budget()
                    run = prepared.open(threads, self.device)
                    if key not in self.accuracy:
                        self.accuracy[key] = self._accuracy(key.model, run)
                    in_layout = self.grid.channels_last and key.runtime in ("eager", "compile")
                    form = torch.channels_last if in_layout else torch.contiguous_format
                    once = partial(self._run, run, images.contiguous(memory_format=form))
                    # The first call may compile.
                    once()
                    began = time.perf_counter()
                    once()
                    took[key] = time.perf_counter() - began
                    runs[key] = once
        # The fast ones first, so that the slowest are left out.
        planned = 0.0
        for key in sorted(took, key=lambda key: took[key]):
            planned += took[key] * (measure.WARM_UP_ROUNDS + measure.MIN_ROUNDS)
            with self._noting(key, threads=number, batch=batch):
                try:
                    self._check_budget(planned)
                except ValueError:
                    del runs[key]
                    raise
        if not runs:
            return
        # Of torch's runtimes all models share one pool of threads.
        pause = PAUSE_SECONDS if any(key.runtime in OWN_THREADS for key in runs) else 0.0
        latencies = measure.time_in_turn(runs, batch=batch, seconds=self.grid.seconds, pause=pause)
        for key, latency in latencies.items():
            size, accuracy = self.prepared[key].bytes, self.accuracy[key]
            self.cells.append(_Cell(key, number, latency, size, self._peak(key, batch, threads), accuracy))

    def _check_budget(self, seconds: float = 0.0) -> None:
        """ValueError where what takes so long would not be done in time."""
        if self.grid.budget is not None:
            left = self.grid.budget - (time.perf_counter() - self.began)
            if left < seconds or left <= 0:
                raise ValueError(f"no time left of {self.grid.budget:g} seconds")

    def _peak(self, key: _Key, batch: int, threads: int | None) -> int | None:
        if not self.grid.memory or self.device.type != "cpu":
            return None
        return peak_memory(self.prepared[key], self.shape, batch, threads)

    def _run(self, run: Callable[[Tensor], Tensor], images: Tensor) -> None:
        run(images)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextmanager
    def _noting(self, key: _Key, **where: int) -> Iterator[None]:
        """What fails is left out, with the reason."""
        try:
            yield
        except Exception as error:
            known = isinstance(error, (ValueError, ImportError))
            why = str(error) if known else f"{type(error).__name__}: {error}"
            self.left_out.append({**key._asdict(), **where, "why": why.partition("\n")[0]})

    def _task_of(self, name: str) -> TaskData | None:
        """The task, if it is the model's."""
        names = self.models[name].card.class_names
        return self.data if self.data is not None and sorted(names) == sorted(self.data.class_names) else None

    @torch.inference_mode()
    def _accuracy(self, name: str, run: Callable[[Tensor], Tensor]) -> float | None:
        data, card = self._task_of(name), self.models[name].card
        if data is None:
            return None
        chosen = few_of_each(data.test_labels, ACCURACY_ON, seed=0)
        # The task may have its classes in another order than the model's outputs.
        place = {name: number for number, name in enumerate(card.class_names)}
        labels = torch.tensor([place[name] for name in data.class_names])[data.test_labels[chosen]]
        see = card.need_preprocessing("bench: data")
        batches = data.test_images[chosen].split(ACCURACY_BATCH)
        logits = torch.cat(
            [run(see.batch(resize(images, see.size)).to(self.device)).cpu() for images in batches]
        )
        return accuracy_of(logits.float(), labels)

    def described(self) -> dict[str, Any]:
        """Model → JSON values."""
        dense = {(c.key[1:], c.threads, c.latency.batch): c for c in self.cells if c.key.model == DENSE}
        described: dict[str, Any] = {
            name: {
                "name": name,
                "parameters": count_parameters(small.model),
                "flops": self.flops[name],
                "latency": [],
                "left_out": [
                    {k: v for k, v in cell.items() if k != "model"}
                    for cell in self.left_out
                    if cell["model"] == name
                ],
            }
            for name, small in self.models.items()
        }
        for cell in self.cells:
            batch = cell.latency.batch
            other = dense.get((cell.key[1:], cell.threads, batch))
            described[cell.key.model]["latency"].append(
                {
                    **cell.latency.to_dict(),
                    "runtime": cell.key.runtime,
                    "precision": cell.key.precision,
                    "threads": cell.threads,
                    "bytes": cell.bytes,
                    "peak_memory_bytes": cell.peak_memory_bytes,
                    "accuracy": cell.accuracy,
                    "speed_up": other and other.latency.median_ms / cell.latency.median_ms,
                    "share_of_saving": other
                    and share_of_saving(self._measured(other), self._measured(cell), cell.latency.batch),
                }
            )
        return described

    def _measured(self, cell: _Cell) -> Measurement:
        return Measurement(cell.key.model, 0, self.flops[cell.key.model], (cell.latency,))


def _noise(small: PrunedCheckpoint, input_shape: tuple[int, ...]) -> TaskData:
    """Images to calibrate int8 on where only its speed is asked for."""
    generator = torch.Generator().manual_seed(0)
    shape = (NOISE, input_shape[1], input_shape[2], 3)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    names = small.card.class_names or ("noise",)
    labels = torch.arange(NOISE) % len(names)
    return TaskData("noise", images, labels, images, labels, names)


def bench_table(result: Mapping[str, Any]) -> Table:
    """One row a measurement; "saving in time": what share of the saved FLOPs became saved time.

    What was not measured is a row, too (``reasons`` says why). Runtimes, threads and the like have columns where they
    differ.
    """
    sizes: list[tuple[str, str, str]] = []
    cells: list[dict[str, str]] = []
    for name, model in result["models"].items():
        own = (name, count_text(model["parameters"]), flops_text(model["flops"]))
        for position, timed in enumerate((*model["latency"], *model["left_out"])):
            sizes.append(own if position == 0 else ("", "", ""))
            cells.append(_cell_texts(timed, dense=name == DENSE))
    several = len({cell["runtime"] for cell in cells}) > 1
    hidden = set() if several else {"runtime", "MB on disk"}
    hidden |= {heading for heading in ("peak MB", "accuracy") if not any(cell[heading] for cell in cells)}
    if len({cell["threads"] for cell in cells} - {""}) <= 1:
        hidden.add("threads")
    shown = [heading for heading in cells[0] if heading not in hidden]
    columns: list[tuple[str, Side]] = [("model", "left"), ("parameters", "right"), ("FLOPs", "right")]
    columns += [(heading, "left" if heading == "runtime" else "right") for heading in shown]
    rows = [(*own, *(cell[heading] for heading in shown)) for own, cell in zip(sizes, cells, strict=True)]
    return Table(columns, rows, "dense against pruned")


def reasons(result: Mapping[str, Any]) -> list[str]:
    """A line for each reason why something was not measured, with the models that it holds for."""
    models: dict[str, list[str]] = {}
    for name, model in result["models"].items():
        for cell in model["left_out"]:
            where = ", ".join(f"{part} {cell[part]}" for part in ("threads", "batch") if part in cell)
            what = f"{cell['runtime']} {cell['precision']}" + (f" ({where})" if where else "")
            models.setdefault(f"{what}: {cell['why']}", []).append(name)
    return [f"not measured: {', '.join(names)} in {reason}" for reason, names in models.items()]


def _cell_texts(timed: Mapping[str, Any], *, dense: bool) -> dict[str, str]:
    """Heading → text of one measurement, or of what was left out."""

    def text(name: str, form: str, scale: float = 1) -> str:
        value = timed.get(name)
        return "" if value is None else form.format(value * scale)

    measured = "median_ms" in timed
    spread = f" ({timed['p10_ms']:.4g}–{timed['p90_ms']:.4g})" if measured else ""
    return {
        "runtime": f"{timed['runtime']} {timed['precision']}".removesuffix(" float32"),
        "threads": text("threads", "{}"),
        "batch": text("batch", "{}"),
        "median ms (p10–p90)": text("median_ms", "{:.4g}") + spread if measured else "not measured",
        "images/s": text("throughput", "{:.0f}"),
        "times as fast": "" if dense else text("speed_up", "{:.2f}×"),
        "saving in time": text("share_of_saving", "{:.0%}"),
        "MB on disk": text("bytes", "{:.1f}", 1e-6),
        "peak MB": text("peak_memory_bytes", "{:.0f}", 1e-6),
        "accuracy": text("accuracy", "{:.1%}"),
    }
