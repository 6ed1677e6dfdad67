"""What a study is made of, read from one TOML file a scale. Unknown keys are errors: a typo must not run for hours."""

from __future__ import annotations

import dataclasses
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib  # type: ignore[no-redef]

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class BackboneConfig:
    """The dense model: with weights from a file, or pre-trained by the program on the classes that the zoo may see.

    ``pretrain_*``: steps, batch size and peak learning rate of that training; 0 steps: ``weights`` (or, for "tiny",
    a model of the tests' size with random weights) are used as they are.
    """

    model: str
    image_size: int
    weights: str = ""
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    pretrain_steps: int = 0
    pretrain_batch: int = 32
    pretrain_rate: float = 3e-3


@dataclass(frozen=True)
class Split:
    """Held-out tasks: ``kind`` "shared" (of the zoo's classes), "hidden" (classes hidden from the zoo, and from a
    backbone that is pre-trained here) or "other" (all of another ``source``).

    ``again``: drawn to ask once more what other tasks have suggested. What is asked of such tasks was fixed before they
    were run, so its p-values are corrected among themselves, not with all that was looked at before.
    """

    kind: str
    count: int
    classes: int = 10
    source: str = ""
    again: bool = False


@dataclass(frozen=True)
class World:
    """A backbone, the data, a zoo and the tasks held out from it.

    Attributes:
        sources: what ``load_data`` takes, relative paths below the folder of ``--files``; several are joined into one
            data set at ``joined_size`` pixels. ``optional_sources`` are used where they are there.
        domains: lists of superclasses (or names of joined sources): each task's classes are then of one domain.
        hidden: number of classes that neither the zoo nor universal models nor a backbone pre-trained here see.
        zoo_train, task_train: training images a class of the zoo's tasks, and of targets.
        rates_from: the world whose learning rates are used; "" = its own. more_rates: learning rates tried here beside
            the study's, where arms have their best at the end of those.
        start_keep, start_share: of the specialised zoo: the keep ratio of the universal model that entries start from,
            and the share of the zoo's steps spent on it. base_share: the same of the refined zoo, whose entries start
            from a universal model of their own keep ratio. elastic_share: of the elastic weights.
    """

    backbone: BackboneConfig
    sources: tuple[str, ...]
    splits: dict[str, Split]
    optional_sources: tuple[str, ...] = ()
    joined_size: int = 32
    domains: tuple[tuple[str, ...], ...] = ()
    hidden: int = 0
    scope: str = "inner"
    keep: float = 0.1
    align: int = 8
    classes_per_task: int = 10
    zoo_tasks: int = 24
    zoo_train: int | None = None
    task_train: int | None = 100
    development: int = 3
    rates_from: str = ""
    more_rates: tuple[float, ...] = ()
    share: float = 0.1
    steps_per_round: int = 5
    final_steps: int = 200
    plain_final_steps: int = 40
    start_keep: float = 0.2
    start_share: float = 0.5
    base_share: float = 0.8
    elastic_share: float = 0.5
    elastic_range: tuple[float, float] = (0.05, 0.3)
    batch_size: int = 32
    precision: str = "auto"
    seed: int = 0


@dataclass(frozen=True)
class Part:
    """A set of units of work: arms × values of one or more factors × tasks × seeds. Parts are run in their order.

    ``tasks``: only so many tasks of each split. The other fields are factors; an empty one has its default.
    """

    name: str
    world: str
    arms: tuple[str, ...]
    splits: tuple[str, ...] = ("shared",)
    tasks: int | None = None
    seeds: tuple[int, ...] = (0,)
    steps: tuple[int, ...] = ()
    keep: tuple[float, ...] = ()
    neighbours: tuple[int, ...] = ()
    pick: tuple[str, ...] = ()
    similarity: tuple[str, ...] = ()


