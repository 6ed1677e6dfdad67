"""Writes what is measured into the README's table and docs/results/, or checks (``--check``) that they agree.

Everything comes from committed files. Each folder of benchmarks/results/ is a device; docs/results/<device>/ gets

    study.md          from study_*.json          claims, verdicts, tables, figures
    experts.md        from experts_*.json        experts by cluster, and what is asked of them
    comparisons.md    from compare_*.json, demo_*.json
    speed.md          from deployed_*.json, latency_*.json, runtimes_*.json, memory_*.json and each op's file

and docs/scale.md its tables from results/cpu/scale.json and images.json.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.coverage import PROOFS  # noqa: E402
from benchmarks.coverage import summary as summary_of_coverage  # noqa: E402
from benchmarks.results import Promise, Results, Row, read_results  # noqa: E402
from mvp_ext.app.bench import bench_table, reasons  # noqa: E402
from mvp_ext.app.report import summary_table  # noqa: E402
from mvp_ext.app.results import count_text, flops_text, load_results, seconds_text  # noqa: E402
from mvp_ext.app.tables import Table  # noqa: E402

RESULTS, FIGURES, PAGES = (
    ROOT / "benchmarks" / "results",
    ROOT / "docs" / "figures",
    ROOT / "docs" / "results",
)
BEGIN, END = "<!-- results -->", "<!-- /results -->"
# The README's table and the list of verdicts show this study.
SHOWN = RESULTS / "cpu" / "study_cpu.json"
SCALE = RESULTS / "cpu" / "scale.json"
IMAGES = RESULTS / "cpu" / "images.json"
EXPERTS = RESULTS / "cpu" / "experts_diverse.json"
OURS, CONTROL = "mvp refined, weighted", "universal"
README_ARMS = {
    "dense, ridge head": "dense model, a new head",
    CONTROL: "**one universal pruned model**, the control to beat",
    OURS: "**our default**: nearest entries vote",
    "iterative, full": "pruned from scratch for the task",
    "one-shot taylor": "pruned in one shot",
    "random sub-network": "random sub-network",
}
PAGE_TITLES = {
    "study": "every claim of the method beside the controls that could beat it",
    "comparisons": "single runs of `mvp-ext compare` and `mvp-ext demo`",
    "speed": "latency of pruned models, and every op against what a user would write",
    "coverage": "which backbones can be cut, exactly and all the way",
    "experts": "zoos of experts beside one universal model, where tasks differ: when the vote pays",
}


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of numbers stand right."""
    cells = [[row[i] for row in rows if row[i]] for i in range(len(columns))]
    sides = ["right" if all(text[0] in "+-0123456789" for text in column) else "left" for column in cells]
    return Table(list(zip(columns, sides, strict=True)), rows).markdown()


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def link(path: Path, page: Path) -> str:
    """A path under docs/ as ``page`` has to write it."""
    return Path(os.path.relpath(path, page.parent)).as_posix()


def machine(environment: Mapping[str, Any]) -> str:
    """The hardware and the versions that say most, of whichever are recorded."""
    gpu = str(environment.get("gpu", "none"))
    hardware = str(environment.get("cpu", "")) if gpu.startswith("none") else gpu
    threads = (
        f"{environment['threads']} threads" if "threads" in environment else environment.get("cpu cores")
    )
    return ", ".join(str(part) for part in (hardware, threads, f"torch {environment['torch']}") if part)


# ---- the study


