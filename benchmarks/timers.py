"""How contenders are timed: in turn, round after round, in one process, so that a slow phase of the machine hits all.

Each timer has ``seconds`` (for a case, unless told otherwise), ``cold`` (whether caches are emptied before a sample),
``measure`` (seconds a call of each contender on the device, one sample a round), ``call`` (seconds of a call with the
CPU's launches; None where that is the same) and ``environment`` (what of the machine matters to its numbers).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

Run = Callable[[], object]
Contenders = Mapping[str, Run]
Samples = dict[str, list[float]]
LIMITS = ("read", "copy")


class Timer(Protocol):
    seconds: float
    cold: bool

    def measure(self, contenders: Contenders, seconds: float) -> Samples: ...

    def call(self, run: Run) -> float | None: ...

    def environment(self) -> dict[str, Any]: ...


class CpuTimer:
    """From warm caches: each contender is warmed until two samples in a row agree.

    A sample is long enough for the clock: short functions are repeated within it. Each round has an order of its own
    (drawn, the same in every run): who always follows the largest contender would always pay for the pages that the
    allocator gave back after it.
    """

    seconds, cold = 1.5, False
    # The clock and a context switch are well below a percent of it.
    SAMPLE_SECONDS = 1e-3
    MIN_ROUNDS, MAX_ROUNDS = 9, 400
    WARM_UP_SAMPLES = 20

    def measure(self, contenders: Contenders, seconds: float) -> Samples:
        order, draw = list(contenders), random.Random(0)
        repeats = {name: self._warm_up(run) for name, run in contenders.items()}
        samples: Samples = {name: [] for name in contenders}
        end = time.perf_counter() + seconds
        for done in range(self.MAX_ROUNDS):
            if done >= self.MIN_ROUNDS and time.perf_counter() > end:
                break
            draw.shuffle(order)
            for name in order:
                samples[name].append(_seconds(contenders[name], repeats[name]))
        return samples

    def call(self, run: Run) -> None:
        return None

    def environment(self) -> dict[str, Any]:
        caches = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        sizes = [int(path.read_text().strip().rstrip("K")) * 1024 for path in caches]
        return {"last_level_cache_bytes": max(sizes, default=None)}

    def _warm_up(self, run: Run) -> int:
        """Run until two samples in a row agree within 5 %; returns the number of calls that make one sample."""
        run()
        repeats, last = 1, float("inf")
        for _ in range(self.WARM_UP_SAMPLES):
            now = _seconds(run, repeats)
            repeats = max(1, round(self.SAMPLE_SECONDS / now))
            if abs(now - last) < 0.05 * last:
                break
            last = now
        return repeats


class CudaTimer:
    """From cold caches: events around one call, after the L2 cache was flushed.

    A delay kernel holds the device back until all of the call was enqueued, so that the CPU's launches are not in it.
    """

    seconds, cold = 0.4, True
    MIN_ROUNDS, MAX_ROUNDS = 7, 200
    WARM_UP = 3

    def __init__(self) -> None:
        self.properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.flusher = torch.empty(2 * self.properties.L2_cache_size, dtype=torch.uint8, device="cuda")
        self.cycles_per_second = self._clock()

    def measure(self, contenders: Contenders, seconds: float) -> Samples:
        delays = {name: self._enqueue_seconds(run) for name, run in contenders.items()}
        samples: Samples = {name: [] for name in contenders}
        end = time.perf_counter() + seconds
        for done in range(self.MAX_ROUNDS):
            if done >= self.MIN_ROUNDS and time.perf_counter() > end:
                break
            for name, run in contenders.items():
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self.flusher.zero_()
                torch.cuda._sleep(int((1.5 * delays[name] + 50e-6) * self.cycles_per_second))
                start.record()
                run()
                stop.record()
                stop.synchronize()
                samples[name].append(1e-3 * start.elapsed_time(stop))
        return samples

    def call(self, run: Run) -> float:
        """In a loop that takes some milliseconds, with warm caches, waited for at its end."""
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        calls = max(1, min(1000, round(5e-3 / (time.perf_counter() - begin))))
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) / calls

    def environment(self) -> dict[str, Any]:
        return {
            "multiprocessors": self.properties.multi_processor_count,
            "l2_bytes": self.properties.L2_cache_size,
        }

    def _enqueue_seconds(self, run: Run) -> float:
        for _ in range(self.WARM_UP):
            run()
        torch.cuda.synchronize()
        seconds = _seconds(run)
        torch.cuda.synchronize()
        return seconds

    @staticmethod
    def _clock() -> float:
        cycles = 20_000_000
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(cycles)
        start.record()
        torch.cuda._sleep(cycles)
        stop.record()
        stop.synchronize()
        return cycles / (1e-3 * start.elapsed_time(stop))


class DryTimer:
    """Calls everything once; what it measures says nothing."""

    seconds, cold = 0.0, False

    def measure(self, contenders: Contenders, seconds: float) -> Samples:
        return {name: [_seconds(run)] for name, run in contenders.items()}

    def call(self, run: Run) -> float:
        return _seconds(run)

    def environment(self) -> dict[str, Any]:
        return {}


def bandwidth_test(limit: str, moved: int, device: torch.device) -> Run:
    """A physical limit, as a contender: over as many bytes as the op moves, so that its working set lies in the same
    level of the caches as the op's."""
    if limit not in LIMITS:
        raise ValueError(f"limit: expected one of {LIMITS}, got {limit!r}")
    # Two float32 arrays that are `moved` bytes together.
    half = torch.ones(max(1, moved // 8), device=device)
    other = torch.zeros_like(half)
    return (lambda: torch.dot(half, other)) if limit == "read" else (lambda: other.copy_(half))


def _seconds(run: Run, repeats: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats
