"""Making a zoo: one iteratively pruned, distilled model a task; and the universal model, the control to beat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from mvp_ext.model.budget import kept_counts
from mvp_ext.model.checkpoint import read_pruned, save_pruned
from mvp_ext.model.structure import Structure, find_structure
from mvp_ext.pruning.backbone import Backbone
from mvp_ext.pruning.iterative import Schedule, planned_steps
from mvp_ext.pruning.prune import prune, universal_path
from mvp_ext.pruning.result import Result
from mvp_ext.pruning.tasks import Task
from mvp_ext.pruning.training import Recipe
from mvp_ext.pruning.zoo import Zoo, ZooError
from mvp_ext.pruning.zoo_entry import BackboneIdentity, ZooEntry

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
) -> list[Result]:
    """Prune the model for each task from scratch and add the results to the zoo.

    A task that the zoo already has is passed over, so an interrupted build goes on where it was. Each entry depends on
    ``seed`` and its own task alone, not on the order of the tasks or on interruptions.

    Returns:
        The results made by this call.

    Raises:
        ZooError: the zoo is of another backbone, or has one of the tasks with another number of units kept.
    """
    backbone, schedule = Backbone.wrap(model), schedule or Schedule()
    structure = find_structure(backbone.model, scope)
    zoo.bind(BackboneIdentity.of(backbone.model, structure))
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
        )
        zoo.add(result, if_absent=True)  # another process may have been faster
        results.append(result)
    return results


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
        steps: all optimizer steps; default: as many as these tasks' entries in the zoo took together.

    Raises:
        ZooError: ``steps`` is not given and the zoo lacks one of the tasks.
    """
    path = universal_path(zoo)
    backbone, schedule = Backbone.wrap(model), schedule or Schedule()
    structure = find_structure(backbone.model, scope)
    if path.exists() and read_pruned(path).extra.get("keep") == keep:
        return None
    steps = steps if steps is not None else sum(zoo[task.name].steps for task in tasks)
    classes = tuple(sorted({c for task in tasks for c in task.classes}))
    pooled = Task("universal", tasks[0].data, classes, seed=seed)
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
        on_step=_named(progress, "universal"),
        resume=path.with_suffix(".partial"),
    )
    extra = {"keep": keep, "classes": list(classes), "result": result.summary()}
    save_pruned(result.model, path, mask=result.mask, structure=result.structure, extra=extra)
    return result


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
