"""Compile the CPU kernels for aarch64 with Debian's cross compiler, warnings being errors; and run them, if possible.

Kernels know no torch, so under qemu-user they need none: what the kernels of this machine's oldest instruction set did
in the tests that they have is written down, and done again (see tests/aarch64). Both have
vectors of four floats and no fused multiply-add, so every bit must be the same.

Without ``aarch64-linux-gnu-g++`` (Debian: g++-aarch64-linux-gnu) it says so and succeeds; so it does without
``qemu-aarch64-static`` (qemu-user-static) after compiling. ``--require`` makes both a failure.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sanitize import chosen_tests

ROOT = Path(__file__).resolve().parent.parent
COMPILER = "aarch64-linux-gnu-g++"
EMULATORS = ("qemu-aarch64-static", "qemu-aarch64")
# As in CMakeLists.txt.
FLAGS = [
    *(
        "-std=c++17",
        "-O3",
        "-fPIC",
        "-fopenmp",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-ffp-contract=off",
        "-fno-math-errno",
    ),
    *("-DMVP_ISA=baseline", "-I", str(ROOT / "csrc" / "include")),
]


def run(*command: object, **options: object) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout[-6000:]}{done.stderr[-6000:]}")
    if done.stdout.strip():
        print(
            done.stdout.strip().splitlines()[-1] if "pytest" in command else done.stdout.strip(), flush=True
        )


def compile_all(folder: Path) -> list[Path]:
    """The kernels as objects; the bindings, which need Python's libraries, are only looked through."""
    import pybind11

    sources = [*sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), ROOT / "tests" / "aarch64" / "replay.cpp"]
    objects = [folder / f"{source.stem}.o" for source in sources]
    commands = [[COMPILER, *FLAGS, "-c", s, "-o", o] for s, o in zip(sources, objects, strict=True)]
    python = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"]]
    facts = ["-DMVP_HAVE_BASELINE", '-DMVP_COMPILER="GNU"', '-DMVP_BUILD_TYPE="Release"']
    commands += [[COMPILER, *FLAGS, *python, *facts, "-fsyntax-only", ROOT / "csrc" / "bindings.cpp"]]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda command: run(*command), commands))
    print(f"aarch64: {len(commands)} sources compiled without warnings", flush=True)
    return objects


def replay(folder: Path, objects: list[Path], emulator: str) -> None:
    """The kernels of this process's mvp_ext, and then those for aarch64."""
    program, record = folder / "replay", folder / "record"
    run(COMPILER, "-static", "-fopenmp", *objects, "-o", program)
    plugin = os.pathsep.join([str(ROOT / "tests" / "aarch64"), os.environ.get("PYTHONPATH", "")])
    run(
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "record", "--record", record),
        *("-c", ROOT / "pyproject.toml", f"--rootdir={ROOT}", ROOT / "tests" / "ops"),
        *("-k", chosen_tests()),
        env={**os.environ, "MVP_CPU_ISA": "baseline", "PYTHONPATH": plugin},
    )
    run(emulator, program, record)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "aarch64")
    parser.add_argument("--require", action="store_true", help="fail where a tool is missing")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.which(COMPILER) is None:
        print(f"aarch64: no {COMPILER} on the PATH (Debian: g++-aarch64-linux-gnu): nothing was compiled")
        return int(options.require)
    objects = compile_all(folder)
    emulator = next((name for name in EMULATORS if shutil.which(name)), None)
    if emulator is None:
        print("aarch64: no qemu-aarch64-static on the PATH (Debian: qemu-user-static): compiled, not run")
        return int(options.require)
    replay(folder, objects, emulator)
    return 0


if __name__ == "__main__":
    sys.exit(main())
