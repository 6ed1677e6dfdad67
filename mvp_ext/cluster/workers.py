"""Entries of a zoo, and runs of a comparison, as tasks of Ray: workers compute, and one process alone writes.

So no lock and no database crosses a network, and a worker, or a whole machine, may die at any moment: Ray runs its task
again somewhere else. Images and models go to each machine once. Ray is the extra ``ray``, imported where it is used.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from importlib import import_module
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from mvp_ext._version import __version__
from mvp_ext.data.images import ImageData
from mvp_ext.data.tasks import Task
from mvp_ext.model.checkpoint import PrunedCheckpoint
from mvp_ext.pruning.build import EntryJob, Progress, make_entry
from mvp_ext.pruning.result import Result
from mvp_ext.train.backbone import Backbone

# How often a task is run again because its worker died. More is no bad luck: it kills its workers.
RETRIES = 10
# Between two looks at the workers' progress, and between two reports of one.
LOOK_SECONDS, REPORT_SECONDS = 0.5, 0.2


# A dataclass with a backbone, a task, a name, and perhaps a start, as ``EntryJob`` is.
Job = TypeVar("Job", bound=Any)


@contextmanager
def ray_workers(
    count: int | None = None,
    *,
    address: str | None = None,
    cpus_per_task: int | None = None,
    gpus_per_task: float = 0.0,
) -> Iterator[Workers]:
    """Workers that make entries of a zoo at the same time: ``with ray_workers(4) as run: build_zoo(…, run=run)``.

    Each entry is the one that a single process makes with as many threads as ``cpus_per_task``; so is each run of
    ``compare(…, workers=run)``. What a task raises is an error that names it, once all others are done and kept.

    Args:
        count: start a Ray with so many workers on this machine, and end it afterwards.
        address: use the Ray that runs there ("auto": on this machine), with as many workers as it has room for. With
            neither this process must have called ``ray.init``.
        cpus_per_task: cores and torch's threads of each task. Default: of ``count`` workers an equal share of this
            machine's cores, else 1.
        gpus_per_task: GPUs of each task, or a share of one; 0: it computes on the CPU.

    Raises:
        ImportError: Ray is not installed; the message says how to have it.
        ValueError: an argument out of range, or both ``count`` and ``address``. ConnectionError: no Ray there.
        RuntimeError: (while entries are made) a task failed.
    """
    ray = _need_ray()
    if count is not None and address is not None:
        raise ValueError(
            "ray_workers: expected count (a Ray of this machine) or address (one that runs), got both"
        )
    known = {"count": count, "cpus_per_task": cpus_per_task}
    for name, value in known.items():
        if value is not None and value < 1:
            raise ValueError(f"ray_workers: {name}: expected at least 1, got {value}")
    if gpus_per_task < 0:
        raise ValueError(f"ray_workers: gpus_per_task: expected at least 0, got {gpus_per_task}")
    ours = count is not None or address is not None
    if ours == ray.is_initialized():
        found = "Ray is in use in this process already" if ours else "neither, and this process uses no Ray"
        raise ValueError(f"ray_workers: expected count, address, or ray.init() beforehand; {found}")
    cpus = cpus_per_task or max(1, len(os.sched_getaffinity(0)) // (count or 1) if count else 1)
    if ours:
        _start(ray, None if count is None else count * cpus, address)
    try:
        _look_for_room(ray, {"CPU": cpus, "GPU": gpus_per_task}, wait=count is None)
        yield Workers(cpus, gpus_per_task)
    finally:
        if ours:
            ray.shutdown()


def _need_ray() -> Any:
    try:
        return import_module("ray")
    except ImportError as error:
        raise ImportError(f"workers need Ray: pip install 'mvp_ext[ray]' ({error})") from error


def _start(ray: Any, cpus: int | None, address: str | None) -> None:
    # What runs here is nobody else's to know.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        # "local": not the cluster that this machine may be a part of.
        ray.init("local", num_cpus=cpus, include_dashboard=False, **quiet)
        return
    try:
        ray.init(address, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())
        raise ConnectionError(f"ray_workers: {address}: no Ray can be reached there ({text})") from error


def _look_for_room(ray: Any, needed: dict[str, float], *, wait: bool) -> None:
    """A task that fits nowhere would wait forever; where machines may still join, that is not an error."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(all(node.get(name, 0) >= amount for name, amount in needed.items()) for node in nodes):
        return
    wanted = " and ".join(f"{amount:g} {name}" for name, amount in needed.items() if amount)
    text = f"ray_workers: no machine of this Ray has {wanted}, which a task needs"
    if not wait:
        raise ValueError(text)
    warnings.warn(f"{text}; waiting for one", stacklevel=4)


