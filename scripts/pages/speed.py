"""Latency of pruned models, runtimes, and every op against what a user would write."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.results import Promise, Results, Row, read_results
from mvp_ext.app.bench import bench_table, reasons
from scripts.pages.common import FIGURES, RESULTS, link, machine, name_of, read, table


def speed_page(folder: Path, ops: Sequence[Results], page: Path) -> str:
    deployed, latencies, runtimes, memory = (
        sorted(folder.glob(f"{kind}_*.json")) for kind in ("deployed", "latency", "runtimes", "memory")
    )
    parts = [
        "# Speed",
        f"Measured on `{page.parent.name}`; every number's file is named, and slow cases stay.",
    ]
    if deployed:
        parts += ["## Accuracy against latency", *_deployed(deployed, page)]
    if latencies:
        parts += ["## Pruned models", _latency(latencies)]
    if runtimes:
        parts += ["## Runtimes", *_runtimes(runtimes)]
    if memory:
        parts += ["## Peak memory", *_memory(memory)]
    if (large := folder / "large.json").exists():
        parts += ["## Large models", *_large(large)]
    if ops:
        parts += ["## Ops", *_ops(ops, folder)]
    return "\n\n".join(parts) + "\n"


def _deployed(paths: Sequence[Path], page: Path) -> Iterator[str]:
    """One task's models over keep ratios, methods and runtimes."""
    for path in paths:
        result = read(path)
        setting, models, accuracy = result["setting"], result["speed"]["models"], result["accuracy"]
        yield (
            f"{setting['model']} on {setting['data']}, mean accuracy of {setting['held-out tasks']} held-out tasks of "
            f"{setting['classes a task']} classes after {setting['fine-tuning steps']} steps; one image, two threads. "
            f"`{setting['command']}` ({machine(result['speed']['environment'])}; `{name_of(path)}`)."
        )
        runtimes = [timed["runtime"] for timed in models["dense"]["latency"]]
        dense = [kept["dense"] for kept in accuracy.values()]
        found = [("dense", "dense, ridge head", sum(dense) / len(dense))]
        for keep, kept in accuracy.items():
            found += [(keep, arm, sum(tasks) / len(tasks)) for arm, tasks in kept["arms"].items()]
        rows = [
            (
                arm if name == "dense" else f"{arm}, {name}",
                f"{100 * mean:.1f}",
                *(f"{timed['median_ms']:.2f}" for timed in models[name]["latency"]),
            )
            for name, arm, mean in found
        ]
        yield table(("model", "accuracy (%)", *(f"{runtime} (ms)" for runtime in runtimes)), rows)
        figures = sorted((FIGURES / path.stem).glob("*.png"))
        yield from (f"![{setting['model']}: {figure.stem}]({link(figure, page)})" for figure in figures)


def _latency(paths: Sequence[Path]) -> str:
    rows = []
    for path in paths:
        result = read(path)
        models = result["models"]
        for name, model in models.items():
            if name == "dense" or "torch-pruning" in name:
                continue
            peer = {
                x["batch"]: x["median_ms"]
                for x in models.get(f"{name}, torch-pruning", {}).get("latency", ())
            }
            for timed in model["latency"]:
                other = peer.get(timed["batch"])
                rows.append(
                    (
                        f"{result['setting']['model']} ({result['setting']['scope']}), {name}",
                        str(timed["batch"]),
                        f"{models['dense']['flops'] / model['flops']:.2f}×",
                        f"{timed['median_ms']:.1f} ms",
                        f"{timed['speed_up']:.2f}×",
                        "" if timed["share_of_saving"] is None else f"{timed['share_of_saving']:.0%}",
                        "" if other is None else f"{other / timed['median_ms']:.2f}×",
                    )
                )
    columns = (
        *("model", "batch", "fewer FLOPs", "median latency", "against dense", "saving that became time"),
        "against Torch-Pruning's same shapes",
    )
    made = read(paths[0])
    side = made["input_shape"][-1]
    sources = ", ".join(f"`{name_of(path)}`" for path in paths)
    where = machine({**made["environment"], "threads": made["setting"]["threads"]})
    return f"At {side} × {side} pixels, timed in turn ({where}; {sources}).\n\n" + table(columns, rows)


def _model(result: Mapping[str, Any], path: Path) -> Iterator[str]:
    """A model's heading, and how it was measured."""
    side, made = result["input_shape"][-1], result["setting"]["command"]
    yield f"### {result['setting']['model']}"
    yield f"`{made}` at {side} × {side} pixels ({machine(result['environment'])}; `{name_of(path)}`)."


def _runtimes(paths: Sequence[Path]) -> Iterator[str]:
    """Every cell of each model, and why others were not measured."""
    yield (
        "Dense and pruned models in turn in one process, models of one precision and runtime beside runtime; random "
        "weights. `times as fast` and `saving in time` compare with the dense model in the same runtime, precision, "
        "batch and threads."
    )
    for path in paths:
        result = read(path)
        yield from _model(result, path)
        yield bench_table(result).markdown()
        if lines := reasons(result):
            yield "\n".join(f"- {line}" for line in lines)


