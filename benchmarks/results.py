"""The one form of the ops' results, on a CPU and on a GPU: ``harness.py`` writes it, tables and pages are read from it.

``benchmarks/results/<machine>/<op>.json`` holds one ``Results``: the fields of that class and, for each case, those of
``Row``, by their names; a field that is None is left out.

    for results in read_results(Path("benchmarks/results/amd-epyc")):
        print(results.op, [promise for row in results.rows for promise in row.promises() if not promise.kept])

    python benchmarks/results.py FOLDER      # every op's promises beside what was measured
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.table import Table

from mvp_ext.ops._native import cpu_name

ROOT = Path(__file__).resolve().parent.parent

Times = Mapping[str, float]  # p10, median, p90 (µs) and the number of rounds


class Promise(NamedTuple):
    """What one case was to reach, and what was measured."""

    case: str
    # A least ratio of a peer's time to ours, a least share of a limit, or a greatest time (µs).
    kind: Literal["ratio", "share", "time"]
    against: str
    value: float
    wanted: float

    @property
    def margin(self) -> float:
        """1 and more: kept."""
        return self.wanted / self.value if self.kind == "time" else self.value / self.wanted

    @property
    def kept(self) -> bool:
        return self.margin >= 1

    @property
    def unit(self) -> str:
        return {"ratio": f"× {self.against}", "share": f"of {self.against}", "time": "µs"}[self.kind]


@dataclass(frozen=True)
class Limit:
    """The physical limit: a function that moves as many bytes as the op."""

    name: str  # "copy" (Tensor.copy_) or "read" (torch.dot)
    share: float  # its time / ours
    floor: float | None  # the least share that is promised


@dataclass(frozen=True)
class Row:
    """One case. Times are on the device: on a GPU without the CPU's launches, which ``call_us`` includes."""

    case: str
    times_us: dict[str, Times]  # of "ours", each peer and the limit
    ratios: dict[str, float]  # of each peer: its time / ours
    floors: dict[str, float]  # of some peers: the least ratio that is promised
    moved_bytes: int | None = None  # that the op must read and write
    gb_per_s: float | None = None
    limit: Limit | None = None
    cold: bool = False  # whether caches were emptied before each sample
    call_us: dict[str, float] | None = None  # on a GPU: a call in a loop of calls, with warm caches
    tflop_per_s: float | None = None
    share_of_peak: float | None = None
    most_us: float | None = None  # the longest time that is promised

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Row:
        limit = row.get("limit")
        return cls(**{**row, "limit": None if limit is None else Limit(**limit)})

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    def promises(self) -> Iterator[Promise]:
        for peer, floor in self.floors.items():
            yield Promise(self.case, "ratio", peer, self.ratios[peer], floor)
        if self.limit is not None and self.limit.floor is not None:
            yield Promise(self.case, "share", self.limit.name, self.limit.share, self.limit.floor)
        if self.most_us is not None:
            yield Promise(self.case, "time", "ours", self.times_us["ours"]["median"], self.most_us)


@dataclass(frozen=True)
class Results:
    """All cases of one op on one device."""

    op: str
    device: Literal["cpu", "cuda"]
    created: str
    command: str
    commit: str
    environment: dict[str, Any]
    rows: list[Row]
    peak_tflop_per_s: float | None = None
    left_out: list[str] = field(default_factory=list)  # cases for which there was no time
    failed: dict[str, str] = field(default_factory=dict)  # case: error
    dry_run: bool = False  # each call was made once, small and on the CPU: its times say nothing

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Results:
        """Files written before GPUs were measured name their commit, command and date in the environment."""
        environment = content["environment"]
        earlier = {"commit": "commit", "command": "command", "created": "date"}
        origin = {new: environment[old] for new, old in earlier.items() if old in environment}
        rows = [Row.from_json(row) for row in content["rows"]]
        return cls(**{"device": "cpu", **origin, **content, "rows": rows})

    def to_json(self) -> dict[str, Any]:
        content = {name: value for name, value in vars(self).items() if value is not None}
        return {**content, "rows": [row.to_json() for row in self.rows]}