def summary(study: Mapping[str, Any]) -> str:
    """The README's table: two worlds of one study, and what its rows do not say."""
    tables = {
        world: {row[0]: row for row in study["tables"][f"{world}, shared"]} for world in ("cifar", "domains")
    }
    made = study["worlds"]["cifar"]["latency"]
    rows = []
    for arm, title in README_ARMS.items():
        one, several = tables["cifar"][arm], tables["domains"].get(arm)
        model = made["dense" if arm.startswith("dense") else "keep 0.1"]
        latency = next(timed["median_ms"] for timed in model["latency"] if timed["batch"] == 1)
        rows.append(
            (
                title if one[5] in ("", str(study["config"]["steps"])) else f"{title}, {one[5]} steps",
                one[1],
                several[1] if several else "",
                f"{latency:.1f} ms",
                one[7],
                count_text(model["parameters"]),
            )
        )
    columns = (
        "",
        "accuracy (%), one distribution",
        "several domains",
        "latency",
        "time a task",
        "parameters",
    )
    smaller = next(row for row in study["factors"]["domains"] if row[:2] == ["keep 0.05", OURS])
    fresh = next(row for row in study["tables"]["domains, fresh"] if row[0] == OURS)
    made_once = {arm: tables["cifar"][arm][8] for arm in (CONTROL, OURS)}
    return "\n\n".join(
        (
            table(columns, rows),
            f"ResNet-18 at 64 pixels, scope `inner`, keep {study['worlds']['cifar']['keep']:g}, "
            f"{study['config']['steps']} steps a task, one CPU core, latency of one image; mean ± standard error over "
            "tasks of CIFAR-100, and of CIFAR-100's groups, digits and clothes. Time is for the first column's tasks, "
            f"and without what is made once: {made_once[CONTROL]} (universal), {made_once[OURS]} (ours).",
            "Our default minus the universal model, in points: on one distribution it is level "
            f"({tables['cifar'][OURS][2]}) and costs more, so take `method=\"universal\"` there; on several domains "
            f"{tables['domains'][OURS][2]}, on fresh tasks of them {fresh[2]}, at keep 0.05 {smaller[3]}.",
        )
    )  # fmt: skip


def verdicts(study: Mapping[str, Any]) -> str:
    return table(("", "claim", "verdict"), [(v["name"], v["claim"], v["verdict"]) for v in study["verdicts"]])


def study_page(path: Path, page: Path) -> str:
    study = read(path)
    config, columns = study["config"], study["table columns"]
    parts = [
        "# The study",
        f"{study['title']}. Made by scripts/result_pages.py from `{name_of(path)}`, which `{study['command']}` "
        f"made from the run's journal at commit {study['commit']}, {study['created'][:10]} "
        f"({machine(study['environment'])}). `benchmarks/README.md` says how to repeat it.",
        "## Verdicts",
    ]
    for v in study["verdicts"]:
        parts.append(f"**{v['name']}: {v['claim']}: {v['verdict']}.**")
        parts += ["\n".join(f"- {sentence}" for sentence in v["sentences"])] if v["sentences"] else []
    parts += [
        "## Tables",
        f"All at J = {config['steps']} steps and the world's own keep ratio; best arm first, by the paired difference: "
        "arms that ran on fewer tasks have means of other tasks. p is corrected (Holm) within a table; in the verdicts "
        "above over all questions that they ask.",
    ]
    for name, rows in study["tables"].items():
        if rows:
            world = study["worlds"][name.partition(",")[0]]
            parts += [f"**{name}** ({world['model']}, keep {world['keep']:g})", table(columns["arms"], rows)]
    if study["time to accuracy"]:
        parts += [
            "## Cost to reach full iterative pruning's accuracy",
            study["table notes"]["time"],
            table(columns["time"], study["time to accuracy"]),
        ]
    parts += ["## One factor at a time", study["table notes"]["factors"]]
    for world, rows in study["factors"].items():
        if rows:
            parts += [f"**{world}, shared**", table(columns["factors"], rows)]
    parts.append("## Figures")
    for figure in sorted((FIGURES / "study").glob(f"{study['name']}_*.png")):
        parts.append(f"![{figure.stem}]({link(figure, page)})")
    parts += ["## Read this before quoting it", "\n".join(f"- {sentence}" for sentence in study["limits"])]
    done = ", ".join(f"{p['part']} {p['done']}/{p['total']}" for p in study["parts"])
    return "\n\n".join([*parts, f"Units of work done, by part: {done}."]) + "\n"


# ---- comparisons


