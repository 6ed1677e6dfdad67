"""What every benchmark here shares: fair timing, the machine's limits, one JSON file and one table an op.

    bench = Bench("pack")
    bench.case("resnet18, keep 0.5", ours, {"index_select per tensor": peer},
               floors={"index_select per tensor": 1.5}, moved=bytes_read_and_written, limit="copy",
               check=lambda: torch.testing.assert_close(ours(), peer()))
    bench.finish()

How it measures:
- ``check`` runs first: a wrong result has no speed.
- All contenders run in turn, round after round, in one process; a ratio is the median over the rounds of
  peer time / our time, so that a slow phase of the machine hits both sides of it. Each round has an order of
  its own (drawn, the same in every run): who always follows the largest contender would always pay for the
  pages that the allocator gave back after it.
- A sample is long enough for the clock (``SAMPLE_SECONDS``): short functions are repeated within it.
- The physical limit is a contender too: "read" is ``torch.dot``, "copy" is ``Tensor.copy_``, over as many
  bytes as the op moves, so its working set sits in the same cache level as the op's.
- Before timing, each contender is warmed until two samples in a row agree. ``cold=True`` evicts the
  last-level cache before every sample instead: what a caller sees who has done something else in between.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
SAMPLE_SECONDS = 1e-3  # the clock and a context switch are well below a percent of it
MIN_ROUNDS, MAX_ROUNDS = 9, 400
WARM_UP_SAMPLES = 20
LIMITS = ("read", "copy")


class Bench:
    """Times the cases of one op, then prints the table and writes the JSON file."""

    def __init__(self, op: str) -> None:
        parser = argparse.ArgumentParser(description=f"Benchmark of {op}")
        parser.add_argument(
            "--out", type=Path, default=ROOT / "benchmarks" / "results" / "cpu" / f"{op}.json"
        )
        parser.add_argument("--threads", type=int, default=2)
        parser.add_argument("--seconds", type=float, default=1.5, help="time spent on each case")
        parser.add_argument(
            "--only", default="", help="run only the cases whose name contains this; writes no file"
        )
        self.op = op
        self.options = parser.parse_args()
        self.rows: list[dict[str, Any]] = []
        torch.set_num_threads(self.options.threads)

    def case(
        self,
        name: str,
        ours: Callable[[], object],
        peers: Mapping[str, Callable[[], object]],
        *,
        floors: Mapping[str, float] | None = None,
        check: Callable[[], object] | None = None,
        moved: int | None = None,
        limit: str | None = None,
        limit_floor: float | None = None,
        cold: bool = False,
    ) -> None:
        """Time ``ours`` against ``peers``.

        Args:
            floors: for some peers, the least ratio (peer time / our time) that is promised.
            check: raises if ``ours`` is wrong; not timed.
            moved: bytes that the op must read and write.
            limit: "read" or "copy": show the share of that bandwidth.
            limit_floor: the least share of the limit that is promised.
            cold: evict the last-level cache before every sample.
        """
        if self.options.only not in name:
            return
        if check is not None:
            check()
        contenders = {"ours": ours, **peers}
        if limit is not None:
            if limit not in LIMITS or not moved:
                raise ValueError(
                    f"limit: expected one of {LIMITS} together with moved > 0, got {limit!r}, {moved!r}"
                )
            contenders[limit] = _bandwidth_test(limit, moved)
        samples = _measure(contenders, self.options.seconds, cold)
        row: dict[str, Any] = {"case": name, "times_us": {k: _summary(v) for k, v in samples.items()}}
        row["ratios"] = {peer: _ratio(samples[peer], samples["ours"]) for peer in peers}
        row["floors"] = dict(floors or {})
        if moved:
            row["moved_bytes"] = moved
            row["gb_per_s"] = round(moved / row["times_us"]["ours"]["median"] * 1e-3, 2)
        if limit is not None:
            row["limit"] = {
                "name": limit,
                "share": _ratio(samples[limit], samples["ours"]),
                "floor": limit_floor,
            }
        row["cold"] = cold
        self.rows.append(row)
        Console(stderr=True).print(f"[dim]{self.op}: {name}: {row['ratios']}[/dim]")

    def finish(self) -> None:
        """Print the table; write the JSON file unless ``--only`` chose some cases."""
        Console(width=160 if not sys.stdout.isatty() else None).print(_table(self.op, self.rows))
        if self.options.only:
            return
        result = {"op": self.op, "environment": environment(), "rows": self.rows}
        self.options.out.parent.mkdir(parents=True, exist_ok=True)
        self.options.out.write_text(json.dumps(result, indent=1) + "\n")


def _measure(
    contenders: Mapping[str, Callable[[], object]], seconds: float, cold: bool
) -> dict[str, list[float]]:
    """Seconds a call of each contender, one sample a round, contenders in turn."""
    order, draw = list(contenders), random.Random(0)
    repeats = {name: 1 if cold else _warm_up(run) for name, run in contenders.items()}
    evict = _evictor() if cold else None
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + seconds
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.perf_counter() > end:
            break
        draw.shuffle(order)
        for name in order:
            if evict is not None:
                evict()
            samples[name].append(_sample(contenders[name], repeats[name]))
    return samples


def _warm_up(run: Callable[[], object]) -> int:
    """Run until two samples in a row agree within 5 %; returns the number of calls that make one sample."""
    run()
    repeats, last = 1, float("inf")
    for _ in range(WARM_UP_SAMPLES):
        now = _sample(run, repeats)
        repeats = max(1, round(SAMPLE_SECONDS / now))
        if abs(now - last) < 0.05 * last:
            break
        last = now
    return repeats


def _sample(run: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def _bandwidth_test(limit: str, moved: int) -> Callable[[], object]:
    half = torch.ones(max(1, moved // 8))  # two float32 arrays that are `moved` bytes together
    other = torch.zeros_like(half)
    return (lambda: torch.dot(half, other)) if limit == "read" else (lambda: other.copy_(half))


def _evictor() -> Callable[[], object]:
    buffer = torch.zeros(2 * _last_level_cache_bytes(), dtype=torch.uint8)
    return lambda: buffer.add_(1)


def _last_level_cache_bytes() -> int:
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        sizes.append(int(path.read_text().strip().rstrip("K")) * 1024)
    return max(sizes) or 32 << 20


def _summary(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    pick = [ordered[round(q * (len(ordered) - 1))] * 1e6 for q in (0.1, 0.5, 0.9)]
    return {
        "p10": round(pick[0], 3),
        "median": round(pick[1], 3),
        "p90": round(pick[2], 3),
        "rounds": len(ordered),
    }


def _ratio(numerator: list[float], denominator: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(numerator, denominator, strict=True)), 3)


def environment() -> dict[str, Any]:
    """What is needed to judge and to repeat the numbers."""
    from mvp_ext.ops._native import build_info

    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "last_level_cache_bytes": _last_level_cache_bytes(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "build": build_info(),
        "commit": _commit(),
        "command": shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def _commit() -> str:
    """The commit, with "+" where the sources that were measured differ from it (results do not count); MVP_COMMIT says
    it where the sources are a copy without git."""

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "csrc", "mvp_ext", "benchmarks/*.py")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("MVP_COMMIT", "unknown")


def _table(op: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"{op}: median µs (p10 – p90); × = peer time / our time")
    table.add_column("case")
    for column in ("ours", "GB/s", "against", "time", "×", "floor"):
        table.add_column(column, justify="left" if column == "against" else "right")
    for row in rows:
        times = row["times_us"]
        lines = [
            (peer, ratio, row["floors"].get(peer), f"{ratio:.2f}×") for peer, ratio in row["ratios"].items()
        ]
        if "limit" in row:
            name, share, floor = (row["limit"][key] for key in ("name", "share", "floor"))
            lines.append((name, share, floor, f"{share:.0%}"))
        first = (row["case"], _span(times["ours"]), str(row.get("gb_per_s", "")))
        for against, value, floor, text in lines:
            if floor is not None:
                text = f"[{'green' if value >= floor else 'red'}]{text}[/]"
            table.add_row(*first, against, _span(times[against]), text, "" if floor is None else f"{floor:g}")
            first = ("", "", "")
        table.add_section()
    return table


def _span(times: Mapping[str, float]) -> str:
    return f"{times['median']:.1f} ({times['p10']:.1f} – {times['p90']:.1f})"
