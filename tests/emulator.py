"""The CUDA kernels without a GPU: builds tests/cuda_emulator, and lets the ops run their CUDA side on CPU tensors."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest

from mvp_ext.ops import device

ROOT = Path(__file__).resolve().parent.parent
SANITIZE = os.environ.get("MVP_EMULATOR_SANITIZE") == "1"
_module: ModuleType | None = None


def build(*, sanitize: bool = SANITIZE) -> Path:
    """The module's file; compiled if a source is newer. One process builds, others wait."""
    pybind11 = pytest.importorskip("pybind11", reason="the CUDA emulator needs the extra dev")
    # Not in the tree: it may be read-only, and tests may run on several checkouts at once.
    name = hashlib.sha256(f"{ROOT}{sys.version}".encode()).hexdigest()[:12]
    folder = (
        Path(tempfile.gettempdir()) / f"mvp_emulator_{os.getuid()}_{name}{'_sanitized' if sanitize else ''}"
    )
    folder.mkdir(exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        commands = [
            [
                *(_tool("cmake"), "-G", "Ninja", "-S", ROOT / "tests" / "cuda_emulator", "-B", folder),
                f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DMVP_SANITIZE={'ON' if sanitize else 'OFF'}",
            ],
            [_tool("cmake"), "--build", folder],
        ]
        for command in commands:
            done = subprocess.run([*map(str, command)], capture_output=True, text=True)
            if done.returncode:
                pytest.fail(f"the CUDA emulator does not build:\n{done.stdout[-6000:]}{done.stderr[-2000:]}")
    (file,) = folder.glob("_emulator.*.so")
    return file


def _tool(name: str) -> str:
    path = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if path is None:
        pytest.skip(f"the CUDA emulator needs {name} (the extra dev)")
    return path


def module() -> ModuleType:
    global _module
    if _module is None:
        specification = importlib.util.spec_from_file_location("_emulator", build())
        assert specification is not None
        assert specification.loader is not None
        _module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(_module)
    return _module


@contextlib.contextmanager
def emulated(schedule: int = 0) -> Iterator[ModuleType]:
    """In here the ops take CPU tensors for CUDA tensors, and the kernels run in the emulator.

    schedule: 0 runs threads and blocks in order, 1 in reverse, others at random by this seed.
    """
    emulator = module()
    emulator.set_schedule(schedule)
    with mock.patch.object(device, "emulator", emulator):
        yield emulator