def comparisons_page(paths: Sequence[Path], page: Path) -> str:
    parts = [
        "# Comparisons",
        "Each is one run of one command, with one seed and one learning rate for all arms: read differences of a point "
        "or two accordingly. The [study](study.md) tests the claims; the first two tables are of the plain method, "
        "and the demo's digits are too easy to tell much.",
    ]
    for path in paths:
        results = load_results(path)
        entries = results.get("zoo", {}).get("entries", "?")
        parts += [
            f"## {results['title']}",
            f"Keep {results['keep']:g}, {len(results['arms'][0]['tasks'])} held-out tasks, a zoo of {entries}. "
            f"`{name_of(path)}`, {machine(results['environment'])}:",
            f"```text\n{results.get('command', '')}\n```",
            summary_table(results).markdown(),
        ]
        figures = sorted((FIGURES / path.stem).glob("*.png"))
        parts += [f"![{results['title']}: {figure.stem}]({link(figure, page)})" for figure in figures]
    return "\n\n".join(parts) + "\n"


# ---- speed


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


def _runtimes(paths: Sequence[Path]) -> Iterator[str]:
    """Every cell of each model, and why others were not measured."""
    yield (
        "Dense and pruned models in turn in one process, models of one precision and runtime beside runtime; random "
        "weights. `times as fast` and `saving in time` compare with the dense model in the same runtime, precision, "
        "batch and threads."
    )
    for path in paths:
        result = read(path)
        yield f"### {result['setting']['model']}"
        side, made = result["input_shape"][-1], result["setting"]["command"]
        yield f"`{made}` at {side} × {side} pixels ({machine(result['environment'])}; `{name_of(path)}`)."
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
        yield f"### {result['setting']['model']}"
        side, made = result["input_shape"][-1], result["setting"]["command"]
        yield f"`{made}` at {side} × {side} pixels ({machine(result['environment'])}; `{name_of(path)}`)."
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


# ---- experts


def experts_page(paths: Sequence[Path], page: Path) -> str:
    """A world a chapter: what was asked and answered, then every arm."""
    first = (
        "# Experts by cluster",
        "New tasks of classes that the zoo knows, 50 images of each; bars are standard errors over tasks:",
        f"![accuracy against latency]({link(FIGURES / 'experts' / 'accuracy_latency.png', page)})",
    )
    return "\n\n".join((*first, *(part for path in paths for part in _experts(path, page)))) + "\n"


def summary_of_experts(result: Mapping[str, Any]) -> str:
    """The README's answers: the default against universal at equal steps, and against one that is told the same."""
    found = {(a["split"], a["images"], a["second"]): a["over tasks"] for a in result["questions"]}

    def said(split: str, images: int, second: str = CONTROL) -> str:
        over = found[split, images, second]
        return _points(over["difference"], over["error"])

    images = sorted({images for _, images, _ in found})
    world, seeds = result["setting"]["world"], len(result["setting"]["seeds"])
    rows = (
        ("classes that the zoo knows", "known", CONTROL),
        (
            "the same, where universal is told what it knows of them",
            "known",
            "universal, head of what it knows",
        ),
        ("classes hidden from the zoo", "hidden", CONTROL),
        ("domains that nobody saw", "new", CONTROL),
    )
    return "\n\n".join(
        (
            "Where tasks are of several kinds (photos, paintings, drawings, textures, digits), the default is a zoo of "
            f"experts. Experts minus universal, in points, scope `{world['scope']}`, keep {world['keep']:g}, 20 steps, "
            f"{seeds} training seeds:",
            table(
                ("new task of", *(f"{count} images a class" for count in images)),
                [(title, *(said(split, count, second) for count in images)) for title, split, second in rows],
            ),
        )
    )


