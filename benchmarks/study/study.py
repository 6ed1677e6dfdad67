"""A study in a folder: runs units, remembers them, and knows what earlier ones said."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mvp_ext.app.environment import environment
from mvp_ext.app.peers import prune_with_torch_pruning
from mvp_ext.model.mask import Mask
from mvp_ext.model.measure import count_flops, measure
from mvp_ext.pruning.iterative import Schedule, round_ratios
from mvp_ext.pruning.prune import prune
from mvp_ext.pruning.vote import VoteOptions, proxy_leep, small_model
from mvp_ext.storage import write_atomic
from mvp_ext.train.cost import BACKWARD_FACTOR, use_clock
from mvp_ext.zoo.entry import ZooEntry

from .arms import ARMS, Arm, Point, Run
from .config import Config, rates_of
from .journal import Journal
from .units import REFERENCE_ARM, rate_key
from .worlds import WorldAtWork

SHARES = (
    0.1,
    0.15,
    0.25,
    0.4,
    0.6,
    0.8,
)  # removed a round by iterative pruning; the finest that a budget allows


class Study:
    """``folder`` holds everything of one study; ``files``: where data and weights lie.

    Raises:
        ValueError: the folder holds a study of other worlds, learning rates or defaults.
    """

    def __init__(self, config: Config, folder: Path, files: Path) -> None:
        self.config, self.folder, self.files = config, folder, files
        folder.mkdir(parents=True, exist_ok=True)
        self._check_identity()
        self.journal = Journal(folder)
        self._worlds: dict[str, WorldAtWork] = {}
        torch.set_num_threads(config.threads)
        use_clock({"wall": time.perf_counter, "cpu": time.process_time}[config.clock])

    def world(self, name: str) -> WorldAtWork:
        if name not in self._worlds:
            folder = self.folder / name
            folder.mkdir(exist_ok=True)
            self._worlds[name] = WorldAtWork(name, self.config.worlds[name], folder, self.files)
        return self._worlds[name]

    # ---- arms

    def run_arm(
        self, world: str, arm: str, point: Point, split: str, index: int, seed: int
    ) -> dict[str, Any]:
        return self._run(ARMS[arm], Run(self.world(world), split, index, seed, point), self.rate(world, arm))

    def run_rate(self, world: str, arm: str, rate: float, index: int) -> dict[str, Any]:
        """One arm with one learning rate on a development task."""
        c = self.config
        point = Point(c.steps, c.worlds[world].keep, c.neighbours, "nearest", c.similarity)
        return self._run(ARMS[arm], Run(self.world(world), "development", index, 0, point), rate)

    def rate(self, world: str, arm: str) -> float:
        """The learning rate with the best mean accuracy on the development tasks; the smaller one if two are equal."""
        return max((accuracy, -rate) for rate, accuracy in self.rate_scores(world, arm).items())[1] * -1

    def rate_scores(self, world: str, arm: str) -> dict[float, float]:
        """Learning rate → mean accuracy on the development tasks that it was tried on."""
        world = self.config.worlds[world].rates_from or world
        arm = ARMS[arm].rate_of or arm
        scores = {}
        for rate in rates_of(self.config, world, arm):
            keys = [rate_key(world, arm, rate, i) for i in range(self.config.worlds[world].development)]
            found = [self.journal.result(key)["accuracy"] for key in keys if key in self.journal]
            if found:
                scores[rate] = math.fsum(found) / len(found)
        return scores

    def _run(self, arm: Arm, run: Run, rate: float) -> dict[str, Any]:
        world, point = run.world, run.point
        steps, schedule = point.steps, world.schedule("distilled")
        method: Any = "ifp"
        if arm.ifp_cost is not None:
            if math.isfinite(arm.ifp_cost):
                schedule = self.budgeted_schedule(run, arm.ifp_cost)
            steps = schedule.final_steps
        else:
            start = arm.start
            assert start is not None
            method = functools.partial(start, run)
            method.__name__ = arm.name
        try:
            result = prune(
                world.backbone,
                world.task(run.split, run.index),
                zoo=None,
                keep=point.keep,
                steps=steps,
                method=method,
                scope=world.config.scope,
                align=world.config.align,
                recipe=world.recipe.with_rate(rate),
                schedule=schedule,
                vote=VoteOptions(neighbours=point.neighbours, similarity=point.similarity),
                seed=1009 * run.seed + run.index,
                features=world.features(run.split, run.index),
            )
        except (
            FloatingPointError
        ) as error:  # a learning rate that is far too large is a result, not a failure
            return {"accuracy": 0.0, "trained": 0.0, "rate": rate, "diverged": str(error)}
        if arm.ifp_cost == math.inf:
            path = world.own_mask_path(run.split, run.index, run.seed, point.keep)
            path.parent.mkdir(exist_ok=True)
            result.mask.save(path)
        return {
            "accuracy": result.accuracy,
            "trained": result.trained_accuracy,
            "rate": rate,
            "cost": result.cost.to_dict(),
            "neighbours": [name for name, _ in result.neighbours],
            "flops": result.flops,
            "parameters": result.parameters,
        }

    def budgeted_schedule(self, run: Run, times: float) -> Schedule:
        """Iterative pruning within ``times`` MVP's FLOPs: at most half for the removals, the rest for the final steps.

        The finest removal that fits is taken; the coarsest, with no final steps, where none does.
        """
        world, keep, batch = run.world, run.point.keep, run.world.recipe.batch_size
        images = len(world.task(run.split, run.index).split().train_labels)
        base = world.schedule("distilled")
        dense = self._image_flops(world, 1.0)
        fixed = images * (dense + self._image_flops(world, keep))
        budget = times * self.reference_flops(run) - fixed

        def step(ratio: float) -> float:
            return batch * (BACKWARD_FACTOR * self._image_flops(world, ratio) + dense)

        for share, steps in [(share, steps) for share in SHARES for steps in (10, 5, 2, 1)]:
            schedule = replace(base, share=share, steps_per_round=steps)
            ratios = round_ratios(world.structure, keep, world.config.align, schedule)
            scored = [1.0, *ratios[:-1]]
            scoring = BACKWARD_FACTOR * batch * schedule.score_batches
            removal = sum(scoring * self._image_flops(world, r) for r in scored) + steps * sum(
                map(step, ratios)
            )
            if removal <= budget / 2:
                return replace(schedule, final_steps=int((budget - removal) / step(keep)))
        return replace(schedule, final_steps=max(0, int((budget - removal) / step(keep))))

    def reference_flops(self, run: Run) -> float:
        """What MVP cost, on average, on the development tasks."""
        world = self.config.worlds[run.world.name].rates_from or run.world.name
        costs = [
            record["result"]["cost"]["flops"]
            for key, record in sorted(self.journal.records.items())
            if key.startswith(f"{world}/rate/{REFERENCE_ARM}/") and "cost" in record["result"]
        ]
        return costs[0]  # the same for every rate and task: shapes and steps decide it

    def _image_flops(self, world: WorldAtWork, keep: float) -> int:
        cache = self.__dict__.setdefault("_flops", {})
        key = (world.name, round(keep, 6))
        if key not in cache:
            mask = Mask.random(world.structure, keep, 0, world.config.align)
            size = world.backbone.preprocessing.size
            cache[key] = count_flops(small_model(world.backbone, world.structure, mask), (3, size, size))
        return int(cache[key])

    # ---- what says something of the zoo and the models

    def run_overlap(self, name: str, keep: float) -> dict[str, Any]:
        """Similarity and per-layer IoU of every pair of the distilled zoo's tasks; IoU of two seeds of one task."""
        world = self.world(name)
        zoo = world.zoo("distilled", keep)
        entries = [zoo[task.name] for task in world.tasks.zoo]
        near = self._similarities(world, entries)
        layers = list(world.structure.names)
        pairs, ious = [], []
        for j in range(len(entries)):
            for i in range(j):
                pairs.append([i, j, round((near[i, j] + near[j, i]) / 2, 5)])
                ious.append(_ious(entries[i].mask, entries[j].mask, layers))
        ceiling = []
        again = world.zoo("distilled", keep, seed=1)
        for task in world.tasks.zoo[: self.config.ceiling]:
            ceiling.append(_ious(zoo[task.name].mask, again[task.name].mask, layers))
        kept = [layer.units and entries[0].mask.kept[layer.name] / layer.units for layer in world.structure]
        return {"layers": layers, "kept": kept, "pairs": pairs, "ious": ious, "two seeds": ceiling}

    def _similarities(self, world: WorldAtWork, entries: list[ZooEntry]) -> np.ndarray:
        """[i, j]: proxy-LEEP of entry i for the task of entry j, on 500 of its training images."""
        from mvp_ext.train.backbone import extract_features

        near = np.zeros((len(entries), len(entries)))
        described = [entry.read().extra for entry in entries]
        for j, task in enumerate(world.tasks.zoo):
            data = task.split()
            chosen = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(j))[:500]
            images, labels = data.train_images[chosen], data.train_labels[chosen]
            features = extract_features(world.backbone.model, images, world.backbone.preprocessing)
            for i, tensors in enumerate(described):
                near[i, j] = proxy_leep(tensors, features, labels)
        return near

    def run_latency(self, name: str) -> dict[str, Any]:
        """Size and latency of the dense model and of the shapes at each keep ratio, ours and Torch-Pruning's."""
        world = self.world(name)
        size = world.backbone.preprocessing.size
        shape = (3, size, size)
        models = {"dense": world.backbone.copy_model().eval()}
        for keep in sorted({world.config.keep, *self.config.latency_keeps}):
            mask = Mask.random(world.structure, keep, 0, world.config.align)
            models[f"keep {keep:g}"] = small_model(world.backbone, world.structure, mask).eval()
            try:
                peer = prune_with_torch_pruning(models["dense"].cpu(), world.structure, mask, shape)
            except (ImportError, ValueError):
                continue
            models[f"Torch-Pruning, keep {keep:g}"] = peer.to(world.backbone.device)
        models["dense"].to(world.backbone.device)
        measured = measure(models, shape, batches=(1, 32), seconds=self.config.latency_seconds)
        return {name: m.to_dict() for name, m in measured.items()}

    # ---- identity

    def _check_identity(self) -> None:
        path = self.folder / "study.json"
        mine = json.loads(json.dumps(_identity(self.config)))
        if path.exists():
            theirs = json.loads(path.read_text())["identity"]
            for key in theirs.keys() & mine.keys():
                if _differ(theirs[key], mine[key]):
                    raise ValueError(
                        f"{self.folder}: holds a study with another {key}: expected {mine[key]}, got {theirs[key]}; "
                        "give another --out"
                    )
            mine = {**theirs, **mine}
        if not path.exists() or json.loads(path.read_text())["identity"] != mine:
            text = json.dumps({"identity": mine, "environment": environment()}, indent=1)
            write_atomic(path, text.encode())


def _identity(config: Config) -> dict[str, Any]:
    """What units' numbers depend on beside their keys. Parts and numbers of tasks may grow."""
    worlds = {}
    for name, world in config.worlds.items():
        values = asdict(world)
        values["splits"] = {k: {**v, "count": None} for k, v in values["splits"].items()}
        worlds[f"world {name}"] = values
    defaults = {
        k: v for k, v in dataclasses.asdict(config).items() if k in ("rates", "rate_tasks", "threads")
    }
    return {**worlds, **defaults}


def _differ(theirs: Any, mine: Any) -> bool:
    """A setting that one side does not know yet (it came later) is no difference."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        return any(_differ(theirs[key], mine[key]) for key in theirs.keys() & mine.keys())
    return bool(theirs != mine)


def _ious(a: Mask, b: Mask, layers: list[str]) -> list[float]:
    per_layer = a.iou(b, per_layer=True)
    assert isinstance(per_layer, dict)
    return [round(per_layer[name], 4) for name in layers]
