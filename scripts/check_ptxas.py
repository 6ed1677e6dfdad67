"""Compile csrc/cuda with nvcc for the default architectures and read what ptxas says of each kernel.

Fails on a warning, and on a kernel that spills registers or keeps arrays in local memory: both cost more than most
kernels here take. Shows what ptxas calls a performance loss, which is no warning to it: wgmma instructions that wait
for each other. Needs nvcc, no GPU; without nvcc it says so and succeeds, unless --require is given.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
FLAGS = [
    *(
        "-std=c++17",
        "-O3",
        "--fmad=false",
        "-Wno-deprecated-gpu-targets",
        "-I",
        str(ROOT / "csrc" / "include"),
    ),
    *("-Xptxas", "-v", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror"),
]
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


@dataclass
class Kernel:
    source: str
    name: str
    arch: str
    # -1: ptxas has not said.
    stack: int = -1
    spilled: int = 0
    registers: int = 0
    shared: int = 0


def architectures(source: Path) -> list[str]:
    """Those that setup.py builds for; sources for Hopper alone are built for that (see CMakeLists.txt)."""
    return ["90a"] if source.stem.endswith("_sm90") else ["80", "90"]


def compile_one(nvcc: str, source: Path) -> tuple[Path, int, str]:
    targets = [
        flag for arch in architectures(source) for flag in ("-gencode", f"arch=compute_{arch},code=sm_{arch}")
    ]
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *FLAGS, *targets, "-c", "-o", str(Path(folder) / "out.o"), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
    return source, done.returncode, done.stdout + done.stderr


def read(source: Path, output: str) -> list[Kernel]:
    kernels: list[Kernel] = []
    for line in output.splitlines():
        if entry := ENTRY.search(line):
            kernels.append(Kernel(source.name, *entry.groups()))
        elif kernels and (stack := STACK.search(line)):
            kernels[-1].stack = int(stack[1])
            kernels[-1].spilled = int(stack[2]) + int(stack[3])
        elif kernels and (used := USED.search(line)):
            kernels[-1].registers = int(used[1])
            shared = SHARED.search(line)
            kernels[-1].shared = int(shared[1]) if shared else 0
    return kernels


def readable(names: list[str]) -> list[str]:
    if shutil.which("c++filt") is None:
        return names
    done = subprocess.run(["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True)
    return [
        name.replace("mvp::cuda::", "").replace("(anonymous namespace)::", "")
        for name in done.stdout.splitlines()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--require", action="store_true", help="fail where there is no nvcc")
    options = parser.parse_args()
    console = Console(width=150 if not sys.stdout.isatty() else None)
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc is None:
        console.print("no nvcc on the PATH: the CUDA kernels were not compiled")
        return int(options.require)
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda source: compile_one(nvcc, source), sources))
    broken = [(source, output) for source, code, output in results if code]
    for source, output in broken:
        console.print(
            f"[red]{source.name} does not compile without warnings[/red]\n{output}", highlight=False
        )
    kernels = [kernel for source, code, output in results if not code for kernel in read(source, output)]
    table = Table(title="ptxas: every kernel, every architecture")
    for column in ("source", "kernel", "arch", "registers", "stack", "spilled"):
        table.add_column(column, overflow="fold")
    bad = 0
    for kernel, name in zip(kernels, readable([k.name for k in kernels]), strict=True):
        fails = kernel.stack != 0 or kernel.spilled > 0
        bad += fails
        style = "red" if fails else None
        cells = (kernel.source, name, kernel.arch, kernel.registers, kernel.stack, kernel.spilled)
        table.add_row(*map(str, cells), style=style)
    console.print(table)
    for source, _, output in results:
        for line in sorted({line for line in output.splitlines() if "Performance Loss" in line}):
            console.print(f"{source.name}: {line}", highlight=False, markup=False, style="yellow")
    console.print(
        f"{len(kernels)} kernels from {len(sources)} files; {bad} spill or use local memory; {len(broken)} files fail"
    )
    return int(bad > 0 or bool(broken) or not kernels)


if __name__ == "__main__":
    sys.exit(main())
