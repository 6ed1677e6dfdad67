"""Whole models in every runtime × precision × batch × threads, dense and pruned in turn; random weights: speed alone.

    python benchmarks/runtimes.py [--budget 1200] [--only resnet18] [--threads 2] [--without compile]
    # benchmarks/results/<machine>/runtimes_<model>.json
    python benchmarks/runtimes.py --memory --threads 2
    # benchmarks/results/<machine>/memory_<model>.json: the peak memory of each, no times; other work may go on

The budget is shared by the models: one gets what those before left of it. Small batches come first, and what there is
no time for is in the file with that reason.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models import small_model
from results import machine_folder

from mvp_ext.app.bench import Grid, bench, bench_table, checkpoint_of, pruned_copies, reasons
from mvp_ext.app.console import console, say
from mvp_ext.app.environment import command, commit
from mvp_ext.deploy.metadata import PRECISIONS
from mvp_ext.deploy.runtimes import RUNTIMES
from mvp_ext.model.create import create_model
from mvp_ext.model.preprocessing import Preprocessing

ROOT = Path(__file__).resolve().parent.parent
# name: scope: keep ratios, and the model's share of the time.
MODELS = {
    "vit_tiny_patch16_224": ({"heads": (0.5,)}, 2),
    "resnet18": ({"inner": (0.5, 0.25), "all": (0.5,), "stream": (0.5,)}, 5),
    "deit_small_patch16_224": ({"heads+mlp": (0.5,)}, 3),
    "resnet50": ({"inner": (0.25,)}, 3),
}
ALIGN = 8


def main() -> None:
    options = _parse()
    end = time.perf_counter() + options.budget
    names = [name for name in MODELS if options.only in name]
    for position, name in enumerate(names):
        scopes, share = MODELS[name]
        left = max(0.0, end - time.perf_counter())
        budget = left * share / sum(MODELS[other][1] for other in names[position:])
        dense = create_model(small_model(name) if options.dry_run else name).eval()
        size = dense.pretrained_cfg["input_size"][1] if options.dry_run else 224
        see = Preprocessing(size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        others = {
            f"{scope}, {kept}": checkpoint_of(model, see)
            for scope, keeps in scopes.items()
            for kept, model in pruned_copies(dense, keeps, scope=scope, align=ALIGN).items()
        }
        # Memory takes a process a cell.
        few = options.dry_run and options.memory
        grid = Grid(
            tuple(runtime for runtime in RUNTIMES if runtime not in options.without),
            PRECISIONS[:1] if few else PRECISIONS,
            (1,) if few else (1, 2) if options.dry_run else (1, 32),
            (1,) if options.dry_run else tuple(options.threads),
            seconds=0.0 if options.dry_run or options.memory else options.seconds,
            memory=options.memory,
            budget=budget,
        )
        result = bench(
            checkpoint_of(dense, see),
            others,
            (3, size, size),
            grid,
            setting={
                "model": name,
                "align": ALIGN,
                "threads": list(grid.threads),
                "weights": "random",
                "budget_seconds": round(budget),
                "command": command(ROOT),
                "commit": commit(ROOT, "csrc", "mvp_ext", "benchmarks/*.py"),
            },
        )
        kind = "memory" if options.memory else "runtimes"
        if options.memory:
            result = {**result, "models": {name: _memory(model) for name, model in result["models"].items()}}
        else:
            console.print(bench_table(result))
        for reason in reasons(result):
            say(reason)
        if not options.dry_run or options.out:
            folder = options.out or machine_folder()
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(result, indent=1, ensure_ascii=False)
            (folder / f"{kind}_{name}.json").write_text(text + "\n", encoding="utf-8")


def _memory(model: Mapping[str, Any]) -> dict[str, Any]:
    """Of what was measured the bytes alone: a single call has no time worth keeping."""
    kept = ("runtime", "precision", "threads", "batch", "peak_memory_bytes")
    return {
        "name": model["name"],
        "peak_memory": [{key: cell[key] for key in kept} for cell in model["latency"]],
        "left_out": model["left_out"],
    }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Whole models in every runtime")
    parser.add_argument("--budget", type=float, default=1200.0, help="seconds for all models")
    parser.add_argument("--only", default="", help="only models whose name contains this")
    parser.add_argument("--seconds", type=float, default=1.0, help="for the slowest model of a setting")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of CPU threads")
    parser.add_argument(
        "--without", nargs="*", default=[], help="runtimes to leave out: compiling takes most of the time"
    )
    parser.add_argument("--memory", action="store_true", help="peak memory instead of times")
    parser.add_argument("--out", type=Path, help="folder; default: benchmarks/results/<machine>")
    parser.add_argument("--dry-run", action="store_true", help="tiny models, once; no file without --out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
