"""The units of work of a study, in the order in which they are wanted, with what each needs first.

A unit's key says all that its numbers depend on within its world; the world's own values enter the folder's identity.
So arms and parts may be added to a study that has begun.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .arms import ARMS, Arm, Point
from .config import Config, Part, rates_of
from .worlds import STARTS

if TYPE_CHECKING:
    from .study import Study

REFERENCE_ARM = "mvp"  # whose cost the iterative arms' budgets are multiples of


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
        for unit in planner.part(part):
            planner.add(unit)
        planner.describe(part.world)
    return list(planner.units.values())


def arm_key(world: str, arm: str, point: Point, split: str, index: int, seed: int) -> str:
    """``cifar/arm/mvp/J20 k0.1 N5 nearest proxy_leep/shared-003/s0``; what an arm does not depend on is left out."""
    return f"{world}/arm/{arm}/{point_text(ARMS[arm], point)}/{split}-{index:03d}/s{seed}"


def rate_key(world: str, arm: str, rate: float, index: int) -> str:
    return f"{world}/rate/{arm}/{rate:g}/development-{index:03d}"


def point_text(arm: Arm, point: Point) -> str:
    words = [f"J{point.steps}"] if arm.ifp_cost is None else []
    if not arm.dense:
        words.append(f"k{point.keep:g}")
    if arm.votes:
        words += [f"N{point.neighbours}", point.pick, point.similarity]
    return " ".join(words)


class _Planner:
    def __init__(self, config: Config) -> None:
        self.config = config
        self.units: dict[str, Unit] = {}

    def add(self, unit: Unit) -> str:
        """Put a unit behind what it needs (which has been added); returns its key."""
        self.units.setdefault(unit.key, unit)
        return unit.key

    def default(self, world: str) -> Point:
        c = self.config
        return Point(c.steps, c.worlds[world].keep, c.neighbours, "nearest", c.similarity)

    def part(self, part: Part) -> Iterator[Unit]:
        """Task by task, so that a part that is stopped early has all arms on the tasks it got to."""
        world, default = self.config.worlds[part.world], self.default(part.world)
        factors = [
            part.steps or (default.steps,),
            part.keep or (default.keep,),
            part.neighbours or (default.neighbours,),
            part.pick or (default.pick,),
            part.similarity or (default.similarity,),
        ]
        points = [Point(*values) for values in itertools.product(*factors)]
        for seed in part.seeds:
            for split in part.splits:
                count = world.development if split == "development" else world.splits[split].count
                for index in range(min(count, part.tasks or count)):
                    for arm, point in itertools.product(part.arms, points):
                        yield self.arm_unit(part.name, part.world, arm, point, split, index, seed)

    def arm_unit(
        self, part: str, world: str, arm: str, point: Point, split: str, index: int, seed: int
    ) -> Unit:
        key = arm_key(world, arm, point, split, index, seed)
        if key in self.units:
            return self.units[key]
        needs = [*self.arm_needs(part, world, ARMS[arm], point), self.features(part, world, split, index)]
        needs += self.rates(world, arm)
        if ARMS[arm].oracle:
            own = self.arm_unit(part, world, "iterative, full", point, split, index, seed)
            needs.append(self.add(own))
        return Unit(key, part, lambda s: s.run_arm(world, arm, point, split, index, seed), tuple(needs))

    def arm_needs(self, part: str, world: str, arm: Arm, point: Point) -> list[str]:
        keys = self.backbone(world)
        for need in arm.needs:
            kind, _, which = need.partition(" ")
            if kind == "zoo":
                keys += self.zoo(world, which, point.keep)
            elif kind == "universal":
                keys.append(self.universal(world, which, point.keep))
            else:
                keys.append(self.elastic(world))
        return keys

    def rates(self, world: str, arm: str) -> list[str]:
        """The runs on development tasks that choose an arm's learning rate."""
        config, world = self.config, self.config.worlds[world].rates_from or world
        count = config.costly_rate_tasks if ARMS[arm].costly else config.rate_tasks
        count = min(count, config.worlds[world].development)
        default, keys = self.default(world), []
        arm = ARMS[arm].rate_of or arm
        for index in range(count):
            features = self.features("rates", world, "development", index)
            needs = [*self.arm_needs("rates", world, ARMS[arm], default), features]
            if ARMS[arm].ifp_cost is not None:
                needs += self.reference(world)
            for rate in rates_of(config, world, arm):
                keys.append(
                    self.add(
                        Unit(
                            rate_key(world, arm, rate, index),
                            "rates",
                            lambda s, rate=rate, index=index: s.run_rate(world, arm, rate, index),
                            tuple(needs),
                        )
                    )
                )
        return keys

    def reference(self, world: str) -> list[str]:
        """Runs of MVP whose cost says what the iterative arms may cost."""
        return self.rates(world, REFERENCE_ARM)[:1]

    # ---- what is made once

    def backbone(self, world: str) -> list[str]:
        if not self.config.worlds[world].backbone.pretrain_steps:
            return []
        return [self.add(Unit(f"{world}/backbone", "backbone", lambda s: s.world(world).make_backbone()))]

    def features(self, part: str, world: str, split: str, index: int) -> str:
        needs = tuple(self.backbone(world))
        key = f"{world}/features/{split}-{index:03d}"
        return self.add(Unit(key, "features", lambda s: s.world(world).make_features(split, index), needs))

    def zoo(self, world: str, kind: str, keep: float, seed: int = 0, count: int | None = None) -> list[str]:
        needs = self.backbone(world)
        if kind in STARTS:
            needs = [*needs, self.universal(world, STARTS[kind], keep)]
        keys = []
        for index in range(count or self.config.worlds[world].zoo_tasks):
            keys.append(
                self.add(
                    Unit(
                        f"{world}/zoo {kind}/k{keep:g}/zoo-{index:03d}/s{seed}",
                        f"zoo {kind}",
                        lambda s, index=index: s.world(world).make_entry(kind, keep, index, seed),
                        tuple(needs),
                    )
                )
            )
        return keys

    def universal(self, world: str, kind: str, keep: float) -> str:
        return self.add(
            Unit(
                f"{world}/universal {kind}/k{keep:g}",
                f"universal {kind}",
                lambda s: s.world(world).make_universal(kind, keep),
                tuple(self.backbone(world)),
            )
        )

    def elastic(self, world: str) -> str:
        keep = self.config.worlds[world].keep
        needs = tuple(self.zoo(world, "plain", keep))
        run = lambda s: s.world(world).make_elastic(keep)  # noqa: E731
        return self.add(Unit(f"{world}/elastic", "elastic", run, needs))

    def describe(self, world: str) -> None:
        """What says something of a world's zoo and models beside the arms' accuracy."""
        config, keep = self.config, self.config.worlds[world].keep
        zoo = [key for key in self.units if key.startswith(f"{world}/zoo distilled/k{keep:g}/")]
        if not zoo:
            return
        twice = self.zoo(world, "distilled", keep, seed=1, count=config.ceiling) if config.ceiling else []
        needs = (*zoo, *twice)
        self.add(Unit(f"{world}/overlap", "overlap", lambda s: s.run_overlap(world, keep), needs))
        if config.latency_seconds:
            needs = tuple(self.backbone(world))
            self.add(Unit(f"{world}/latency", "latency", lambda s: s.run_latency(world), needs))


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
