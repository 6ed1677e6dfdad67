"""Dense against pruned, in one runtime or several: size, speed, and what share of the FLOP saving became time."""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
# Of the table.
ALWAYS = ("batch", "median ms (p10–p90)", "images/s", "times as fast", "saving in time", "left out")
# Images that int8 is calibrated on where there is no task: noise, which is enough for a time.
NOISE = 32
# For the threads of one runtime to fall asleep before another is timed.
PAUSE_SECONDS = 0.01
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
    """

    runtimes: tuple[str, ...] = ("eager",)
    precisions: tuple[Precision, ...] = ("float32",)
    batches: tuple[int, ...] = (1, 32)
    threads: tuple[int | None, ...] = (None,)
    seconds: float = 2.0
    channels_last: bool = False
    memory: bool = False


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

    Raises:
        ValueError: another model has the dense model's name.
    """
    grid, peers = grid or Grid(), dict(peers or {})
    if DENSE in others or DENSE in peers:
        raise ValueError(f"bench: others: {DENSE!r} is the dense model's own name")
    made_by_others = {name: checkpoint_of(model, None) for name, model in peers.items()}
    session = _Session({DENSE: dense, **others, **made_by_others}, grid, input_shape, data, device)
    with tempfile.TemporaryDirectory() as folder:
        session.prepare(Path(folder), eager_alone=peers.keys())
        for threads in grid.threads:
            with torch_threads(threads):
                session.measure(threads)
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

    def prepare(self, folder: Path, *, eager_alone: Collection[str]) -> None:
        """Make all files."""
        for number, (name, small) in enumerate(self.models.items()):
            place = folder / str(number)
            place.mkdir()
            data = self.data or _noise(small, self.shape)
            for runtime, precision in itertools.product(self.grid.runtimes, self.grid.precisions):
                if name in eager_alone and (runtime, precision) != ("eager", "float32"):
                    continue
                key = _Key(name, runtime, precision)
                with self._noting(key):
                    self.prepared[key] = prepare(
                        small,
                        runtime,
                        place,
                        precision=precision,
                        data=data if precision == "int8" else self._task_of(name),
                        channels_last=self.grid.channels_last,
                    )

    def measure(self, threads: int | None) -> None:
        """Time everything with so many threads, models of one precision in turn."""
        number = threads or torch.get_num_threads()
        for precision in self.grid.precisions:
            opened: dict[_Key, Callable[[Tensor], Tensor]] = {}
            peaks: dict[_Key, dict[int, int]] = {}
            accuracy: dict[_Key, float | None] = {}
            for key, prepared in self.prepared.items():
                if key.precision != precision:
                    continue
                with self._noting(key, threads=number):
                    run = prepared.open(threads, self.device)
                    accuracy[key] = self._accuracy(key.model, run)
                    if self.grid.memory and self.device.type == "cpu":
                        peaks[key] = peak_memory(prepared, self.shape, self.grid.batches, threads)
                    opened[key] = run
            for batch in self.grid.batches:
                for key, latency in self._times(opened, batch, number).items():
                    size, peak = self.prepared[key].bytes, peaks.get(key, {}).get(batch)
                    self.cells.append(_Cell(key, number, latency, size, peak, accuracy[key]))

    def _times(
        self, opened: Mapping[_Key, Callable[[Tensor], Tensor]], batch: int, threads: int
    ) -> dict[_Key, Latency]:
        images = torch.randn(batch, *self.shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        layouts = {False: images, True: images.contiguous(memory_format=torch.channels_last)}
        # A program is compiled for each shape and number of threads; of too many torch keeps none.
        torch.compiler.reset()
        runs: dict[str, Callable[[], object]] = {}
        for key, run in opened.items():
            once = partial(
                self._run,
                run,
                layouts[self.grid.channels_last and key.runtime in ("eager", "compile")],
            )
            with self._noting(key, threads=threads, batch=batch):
                once()
                runs["\0".join(key)] = once
        if not runs:
            return {}
        # One alone needs no rest, nor do the threads of one runtime.
        pause = PAUSE_SECONDS if len({key.runtime for key in opened}) > 1 else 0.0
        timed = measure.time_in_turn(runs, batch=batch, seconds=self.grid.seconds, pause=pause)
        return {key: timed["\0".join(key)] for key in opened if "\0".join(key) in timed}

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
        labels = torch.tensor([card.class_names.index(label) for label in data.class_names])[
            data.test_labels[chosen]
        ]
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

    What was left out is a row with its reason. A column that says nothing, or the same of all rows, is left out, too.
    """
    columns: list[tuple[str, Side]] = [("model", "left"), ("parameters", "right"), ("FLOPs", "right")]
    cells: list[dict[str, str]] = []
    first: list[tuple[str, str, str]] = []
    for name, model in result["models"].items():
        for position, timed in enumerate((*model["latency"], *model["left_out"])):
            sizes = (name, count_text(model["parameters"]), flops_text(model["flops"]))
            first.append(sizes if position == 0 else ("", "", ""))
            cells.append(_cell_texts(timed, dense=name == DENSE))
    for heading in cells[0] if cells else ():
        texts = {cell[heading] for cell in cells}
        if texts != {""} and (len(texts) > 1 or heading in ALWAYS):
            columns.append((heading, "left" if heading in ("runtime", "precision") else "right"))
    rows = [
        (*f, *(cell[heading] for heading, _ in columns[3:])) for f, cell in zip(first, cells, strict=True)
    ]
    return Table(columns, rows, "dense against pruned")


def _cell_texts(timed: Mapping[str, Any], *, dense: bool) -> dict[str, str]:
    """Heading → text of one measurement, or of what was left out."""

    def text(name: str, form: str, scale: float = 1) -> str:
        value = timed.get(name)
        return "" if value is None else form.format(value * scale)

    measured = "median_ms" in timed
    spread = f" ({timed['p10_ms']:.4g}–{timed['p90_ms']:.4g})" if measured else ""
    return {
        "runtime": timed["runtime"],
        "precision": timed["precision"],
        "threads": text("threads", "{}"),
        "batch": text("batch", "{}"),
        "median ms (p10–p90)": text("median_ms", "{:.4g}") + spread,
        "images/s": text("throughput", "{:.0f}"),
        "times as fast": "" if dense else text("speed_up", "{:.2f}×"),
        "saving in time": text("share_of_saving", "{:.0%}"),
        "MB on disk": text("bytes", "{:.1f}", 1e-6),
        "peak MB": text("peak_memory_bytes", "{:.0f}", 1e-6),
        "accuracy": text("accuracy", "{:.1%}"),
        "left out": timed.get("why", ""),
    }
