"""What this machine and this build are: printed by ``python -m mvp_ext`` and stored beside every measurement."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from mvp_ext._version import __version__
from mvp_ext.ops import _native
from mvp_ext.ops._native import cpu_name
from mvp_ext.ops.faster import kept_ways

LIBRARIES = ("torchvision", "timm", "numpy", "safetensors", "scikit-learn", "matplotlib", "torch-pruning")


def environment() -> dict[str, str]:
    """Versions, build flags, CPU and GPU as text, in the order to print; no paths, for it goes into result files.

    Never raises for a part that is missing.
    """
    return {
        "mvp_ext": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpu cores": f"{_usable_cores()} usable of {os.cpu_count()}, torch uses {torch.get_num_threads()}",
        "torch": f"{torch.__version__}, "
        + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"),
        **{name: _version_of(name) for name in LIBRARIES},
        **_native_module(),
        "gpu": "; ".join(gpu_names()) or "none that torch can use",
        "gpu driver": _driver_version() or "none",
    }


def places() -> dict[str, str]:
    """Where the package and its Python are, and which ways of the kernels were found faster on this machine."""
    return {
        "mvp_ext in": str(Path(__file__).parent.parent),
        "python in": sys.executable,
        "MVP_FASTER": os.environ.get("MVP_FASTER") or "not set: measured where it runs",
        **{
            name: f"{found['way']} ("
            + ", ".join(f"{w} {t:g} ms" for w, t in found["milliseconds"].items())
            + ")"
            for name, found in sorted(kept_ways().items())
        },
    }


def commit(folder: Path, *sources: str) -> str:
    """The git commit that ``folder`` is at, with "+" where what was measured differs from it.

    Args:
        sources: git's path patterns under ``folder`` of what was measured; none: everything.

    Without git: what the environment variable MVP_COMMIT says, for copies of the sources, or "unknown".
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", *sources)
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("MVP_COMMIT", "unknown")


def command(root: Path | None = None) -> str:
    """The command line that repeats this process: a script under ``root`` by its path there, another by its name."""
    program = Path(sys.argv[0]).resolve()
    if root is not None and program.is_relative_to(root):
        return shlex.join(["python", str(program.relative_to(root)), *sys.argv[1:]])
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def gpu_names() -> list[str]:
    """Name, compute capability and memory of each GPU that torch can use."""
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"{p.name} (sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB)" for p in found]


def _native_module() -> dict[str, str]:
    try:
        info = _native.build_info()
    except RuntimeError as error:
        return {"native module": f"missing: {error}"}
    isa, detected = info["cpu_isa"], info["cpu_isa_detected"]
    return {
        "native module": f"{info['compiler']}, {info['build_type']}, OpenMP {info['openmp']}",
        "cpu instruction set": (
            f"{isa}" if isa == detected else f"{isa} (MVP_CPU_ISA; the CPU has {detected})"
        )
        + (", pairs of bfloat16" if info["cpu_bf16_pairs"] else "")
        + (", AMX" if info["cpu_amx"] else ""),
        "cuda kernels": f"built for {info['cuda_archs']}" + (", with wgmma" if info["hopper"] else "")
        if info["cuda"]
        else "not built (no CUDA compiler, or switched off)",
    }


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version_of(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _driver_version() -> str | None:
    """The NVIDIA driver's version, whether or not this torch can use it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[0] or None