def _experts(path: Path, page: Path) -> Iterator[str]:
    result = read(path)
    made, world, latency = result["setting"], result["setting"]["world"], result["latency"]
    seeds = ", ".join(map(str, made["seeds"]))
    yield f"## {world['model']} at {world['size']} px, scope `{world['scope']}`, keep {world['keep']:g}"
    yield (
        f"Training seeds {seeds}: each draws hidden classes and held-out domains, and makes the universal model and "
        f"the experts anew, all in as many steps (about {world['steps']:,}). Tasks bring 10 or 50 images of a class; "
        f"the zoo's have up to 200. `{made['command']}`, commit {made['commit']}; {machine(result['environment'])}; "
        f"`{name_of(path)}`."
    )
    if latency is not None:
        one, other = (
            f"{row['median_ms']:.1f} ms for one image on one core, {count_text(row['parameters'])} parameters"
            for row in (latency["pruned"], latency["dense"])
        )
        yield f"All pruned arms have the same shapes: {one}. The dense model: {other}."
    yield "### Asked before the seeds were run"
    yield (
        "At 20 steps a task; p over tasks, corrected over the questions of superiority (Holm); not inferior: the lower "
        "end of the 95 % interval over tasks is above −1 point. p over seeds, uncorrected, takes each training seed as "
        "one observation: with so few of them it is coarse, and decides nothing here."
    )
    yield table(
        (
            "tasks",
            "images a class",
            "question",
            "difference",
            "95 % interval",
            "by seed",
            "corrected p",
            "p over seeds",
            "holds",
        ),
        [_question(answer) for answer in result["questions"]],
    )
    yield "### Accuracy against the cost of a task"
    for figure in sorted((FIGURES / path.stem).glob("*.png")):
        yield f"![{figure.stem}]({link(figure, page)})"
    yield "### Every arm"
    yield (
        "Accuracy in %, mean ± standard error over tasks; in brackets its difference to the universal model at equal "
        "steps, on the tasks that both have. Some arms were run under the first seed alone. *auto*: as many steps as "
        "the rule gives each task. Seconds are a task's at 20 steps on one core of a busy machine, without what is "
        "made once."
    )
    for title, arms in result["arms"].items():
        steps = list(dict.fromkeys(j for points in arms.values() for j in points))
        yield f"#### {title.capitalize()} a class"
        yield table(
            ("arm", *(f"J {j}" for j in steps), "s a task"),
            [
                (
                    name,
                    *(points[j]["text"] if j in points else "" for j in steps),
                    f"{points['20']['seconds a task']:.1f}" if "20" in points else "",
                )
                for name, points in arms.items()
            ],
        )
    yield "### By what the zoo knows"
    yield table(
        ("images a class", "share of the classes known", "tasks", "default − universal"),
        [
            (
                str(row["images"]),
                f"{row['from']:.0%}" if row["from"] == row["to"] else f"{row['from']:.0%} to {row['to']:.0%}",
                str(row["tasks"]),
                _points(row["difference"], row["error"]),
            )
            for row in result["by known share"]
        ],
    )


def _question(answer: Mapping[str, Any]) -> tuple[str, ...]:
    over = answer["over tasks"]
    return (
        {"known": "known classes", "hidden": "hidden classes", "new": "new domains"}[answer["split"]],
        str(answer["images"]),
        f"{answer['first']} {'>' if answer['kind'] == 'superior' else '≥'} {answer['second']}",
        _points(over["difference"], over["error"]),
        f"[{100 * over['low']:+.1f}, {100 * over['high']:+.1f}]",
        ", ".join(f"{100 * value:+.1f}" for value in answer["by seed"].values()),
        f"{answer['corrected p']:.2g}" if "corrected p" in answer else "",
        f"{answer['over seeds']['p']:.2g}" if answer["kind"] == "superior" else "",
        "yes" if answer["holds"] else "no",
    )


def _points(difference: float, error: float | None) -> str:
    return f"{100 * difference:+.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


# ---- coverage


def coverage_page(path: Path, page: Path) -> str:
    """One row a model, Torch-Pruning beside it."""
    result = read(path)
    rows = result["models"]
    made = result["setting"]
    where = machine({**result["environment"], "threads": made["threads"]})
    columns = (
        "model",
        "scope",
        "exact, eval",
        "exact, train",
        "read again",
        "pruned",
        "ONNX",
        "FLOPs",
        "weights",
        "time",
    )
    cells = [
        (
            name,
            row.get("scope", ""),
            *("✓" if row.get(proof) else "–" for proof in PROOFS),
            *(_left(row, kind, "ours") for kind in ("flops", "parameters", "latency_ms")),
            *(_left(row, kind, "Torch-Pruning") or "–" for kind in ("flops", "latency_ms")),
        )
        for name, row in rows.items()
    ]
    reasons = [f"- `{name}`: {each}" for name, row in rows.items() for each in _why(row)]
    return (
        "\n\n".join(
            (
                "# Coverage",
                f"Which backbones can be cut to keep {made['keep']:g}, exactly and all the way (`{made['command']}`; "
                f"{where}; `{name_of(path)}`). Random weights; gains, biases, tables and statistics are drawn. FLOPs, "
                "weights and the time of one image are shares of the dense model's; the last two columns are "
                "Torch-Pruning's, used as in its examples with whole heads pruned (its errors are in the file; in an "
                "earlier trial, which only asked for outputs of the right shape, it ran on 75 of 120 of these models).",
                "\n".join(f"- {line}" for line in summary_of_coverage(rows).splitlines()),
                table((*columns, "FLOPs, peer", "time, peer"), cells),
                "## Why not",
                "\n".join(reasons),
            )
        )
        + "\n"
    )


