"""What can run a small model, and each of them as something to call: for measuring one beside the other."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from mvp_ext.data.tasks import TaskData
from mvp_ext.deploy.export import export
from mvp_ext.deploy.exported import load_exported
from mvp_ext.deploy.extra import need
from mvp_ext.deploy.formats import FORMATS
from mvp_ext.deploy.metadata import PRECISIONS, Precision
from mvp_ext.deploy.optimized import optimized
from mvp_ext.model.borrowed import unwrapped
from mvp_ext.model.checkpoint import PrunedCheckpoint
from mvp_ext.model.measure import torch_threads
from mvp_ext.timm_compat import import_timm

# PyTorch's eager mode, that of ``optimized``, torch.compile, and the runtimes of exported files.
RUNTIMES = ("eager", "optimized", "compile", "onnxruntime", "openvino")
_EXPORTED = {form.runtime: form for form in FORMATS.values() if form.runtime in RUNTIMES}


@dataclass(frozen=True)
class Prepared:
    """A model as a file that a runtime can open, in this process or in another.

    Attributes:
        runtime: one of ``RUNTIMES``.
        precision: that it computes in.
        path: of the file; a runtime of torch's has a pickle of its own making there.
        bytes: on disk, all parts together.
    """

    runtime: str
    precision: Precision
    path: Path
    bytes: int

    def open(
        self, threads: int | None = None, device: torch.device | str = "cpu"
    ) -> Callable[[Tensor], Tensor]:
        """What computes float32 [B, C, S, S] → logits [B, k], both on the device.

        Args:
            threads: of the runtime; those of torch are set by who calls.
            device: where it computes.

        Raises:
            ImportError: the runtime is not installed. ValueError: it runs on the CPU alone here.
        """
        if self.runtime in _EXPORTED:
            if torch.device(device).type != "cpu":
                raise ValueError(f"{self.runtime} runs on the CPU alone here")
            return load_exported(self.path, threads=threads)
        # Written by ``prepare``.
        model = torch.load(self.path, map_location=device, weights_only=False)
        dtype = getattr(torch, self.precision)
        # For each shape a program of its own, as it would be deployed; one that cannot be made is an error.
        ready = model if self.runtime != "compile" else torch.compile(model, dynamic=False, fullgraph=True)

        def run(images: Tensor) -> Tensor:
            with torch.inference_mode():
                return ready(images.to(dtype))

        return run


def prepare(
    small: PrunedCheckpoint,
    runtime: str,
    folder: Path,
    *,
    precision: Precision = "float32",
    data: TaskData | None = None,
    channels_last: bool = False,
) -> Prepared:
    """Make the file that a runtime needs.

    Args:
        small: of any kind, dense too; not changed.
        runtime: one of ``RUNTIMES``.
        folder: where it goes; it must not hold one of the same runtime and precision.
        precision: as of ``export``; torch's own runtimes have float32 and bfloat16.
        data: for int8.
        channels_last: layout of the weights in eager mode and under torch.compile.

    Raises:
        ValueError: the runtime does not have the precision, or ``export`` refuses.
        ImportError: it is not installed.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f"prepare: runtime: expected one of {', '.join(RUNTIMES)}, got {runtime!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"prepare: precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    stem = re.sub(r"\W", "-", f"{runtime}-{precision}")
    if runtime in _EXPORTED:
        form = _EXPORTED[runtime]
        if precision in form.refused:
            raise ValueError(f"{runtime} has no {precision}: {form.refused[precision]}")
        need(runtime)
        path = folder / f"{stem}{form.suffix}"
        report = export(small, path, to=form.name, precision=precision, data=data)
        return Prepared(runtime, precision, path, report.bytes)
    if precision == "int8":
        raise ValueError(f"{runtime} has no int8: {FORMATS['pt2'].refused['int8']}")
    model = optimized(small.model) if runtime == "optimized" else copy.deepcopy(unwrapped(small.model)).eval()
    layout = torch.channels_last if channels_last else torch.preserve_format
    model = model.cpu().to(dtype=getattr(torch, precision)).to(memory_format=layout)  # type: ignore[call-overload]
    path = folder / f"{stem}.pt"
    torch.save(model, path)
    return Prepared(runtime, precision, path, path.stat().st_size)


def peak_memory(
    prepared: Prepared, image_shape: Sequence[int], batch: int, threads: int | None = None
) -> int:
    """Bytes by which loading the model and running it makes a fresh process grow at its peak.

    What importing the runtime takes is not counted. Linux alone.

    Args:
        prepared: of ``prepare``.
        image_shape: of one image, (C, H, W).
        batch: images a pass.
        threads: of the runtime.

    Raises:
        OSError: the system does not tell.
    """
    # fork would copy threads' locks, and count the parent's memory.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak_here, prepared, (batch, *image_shape), threads).result()


def _peak_here(prepared: Prepared, shape: tuple[int, ...], threads: int | None) -> int:
    if prepared.runtime in _EXPORTED:
        need(prepared.runtime)
    else:
        import_timm()
    images = torch.randn(shape)
    before = _memory("VmRSS")
    # The peak is the process's own from here on.
    Path("/proc/self/clear_refs").write_text("5")
    with torch_threads(threads):
        run = prepared.open(threads)
        for _ in range(2):
            run(images)
    return _memory("VmHWM") - before


def _memory(name: str) -> int:
    """Bytes, by the kernel's name of them."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(rf"^{name}:\s+(\d+) kB", status, re.M)[0])