def _memory(paths: Sequence[Path]) -> Iterator[str]:
    """Peak memory, a column for each model."""
    yield (
        "What loading a model and one call of it take at most, in a process of its own, beside what the process had "
        "before (its imports); MB."
    )
    for path in paths:
        result = read(path)
        yield from _model(result, path)
        cells: dict[tuple[str, str], dict[str, int]] = {}
        for name, model in result["models"].items():
            for cell in model["peak_memory"]:
                key = (f"{cell['runtime']} {cell['precision']}".removesuffix(" float32"), str(cell["batch"]))
                cells.setdefault(key, {})[name] = cell["peak_memory_bytes"]
        names = list(result["models"])
        rows = [
            (*key, *(f"{found[name] / 1e6:.0f}" if found.get(name) else "" for name in names))
            for key, found in cells.items()
        ]
        yield table(("runtime", "batch", *names), rows)


def _large(path: Path) -> Iterator[str]:
    """Seconds and memory of each step."""
    result = read(path)
    made = result["setting"]
    yield (
        f"From a large model to a file of the model cut to keep {made['keep']:g}, and back; random weights. Memory is "
        f"what a step takes at most beside what there was before it (`{made['command']}`; "
        f"{machine({**result['environment'], 'threads': made['threads']})}; `{name_of(path)}`)."
    )
    yield table(
        ("model, scope", "weights", "step", "seconds", "peak memory", "memory after"),
        [
            (
                each.replace(":", ", "),
                f"{model['weights_mb']} MB",
                name,
                f"{step['seconds']:.2f}",
                f"{step['peak_mb']:+} MB",
                f"{step['after_mb']:+} MB",
            )
            for each, model in result["models"].items()
            for name, step in model["steps"].items()
        ],
    )


def _ops(ops: Sequence[Results], folder: Path) -> Iterator[str]:
    """What was promised of the ops' speed, how much of it is kept, every promise that is not, and every case."""
    summary, missed = [], []
    for result in ops:
        promises = [promise for row in result.rows for promise in row.promises()]
        kept = sum(promise.kept for promise in promises)
        summary.append((f"[{result.op}](#{result.op})", *map(str, (len(result.rows), len(promises), kept))))
        missed += [(result.op, p.case, *_measured(p)) for p in promises if not p.kept]
    yield (
        "Each op against what a user would write, in turn in one run. A promise is a least ratio of a peer's time to "
        "ours, a least share of the memory bandwidth, or a longest time; the files have p10 and p90, too."
    )
    yield table(("op", "cases", "promises", "kept"), summary)
    if missed:
        yield "### Promises that are not kept"
        yield table(("op", "case", "measured", "promised"), missed)
    for result in ops:
        yield from _op(result, folder)


def promises() -> str:
    """How many of each op's promises are kept, a column a machine."""
    kept: dict[str, dict[str, str]] = {}
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        for result in read_results(folder):
            made = [promise for row in result.rows for promise in row.promises()]
            if made and not result.dry_run:
                number = sum(promise.kept for promise in made)
                kept.setdefault(result.op, {})[folder.name] = f"{number} of {len(made)}"
    machines = sorted({name for found in kept.values() for name in found})
    rows = [(op, *(found.get(name, "") for name in machines)) for op, found in sorted(kept.items())]
    return "Promises kept:\n\n" + table(("op", *machines), rows)


def _measured(promise: Promise) -> tuple[str, str]:
    unit = f"{promise.unit} bandwidth" if promise.kind == "share" else promise.unit
    return f"{promise.value:.3g} {unit}", f"{promise.wanted:g}"


def _op(result: Results, folder: Path) -> Iterator[str]:
    """Every case of one op."""
    path = folder / f"{result.op}.json"
    yield f"### {result.op}"
    yield (
        f"`{result.command}` at commit {result.commit[:9]} ({machine(result.environment)}; `{name_of(path)}`). Times "
        "are medians in µs, the columns with × a peer's time over ours."
    )
    peers = list(dict.fromkeys(peer for row in result.rows for peer in row.ratios))
    columns: dict[str, Callable[[Row], str]] = {
        "case": lambda row: row.case,
        "ours": lambda row: f"{row.times_us['ours']['median']:.1f}",
        "with the call": lambda row: f"{row.call_us['ours']:.1f}" if row.call_us else "",
        **{f"× {peer}": partial(_ratio, peer) for peer in peers},
        "bandwidth": lambda row: f"{row.limit.share:.0%} of {row.limit.name}" if row.limit else "",
        "of the peak": lambda row: "" if row.share_of_peak is None else f"{row.share_of_peak:.0%}",
    }
    cells = {name: [cell(row) for row in result.rows] for name, cell in columns.items()}
    filled = {name: column for name, column in cells.items() if any(column)}
    yield table(list(filled), list(zip(*filled.values(), strict=True)))
    for word, cases in (("Failed", list(result.failed)), ("Left out", result.left_out)):
        if cases:
            yield f"{word}: {', '.join(cases)}."


def _ratio(peer: str, row: Row) -> str:
    return f"{row.ratios[peer]:.2f}" if peer in row.ratios else ""
