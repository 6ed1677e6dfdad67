"""Making a zoo: one iteratively pruned, distilled model a task; and one that serves all tasks at once, the universal
model (the control to beat).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mvp_ext.data.tasks import Task
from mvp_ext.model.budget import kept_counts
from mvp_ext.model.checkpoint import PrunedCheckpoint, load_pruned, read_pruned, save_pruned
from mvp_ext.model.families import find_structure
from mvp_ext.model.structure import Structure
from mvp_ext.pruning.iterative import Schedule, planned_steps
from mvp_ext.pruning.prune import prune
from mvp_ext.pruning.result import Result
from mvp_ext.train.backbone import Backbone, BackboneIdentity
from mvp_ext.train.recipe import Recipe
from mvp_ext.zoo.entry import ZooEntry
from mvp_ext.zoo.shared import start_path, universal_path
from mvp_ext.zoo.zoo import Zoo, ZooError

Progress = Callable[[str, int, int], None]  # (what is being made, steps done, steps in all)


def build_zoo(
    model: nn.Module | Backbone,
    tasks: Sequence[Task],
    zoo: Zoo,
    *,
    keep: float = 0.3,
    scope: str | None = None,
    align: int = 8,
    schedule: Schedule | None = None,
    recipe: Recipe | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    start: PrunedCheckpoint | None = None,
) -> list[Result]:
    """Prune the model for each task from scratch and add the results to the zoo.

    A task that the zoo already has is passed over, so an interrupted build goes on where it was. Each entry depends on
    ``seed`` and its own task alone, not on the order of the tasks or on interruptions.

    Args:
        start: a pruned model of this backbone that every entry goes on from, instead of the dense one: entries of a
            well healed, wider model (the universal model of a larger ``keep``, say) share its healing and bring what
            they learned of their tasks. The zoo keeps it: merged weights that no voter has are its.

    Returns:
        The results made by this call.

    Raises:
        ZooError: the zoo is of another backbone, has one of the tasks with another number of units kept, or has entries
            of another start.
    """
    backbone, schedule = Backbone.wrap(model), schedule or Schedule()
    structure = find_structure(backbone.model, scope)
    zoo.bind(BackboneIdentity.of(backbone.model, structure))
    _bind_start(zoo, start)
    results = []
    for task in tasks:
        if task.name in zoo:
            _check_same_budget(zoo[task.name], structure, keep, align, schedule)
            continue
        result = prune(
            backbone,
            task,
            keep=keep,
            scope=scope,
            align=align,
            method="ifp",
            steps=schedule.final_steps,
            schedule=schedule,
            recipe=recipe,
            seed=seed + task.seed,
            on_step=_named(progress, task.name),
            start=start,
        )
        zoo.add(result, if_absent=True)  # another process may have been faster
        results.append(result)
    return results


def build_refined_zoo(
    model: nn.Module | Backbone,
    tasks: Sequence[Task],
    zoo: Zoo,
    *,
    keep: float = 0.3,
    scope: str | None = None,
    align: int = 8,
    schedule: Schedule | None = None,
    share: float = 0.8,
    recipe: Recipe | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Result]:
    """One pruned model of all tasks, and for each task an entry that refines it: what ``prune`` serves best from.

    It takes as many optimizer steps as ``build_zoo`` with the same schedule: ``share`` of them go into the universal
    model, the rest into the entries. All have the universal model's mask, so that the neighbours vote by their weights.
    May be interrupted and called again like ``build_zoo``. Tasks added later refine the model that is there.

    Raises:
        ValueError: ``share`` outside (0, 1).
        ZooError: the zoo is of another backbone, of another keep ratio, or its entries do not refine a universal model.
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"build_refined_zoo: share: expected a value in (0, 1), got {share}")
    backbone, schedule = Backbone.wrap(model), schedule or Schedule()
    structure = find_structure(backbone.model, scope)
    zoo.bind(BackboneIdentity.of(backbone.model, structure))
    path = start_path(zoo)
    if len(zoo) > 0 and not path.exists():
        raise ZooError(
            f"build_refined_zoo: {zoo.path}: its {len(zoo)} entries refine no universal model; use another zoo"
        )
    each = planned_steps(structure, keep, align, schedule)
    common: dict[str, Any] = {
        "keep": keep,
        "scope": scope,
        "align": align,
        "recipe": recipe,
        "seed": seed,
        "progress": progress,
    }
    if not path.exists():
        steps = round(share * each * len(tasks))
        _build_universal(backbone, tasks, path, "start", steps=steps, schedule=schedule, **common)
    start = load_pruned(path)
    if start.extra.get("keep") != keep:
        raise ZooError(
            f"build_refined_zoo: {path}: expected a universal model with keep {keep}, got "
            f"{start.extra.get('keep', 'one that build_zoo was given')}; use another zoo"
        )
    refining = replace(schedule, final_steps=max(1, round((1 - share) * each)))
    return build_zoo(backbone, tasks, zoo, schedule=refining, start=start, **common)


