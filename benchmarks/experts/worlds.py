"""Where the study takes place: domains, tasks, backbones, and the zoos that are made of them."""

from __future__ import annotations

import contextlib
import random
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from study.arms import reset_weights
from torch import Tensor, nn

from mvp_ext.data.images import ImageData, load_joined
from mvp_ext.data.tasks import Task, sample_tasks
from mvp_ext.model.checkpoint import PrunedCheckpoint
from mvp_ext.model.ends import classifiers, linear_weight
from mvp_ext.model.families import find_structure
from mvp_ext.model.structure import Structure
from mvp_ext.pruning.build import bind, build_refined_zoo, build_universal, make_universal, pooled_task
from mvp_ext.pruning.clusters import CLUSTERED_SHARE, build_clustered_zoo, expert_recipe
from mvp_ext.pruning.iterative import planned_steps
from mvp_ext.pruning.prune import prune
from mvp_ext.pruning.settings import Schedule, Settings
from mvp_ext.train.backbone import Backbone, extract_features, load_backbone
from mvp_ext.train.heads import ClassStatistics
from mvp_ext.train.recipe import Recipe
from mvp_ext.zoo.shared import UNIVERSAL
from mvp_ext.zoo.zoo import Zoo

# Domain → its source, and of CIFAR-100 the superclasses.
DOMAINS: dict[str, tuple[str, tuple[str, ...]]] = {
    "photo": ("pacs_photo", ()),
    "art": ("pacs_art_painting", ()),
    "cartoon": ("pacs_cartoon", ()),
    "imagenette": ("imagenette", ()),
    "textures": ("textures10", ()),
    "flowers": ("flowers5", ()),
    "digits": ("digits", ()),
    "fish": ("cifar100", ("fish", "aquatic_mammals", "reptiles")),
    "mammals": (
        "cifar100",
        ("large_carnivores", "large_omnivores_and_herbivores", "medium_mammals", "small_mammals"),
    ),
    "things": ("cifar100", ("household_electrical_devices", "household_furniture", "food_containers")),
}
SOURCES = tuple(dict.fromkeys(source for source, _ in DOMAINS.values()))
# Those of the claims; what was seen under 0, 1 and 2 led to the method, which was chosen under 100 and 101.
SEEDS = (3, 4, 5)
# Of each seed; a seed that is not here holds out those of its number modulo 5.
HELD_OUT = (
    *(("textures", "cartoon"), ("flowers", "art"), ("digits", "fish")),
    *(("photo", "things"), ("imagenette", "mammals")),
)
CLASSES, ZOO_IMAGES = 4, 200
# Of random weights, to the recipe's. Not tuned.
FRESH_RATE = 3.0


@dataclass(frozen=True)
class World:
    """A backbone and how much of it stays."""

    model: str
    weights: str
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scope: str
    keep: float
    steps: int


