"""The keys of a study's journal: what a unit's numbers depend on within its world, as one line of text.

``world/kind`` and then, where the kind has them, the arm, the values it was run at, the task and the seed::

    cifar/arm/mvp/J20 k0.1 N5 nearest proxy_leep/shared-003/s0      cifar/rate/mvp/0.001/development-000
    cifar/zoo distilled/k0.1/zoo-007/s0                             cifar/universal whole/k0.1
    cifar/features/shared-003                                       cifar/backbone, elastic, overlap, latency

Published journals have them: they may grow, not change.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .arms import ARMS
from .config import Factors


@dataclass(frozen=True)
class Key:
    """A key's parts; empty where its kind has none.

    Attributes:
        kind: "arm", "rate", "features", "zoo distilled", "universal whole", "elastic", …
        at: an arm's factors, a learning rate, or what was made for a keep ratio: "k0.1".
        split, index: the task.
    """

    world: str
    kind: str
    arm: str = ""
    at: str = ""
    split: str = ""
    index: int = 0
    seed: int | None = None

    def __str__(self) -> str:
        task = f"{self.split}-{self.index:03d}" if self.split else ""
        seed = "" if self.seed is None else f"s{self.seed}"
        return "/".join(filter(None, (self.world, self.kind, self.arm, self.at, task, seed)))

    @property
    def made(self) -> str:
        """What is made once that this is (a part of): ``zoo distilled/k0.1``."""
        return "/".join(filter(None, (self.kind, self.at)))


def parse(text: str) -> Key:
    """The parts of a key; ``str`` makes it again. ValueError for what is none."""
    world, kind, *rest = text.split("/")
    arm = rest.pop(0) if rest and kind in ("arm", "rate") else ""
    seed = int(rest.pop()[1:]) if rest and re.fullmatch(r"s\d+", rest[-1]) else None
    split, index = "", "0"
    if rest and re.fullmatch(r".+-\d{3,}", rest[-1]):
        split, _, index = rest.pop().rpartition("-")
    at = rest.pop() if rest else ""
    key = Key(world, kind, arm, at, split, int(index), seed)
    if str(key) != text:
        raise ValueError(f"not a key of the study: {text!r}")
    return key


def arm_key(world: str, arm: str, factors: Factors, split: str, index: int, seed: int) -> str:
    return str(Key(world, "arm", arm, factors_text(arm, factors), split, index, seed))


def rate_key(world: str, arm: str, rate: float, index: int) -> str:
    return str(Key(world, "rate", arm, f"{rate:g}", "development", index))


def features_key(world: str, split: str, index: int) -> str:
    return str(Key(world, "features", split=split, index=index))


def zoo_key(world: str, kind: str, keep: float, index: int, seed: int) -> str:
    return str(Key(world, f"zoo {kind}", at=_keep_text(keep), split="zoo", index=index, seed=seed))


def universal_key(world: str, kind: str, keep: float) -> str:
    return str(Key(world, f"universal {kind}", at=_keep_text(keep)))


def world_key(world: str, kind: str) -> str:
    """Of what a world has one of: "backbone", "elastic", "overlap", "latency"."""
    return str(Key(world, kind))


def factors_text(arm: str, factors: Factors) -> str:
    """``J20 k0.1 N5 nearest proxy_leep``; what the arm does not depend on is left out."""
    words = [f"J{factors.steps}"] if ARMS[arm].ifp_cost is None else []
    if not ARMS[arm].dense:
        words.append(_keep_text(factors.keep))
    if ARMS[arm].votes:
        words += [f"N{factors.neighbours}", factors.pick, factors.similarity]
    return " ".join(words)


def _keep_text(keep: float) -> str:
    return f"k{keep:g}"
