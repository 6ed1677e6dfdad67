"""Loads the native module ``_C``. Importing never fails: the first use of a kernel says what is missing and why."""

from __future__ import annotations

import importlib
import platform
from pathlib import Path
from types import ModuleType

import torch  # noqa: F401  (first: then the kernels share torch's OpenMP runtime and its number of threads)

_C: ModuleType | None
try:
    _C = importlib.import_module("mvp_ext._C")
    _error: ImportError | None = None
except ImportError as error:
    _C, _error = None, error


def native() -> ModuleType:
    """The native module; RuntimeError with cause and remedy if it is not there."""
    if _C is None:
        raise RuntimeError(
            f"mvp_ext: the native module could not be loaded ({_error}). "
            "Build it with `pip install .` (or `pip install -e .`) in the source tree."
        )
    return _C


def build_info() -> dict[str, object]:
    """How ``_C`` was built and what it runs with: compiler, OpenMP, instruction set, CUDA architectures."""
    return dict(native().build_info())


def cpu_name() -> str:
    """The processor's model name, or the architecture where the system does not tell."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