WORLDS = {
    "diverse": World(
        *("resnet18", "resnet18_cifar100_64px_fp16.safetensors", 64),
        *((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        *("all", 0.1, 1200),
    ),
    "diverse, vit_tiny": World(
        *("vit_tiny_patch16_224", "vit_tiny_patch16_224_imagenet_fp16.safetensors", 96),
        *((0.5,) * 3, (0.5,) * 3),
        *("heads+mlp", 0.1, 1200),
    ),
}
# The source of exactly the classes of a backbone's head, in its order.
TRAINED_ON = {WORLDS["diverse"].weights: "cifar100"}
WORLDS["diverse, keep 0.05"] = replace(WORLDS["diverse"], keep=0.05)


@dataclass
class Prepared:
    """One world under one training seed: its data, tasks, backbone and zoos.

    ``parts``: those to run beside the questions, of those that are run here; None: all.
    """

    world: World
    seed: int
    folder: Path
    files: Path
    parts: tuple[str, ...] | None = None

    @property
    def is_first(self) -> bool:
        """Where also that is run which no question is about."""
        return (self.world, self.seed) == (WORLDS["diverse"], SEEDS[0])

    @cached_property
    def data(self) -> ImageData:
        return load_images(self.files, self.folder.parent / "images", self.world.size)

    @cached_property
    def backbone(self) -> Backbone:
        world = self.world
        return load_backbone(
            world.model,
            weights=self.files / world.weights,
            image_size=world.size,
            mean=world.mean,
            std=world.std,
        )

    @cached_property
    def structure(self) -> Structure:
        return find_structure(self.backbone.model, self.world.scope)

    @property
    def settings(self) -> Settings:
        return self.settings_for(1)

    def settings_for(self, times: int) -> Settings:
        """So many times the world's steps."""
        schedule = Schedule(share=0.1, steps_per_round=3, final_steps=0)
        recipe = replace(Recipe.for_model(self.backbone.model), batch_size=64)
        settings = Settings(
            self.world.keep, self.world.scope, schedule=schedule, recipe=recipe, seed=self.seed
        )
        # All arms that make something once take as many steps, in a number that removal leaves room for.
        removal = planned_steps(self.structure, settings)
        each = max(removal + 1, self.world.steps // len(self.tasks["zoo"]))
        return replace(settings, schedule=replace(schedule, final_steps=times * each - removal))

    @property
    def steps(self) -> int:
        return planned_steps(self.structure, self.settings) * len(self.tasks["zoo"])

    @cached_property
    def tasks(self) -> dict[str, list[Task]]:
        """The zoo's; those of known classes, of which the zoo's were drawn; of hidden ones; of held-out domains."""
        draw, found = random.Random(self.seed), {"zoo": [], "known": [], "hidden": [], "new": []}
        for domain, classes in domains_of(self.data).items():
            if domain in HELD_OUT[self.seed % len(HELD_OUT)]:
                count = min(CLASSES, len(classes) - 1)
                drawn = sample_tasks(self.data, 4, count, 3000 + self.seed, domain, classes=classes)
                found["new"] += drawn
                continue
            classes = draw.sample(classes, len(classes))
            hidden = max(2, round(0.4 * len(classes)))
            hidden, seen = classes[:hidden], classes[hidden:]
            if len(seen) > CLASSES:
                drawn = sample_tasks(self.data, 3, CLASSES, 1000 + self.seed, domain, classes=seen)
            else:
                drawn = [Task(f"{domain}-000", self.data, tuple(seen), 1000 + self.seed)]
            found["zoo"] += [replace(t, max_train_per_class=ZOO_IMAGES) for t in drawn]
            for split, pool, count in (("known", seen, 3), ("hidden", hidden, 2)):
                most = CLASSES if len(pool) > CLASSES else max(2, len(pool) - 1)
                for number in range(count):
                    chosen = tuple(draw.sample(pool, most))
                    name = f"{domain}-{split}-{number}"
                    seed = 5000 + self.seed + number
                    found[split].append(Task(name, self.data, chosen, seed))
        return found

    def zoo(self, kind: str) -> Zoo:
        return Zoo(self.folder / kind)

    def own_head(self, task: Task) -> Callable[[Tensor], Tensor] | None:
        """The backbone's own for these classes, where it was trained on all of them."""
        if (source := TRAINED_ON.get(self.world.weights)) is None:
            return None
        assert self.data.domains is not None
        trained = self.data.domains[SOURCES.index(source)]
        if not set(task.classes) <= set(trained):
            return None
        classifier = classifiers(self.backbone.model)[0]
        rows = [label - trained.start for label in task.classes]
        weight, bias = linear_weight(classifier)[rows], classifier.bias
        assert bias is not None
        return lambda features: (features @ weight.T + bias[rows]).detach()

    def make(self, kind: str, say: Callable[[str, int, int], None]) -> None:
        """A zoo, or what is made once for all tasks; goes on where it was.

        "…, 4 ×": in so many times the steps; "…, share 0.8": so many of them in what the experts refine.
        """
        zoo, tasks = self.zoo(kind), self.tasks["zoo"]
        kind, _, share = kind.partition(", share ")
        kind, _, times = kind.partition(", ") if kind.endswith(" ×") else (kind, "", "1")
        settings = self.settings_for(int(times.removesuffix(" ×")))
        if kind == "universal":
            steps = planned_steps(self.structure, settings) * len(tasks)
            build_universal(self.backbone, tasks, zoo, settings, steps=steps, progress=say)
        elif kind == "universal, experts' recipe":
            recipe = settings.recipe_for(self.backbone.model)
            settings = replace(settings, recipe=expert_recipe(recipe))
            build_universal(self.backbone, tasks, zoo, settings, steps=self.steps, progress=say)
        elif kind == "refined":
            build_refined_zoo(self.backbone, tasks, zoo, settings, progress=say)
        elif kind == "from random weights":
            self._make_from_random_weights(zoo, say)
        else:
            wide = min(1.0, 2 * settings.keep) if kind == "own masks" else None
            part = float(share or CLUSTERED_SHARE)
            build_clustered_zoo(self.backbone, tasks, zoo, settings, share=part, base_keep=wide, progress=say)

    def _make_from_random_weights(self, zoo: Zoo, say: Callable[[str, int, int], None]) -> None:
        """The universal model's units without what they had learned, then as many steps: is it the pruning?"""
        pooled = pooled_task(self.tasks["zoo"], UNIVERSAL, self.seed)
        bind(self.backbone, zoo, self.settings)
        cut = prune(self.backbone, pooled, settings=self.settings, method="ifp", steps=0)
        reset_weights(cut.model, self.seed)
        start = PrunedCheckpoint(cut.model, cut.mask, cut.structure)
        recipe = self.settings.recipe_for(self.backbone.model)
        settings = replace(self.settings, recipe=recipe.with_rate(FRESH_RATE * recipe.learning_rate))
        make_universal(self.backbone, pooled, zoo, settings, self.steps, say, start)

    @cached_property
    def known_to_universal(self) -> tuple[list[str], nn.Module, ClassStatistics]:
        """The names of its classes, itself, and what is known of them by its features."""
        data = pooled_task(self.tasks["zoo"], "all", self.seed).split()
        stored = self.zoo("universal").shared(UNIVERSAL)
        assert stored is not None
        model = stored.load().model
        features = extract_features(model, data.train_images, self.backbone.preprocessing)
        return (
            list(data.class_names),
            model,
            ClassStatistics.of(features, data.train_labels, data.num_classes),
        )


def load_images(files: Path, folder: Path, size: int) -> ImageData:
    """All domains' as one data set; tars are unpacked once."""
    folder.mkdir(parents=True, exist_ok=True)
    sources: list[Any] = []
    for source in SOURCES:
        if source == "cifar100":
            sources.append(sorted(files.glob("cifar100_part*.npz")))
        elif source == "digits":
            sources.append(source)
        else:
            if not (folder / source).exists() and not (files / source).exists():
                _unpack(files / f"{source}.tar", folder / source)
            sources.append(files / source if (files / source).exists() else folder / source)
    return load_joined(sources, image_size=size)


def _unpack(path: Path, folder: Path) -> None:
    """The folder of this name in a tar; by several processes at once, too."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as place, tarfile.open(path) as tar:
        tar.extractall(place, filter="data")
        # Another may have been faster: a folder that holds something is not replaced.
        with contextlib.suppress(OSError):
            Path(place, folder.name).rename(folder)


def domains_of(data: ImageData) -> dict[str, list[int]]:
    """Class numbers of each domain."""
    groups_of, names = data.superclass_of_class, data.superclass_names
    assert data.domains is not None
    assert groups_of is not None
    assert names is not None
    group = {c: names[g].rpartition("/")[2] for c, g in enumerate(groups_of)}
    return {
        name: [c for c in data.domains[SOURCES.index(source)] if not groups or group[c] in groups]
        for name, (source, groups) in DOMAINS.items()
    }
