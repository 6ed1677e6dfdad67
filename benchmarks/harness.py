"""What every benchmark here shares: its options, the cases' checks and times, one file and one table an op.

    bench = Bench("pack")
    bench.case("resnet18, keep 0.5", ours, {"index_select per tensor": peer, "ours, CUDA graph": bench.graphed(ours)},
               floors={"index_select per tensor": 1.5}, moved=bytes_read_and_written,
               check=lambda: torch.testing.assert_close(ours(), peer()))
    bench.finish()

- ``check`` runs first: a wrong result has no speed.
- A ratio is the median over the rounds of peer time / our time (timers.py has how each device is timed), and the
  physical limit is a contender too.
- A case that fails, fails alone, and the file (results.py has its form) is written anew after each: a run that is cut
  off leaves what it measured.
- ``--device cuda --dry-run`` calls everything that a GPU would run once, small and on the CPU.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from results import Limit, Results, Row, console, machine_folder, table
from timers import CpuTimer, CudaTimer, DryTimer, Run, Timer, bandwidth_test
from torch import Tensor

from mvp_ext.app.environment import command, commit, environment

ROOT = Path(__file__).resolve().parent.parent
# What the numbers depend on: results that were written do not count as changes.
SOURCES = ("csrc", "mvp_ext", "benchmarks/*.py")
# What dry runs cut sizes down to: a call of each kind must work, its time is none of theirs.
SMALL = 8


class Bench:
    """Times the cases of one op on one device, then prints the table and writes the JSON file.

    ``device`` is where tensors go; ``gpu`` says whether the cases of a GPU are wanted, also in a dry run on the CPU.
    """

    def __init__(self, op: str) -> None:
        self.op, self.options = op, _parse(op)
        self.gpu, self.dry = self.options.device == "cuda", self.options.dry_run
        if self.gpu and not self.dry and not torch.cuda.is_available():
            sys.exit(f"bench {op}: torch sees no CUDA device (--dry-run needs none)")
        self.device = torch.device("cuda" if self.gpu and not self.dry else "cpu")
        self.timer: Timer = DryTimer() if self.dry else CudaTimer() if self.gpu else CpuTimer()
        self.seconds = self.timer.seconds if self.options.seconds is None else self.options.seconds
        self.rows: list[Row] = []
        self.left_out: list[str] = []
        self.failed: dict[str, str] = {}
        self.peak_tflop_per_s: float | None = None
        self.began = time.perf_counter()
        torch.set_num_threads(self.options.threads)
        torch.manual_seed(0)

    def size(self, n: int) -> int:
        """``n``, or what a dry run makes of it."""
        return min(n, SMALL) if self.dry else n

    def wants(self, *names: str) -> bool:
        """Whether one of these cases will run: to be asked before what is dear to set up."""
        wanted = [name for name in names if self.options.only in name]
        if wanted and time.perf_counter() - self.began > self.options.budget:
            self.left_out += wanted
            return False
        return bool(wanted)

    def case(
        self,
        name: str,
        ours: Run,
        peers: Mapping[str, Run | None],
        *,
        floors: Mapping[str, float] | None = None,
        check: Run | None = None,
        moved: int | None = None,
        limit: str = "copy",
        limit_floor: float | None = None,
        flops: int | None = None,
        most_us: float | None = None,
    ) -> None:
        """Time ``ours`` against ``peers`` (None: one that there is not, here).

        Args:
            floors: for some peers, the least ratio (peer time / our time) that is promised.
            check: raises if ``ours`` is wrong; not timed.
            moved: bytes that the op must read and write: then a bandwidth is a contender.
            limit: which: "copy" or "read".
            limit_floor: the least share of it that is promised.
            flops: of the call; shown as TFLOP/s, and as a share of the peak if that was measured.
            most_us: the longest time that is promised.
        """
        if not self.wants(name):
            return
        contenders = {"ours": ours, **{peer: run for peer, run in peers.items() if run is not None}}
        compared = list(contenders)[1:]
        try:
            if check is not None:
                check()
            if moved:
                contenders[limit] = bandwidth_test(limit, moved, self.device)
            samples = self.timer.measure(contenders, self.seconds)
            calls = {k: self.timer.call(contenders[k]) for k in ("ours", *compared)} if self.gpu else None
        except Exception as error:
            if self.dry:
                raise
            self.failed[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            self._say(f"{name}: FAILED: {self.failed[name]}")
        else:
            times = {contender: _times(taken) for contender, taken in samples.items()}
            seconds = statistics.median(samples["ours"])
            tflop_per_s = None if flops is None else _rate(flops, seconds)
            peak = self.peak_tflop_per_s
            row = Row(
                case=name,
                times_us=times,
                ratios={peer: _ratio(samples[peer], samples["ours"]) for peer in compared},
                floors={peer: floor for peer, floor in (floors or {}).items() if peer in compared},
                moved_bytes=moved or None,
                gb_per_s=round(1e-9 * moved / seconds, 2) if moved else None,
                limit=Limit(limit, _ratio(samples[limit], samples["ours"]), limit_floor) if moved else None,
                cold=self.timer.cold,
                call_us=None if calls is None else {k: round(1e6 * v, 2) for k, v in calls.items()},
                tflop_per_s=tflop_per_s,
                share_of_peak=None if peak is None or tflop_per_s is None else round(tflop_per_s / peak, 3),
                most_us=most_us,
            )
            self.rows.append(row)
            ratios = " ".join(f"{peer} {ratio:.2f}x" for peer, ratio in row.ratios.items())
            self._say(f"{name}: {times['ours']['median']:.1f} us; {ratios}")
        self._write()

    def finish(self) -> None:
        """Print the table; end with status 1 where a case failed."""
        self._write()
        if self.dry:
            print(f"{self.op}: {len(self.rows)} cases ran once")
            return
        console(170).print(table(self.op, self.rows))
        if self.left_out:
            print(f"{self.op}: no time for {len(self.left_out)} cases: {', '.join(self.left_out)}")
        if self.failed:
            sys.exit(f"{self.op}: {len(self.failed)} cases failed: {', '.join(self.failed)}")

    def measure_peak(self) -> None:
        """On a GPU: what the flops of the cases that follow are a share of, the library's large bfloat16 product."""
        if not self.gpu:
            return
        n = self.size(8192)
        while not self.dry and 6 * n**2 > torch.cuda.mem_get_info()[0] // 2:
            n //= 2
        a, b, out = (torch.randn(n, n, device=self.device).to(torch.bfloat16) for _ in range(3))
        samples = self.timer.measure({"peak": lambda: torch.mm(a, b, out=out)}, self.seconds)
        self.peak_tflop_per_s = _rate(2 * n**3, statistics.median(samples["peak"]))
        self._say(f"peak {self.peak_tflop_per_s} TFLOP/s, of {n} x {n} x {n}")

    def graphed(self, run: Run) -> Run | None:
        """On a GPU: the call as a CUDA graph's replay; None where it cannot be captured (a peer that waits for the
        device)."""
        if not self.gpu or self.dry:
            return run if self.gpu else None
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(CudaTimer.WARM_UP):
                    run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
        except RuntimeError as error:
            self._say(f"not captured in a CUDA graph: {str(error).splitlines()[0]}")
            return None
        return graph.replay

    def compiled(self, function: Callable[..., object], *arguments: object) -> Run | None:
        """On a GPU: torch.compile of ``function`` for these arguments. What it made for earlier cases is forgotten:
        from the ninth set of shapes of one function on, torch would run that as it is, and the peer would be eager
        torch by another name."""
        if not self.gpu:
            return None
        if not self.dry:
            torch.compiler.reset()
            function = torch.compile(function, dynamic=False)
        return partial(function, *arguments)

    def _say(self, text: str) -> None:
        print(f"{self.op}: {text}", file=sys.stderr, flush=True)

    def _write(self) -> None:
        """The JSON file: in its usual place, unless only some cases run, or dry; or where ``--out`` says."""
        out = self.options.out
        if out is None:
            if self.options.only or self.dry:
                return
            out = ROOT / "benchmarks" / "results" / _device_folder(self.device) / f"{self.op}.json"
        results = Results(
            op=self.op,
            device=self.options.device,
            **self._origin,
            rows=self.rows,
            peak_tflop_per_s=self.peak_tflop_per_s,
            left_out=self.left_out,
            failed=self.failed,
            dry_run=self.dry,
        )
        out.parent.mkdir(parents=True, exist_ok=True)
        # Whoever is stopped while writing leaves the last whole file.
        part = out.with_suffix(".part")
        part.write_text(json.dumps(results.to_json(), indent=1) + "\n")
        part.replace(out)

    @cached_property
    def _origin(self) -> dict[str, Any]:
        """What is needed to judge and to repeat the numbers."""
        return {
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": command(ROOT),
            "commit": commit(ROOT, *SOURCES),
            "environment": {**environment(), **self.timer.environment()},
        }