def machine_folder() -> Path:
    """Where results of this machine's CPU are kept: "Intel(R) Xeon(R) Platinum 8488C" → …/intel-xeon-platinum-8488c."""
    name = re.sub(r"\(\w+\)|\bCPU @.*|\b\d+-Core\b|\bProcessor\b", " ", cpu_name())
    return ROOT / "benchmarks" / "results" / ("-".join(re.findall(r"[a-z0-9]+", name.lower())) or "cpu")


def read_results(path: Path) -> list[Results]:
    """The results in a file, or in a folder: by name; files of other kinds are passed over.

    Raises:
        TypeError: a file has keys that are not of this form.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    contents = (json.loads(file.read_text()) for file in files)
    return [Results.from_json(content) for content in contents if {"op", "rows"} <= content.keys()]


def table(op: str, rows: Sequence[Row]) -> Table:
    """All cases of an op with their peers."""
    result = Table(title=f"{op}: median µs (p10 – p90); × = peer's time / ours")
    result.add_column("case")
    for column in ("ours", "call µs", "GB/s, TFLOP/s", "against", "its µs", "×", "floor"):
        result.add_column(column, justify="left" if column == "against" else "right")
    for row in rows:
        rate = str(row.gb_per_s or row.tflop_per_s or "")
        if row.share_of_peak is not None:
            rate += f" ({row.share_of_peak:.0%} of peak)"
        lines = [(peer, value, row.floors.get(peer), f"{value:.2f}×") for peer, value in row.ratios.items()]
        if row.limit is not None:
            lines.append((row.limit.name, row.limit.share, row.limit.floor, f"{row.limit.share:.0%}"))
        call = "" if row.call_us is None else f"{row.call_us['ours']:.1f}"
        first = (row.case, _span(row.times_us["ours"]), call, rate)
        for against, value, floor, text in lines or [("", 0.0, None, "")]:
            if floor is not None:
                text = f"[{'green' if value >= floor else 'red'}]{text}[/]"
            its = _span(row.times_us[against]) if against else ""
            result.add_row(*first, against, its, text, "" if floor is None else f"{floor:g}")
            first = ("", "", "", "")
        result.add_section()
    return result


def summary(folder: Path) -> int:
    """Print each op's promises beside what was measured, all cases of a kind in one line. The number of broken ones."""
    broken = 0
    printed = Table(title=f"promises and measurements, from {folder.name}")
    for column in ("op", "promise", "measured, of all cases", "kept", "furthest from it"):
        printed.add_column(column, overflow="fold")
    for results in read_results(folder):
        kinds: dict[str, list[Promise]] = {}
        for row in results.rows:
            for promise in row.promises():
                kinds.setdefault(promise.unit, []).append(promise)
        op = results.op
        for unit, promises in kinds.items():
            kept = sum(promise.kept for promise in promises)
            broken += len(promises) - kept
            worst = min(promises, key=lambda promise: promise.margin)
            printed.add_row(
                op,
                f"{'≤' if worst.kind == 'time' else '≥'} {_range([p.wanted for p in promises])} {unit}",
                _range([p.value for p in promises]),
                f"[{'green' if kept == len(promises) else 'red'}]{kept} of {len(promises)}[/]",
                f"{worst.value:g}: {worst.case}",
            )
            op = ""
        for word, cases in (("failed", list(results.failed)), ("left out", results.left_out)):
            if cases:
                printed.add_row(op, word, f"{len(cases)} cases", "", cases[0])
                op = ""
        printed.add_section()
    console(150).print(printed)
    return broken


def console(width: int) -> Console:
    """One for tables: as wide as the terminal, or ``width`` where the output goes elsewhere."""
    return Console(width=None if sys.stdout.isatty() else width)


def _span(times: Times) -> str:
    return f"{times['median']:.1f} ({times['p10']:.1f} – {times['p90']:.1f})"


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.3g}" if low == high else f"{low:.3g} – {high:.3g}"


if __name__ == "__main__":
    summary(Path(sys.argv[1]))
