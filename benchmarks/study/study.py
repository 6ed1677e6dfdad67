"""A study in a folder: runs units, remembers them, and knows what earlier ones said."""

from __future__ import annotations

import functools
import itertools
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
from mvp_ext.journal import Journal
from mvp_ext.model.mask import Mask
from mvp_ext.model.measure import count_flops, measure
from mvp_ext.pruning.iterative import round_ratios
from mvp_ext.pruning.prune import RunOptions, prune
from mvp_ext.pruning.settings import Schedule
from mvp_ext.pruning.vote import small_model
from mvp_ext.storage import write_atomic
from mvp_ext.train.backbone import extract_features
from mvp_ext.train.cost import BACKWARD_FACTOR, use_clock
from mvp_ext.zoo.entry import ZooEntry
from mvp_ext.zoo.neighbours import proxy_leep
from mvp_ext.zoo.zoo import Zoo

from .arms import ARMS, REFERENCE_ARM, Run
from .config import Config, Factors, default_factors, rates_of
from .keys import rate_key
from .worlds import PreparedWorld

# Removed a round by iterative pruning; the finest that a budget allows.
SHARES = (0.1, 0.15, 0.25, 0.4, 0.6, 0.8)


class Study:
    """``folder`` holds everything of one study; ``files``: where data and weights lie.

    Raises:
        ValueError: the folder holds a study of other worlds, learning rates or defaults.
    """

    def __init__(self, config: Config, folder: Path, files: Path) -> None:
        self.config, self.folder, self.files = config, folder, files
        folder.mkdir(parents=True, exist_ok=True)
        self._check_identity()
        self.journal = Journal(folder / "journal.jsonl")
        self._worlds: dict[str, PreparedWorld] = {}
        torch.set_num_threads(config.threads)
        use_clock({"wall": time.perf_counter, "cpu": time.process_time}[config.clock])

    def world(self, name: str) -> PreparedWorld:
        if name not in self._worlds:
            folder = self.folder / name
            folder.mkdir(exist_ok=True)
            self._worlds[name] = PreparedWorld(name, self.config.worlds[name], folder, self.files)
        return self._worlds[name]

    # ---- arms

    def run_arm(
        self, world: str, arm: str, factors: Factors, split: str, index: int, seed: int
    ) -> dict[str, Any]:
        run = Run(self.world(world), ARMS[arm], split, index, seed, factors)
        return self._run(run, self.rate(world, arm))

    def run_rate(self, world: str, arm: str, rate: float, index: int) -> dict[str, Any]:
        """One arm with one learning rate on a development task."""
        factors = default_factors(self.config, world)
        return self._run(Run(self.world(world), ARMS[arm], "development", index, 0, factors), rate)

    def rate(self, world: str, arm: str) -> float:
        """The learning rate with the best mean accuracy on the development tasks; the smaller one if two are equal."""
        return max((accuracy, -rate) for rate, accuracy in self.rate_scores(world, arm).items())[1] * -1

    def rate_scores(self, world: str, arm: str) -> dict[float, float]:
        """Learning rate → mean accuracy on the development tasks that it was tried on."""
        found = self._rate_results(world, ARMS[arm].rate_of or arm)
        return {
            rate: math.fsum(r["accuracy"] for r in results) / len(results) for rate, results in found.items()
        }

    def _rate_results(self, world: str, arm: str) -> dict[float, list[dict[str, Any]]]:
        world = self.config.worlds[world].rates_from or world
        found: dict[float, list[dict[str, Any]]] = {}
        for rate in rates_of(self.config, world, arm):
            for index in range(self.config.worlds[world].development):
                key = rate_key(world, arm, rate, index)
                if key in self.journal:
                    found.setdefault(rate, []).append(self.journal.result(key))
        return found

    def _run(self, run: Run, rate: float) -> dict[str, Any]:
        world, arm, factors = run.world, run.arm, run.factors
        steps, schedule = factors.steps, world.schedule("distilled")
        method: Any = "ifp"
        if arm.start is not None:
            method = functools.partial(arm.start, run)
            method.__name__ = arm.name
        else:
            if arm.ifp_cost != math.inf:
                schedule = self.budgeted_schedule(run)
            steps = schedule.final_steps
        try:
            result = prune(
                world.backbone,
                world.task(run.split, run.index),
                settings=world.settings(factors.keep, schedule, rate=rate, seed=1009 * run.seed + run.index),
                method=method,
                steps=steps,
                vote=run.vote,
                run=RunOptions(features=world.features(run.split, run.index)),
            )
        except FloatingPointError as error:
            # A learning rate that is far too large is a result, not a failure.
            return {"accuracy": 0.0, "trained": 0.0, "rate": rate, "diverged": str(error)}
        if arm.ifp_cost == math.inf:
            path = world.own_mask_path(run.split, run.index, run.seed, factors.keep)
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

    def budgeted_schedule(self, run: Run) -> Schedule:
        """Iterative pruning within the arm's multiple of MVP's FLOPs: at most half for the removals, the rest for the
        final steps.

        The finest removal that fits is taken; the coarsest, with no final steps, where none does.
        """
        assert run.arm.ifp_cost is not None
        world, keep, batch = run.world, run.factors.keep, run.world.recipe.batch_size
        images = len(world.task(run.split, run.index).split().train_labels)
        base = world.schedule("distilled")
        dense = self._image_flops(world, 1.0)
        fixed = images * (dense + self._image_flops(world, keep))
        budget = run.arm.ifp_cost * self.reference_flops(run) - fixed

        def step(ratio: float) -> float:
            return batch * (BACKWARD_FACTOR * self._image_flops(world, ratio) + dense)

        for share, steps in itertools.product(SHARES, (10, 5, 2, 1)):
            schedule = replace(base, share=share, steps_per_round=steps)
            ratios = round_ratios(world.structure, world.settings(keep, schedule))
            scored = [1.0, *ratios[:-1]]
            scoring = BACKWARD_FACTOR * batch * schedule.score_batches
            removal = sum(scoring * self._image_flops(world, ratio) for ratio in scored)
            removal += steps * sum(step(ratio) for ratio in ratios)
            if removal <= budget / 2:
                break
        return replace(schedule, final_steps=max(0, int((budget - removal) / step(keep))))

    def reference_flops(self, run: Run) -> float:
        """What MVP cost on a development task: the same for every rate and task, for shapes and steps decide it."""
        found = self._rate_results(run.world.name, REFERENCE_ARM)
        return next(r["cost"]["flops"] for results in found.values() for r in results if "cost" in r)

    def _image_flops(self, world: PreparedWorld, keep: float) -> int:
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
        near = self._similarities(world, zoo, entries)
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

    def _similarities(self, world: PreparedWorld, zoo: Zoo, entries: list[ZooEntry]) -> np.ndarray:
        """[i, j]: proxy-LEEP of entry i for the task of entry j, on 500 of its training images."""
        near = np.zeros((len(entries), len(entries)))
        known = {k.name: k for k in zoo.class_means(world.structure.fingerprint)}
        means = [known[entry.name] for entry in entries]
        for j, task in enumerate(world.tasks.zoo):
            data = task.split()
            chosen = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(j))[:500]
            images, labels = data.train_images[chosen], data.train_labels[chosen]
            features = extract_features(world.backbone.model, images, world.backbone.preprocessing)
            near[:, j] = proxy_leep(means, features, labels).numpy()
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
    defaults = {name: getattr(config, name) for name in ("rates", "rate_tasks", "threads")}
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