def zoo_steps(zoo: Zoo, tasks: Sequence[Task]) -> int:
    """Optimizer steps of these tasks' entries, and of the model that they start from.

    Raises:
        ZooError: the zoo lacks one of the tasks.
    """
    path = start_path(zoo)
    start = read_pruned(path).extra.get("result", {}) if path.exists() else {}
    return sum(zoo[task.name].steps for task in tasks) + int(start.get("cost", {}).get("steps", 0))


def build_universal(
    model: nn.Module | Backbone,
    tasks: Sequence[Task],
    zoo: Zoo,
    *,
    keep: float = 0.3,
    scope: str | None = None,
    align: int = 8,
    schedule: Schedule | None = None,
    steps: int | None = None,
    recipe: Recipe | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Result | None:
    """One pruned model for all classes of the tasks together, distilled, at the whole zoo's number of steps.

    It is the control that a vote has to beat: where all tasks come from one distribution, one well healed model serves
    them all. None if the zoo has it already.

    Args:
        steps: all optimizer steps; default: as many as the zoo took for these tasks (``zoo_steps``).

    Raises:
        ZooError: ``steps`` is not given and the zoo lacks one of the tasks.
    """
    path = universal_path(zoo)
    if path.exists() and read_pruned(path).extra.get("keep") == keep:
        return None
    return _build_universal(
        Backbone.wrap(model),
        tasks,
        path,
        "universal",
        keep=keep,
        scope=scope,
        align=align,
        schedule=schedule or Schedule(),
        steps=steps if steps is not None else zoo_steps(zoo, tasks),
        recipe=recipe,
        seed=seed,
        progress=progress,
    )


def _build_universal(
    backbone: Backbone,
    tasks: Sequence[Task],
    path: Path,
    name: str,
    *,
    keep: float,
    scope: str | None,
    align: int,
    schedule: Schedule,
    steps: int,
    recipe: Recipe | None,
    seed: int,
    progress: Progress | None,
) -> Result:
    """``name`` seeds nothing: two models of the same arguments are the same, whatever they are for."""
    structure = find_structure(backbone.model, scope)
    pooled = pooled_task(tasks, name, seed)
    removing = planned_steps(structure, keep, align, replace(schedule, final_steps=0))
    schedule = replace(schedule, final_steps=max(0, steps - removing))
    result = prune(
        backbone,
        pooled,
        keep=keep,
        scope=scope,
        align=align,
        method="ifp",
        steps=schedule.final_steps,
        schedule=schedule,
        recipe=recipe,
        seed=seed,
        on_step=_named(progress, name),
        resume=path.with_suffix(".partial"),
    )
    extra = {"keep": keep, "classes": list(pooled.classes), "result": result.summary()}
    save_pruned(result.model, path, mask=result.mask, structure=result.structure, extra=extra)
    return result


def pooled_task(tasks: Sequence[Task], name: str, seed: int = 0) -> Task:
    """All classes of these tasks as one task."""
    return Task(name, tasks[0].data, tuple(sorted({c for task in tasks for c in task.classes})), seed=seed)


def _bind_start(zoo: Zoo, start: PrunedCheckpoint | None) -> None:
    """Record what the zoo's entries start from, or compare it with what is recorded."""
    path = start_path(zoo)
    if not path.exists() and start is not None and len(zoo) == 0:
        save_pruned(start.model, path, mask=start.mask, structure=start.structure)
        return
    known = load_pruned(path) if path.exists() else None
    if (known is None) != (start is None) or (known and start and not _same_model(known, start)):
        raise ZooError(
            f"build_zoo: {zoo.path}: its entries start from another model than the one given "
            f"(expected {'the dense model' if known is None else path}); use another zoo"
        )


def _same_model(a: PrunedCheckpoint, b: PrunedCheckpoint) -> bool:
    mine, theirs = a.model.state_dict(), b.model.state_dict()
    return (
        a.mask == b.mask
        and mine.keys() == theirs.keys()
        and all(torch.equal(t.cpu(), theirs[n].cpu()) for n, t in mine.items())
    )


def _check_same_budget(
    entry: ZooEntry, structure: Structure, keep: float, align: int, schedule: Schedule
) -> None:
    """An entry of another budget is not what was asked for, and must not be passed over as if it were."""
    if schedule.global_ranking:
        return  # its counts follow from its scores
    expected = kept_counts(structure, keep, align)
    if tuple(entry.mask.kept.values()) != expected:
        raise ZooError(
            f"build_zoo: entry {entry.name!r} was made with keep {entry.keep:.4g} of all units, not {keep:.4g} "
            f"(expected {sum(expected)} units, got {sum(entry.mask.kept.values())}); remove it or use another zoo"
        )


def _named(progress: Progress | None, name: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(name, done, total)