@dataclass(frozen=True)
class Workers:
    """What each task gets. Called with the jobs of entries they are a ``Run``."""

    cpus: int
    gpus: float

    def __call__(self, jobs: Iterable[EntryJob], progress: Progress | None = None) -> Iterator[Result]:
        for job, result in self.map(_entry, jobs, progress):
            if progress is not None:
                progress(job.name, result.cost.steps, result.cost.steps)
            yield replace(result, task=job.task)

    def map(
        self,
        function: Callable[[Job, Progress | None], Any],
        jobs: Iterable[Job],
        progress: Progress | None = None,
    ) -> Iterator[tuple[Job, Any]]:
        """Each job with what ``function(job, progress)`` made of it in a worker, in the order in which they end."""
        ray = _need_ray()
        store = _Store(ray)
        news = None if progress is None else _queue_here(ray)
        options = {"num_cpus": self.cpus, "num_gpus": self.gpus, "max_retries": RETRIES}
        make = ray.remote(_make)
        waiting: dict[Any, Job] = {}
        for job in jobs:
            values = {field.name: getattr(job, field.name) for field in fields(job)}
            task, backbone, start = values.pop("task"), values.pop("backbone"), values.pop("start", None)
            ref = make.options(name=job.name, **options).remote(
                store.put(task.data, _packed),
                store.put(backbone, _on_cpu),
                None if start is None else store.put(start),
                {"function": function, "kind": type(job), "values": values, "task": _without_images(task)},
                {"news": news, "threads": self.cpus, "gpu": self.gpus > 0, "versions": _versions()},
            )
            waiting[ref] = job
        failed: dict[str, BaseException] = {}
        try:
            while waiting:
                done, _ = ray.wait(list(waiting), timeout=LOOK_SECONDS)
                if progress is not None:
                    _tell(news, progress, {job.name for job in waiting.values()})
                for ref in done:
                    job = waiting.pop(ref)
                    try:
                        result = ray.get(ref)
                    except ray.exceptions.RayError as error:
                        # What the task itself raised, if it came to that.
                        failed[job.name] = getattr(error, "cause", None) or error
                        continue
                    yield job, result
        finally:
            for ref in waiting:
                ray.cancel(ref, force=True)
        if failed:
            (name, first), *others = failed.items()
            more = f"; so did {', '.join(repr(other) for other, _ in others)}" if others else ""
            raise RuntimeError(
                f"task {name!r} failed: {type(first).__name__}: {first}{more}. What other tasks made is kept"
            ) from first


class _Store:
    """Objects in Ray's store, each put there once."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        # With the objects: another one must not get the number of one that is gone.
        self._known: dict[int, tuple[Any, Any]] = {}

    def put(self, value: Any, packed: Callable[[Any], Any] = lambda value: value) -> Any:
        if id(value) not in self._known:
            self._known[id(value)] = value, self._ray.put(packed(value))
        return self._known[id(value)][1]


def _packed(data: ImageData) -> dict[str, Any]:
    """As the store keeps it: NumPy's arrays are not copied when a task reads them, torch's tensors are."""
    values = {field.name: getattr(data, field.name) for field in fields(data)}
    return {name: value.numpy() if isinstance(value, Tensor) else value for name, value in values.items()}


def _unpacked(values: dict[str, Any]) -> ImageData:
    with warnings.catch_warnings():
        # Torch knows no arrays that may only be read. Nobody writes into a data set.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        read: dict[str, Any] = {
            name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
            for name, value in values.items()
        }
    return ImageData(**read)


def _on_cpu(backbone: Backbone) -> Backbone:
    if backbone.device.type == "cpu":
        return backbone
    return replace(backbone, model=backbone.copy_model().cpu())


def _without_images(task: Task) -> dict[str, Any]:
    return {field.name: getattr(task, field.name) for field in fields(task) if field.name != "data"}


def _versions() -> dict[str, str]:
    return {"mvp_ext": __version__, "torch": torch.__version__}


def _make(
    images: dict[str, Any],
    backbone: Backbone,
    start: PrunedCheckpoint | None,
    what: dict[str, Any],
    how: dict[str, Any],
) -> Any:
    """One job, in a worker."""
    if how["versions"] != _versions():
        raise RuntimeError(
            f"{platform.node()} has {_versions()}, the process that builds the zoo {how['versions']}; install the same"
        )
    torch.set_num_threads(how["threads"])
    values = what["values"] if start is None else {**what["values"], "start": start}
    task = Task(data=_unpacked(images), **what["task"])
    job = what["kind"](backbone=backbone.to("cuda" if how["gpu"] else "cpu"), task=task, **values)
    return what["function"](job, None if how["news"] is None else _reporter(how["news"]))


def _entry(job: EntryJob, progress: Progress | None) -> Result:
    """Its task stays where the images are."""
    result = make_entry(job, progress)
    tensors = {name: tensor.cpu() for name, tensor in result.tensors.items()}
    return replace(result, task=None, model=result.model.cpu(), tensors=tensors)  # type: ignore[arg-type]


# ---- progress


def _queue_here(ray: Any) -> Any:
    """A queue on this machine, so that it lives as long as this process does."""
    here = import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )
    return import_module("ray.util.queue").Queue(
        actor_options={"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": here}
    )


def _reporter(news: Any) -> Progress:
    """Sends a task's progress from its worker; never waited for long, never an error."""
    last = 0.0

    def report(what: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= REPORT_SECONDS:
            last = time.monotonic()
            with contextlib.suppress(Exception):
                news.put_nowait((what, done, total))

    return report


def _tell(news: Any, progress: Progress, names: set[str]) -> None:
    """Pass on the last that each of these tasks reported."""
    last = {}
    with contextlib.suppress(Exception):
        for what, done, total in news.get_nowait_batch(news.qsize()):
            last[what] = done, total
    for what, (done, total) in last.items():
        if what in names:
            progress(what, done, total)