@dataclass(frozen=True)
class Config:
    """A study. ``steps``, ``neighbours``, ``similarity``: the defaults that factors vary around.

    ``rates``: the learning rates tried for each arm, on ``rate_tasks`` development tasks (``costly_rate_tasks`` for
    arms that take many steps); ``more_rates``: others, for arms whose best one lies at the end of these. ``ceiling``:
    tasks of the zoo that are pruned with a second seed. ``latency_seconds``: spent on timing each model; 0: none is
    timed. ``clock``: what costs in seconds are read from, "wall", or "cpu" where units of one thread each share a
    machine with other work.
    """

    name: str
    title: str
    machine: str
    parts: tuple[Part, ...]
    worlds: dict[str, World]
    threads: int = 1
    steps: int = 20
    neighbours: int = 5
    similarity: str = "proxy_leep"
    rates: tuple[float, ...] = (2.5e-4, 1e-3, 4e-3)
    more_rates: dict[str, tuple[float, ...]] = field(default_factory=dict)
    rate_tasks: int = 3
    costly_rate_tasks: int = 1
    ceiling: int = 3
    latency_seconds: float = 1.0
    clock: Literal["wall", "cpu"] = "wall"
    latency_keeps: tuple[float, ...] = ()
    default_arm: str = "mvp"
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        for part in self.parts:
            if part.world not in self.worlds:
                raise ValueError(f"part {part.name!r}: no world {part.world!r} among {sorted(self.worlds)}")
            if unknown := set(part.splits) - set(self.worlds[part.world].splits) - {"development"}:
                raise ValueError(f"part {part.name!r}: world {part.world!r} has no split {min(unknown)!r}")
        if self.clock == "cpu" and self.threads != 1:
            raise ValueError(
                f"clock 'cpu' counts the seconds of one core: expected threads = 1, got {self.threads}"
            )
        names = [part.name for part in self.parts]
        if len(set(names)) < len(names):
            raise ValueError(f"parts must have different names, got {names}")
        for name, world in self.worlds.items():
            if world.rates_from and world.rates_from not in self.worlds:
                raise ValueError(f"world {name!r}: rates_from: no world {world.rates_from!r}")
            if world.rates_from and world.more_rates:
                raise ValueError(f"world {name!r}: more_rates: its rates are those of {world.rates_from!r}")


@dataclass(frozen=True)
class Factors:
    """At which values of all factors an arm is run."""

    steps: int
    keep: float
    neighbours: int
    pick: str = "nearest"
    similarity: str = "proxy_leep"


def default_factors(config: Config, world: str) -> Factors:
    """Where a world's arms are run unless a part says otherwise, and where their learning rates are chosen."""
    return Factors(config.steps, config.worlds[world].keep, config.neighbours, similarity=config.similarity)


def rates_of(config: Config, world: str, arm: str) -> tuple[float, ...]:
    """The learning rates tried for an arm in a world that has its own (no ``rates_from``)."""
    return (*config.rates, *config.more_rates.get(arm, ()), *config.worlds[world].more_rates)


def load_config(name: str | Path) -> Config:
    """A configuration by its name (``smoke``, ``cpu``, ``h200``) or by the path of a TOML file."""
    path = Path(name) if str(name).endswith(".toml") else FOLDER / f"{name}.toml"
    with open(path, "rb") as file:
        raw = tomllib.load(file)
    raw["parts"] = raw.pop("part", [])
    # "like": another world's values, some replaced.
    for world in raw.get("worlds", {}).values():
        if like := world.pop("like", None):
            for key, value in raw["worlds"][like].items():
                world.setdefault(key, value)
    return _build(Config, {"name": path.stem, **raw}, str(path))


def _build(kind: Any, value: Any, where: str) -> Any:
    """``value`` as ``kind``; ValueError names what does not fit."""
    origin, arguments = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        known = {f.name for f in dataclasses.fields(kind)}
        if not isinstance(value, dict) or (unknown := set(value) - known):
            raise ValueError(
                f"{where}: expected {', '.join(sorted(known))}; got {sorted(unknown) if value else value}"
            )
        try:
            return kind(**{k: _build(hints[k], v, f"{where}: {k}") for k, v in value.items()})
        except TypeError as error:
            raise ValueError(f"{where}: {error}") from None
    if origin in (Union, types.UnionType):
        inner = next(a for a in arguments if a is not type(None))
        return None if value is None else _build(inner, value, where)
    if origin is tuple:
        kinds = [arguments[0]] * len(value) if arguments[-1] is ... else arguments
        return tuple(_build(k, v, where) for k, v in zip(kinds, value, strict=True))
    if origin is dict:
        return {k: _build(arguments[1], v, f"{where}: {k}") for k, v in value.items()}
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where}: expected one of {', '.join(map(repr, arguments))}, got {value!r}")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind):
        raise ValueError(f"{where}: expected {kind.__name__}, got {value!r}")
    return value
