"""The units of work of a study, in the order in which they are wanted, with what each needs first.

A unit's key says all that its numbers depend on within its world; the world's own values enter the folder's identity.
So arms and parts may be added to a study that has begun.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .arms import ARMS, REFERENCE_ARM
from .config import Config, Factors, Part, default_factors, rates_of
from .keys import arm_key, features_key, rate_key, universal_key, world_key, zoo_key
from .study import Study
from .worlds import STARTS


@dataclass(frozen=True)
class Unit:
    """``run(study)`` returns what the journal keeps; ``needs``: keys that must be finished before."""

    key: str
    part: str
    run: Callable[[Study], dict[str, Any]]
    needs: tuple[str, ...] = ()


def plan(config: Config) -> list[Unit]:
    """All units, each after what it needs, without repeats."""
    planner = _Planner(config)
    for part in config.parts:
        planner.part(part)
        planner.describe(part.world)
    return list(planner.units.values())


class _Planner:
    def __init__(self, config: Config) -> None:
        self.config = config
        self.units: dict[str, Unit] = {}

    def add(
        self, key: str, part: str, run: Callable[[Study], dict[str, Any]], needs: Sequence[str] = ()
    ) -> str:
        """Put a unit behind what it needs (which has been added); returns its key."""
        self.units.setdefault(key, Unit(key, part, run, tuple(needs)))
        return key

    def part(self, part: Part) -> None:
        """Task by task, so that a part that is stopped early has all arms on the tasks it got to."""
        world, default = self.config.worlds[part.world], default_factors(self.config, part.world)
        values = [
            part.steps or (default.steps,),
            part.keep or (default.keep,),
            part.neighbours or (default.neighbours,),
            part.pick or (default.pick,),
            part.similarity or (default.similarity,),
        ]
        points = [Factors(*point) for point in itertools.product(*values)]
        for seed in part.seeds:
            for split in part.splits:
                count = world.development if split == "development" else world.splits[split].count
                for index in range(min(count, part.tasks or count)):
                    for arm, factors in itertools.product(part.arms, points):
                        self.arm(part.name, part.world, arm, factors, split, index, seed)

    def arm(
        self, part: str, world: str, arm: str, factors: Factors, split: str, index: int, seed: int
    ) -> str:
        key = arm_key(world, arm, factors, split, index, seed)
        if key in self.units:
            return key
        needs = [*self.arm_needs(world, arm, factors), self.features(world, split, index)]
        needs += self.rates(world, arm)
        if ARMS[arm].oracle:
            needs.append(self.arm(part, world, "iterative, full", factors, split, index, seed))
        return self.add(key, part, lambda s: s.run_arm(world, arm, factors, split, index, seed), needs)

    def arm_needs(self, world: str, name: str, factors: Factors) -> list[str]:
        arm, keys = ARMS[name], self.backbone(world)
        if arm.elastic:
            return [*keys, self.elastic(world)]
        if arm.zoo:
            keys += self.zoo(world, arm.zoo, factors.keep)
        if arm.universal:
            keys.append(self.universal(world, arm.universal, factors.keep))
        return keys

    def rates(self, world: str, arm: str) -> list[str]:
        """The runs on development tasks that choose an arm's learning rate."""
        config, world = self.config, self.config.worlds[world].rates_from or world
        count = config.costly_rate_tasks if ARMS[arm].costly else config.rate_tasks
        count = min(count, config.worlds[world].development)
        keys = []
        arm = ARMS[arm].rate_of or arm
        for index in range(count):
            features = self.features(world, "development", index)
            needs = [*self.arm_needs(world, arm, default_factors(config, world)), features]
            if ARMS[arm].ifp_cost is not None:
                needs += self.reference(world)
            for rate in rates_of(config, world, arm):
                keys.append(self.rate(world, arm, rate, index, needs))
        return keys

    def rate(self, world: str, arm: str, rate: float, index: int, needs: Sequence[str]) -> str:
        key = rate_key(world, arm, rate, index)
        return self.add(key, "rates", lambda s: s.run_rate(world, arm, rate, index), needs)

    def reference(self, world: str) -> list[str]:
        """Runs of MVP whose cost says what the iterative arms may cost."""
        return self.rates(world, REFERENCE_ARM)[:1]

    # ---- what is made once

    def backbone(self, world: str) -> list[str]:
        if not self.config.worlds[world].backbone.pretrain_steps:
            return []
        key = world_key(world, "backbone")
        return [self.add(key, "backbone", lambda s: s.world(world).make_backbone())]

    def features(self, world: str, split: str, index: int) -> str:
        key, needs = features_key(world, split, index), self.backbone(world)
        return self.add(key, "features", lambda s: s.world(world).make_features(split, index), needs)

    def zoo(self, world: str, kind: str, keep: float, seed: int = 0, count: int | None = None) -> list[str]:
        needs = self.backbone(world)
        if kind in STARTS:
            needs = [*needs, self.universal(world, STARTS[kind], keep)]
        count = count or self.config.worlds[world].zoo_tasks
        return [self.entry(world, kind, keep, index, seed, needs) for index in range(count)]

    def entry(self, world: str, kind: str, keep: float, index: int, seed: int, needs: Sequence[str]) -> str:
        key = zoo_key(world, kind, keep, index, seed)
        return self.add(
            key, f"zoo {kind}", lambda s: s.world(world).make_entry(kind, keep, index, seed), needs
        )

    def universal(self, world: str, kind: str, keep: float) -> str:
        key, needs = universal_key(world, kind, keep), self.backbone(world)
        return self.add(key, f"universal {kind}", lambda s: s.world(world).make_universal(kind, keep), needs)

    def elastic(self, world: str) -> str:
        needs = self.zoo(world, "plain", self.config.worlds[world].keep)
        return self.add(
            world_key(world, "elastic"), "elastic", lambda s: s.world(world).make_elastic(), needs
        )

    def describe(self, world: str) -> None:
        """What says something of a world's zoo and models beside the arms' accuracy."""
        config, keep = self.config, self.config.worlds[world].keep
        wanted = [zoo_key(world, "distilled", keep, i, 0) for i in range(config.worlds[world].zoo_tasks)]
        zoo = [key for key in wanted if key in self.units]
        if not zoo:
            return
        twice = self.zoo(world, "distilled", keep, seed=1, count=config.ceiling) if config.ceiling else []
        key = world_key(world, "overlap")
        self.add(key, "overlap", lambda s: s.run_overlap(world, keep), [*zoo, *twice])
        if config.latency_seconds:
            key = world_key(world, "latency")
            self.add(key, "latency", lambda s: s.run_latency(world), self.backbone(world))


def select(units: Sequence[Unit], only: Sequence[str]) -> list[Unit]:
    """The units whose part or key contains one of ``only``, and what they need, in the plan's order."""
    if not only:
        return list(units)
    by_key = {unit.key: unit for unit in units}
    wanted: set[str] = set()

    def want(key: str) -> None:
        if key not in wanted:
            wanted.add(key)
            for need in by_key[key].needs:
                want(need)

    for unit in units:
        if any(text in unit.part or text in unit.key for text in only):
            want(unit.key)
    return [unit for unit in units if unit.key in wanted]