def _left(row: Mapping[str, Any], kind: str, whose: str) -> str:
    sizes = row.get(kind, {})
    return f"{sizes[whose] / sizes['dense']:.2f}" if whose in sizes else ""


def _why(row: Mapping[str, Any]) -> Iterator[str]:
    for proof, reason in row["reasons"].items():
        if proof != "Torch-Pruning":
            # Some errors come in colours.
            plain = re.sub(r"\x1b\[[0-9;]*m", "", reason)
            yield f"{proof}: {plain}"
    times = row.get("latency_ms", {})
    if "ours" in times and times["ours"] >= times["dense"]:
        flops = row["flops"]
        yield f"not faster: {flops['ours'] / flops['dense']:.0%} of the FLOPs are left"


# ---- scale


def scale(result: Mapping[str, Any]) -> str:
    """What was measured of growth, and what it comes to for many tasks and processes."""
    made, driver, steps = result["setting"], result["driver"], result["steps"]
    times = ("open_seconds", "nearest_seconds", "vote_seconds", "prune_seconds")
    entries = [
        (
            f"{row['entries']:,}",
            f"{count_text(row['index_bytes'])}B",
            *(seconds_text(row[name]) for name in times),
        )
        for row in result["entries"]
    ]
    models = [
        (
            row["model"],
            count_text(row["parameters"]),
            flops_text(row["flops"]),
            seconds_text(row["step_seconds"]),
        )
        for row in result["models"]
    ]
    workers = [
        (str(row["workers"]), f"{60 * row['entries'] / row['seconds']:.1f}") for row in result["workers"]
    ]
    return "\n\n".join(
        (
            "## Measured",
            f"`{made['command']}`, commit {made['commit']}, one thread "
            f"({machine(result['environment'])}; `{name_of(SCALE)}`). Zoos of resnet18 "
            f"with {made['voters']} voters of 10 classes a task; `prune` is that of a tiny model without fine-tuning.",
            table(("entries", "index", "open", f"{made['voters']} nearest", "vote of all", "prune"), entries),
            f"The nearest among {made['among']:,} entries of so many classes each:",
            table(
                ("classes", "time"),
                [(str(row["classes"]), seconds_text(row["nearest_seconds"])) for row in result["classes"]],
            ),
            f"A training step of {made['batch']} images at {result['models'][0]['pixels']} pixels:",
            table(("model", "parameters", "FLOPs an image", "step"), models),
            "Entries of a tiny model, pruned from scratch, by workers (that several share the entries of `zoo build`):",
            table(("workers", "entries a minute"), workers),
            f"One finished entry of resnet18 ({count_text(driver['entry_bytes'])}B) is added in "
            f"{seconds_text(driver['add_seconds'])}: checked, written and synced, its row committed.",
            *_many(steps, driver, tasks=10_000, processes=100),
        )
    )


def images(result: Mapping[str, Any]) -> str:
    """Batches from a folder of more images than memory holds."""
    made, titles = result["setting"], {"cache": "`--cache on`", "torchvision": "ImageFolder and DataLoader"}
    rows = [
        (
            f"{titles[name]}, {time}",
            seconds_text(run["first_batch_seconds"]),
            f"{run['images_per_second']:,.0f}",
            f"{run['peak_mb']:,} MB"
            + (f", and {run['worker_peak_mb']} a worker" if run["worker_peak_mb"] else ""),
        )
        for name in titles
        for time, run in zip(("the first time", "again"), result["runs"][name], strict=True)
    ]
    return "\n\n".join(
        (
            "## More images than memory",
            f"Shuffled, mirrored, normalised batches of {made['batch']} from a folder of {made['images']:,} JPEGs, at "
            f"{made['size']} pixels ({made['decoded_mb'] / 1024:.0f} GB as bytes): `{made['command']}`, commit "
            f"{made['commit']} ({machine(result['environment'])}; `{name_of(IMAGES)}`).",
            table(("", "to the first batch", "images a second after it", "resident memory"), rows),
        )
    )