def check_error(ours: Tensor, peer: Tensor, exact: Tensor, slack: float) -> None:
    """Our greatest error may be twice that of the peer, which has the same dtype, and ``slack`` for its luck."""
    errors = [float((y.double() - exact).abs().max()) for y in (ours, peer)]
    assert errors[0] <= 2 * errors[1] + slack, errors


def _parse(op: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=f"Benchmark of {op}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<machine>/<op>.json")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--seconds", type=float, help="time spent on each case")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds after which no case is begun"
    )
    parser.add_argument(
        "--only", default="", help="only cases whose name contains this; no file without --out"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="call everything once, small, on the CPU; no file without --out",
    )
    return parser.parse_args()


def _device_folder(device: torch.device) -> str:
    """``machine_folder``'s, or "NVIDIA H200" → "h200": where results of this device are kept."""
    if device.type == "cpu":
        return machine_folder().name
    words = re.findall(r"[a-z0-9]+", torch.cuda.get_device_name().lower())
    return next((w for w in words if re.fullmatch(r"[a-z]{1,3}\d+[a-z]*", w)), "-".join(words))


def _times(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    p10, median, p90 = (round(1e6 * ordered[round(q * (len(ordered) - 1))], 3) for q in (0.1, 0.5, 0.9))
    return {"p10": p10, "median": median, "p90": p90, "rounds": len(ordered)}


def _rate(flops: int, seconds: float) -> float:
    """TFLOP/s, to four digits."""
    return float(f"{1e-12 * flops / seconds:.4g}")


def _ratio(numerator: list[float], denominator: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(numerator, denominator, strict=True)), 3)
