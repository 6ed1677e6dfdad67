"""The CPU kernels under AddressSanitizer and UBSan, for every instruction set that this machine can run.

Builds the native module once, with all its instruction sets, beside a copy of the package; then runs, for each of them,
the tests of the ops that older instruction sets are tested with and a part of the fuzz of raw calls. torch is not
sanitized: the sanitizers' runtime is loaded before it. Nothing here touches an installed mvp_ext.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ISAS = ("baseline", "avx2", "avx512")


def build(folder: Path) -> None:
    """``folder``/site/mvp_ext: the package with a sanitized module."""
    import pybind11

    site = folder / "site"
    shutil.rmtree(site, ignore_errors=True)
    shutil.copytree(ROOT / "mvp_ext", site / "mvp_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    cmake, ninja = shutil.which("cmake", path=path), shutil.which("ninja", path=path)
    if cmake is None or ninja is None:
        raise SystemExit("sanitize: cmake and ninja are needed (the extra dev)")
    configure = [
        *(cmake, "-G", "Ninja", "-S", ROOT, "-B", folder / "build", f"-DCMAKE_MAKE_PROGRAM={ninja}"),
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
        *("-DCMAKE_BUILD_TYPE=Sanitized", "-DMVP_USE_CUDA=OFF"),
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={site / 'mvp_ext'}",
    ]
    for command in (configure, [cmake, "--build", folder / "build", "--target", "_C"]):
        done = subprocess.run([*map(str, command)], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"sanitize: the build failed\n{done.stdout[-6000:]}{done.stderr[-2000:]}")


def chosen_tests() -> str:
    """An expression for pytest's -k: the tests that tests/isa.py runs with other instruction sets."""
    parts = []
    for file in sorted((ROOT / "tests" / "ops").glob("test_*.py")):
        for chosen in re.findall(r'run_on\(isa, __file__, "(.+)"\)', file.read_text()):
            parts.append(f"({file.name} and ({chosen}))")
    return f"({' or '.join(parts)}) and not emulator and not cuda"


def environment(site: Path, isa: str) -> dict[str, str]:
    # The second, or the first does not find what throws exceptions, and takes torch's for a failure of its own.
    preloaded = [
        str(Path(subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()).resolve())
        for name in ("libasan.so", "libstdc++.so")
    ]
    return {
        **os.environ,
        "LD_PRELOAD": ":".join(preloaded),
        # Of the leaks and the odd allocations, Python's and torch's own would drown ours; a fuzz asks for too much.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1"
        ":max_allocation_size_mb=1024",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "MVP_CPU_ISA": isa,
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": str(site),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def runs(isa: str) -> bool:
    """Whether this machine does."""
    if isa == "baseline":
        return True
    wanted = {
        "avx2": {"avx2", "fma", "bmi2"},
        "avx512": {f"avx512{x}" for x in ("f", "bw", "cd", "dq", "vl")},
    }
    flags = next(
        (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), ""
    )
    return wanted[isa] <= set(flags.split())


def check(site: Path, isa: str, calls: int) -> str:
    """What went wrong with this instruction set; empty: nothing."""
    native = "from mvp_ext.ops._native import build_info as b; assert (b()['cpu_isa'], b()['build_type']) =="
    tests = ROOT / "tests" / "ops"
    pytest = f"-m pytest -q -x -p no:cacheprovider -c {ROOT / 'pyproject.toml'} --rootdir={ROOT} {tests} -k".split()
    first = 10**6 * (1 + ISAS.index(isa))  # other calls than the test makes
    commands: list[list[object]] = [
        ["-c", f"{native} ({isa!r}, 'Sanitized'), b()"],
        [*pytest, chosen_tests()],
        [tests / "test_fuzz.py", first, calls, site.parent / f"seed_{isa}"],
    ]
    for command in commands:
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=site, env=environment(site, isa), capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            title = f"{isa}: exit code {done.returncode}: {' '.join(map(str, command))}"
            return f"{title}\n{done.stdout[-4000:]}\n{done.stderr[-6000:]}"
        lines = done.stdout.strip().splitlines()
        print(f"{isa}: {time.monotonic() - start:.0f} s: {lines[-1] if lines else 'loads'}", flush=True)
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "sanitized")
    parser.add_argument("--calls", type=int, default=1500, help="raw calls for each instruction set")
    parser.add_argument("--jobs", type=int, default=2, help="instruction sets at a time")
    options = parser.parse_args()
    start = time.monotonic()
    build(options.folder.resolve())
    print(f"built in {time.monotonic() - start:.0f} s", flush=True)
    chosen = [isa for isa in ISAS if runs(isa)]
    for isa in sorted(set(ISAS) - set(chosen)):
        print(f"{isa}: not run, this machine does not have it")
    site = options.folder.resolve() / "site"
    with ThreadPoolExecutor(options.jobs) as pool:
        failures = [text for text in pool.map(lambda isa: check(site, isa, options.calls), chosen) if text]
    print(*failures, sep="\n")
    print(f"{len(chosen)} instruction sets, {len(failures)} with faults; {time.monotonic() - start:.0f} s")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
