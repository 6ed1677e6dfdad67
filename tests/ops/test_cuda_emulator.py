"""The emulator itself: right kernels come out right under every schedule, and each seeded fault is caught."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import emulator
import pytest
import torch
from torch import Tensor

SCHEDULES = range(6)
N = 64
TESTS = Path(__file__).parent


def run(name: str, schedule: int = 0) -> tuple[Tensor, Tensor]:
    values = torch.arange(2 * N, dtype=torch.float32) + 1
    out = torch.full((N,), -1.0)
    with emulator.emulated(schedule) as module:
        module.run_faulty_kernel(name, values, out)
    return values[:N], out


def expected(name: str, x: Tensor) -> Tensor:
    if name.startswith("neighbours"):
        return x.roll(-1) + x.roll(1)
    if name.startswith("two rounds"):
        return 2 * x.roll(-7) + 1
    if name.startswith("exchange"):
        return x[torch.arange(N) ^ 5]
    return x


@pytest.mark.parametrize("name", ["neighbours", "two rounds", "exchange in warp", "copy"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_right_kernels(name: str, schedule: int) -> None:
    x, out = run(name, schedule)
    assert torch.equal(out, expected(name, x))


@pytest.mark.parametrize(
    "name",
    [
        "neighbours without barrier", "two rounds without barrier", "exchange in warp without barrier",
        "copy without wait", "copy with too weak a wait",
    ],
)  # fmt: skip
def test_missing_barriers_change_a_result(name: str) -> None:
    results = [run(name, schedule) for schedule in SCHEDULES]
    assert not all(torch.equal(out, expected(name, x)) for x, out in results)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("barrier for some", r"deadlock: only part of the threads came.*__syncthreads.*24 of 64 threads have ended"),
        ("barriers in two places", r"is at the barrier at __syncthreads \(.*faults.cu:\d+\) while others are at"),
        ("shuffle for some", r"deadlock.*waits at __shfl_xor_sync"),
        ("misaligned", r"thread \(0, 0, 0\) of block \(0, 0, 0\) reads 16 bytes at an address that is not a multiple"),
        ("unwaited copies", r"ends with asynchronous copies that it never waited for"),
    ],
)  # fmt: skip
def test_faults_are_reported(name: str, message: str) -> None:
    for schedule in SCHEDULES:
        with pytest.raises(RuntimeError, match=message):
            run(name, schedule)
    x, out = run("neighbours")  # and the engine goes on
    assert torch.equal(out, expected("neighbours", x))


def test_matrix_instructions() -> None:
    for schedule in SCHEDULES:
        a = torch.randn(16, 16).bfloat16().float()
        b = torch.randn(16, 8).bfloat16().float()
        out = torch.empty(16, 8)
        with emulator.emulated(schedule) as module:
            module.run_faulty_kernel("matrix product", torch.cat([a.flatten(), b.flatten()]), out)
        torch.testing.assert_close(out, a @ b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["", ", rows are k", " by barrier"])
def test_warpgroup_matrix_instructions(variant: str) -> None:
    name, rows_are_k = f"warpgroup product{variant}", "rows are k" in variant
    for schedule in SCHEDULES:
        a, b = torch.randn(64, 64).bfloat16(), torch.randn(64, 128).bfloat16()
        values = torch.cat([a.flatten(), (b if rows_are_k else b.t().contiguous()).flatten()])
        out = torch.empty(64, 128)
        with emulator.emulated(schedule) as module:
            module.run_faulty_kernel(name, values, out)
        torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-4)
    for fault, message in (
        ("warpgroup product without fence", "starts a matrix instruction while copies of .* are not fenced"),
        ("warpgroup product by barrier without fence", "on copies of others that it did not fence"),
        ("warpgroup product without wait", "ends with matrix instructions that it never waited for"),
    ):
        with emulator.emulated() as module, pytest.raises(RuntimeError, match=message):
            module.run_faulty_kernel(fault, values, out)


def run_pipeline(fault: str, schedule: int) -> tuple[Tensor, Tensor]:
    rows = torch.randn(4, 32)
    out = torch.full((32,), -1.0)
    with emulator.emulated(schedule) as module:
        module.run_faulty_kernel(f"pipeline{fault}", rows.flatten(), out)
    return rows.sum(0), out


def test_pipeline_of_boxes() -> None:
    """Barriers in shared memory, barriers for part of a block, and copies of boxes."""
    for schedule in range(12):
        torch.testing.assert_close(*run_pipeline("", schedule))


@pytest.mark.parametrize("fault", [" without wait for full", " without wait for empty"])
def test_a_pipeline_that_does_not_wait_changes_a_result(fault: str) -> None:
    def caught(schedule: int) -> bool:
        try:
            wanted, out = run_pipeline(fault, schedule)
        except RuntimeError:
            return True
        return not torch.allclose(wanted, out)

    assert any(caught(schedule) for schedule in range(12))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (" with too few bytes", "brings bytes to a barrier in shared memory that does not expect them"),
        (" with too many bytes", "deadlock.*waits at a barrier in shared memory"),
        (" without barriers", "a barrier in shared memory is used that was not initialised"),
        (" without the last wait", "a block ends with copies of boxes under way"),
        (" with half a barrier", "deadlock.*waits at a barrier for part of the block"),
    ],
)
def test_faults_of_a_pipeline_are_reported(fault: str, message: str) -> None:
    # In other orders that box may come before the end, by luck.
    for schedule in (0,) if fault == " without the last wait" else SCHEDULES:
        with pytest.raises(RuntimeError, match=message):
            run_pipeline(fault, schedule)


def test_launch_errors_say_what_to_do() -> None:
    wanted = {
        209: r".*float32 could not be launched with grid \(1, 1, 1\), block \(64, 1, 1\) and 256 bytes of shared "
        r"memory on device 0: .*capability 8.0 .*install it again with MVP_CUDA_ARCHS=80-real",
        98: r".*capability 8.0 .*install it again with MVP_CUDA_ARCHS=80-real",
        35: r".*The driver serves CUDA 13.0 .*update the driver",
        222: r".*The driver serves CUDA 13.0 .*update the driver",
        1: r".*CUDA_LAUNCH_BLOCKING=1",
    }
    for error, message in wanted.items():
        with emulator.emulated() as module:
            module.fail_next_launch(error)
        with pytest.raises(RuntimeError, match="a test kernel: the CUDA kernel for " + message):
            run("copy")


def sanitized(*code: str) -> subprocess.CompletedProcess[str]:
    """Python code in a process of its own, with the emulator under AddressSanitizer and UndefinedBehaviorSanitizer."""
    find = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = {
        **os.environ,
        "LD_PRELOAD": str(Path(find.stdout.strip()).resolve()),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "MVP_EMULATOR_SANITIZE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(emulator.ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
    }
    # It starts where this process did, so it imports the same mvp_ext.
    return subprocess.run(
        [sys.executable, *code], env=environment, capture_output=True, text=True, timeout=900
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [("beyond shared", "heap-buffer-overflow"), ("beyond global", "heap-buffer-overflow")],
)
def test_the_sanitizers_see_what_lies_beyond(name: str, message: str) -> None:
    emulator.build(sanitize=True)
    code = f"""
import emulator, torch
with emulator.emulated() as module:
    module.run_faulty_kernel({name!r}, torch.ones({N}), torch.empty({N}))
"""
    done = sanitized("-c", code)
    assert done.returncode != 0
    assert message in done.stderr, done.stderr[-3000:]
    assert "faults.cu" in done.stderr


def test_the_kernels_under_the_sanitizers() -> None:
    """The tests of the ops that carry the mark `sanitize`, again."""
    emulator.build(sanitize=True)
    # By name: some of what other tests import does not start under AddressSanitizer.
    files = [str(f) for f in TESTS.glob("test_*.py") if "@pytest.mark.sanitize" in f.read_text()]
    assert files
    done = sanitized(
        *("-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-m", "sanitize", "-k", "emulator"), *files
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert " passed" in done.stdout