def _many(
    steps: Mapping[str, Any], driver: Mapping[str, Any], tasks: int, processes: int
) -> tuple[str, str, str]:
    shared, own = steps["universal_a_task"] * tasks, steps["entry"] * tasks / processes
    each = own + shared / processes
    rows = [
        ("the model of all tasks", f"{shared:,.0f} steps", f"up to {steps['batch']} processes share each"),
        ("the entries", f"{own:,.0f} steps", f"of each of {processes} processes, side by side"),
        ("adding them by one writer", seconds_text(tasks * driver["add_seconds"]), "while others train"),
    ]
    return (
        f"## {tasks:,} tasks, {processes} GPUs",
        table(("work", "one after another", ""), rows),
        f"**The largest bottleneck is the model of all tasks.** Its steps come one after another, "
        f"{shared / own:,.0f} for each that a process spends on its entries, "
        f"and a batch of {steps['batch']} gives at most {steps['batch']} "
        "processes something to do. The plan gives it a share of all steps, so they grow with the tasks although it "
        "stays one small model. For so many tasks it wants fewer and larger steps (not tried), or none "
        f"(`--no-refine`: {each:,.0f} steps of each process). "
        "What follows behind it is the search for neighbours, which reads and compares every entry for every task: "
        "see the last line of the first table.",
    )


# ---- the pages


def render() -> dict[Path, str]:
    """Every page that is written from result files, and its text."""
    pages = {}
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        here = PAGES / folder.name
        for path in sorted(folder.glob("study_*.json")):
            pages[here / "study.md"] = study_page(path, here / "study.md")
        if found := sorted(folder.glob("experts_*.json"), key=lambda path: path.stem):
            pages[here / "experts.md"] = experts_page(found, here / "experts.md")
        compared = [*sorted(folder.glob("compare_*.json")), *sorted(folder.glob("demo_*.json"))]
        if compared:
            pages[here / "comparisons.md"] = comparisons_page(compared, here / "comparisons.md")
        if (path := folder / "coverage.json").exists():
            pages[here / "coverage.md"] = coverage_page(path, here / "coverage.md")
        ops = [result for result in read_results(folder) if not result.dry_run]
        if ops or any([*folder.glob("latency_*.json"), *folder.glob("runtimes_*.json")]):
            pages[here / "speed.md"] = speed_page(folder, ops, here / "speed.md")
    index, readme, study = PAGES / "index.md", ROOT / "README.md", read(SHOWN)
    listed = [
        f"- [{page.parent.name}: {page.stem}]({link(page, index)}): {PAGE_TITLES[page.stem]}"
        for page in pages
    ]
    pages[index] = _between(index, "\n\n".join(("\n".join(listed), verdicts(study), promises())))
    pages[readme] = _between(readme, f"{summary(study)}\n\n{summary_of_experts(read(EXPERTS))}")
    measured = f"{scale(read(SCALE))}\n\n{images(read(IMAGES))}"
    pages[ROOT / "docs" / "scale.md"] = _between(ROOT / "docs" / "scale.md", measured)
    return pages


def _between(page: Path, new: str) -> str:
    head, rest = page.read_text(encoding="utf-8").split(BEGIN, 1)
    return f"{head}{BEGIN}\n{new}\n{END}{rest.split(END, 1)[1]}"


def main() -> int:
    pages = render()
    if "--check" not in sys.argv[1:]:
        for page, new in pages.items():
            page.parent.mkdir(parents=True, exist_ok=True)
            page.write_text(new, encoding="utf-8")
        return 0
    stale = [page for page, new in pages.items() if not page.exists() or page.read_text("utf-8") != new]
    for page in stale:
        print(f"{name_of(page)}: not what the result files say; run python scripts/result_pages.py")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
