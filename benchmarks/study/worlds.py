"""A prepared world: its tasks, backbone, and what is made once for all targets (zoos, universal and elastic models).

Everything made here lies below ``folder``; making it again gives the same numbers, whatever was interrupted before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from mvp_ext.data.tasks import Task
from mvp_ext.model.checkpoint import PrunedCheckpoint, load_pruned
from mvp_ext.model.create import create_model
from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.structure import Structure
from mvp_ext.pruning.build import build_universal, build_zoo, pooled_task
from mvp_ext.pruning.iterative import planned_steps, round_ratios
from mvp_ext.pruning.settings import Schedule, Settings
from mvp_ext.train.backbone import Backbone, extract_features, load_backbone
from mvp_ext.train.cost import now
from mvp_ext.train.evaluate import accuracy_of
from mvp_ext.train.heads import ridge_head
from mvp_ext.train.pretrain import pretrain
from mvp_ext.train.recipe import Recipe
from mvp_ext.zoo.shared import UNIVERSAL
from mvp_ext.zoo.zoo import Zoo

from .config import World
from .elastic import ElasticOptions, build_elastic
from .tasks import TaskSet, draw_tasks

# The universal model that a zoo's entries go on from.
STARTS = {"specialised": "start", "refined": "base"}


@dataclass
class PreparedWorld:
    name: str
    config: World
    folder: Path
    files: Path

    @cached_property
    def tasks(self) -> TaskSet:
        return draw_tasks(self.config, self.files)

    @cached_property
    def backbone(self) -> Backbone:
        config = self.config.backbone
        if config.pretrain_steps:
            backbone = load_backbone(self.backbone_path)
        else:
            backbone = load_backbone(
                config.model,
                weights=self.files / config.weights if config.weights else None,
                image_size=config.image_size,
                mean=config.mean or None,
                std=config.std or None,
            )
        return backbone.to("cuda") if torch.cuda.is_available() else backbone

    @property
    def backbone_path(self) -> Path:
        return self.folder / "backbone.safetensors"

    @cached_property
    def structure(self) -> Structure:
        return find_structure(self.backbone.model, self.config.scope)

    @cached_property
    def recipe(self) -> Recipe:
        recipe = Recipe.for_model(self.backbone.model)
        return replace(recipe, batch_size=self.config.batch_size, precision=self.config.precision)

    def task(self, split: str, index: int) -> Task:
        return self.tasks.of(split)[index]

    # ---- schedules: what a zoo's entry costs, and what others may cost to be equal

    def schedule(self, kind: str) -> Schedule:
        config = self.config
        final = config.plain_final_steps if kind == "plain" else config.final_steps
        return Schedule(
            share=config.share,
            steps_per_round=config.steps_per_round,
            final_steps=final,
            distill=kind != "plain",
        )

    def entry_steps(self, keep: float) -> int:
        """Optimizer steps of one entry of the distilled zoo."""
        return planned_steps(self.structure, self.settings(keep, self.schedule("distilled")))

    def zoo_steps(self, keep: float) -> int:
        return self.config.zoo_tasks * self.entry_steps(keep)

    def share_of_start(self, kind: str) -> float:
        """The share of the distilled zoo's steps that goes into what a zoo's entries start from."""
        return self.config.start_share if kind == "specialised" else self.config.base_share

    def schedule_from(self, kind: str, start: Mask, keep: float) -> Schedule:
        """An entry's schedule from such a start: with it, all entries take as many steps as the distilled zoo."""
        steps = round((1 - self.share_of_start(kind)) * self.entry_steps(keep))
        schedule = self.schedule("distilled")
        rounds = len(round_ratios(self.structure, self.settings(keep, schedule), start))
        return replace(schedule, final_steps=max(1, steps - rounds * schedule.steps_per_round))

    # ---- what is made once; each returns what the journal keeps

    def make_backbone(self) -> dict[str, Any]:
        config = self.config.backbone
        torch.manual_seed(self.config.seed)
        model = create_model(config.model, num_classes=2)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if hasattr(model, "set_input_size"):
            model.set_input_size(img_size=(config.image_size, config.image_size))
        recipe = Recipe.for_model(model).with_rate(config.pretrain_rate)
        recipe = replace(recipe, batch_size=config.pretrain_batch, precision=self.config.precision)
        backbone, accuracy, cost = pretrain(
            model.to(device),
            self.tasks.seen_data,
            steps=config.pretrain_steps,
            image_size=config.image_size,
            recipe=recipe,
            seed=self.config.seed,
            resume=self.backbone_path.with_suffix(".partial"),
        )
        backbone.save(self.backbone_path)
        return {"accuracy": accuracy, "cost": cost.to_dict(), "classes": len(backbone.classes)}

    def zoo(self, kind: str, keep: float, seed: int = 0) -> Zoo:
        return Zoo(self.folder / f"zoo-{kind}-keep{keep:g}-seed{seed}")

    def make_entry(self, kind: str, keep: float, index: int, seed: int = 0) -> dict[str, Any]:
        zoo, task = self.zoo(kind, keep, seed), self.tasks.zoo[index]
        start, schedule = None, self.schedule(kind)
        if kind in STARTS:
            start = self.universal(STARTS[kind], keep)
            schedule = self.schedule_from(kind, start.mask, keep)
        settings = self.settings(keep, schedule, seed=7919 * seed)
        build_zoo(self.backbone, [task], zoo, settings, start=start)
        # Made now, or before a kill that came between it and its line in the journal.
        entry = zoo[task.name]
        return {"accuracy": entry.accuracy, "cost": entry.cost, "steps": entry.steps}

    def universal_folder(self, kind: str, keep: float) -> Zoo:
        return Zoo(self.folder / f"universal-{kind}-keep{keep:g}")

    def universal_keep(self, kind: str, keep: float) -> float:
        """The start of a specialised zoo is wider than its entries, by the same factor at every keep ratio."""
        return min(1.0, keep * self.config.start_keep / self.config.keep) if kind == "start" else keep

    def make_universal(self, kind: str, keep: float) -> dict[str, Any]:
        """``kind``: "whole" (the zoo's cost), "entry" (one entry's), "plain" (whole, undistilled), "start" and "base"
        (of specialised and refined zoos).
        """
        steps = {
            "whole": self.zoo_steps(keep),
            "plain": self.zoo_steps(keep),
            "entry": self.entry_steps(keep),
            "start": round(self.share_of_start("specialised") * self.zoo_steps(keep)),
            "base": round(self.share_of_start("refined") * self.zoo_steps(keep)),
        }[kind]
        folder = self.universal_folder(kind, keep)
        schedule = replace(self.schedule("distilled"), distill=kind != "plain")
        settings = self.settings(self.universal_keep(kind, keep), schedule)
        build_universal(self.backbone, self.tasks.zoo, folder, settings, steps=steps)
        made = folder.shared(UNIVERSAL)
        assert made is not None
        result = made.extra["result"]
        return {"accuracy": result["accuracy"], "cost": result["cost"]}

    def universal(self, kind: str, keep: float) -> PrunedCheckpoint:
        stored = self.universal_folder(kind, keep).shared(UNIVERSAL)
        assert stored is not None
        return stored.load(self.backbone.device)

    @property
    def elastic_path(self) -> Path:
        return self.folder / "elastic.safetensors"

    def make_elastic(self) -> dict[str, Any]:
        """One for every keep ratio; trained under masks of the plain zoo at the world's own."""
        keep = self.config.keep
        smallest, largest = self.config.elastic_range
        build_elastic(
            self.backbone,
            self.tasks.zoo,
            self.elastic_path,
            steps=round(self.config.elastic_share * self.zoo_steps(keep)),
            masks=[entry.mask for entry in self.zoo("plain", keep).entries(self.structure.fingerprint)],
            options=ElasticOptions(smallest=smallest, largest=largest, align=self.config.align),
            scope=self.config.scope,
            recipe=self.recipe,
        )
        return {"cost": load_pruned(self.elastic_path).extra["cost"]}

    def make_features(self, split: str, index: int) -> dict[str, Any]:
        """The dense model's features of a task, kept for all arms; and its accuracy with a ridge head."""
        data = self.task(split, index).split()
        precision, preprocessing = self.recipe.precision, self.backbone.preprocessing
        begin = now()
        train = extract_features(self.backbone.model, data.train_images, preprocessing, precision)
        seconds = now() - begin
        test = extract_features(self.backbone.model, data.test_images, preprocessing, precision)
        head = ridge_head(train, data.train_labels, data.num_classes)
        path = self._features_path(split, index)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        safetensors.torch.save_file({"features": train}, partial, {"seconds": repr(seconds)})
        partial.replace(path)
        return {"accuracy": accuracy_of(head(test), data.test_labels), "seconds": seconds}

    def features(self, split: str, index: int) -> tuple[Tensor, float]:
        with safetensors.safe_open(self._features_path(split, index), "pt") as file:
            return file.get_tensor("features"), float(file.metadata()["seconds"])

    def pooled(self) -> Task:
        """All classes of the zoo's tasks, few images each: what task-independent scores look at."""
        return replace(pooled_task(self.tasks.zoo, "pooled"), max_train_per_class=20)

    def own_mask_path(self, split: str, index: int, seed: int, keep: float) -> Path:
        return self.folder / "masks" / f"{split}-{index:03d}-seed{seed}-keep{keep:g}.safetensors"

    def _features_path(self, split: str, index: int) -> Path:
        return self.folder / "features" / f"{split}-{index:03d}.safetensors"

    def settings(
        self, keep: float, schedule: Schedule, *, rate: float | None = None, seed: int = 0
    ) -> Settings:
        """What the package's ``prune``, ``build_zoo`` and ``build_universal`` are told in this world."""
        recipe = self.recipe if rate is None else self.recipe.with_rate(rate)
        return Settings(keep, self.config.scope, self.config.align, schedule, recipe, seed)
