"""A study's results as one JSON document, and questions to it.

format, name, title, machine, created, command, commit, environment, config
worlds: {name: {keep, steps, neighbours, similarity, tasks: published class lists, dense: {split: [accuracy, …]},
         again: splits that ask again what others suggested,
         made: {"zoo distilled/k0.1": {seconds, flops, steps, accuracy, count}, …}, rates: {arm: {rate: accuracy}},
         chosen: {arm: rate}, overlap?, latency?}}
columns, rows: one row an arm's run on one task with one seed
parts: progress of each part
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mvp_ext.app.environment import commit, environment
from mvp_ext.train.cost import Cost

from .arms import ARMS
from .config import Factors
from .keys import factors_text, parse, universal_key, world_key, zoo_key
from .runner import progress
from .stats import Scores
from .study import Study
from .units import Unit
from .worlds import STARTS

FORMAT = 1
COLUMNS = (
    "world",
    "split",
    "task",
    "seed",
    "arm",
    "point",
    "accuracy",
    "flops",
    "seconds",
    "steps",
    "model_flops",
)


def collect(study: Study, units: Sequence[Unit], command: str = "") -> dict[str, Any]:
    """What the journal of ``study`` has."""
    journal, config = study.journal, study.config
    rows, worlds = [], {}
    for name in dict.fromkeys(part.world for part in config.parts):
        world = config.worlds[name]
        made: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        dense: dict[str, dict[int, float]] = defaultdict(dict)
        extra: dict[str, Any] = {}
        for text, record in journal.records.items():
            key, result = parse(text), record["result"]
            if key.world != name:
                continue
            if key.kind == "arm":
                cost = result.get("cost", {})
                numbers = [cost.get("flops", 0), round(cost.get("seconds", 0.0), 3), cost.get("steps", 0)]
                head = [name, key.split, key.index, key.seed, key.arm, key.at]
                rows.append([*head, result["accuracy"], *numbers, result.get("flops", 0)])
            elif key.kind == "features":
                dense[key.split][key.index] = result["accuracy"]
            elif key.kind in ("overlap", "latency"):
                extra[key.kind] = result
            elif key.kind != "rate" and key.seed != 1:
                # An entry's second seed only says what chance does.
                entry = made[key.made]
                entry["count"] += 1
                cost = Cost.from_dict(result["cost"]).to_dict()
                for field in ("seconds", "flops", "steps"):
                    entry[field] += cost[field]
                entry["accuracy"] += result.get("accuracy") or 0.0
        for entry in made.values():
            entry["accuracy"] /= entry["count"]
        arms = dict.fromkeys(arm for part in config.parts if part.world == name for arm in part.arms)
        scores = {arm: study.rate_scores(name, arm) for arm in arms}
        worlds[name] = {
            "keep": world.keep,
            "steps": config.steps,
            "neighbours": config.neighbours,
            "similarity": config.similarity,
            "domains": [list(domain) for domain in world.domains],
            "pretrained here": bool(world.backbone.pretrain_steps),
            "model": f"{world.backbone.model} at {world.backbone.image_size} px, scope {world.scope}",
            "kinds": {split: s.kind for split, s in world.splits.items()},
            "again": [split for split, s in world.splits.items() if s.again],
            "tasks": study.world(name).tasks.published(),
            "dense": {s: [values[i] for i in sorted(values)] for s, values in sorted(dense.items())},
            "made": {key: dict(value) for key, value in sorted(made.items())},
            "rates": {arm: {f"{r:g}": a for r, a in found.items()} for arm, found in scores.items() if found},
            "chosen": {arm: study.rate(name, arm) for arm, found in scores.items() if found},
            **extra,
        }
    return {
        "format": FORMAT,
        "name": config.name,
        "title": config.title,
        "machine": config.machine,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "commit": commit(Path(__file__).parents[2]),
        "environment": environment(),
        "default arm": config.default_arm,
        "notes": list(config.notes),
        "config": dataclasses.asdict(config),
        "worlds": worlds,
        "columns": list(COLUMNS),
        "rows": sorted(rows, key=lambda row: [str(v) for v in row[:6]]),
        "parts": list(progress(journal, units)),
    }


class Answers:
    """Questions to a results document."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        self.results = results
        self.worlds: dict[str, Any] = results["worlds"]
        # (world, split, arm, factors) → (task, seed) → row.
        self._runs: dict[tuple[str, str, str, str], dict[tuple[int, int], Any]] = defaultdict(dict)
        for values in results["rows"]:
            row = dict(zip(results["columns"], values, strict=True))
            self._runs[row["world"], row["split"], row["arm"], row["point"]][row["task"], row["seed"]] = row

    def factors(self, world: str, **changes: Any) -> Factors:
        """The defaults of a world, some of them replaced."""
        w = self.worlds[world]
        default = Factors(w["steps"], w["keep"], w["neighbours"], similarity=w["similarity"])
        return replace(default, **changes)

    def runs(
        self, world: str, split: str, arm: str, **changes: Any
    ) -> dict[tuple[int, int], dict[str, float]]:
        """(task, seed) → row, of an arm at a point."""
        if arm not in ARMS:
            return {}
        text = factors_text(arm, self.factors(world, **changes))
        return dict(self._runs.get((world, split, arm, text), {}))

    def scores(self, world: str, split: str, arm: str, **changes: Any) -> Scores:
        return {key: row["accuracy"] for key, row in self.runs(world, split, arm, **changes).items()}

    def values(self, world: str, split: str, arm: str, factor: str) -> list[Any]:
        """The values of one factor for which an arm has runs, the others at their defaults, ascending."""
        candidates = sorted({v for part in self.results["config"]["parts"] for v in part[factor]}, key=repr)
        default = getattr(self.factors(world), factor)
        found = [v for v in {*candidates, default} if self.runs(world, split, arm, **{factor: v})]
        return sorted(found, key=lambda v: (isinstance(v, str), v))

    def arms(self, world: str, split: str) -> list[str]:
        """Arms with runs at the default point, in the registry's order."""
        return [arm for arm in ARMS if self.runs(world, split, arm)]

    def splits(self, world: str, kinds: Iterable[str] = ("shared", "hidden", "other")) -> list[str]:
        return [split for split, kind in self.worlds[world]["kinds"].items() if kind in kinds]

    def shared_cost(self, world: str, arm_name: str, keep: float | None = None) -> dict[str, float]:
        """Seconds, FLOPs and steps of what an arm needs that is made once; 0 where it needs nothing."""
        arm, w = ARMS[arm_name], self.worlds[world]
        keep = w["keep"] if keep is None else keep
        keys = []
        if arm.elastic:
            # And the zoo whose masks the weights were trained under.
            keys += [world_key(world, "elastic"), zoo_key(world, "plain", w["keep"], 0, 0)]
        elif arm.zoo:
            keys.append(zoo_key(world, arm.zoo, keep, 0, 0))
        for kind in filter(None, (arm.universal, STARTS.get(arm.zoo))):
            keys.append(universal_key(world, kind, keep))
        costs = [w["made"].get(parse(key).made, {}) for key in keys]
        return {kind: sum(cost.get(kind, 0.0) for cost in costs) for kind in ("seconds", "flops", "steps")}
