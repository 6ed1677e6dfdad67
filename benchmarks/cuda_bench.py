"""How the benchmarks of the CUDA kernels time: on the device, from cold caches, contenders in turn.

Two times of each contender. "device": CUDA events around one call, after the L2 cache was flushed and while a delay
kernel held the device back until all of the call was enqueued, so that the CPU's launches are not in it. "call": a loop
of calls with warm caches, waited for at its end, divided by their number: what a caller sees, launches included.

Goals are least ratios of a peer's device time to ours, least shares of a limit, or a greatest device time. Each file
names command, commit and machine, and is written anew after each case: a run that is cut off leaves what it measured.
``--dry-run`` calls everything once on the CPU, at small sizes, and times nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import ROOT, _ratio, _summary, environment
from rich.console import Console
from rich.table import Table
from torch import Tensor

Run = Callable[[], object]
MIN_ROUNDS, MAX_ROUNDS = 7, 200
WARM_UP = 3
SMALL = 8  # what dry runs cut sizes down to: a call of each kind must work, its time is none of theirs


class CudaBench:
    """Times the cases of one op on the current CUDA device, then prints a table and writes a JSON file."""

    def __init__(self, op: str) -> None:
        parser = argparse.ArgumentParser(description=f"Benchmark of {op} on a GPU")
        parser.add_argument("--out", type=Path, help="default: benchmarks/results/<device>/<op>.json")
        parser.add_argument("--seconds", type=float, default=0.4, help="time spent on each case")
        parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no case is begun")
        parser.add_argument(
            "--only", default="", help="only the cases whose name contains this; writes no file"
        )
        parser.add_argument("--dry-run", action="store_true", help="call everything once, small, on the CPU")
        self.op = op
        self.options = parser.parse_args()
        self.dry = self.options.dry_run
        if not self.dry and not torch.cuda.is_available():
            sys.exit(f"bench {op}: torch sees no CUDA device (--dry-run needs none)")
        self.device = torch.device("cpu" if self.dry else "cuda")
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[str] = []
        self.failed: dict[str, str] = {}
        self.environment: dict[str, Any] | None = None
        self.began = time.perf_counter()
        self.timer = None if self.dry else Timer()
        self.peak: float | None = None  # TFLOP/s

    def size(self, n: int) -> int:
        """``n``, or what a dry run makes of it."""
        return min(n, SMALL) if self.dry else n

    def wants(self, name: str) -> bool:
        """Whether a case of this name will run: for cases that are dear to set up."""
        if self.options.only not in name:
            return False
        if time.perf_counter() - self.began > self.options.budget:
            self.left_out.append(name)
            return False
        return True

    def measure_peak(self) -> None:
        """What the flops of the cases that follow are a share of: the library's large product in bfloat16."""
        n = self.size(8192)
        if self.timer is not None:
            while 6 * n**2 > torch.cuda.mem_get_info()[0] // 2:
                n //= 2
        a, b, out = (torch.randn(n, n, device=self.device).to(torch.bfloat16) for _ in range(3))

        def product() -> Tensor:
            return torch.mm(a, b, out=out)

        if self.timer is None:
            product()
            return
        seconds = statistics.median(self.timer.device({"peak": product}, self.options.seconds)["peak"])
        self.peak = round(1e-12 * 2 * n**3 / seconds, 2)
        print(f"{self.op}: peak {self.peak} TFLOP/s, of {n} x {n} x {n}", file=sys.stderr, flush=True)

    def case(
        self,
        name: str,
        ours: Run,
        peers: Mapping[str, Run | None],
        *,
        goals: Mapping[str, float] | None = None,
        check: Run | None = None,
        moved: int | None = None,
        least_share: float | None = None,
        flops: int | None = None,
        most_us: float | None = None,
    ) -> None:
        """Time ``ours`` against ``peers`` (None: a peer that could not be made). A case that fails, fails alone.

        Args:
            goals: for some peers, the least ratio (peer's device time / ours) that is wanted.
            check: raises if ``ours`` is wrong; not timed.
            moved: bytes that the op must read and write; the limit is a copy that moves as many.
            least_share: of that limit, wanted.
            flops: of the call; shown as TFLOP/s, and as a share of the peak if that was measured.
            most_us: the longest device time that is wanted.
        """
        if not self.wants(name):
            return
        contenders = {"ours": ours, **{k: v for k, v in peers.items() if v is not None}}
        if self.timer is None:
            if check is not None:
                check()
            for run in contenders.values():
                run()
            self.rows.append({"case": name})
            return
        try:
            if check is not None:
                check()
            row = self._measure(self.timer, name, contenders, goals or {}, moved, least_share, flops, most_us)
        except Exception as error:
            self.failed[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            print(f"{self.op}: {name}: FAILED: {self.failed[name]}", file=sys.stderr, flush=True)
        else:
            self.rows.append(row)
            ratios = " ".join(f"{k} {v:.2f}x" for k, v in row["ratios"].items())
            median = row["device_us"]["ours"]["median"]
            print(f"{self.op}: {name}: {median:.1f} us; {ratios}", file=sys.stderr, flush=True)
        self._write()

    def _measure(
        self,
        timer: Timer,
        name: str,
        contenders: dict[str, Run],
        goals: Mapping[str, float],
        moved: int | None,
        least_share: float | None,
        flops: int | None,
        most_us: float | None,
    ) -> dict[str, Any]:
        if moved:
            half = torch.empty(max(1, moved // 2), dtype=torch.uint8, device=self.device)
            other = torch.empty_like(half)
            contenders["copy"] = lambda: other.copy_(half)
        samples = timer.device(contenders, self.options.seconds)
        row: dict[str, Any] = {
            "case": name,
            "device_us": {k: _summary(v) for k, v in samples.items()},
            "call_us": {k: round(1e6 * timer.call(run), 2) for k, run in contenders.items() if k != "copy"},
            "ratios": {k: _ratio(samples[k], samples["ours"]) for k in samples if k not in ("ours", "copy")},
            "goals": {k: v for k, v in goals.items() if k in samples},
            "most_us": most_us,
        }
        median = row["device_us"]["ours"]["median"]
        if moved:
            row["moved_bytes"] = moved
            row["gb_per_s"] = round(moved / median * 1e-3, 1)
            row["share_of_copy"] = {"share": _ratio(samples["copy"], samples["ours"]), "least": least_share}
        if flops:
            row["tflop_per_s"] = round(flops / median * 1e-6, 2)
            if self.peak is not None:
                row["share_of_peak"] = round(row["tflop_per_s"] / self.peak, 3)
        return row

    def finish(self) -> None:
        """Print the table; end with status 1 where a case failed."""
        if self.dry:
            print(f"{self.op}: {len(self.rows)} cases ran once")
            return
        Console(width=170 if not sys.stdout.isatty() else None).print(table(self.op, self.rows))
        if self.left_out:
            print(f"{self.op}: no time for {len(self.left_out)} cases: {', '.join(self.left_out)}")
        self._write()
        if self.failed:
            sys.exit(f"{self.op}: {len(self.failed)} cases failed: {', '.join(self.failed)}")

    def _write(self) -> None:
        """The JSON file, unless ``--only`` chose some cases."""
        if self.options.only:
            return
        if self.environment is None:
            self.environment = cuda_environment()
        out = self.options.out or ROOT / "benchmarks" / "results" / device_folder() / f"{self.op}.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "op": self.op,
            "environment": self.environment,
            **({} if self.peak is None else {"peak_tflop_per_s": self.peak}),
            "rows": self.rows,
            "left_out": self.left_out,
            "failed": self.failed,
        }
        part = out.with_suffix(".part")  # whoever is stopped while writing leaves the last whole file
        part.write_text(json.dumps(result, indent=1) + "\n")
        part.replace(out)


class Timer:
    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.flusher = torch.empty(2 * properties.L2_cache_size, dtype=torch.uint8, device="cuda")
        self.cycles_per_second = self._clock()

    def device(self, contenders: Mapping[str, Run], seconds: float) -> dict[str, list[float]]:
        """Device seconds a call, one sample a round, contenders in turn."""
        delays = {name: self._enqueue_seconds(run) for name, run in contenders.items()}
        samples: dict[str, list[float]] = {name: [] for name in contenders}
        end = time.perf_counter() + seconds
        for done in range(MAX_ROUNDS):
            if done >= MIN_ROUNDS and time.perf_counter() > end:
                break
            for name, run in contenders.items():
                start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                self.flusher.zero_()
                torch.cuda._sleep(int((1.5 * delays[name] + 50e-6) * self.cycles_per_second))
                start.record()
                run()
                stop.record()
                stop.synchronize()
                samples[name].append(1e-3 * start.elapsed_time(stop))
        return samples

    def call(self, run: Run) -> float:
        """Seconds a call, launches included, in a loop that takes some milliseconds."""
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

    @staticmethod
    def _enqueue_seconds(run: Run) -> float:
        for _ in range(WARM_UP):
            run()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        seconds = time.perf_counter() - begin
        torch.cuda.synchronize()
        return seconds

    @staticmethod
    def _clock() -> float:
        cycles = 20_000_000
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(cycles)
        start.record()
        torch.cuda._sleep(cycles)
        stop.record()
        stop.synchronize()
        return cycles / (1e-3 * start.elapsed_time(stop))


def graphed(bench: CudaBench, run: Run) -> Run | None:
    """The call as a CUDA graph's replay; None where it cannot be captured (a peer that waits for the device)."""
    if bench.dry:
        return run
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as error:
        print(f"not captured in a CUDA graph: {str(error).splitlines()[0]}", file=sys.stderr)
        return None
    return graph.replay


def compiled(bench: CudaBench, function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for the shapes of the first call. What it made for earlier cases is forgotten: from the ninth set
    of shapes of one function on, torch would run that as it is, and the peer would be eager torch by another name."""
    if bench.dry:
        return function
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def quietly(bench: CudaBench) -> AbstractContextManager[Any]:
    """Without gradients: what is timed are forward calls."""
    return nullcontext() if bench.dry else torch.no_grad()


def device_folder() -> str:
    """ "NVIDIA H200" → "h200": where results of this device are kept."""
    words = re.findall(r"[a-z0-9]+", torch.cuda.get_device_name().lower())
    return next((w for w in words if re.fullmatch(r"[a-z]{1,3}\d+[a-z]*", w)), "-".join(words))


def cuda_environment() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: None)()
    return {
        **environment(),
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "driver": driver,
    }


def table(op: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    result = Table(title=f"{op}: device µs, median (p10 – p90); × = peer's device time / ours")
    result.add_column("case")
    for column in ("ours", "call µs", "GB/s, TFLOP/s", "against", "its µs", "×", "goal"):
        result.add_column(column, justify="left" if column == "against" else "right")
    for row in rows:
        times = row["device_us"]
        rate = str(row.get("gb_per_s", row.get("tflop_per_s", "")))
        if "share_of_peak" in row:
            rate += f" ({row['share_of_peak']:.0%} of peak)"
        lines = [(k, v, row["goals"].get(k), f"{v:.2f}×") for k, v in row["ratios"].items()]
        if "share_of_copy" in row:
            share = row["share_of_copy"]
            lines.append(("copy", share["share"], share["least"], f"{share['share']:.0%}"))
        first = (row["case"], span(times["ours"]), f"{row['call_us']['ours']:.1f}", rate)
        for against, value, goal, text in lines:
            if goal is not None:
                text = f"[{'green' if value >= goal else 'red'}]{text}[/]"
            result.add_row(*first, against, span(times[against]), text, "" if goal is None else f"{goal:g}")
            first = ("", "", "", "")
        result.add_section()
    return result


def span(times: Mapping[str, float]) -> str:
    return f"{times['median']:.1f} ({times['p10']:.1f} – {times['p90']:.1f})"


class Goal(NamedTuple):
    """What one case was to reach, and what it measured."""

    kind: str
    case: str
    value: float
    wanted: float
    most: bool = False  # the greatest value that is wanted, not the least

    @property
    def margin(self) -> float:
        """1 and more: reached."""
        return self.wanted / self.value if self.most else self.value / self.wanted


def summary(folder: Path) -> int:
    """Each op's goals beside what was measured, all cases of a kind in one line. The number of missed goals."""
    missed = 0
    console = Console(width=150 if not sys.stdout.isatty() else None)
    result = Table(title=f"goals and measurements, from {folder.name}")
    for column in ("op", "goal", "measured, of all cases", "reached", "furthest from it"):
        result.add_column(column, overflow="fold")
    for file in sorted(folder.glob("*.json")):
        content = json.loads(file.read_text())
        if "rows" not in content:
            continue
        kinds: dict[str, list[Goal]] = {}
        for row in content["rows"]:
            for goal in row_goals(row):
                kinds.setdefault(goal.kind, []).append(goal)
        op = content["op"]
        for kind, goals in kinds.items():
            reached = sum(goal.margin >= 1 for goal in goals)
            missed += len(goals) - reached
            worst = min(goals, key=lambda goal: goal.margin)
            result.add_row(
                op,
                f"{'≤' if worst.most else '≥'} {spread([g.wanted for g in goals])} {kind}",
                spread([g.value for g in goals]),
                f"[{'green' if reached == len(goals) else 'red'}]{reached} of {len(goals)}[/]",
                f"{worst.value:g}: {worst.case}",
            )
            op = ""
        for word in ("failed", "left_out"):
            if names := list(content.get(word, ())):
                result.add_row(op, word.replace("_", " "), f"{len(names)} cases", "", names[0])
                op = ""
        result.add_section()
    console.print(result)
    return missed


def spread(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.3g}" if low == high else f"{low:.3g} – {high:.3g}"


def row_goals(row: Mapping[str, Any]) -> list[Goal]:
    case = row["case"]
    goals = [Goal(f"× {k}", case, row["ratios"][k], g) for k, g in row["goals"].items()]
    share = row.get("share_of_copy")
    if share and share["least"] is not None:
        goals.append(Goal("of copy", case, share["share"], share["least"]))
    if row.get("most_us") is not None:
        goals.append(Goal("µs", case, row["device_us"]["ours"]["median"], row["most_us"], most=True))
    return goals


if __name__ == "__main__":
    summary(Path(sys.argv[1]))
