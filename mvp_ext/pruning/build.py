"""Making a zoo: one iteratively pruned, distilled model a task; and one that serves all tasks at once, the universal
model (the control to beat).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mvp_ext.data.tasks import Task
from mvp_ext.model.budget import kept_counts
from mvp_ext.model.checkpoint import PrunedCheckpoint
from mvp_ext.model.families import find_structure
from mvp_ext.model.structure import Structure
from mvp_ext.pruning.iterative import planned_steps
from mvp_ext.pruning.prune import RunOptions, prune, seen_by
from mvp_ext.pruning.result import Result
from mvp_ext.pruning.settings import Settings
from mvp_ext.train import parallel
from mvp_ext.train.backbone import Backbone, BackboneIdentity
from mvp_ext.zoo.entry import ZooEntry
from mvp_ext.zoo.shared import CLUSTERS, START, UNIVERSAL
from mvp_ext.zoo.zoo import Zoo, ZooError

# (what is being made, steps done, steps in all); what is there already is told once, as done.
Progress = Callable[[str, int, int], None]
# Of a refined zoo's optimizer steps: what goes into the model that its entries refine.
UNIVERSAL_SHARE = 0.8


@dataclass(frozen=True, eq=False)
class EntryJob:
    """All that the making of one entry takes, to be done here or in another process.

    Attributes:
        backbone: the dense model.
        task: the entry's.
        settings: as of ``build_zoo``.
        start: likewise.
        describe: of this job and its result: tensors by which the zoo knows the task, "class_means" and "temperature"
            among them; None: these two, by the dense backbone's features.
    """

    backbone: Backbone
    task: Task
    settings: Settings
    start: PrunedCheckpoint | None = None
    describe: Callable[[EntryJob, Result], dict[str, Tensor]] | None = None

    @property
    def name(self) -> str:
        return self.task.name


# Makes entries and yields the result of each when it is finished, in whatever order.
Run = Callable[[Iterable[EntryJob], Progress | None], Iterator[Result]]


def make_entry(job: EntryJob, progress: Progress | None = None) -> Result:
    """The result that becomes an entry; it depends on the job alone."""
    result = prune(
        job.backbone,
        job.task,
        settings=replace(job.settings, seed=job.settings.seed + job.task.seed),
        method="ifp",
        steps=job.settings.schedule.final_steps,
        run=RunOptions(on_step=_named(progress, job.name), start=job.start),
    )
    if job.describe is not None:
        result.tensors |= job.describe(job, result)
    return result


def one_by_one(jobs: Iterable[EntryJob], progress: Progress | None = None) -> Iterator[Result]:
    """Makes entries in this process, one after the other."""
    for job in jobs:
        yield make_entry(job, progress)


def build_zoo(
    model: nn.Module | Backbone,
    tasks: Sequence[Task],
    zoo: Zoo,
    settings: Settings | None = None,
    *,
    start: PrunedCheckpoint | None = None,
    progress: Progress | None = None,
    run: Run = one_by_one,
) -> list[Result]:
    """Prune the model for each task from scratch and add the results to the zoo.

    A task that the zoo already has is passed over, so an interrupted build goes on where it was. Each entry depends on
    the settings and its own task alone, not on the order of the tasks or on interruptions. Inside of ``data_parallel``
    the processes divide the tasks among them; they must see one zoo.

    Args:
        settings: of every entry; task i trains with seed ``settings.seed + tasks[i].seed``. The zoo keeps the first
            ones that it gets. Default: those.
        start: a pruned model of this backbone that every entry goes on from, instead of the dense one: entries of a
            well healed, wider model (the universal model of a larger ``keep``, say) share its healing and bring what
            they learned of their tasks. The zoo keeps it: merged weights that no voter has are its.
        progress: called with what is being made, its steps done, and its steps in all.
        run: makes the entries that are missing; ``ray_workers`` has one that makes several at once. Default: this
            process does, one after the other. Whoever makes them, this process alone writes the zoo.

    Returns:
        The results made by this call, in the order of the tasks.

    Raises:
        ZooError: the zoo is of another backbone, has one of the tasks with another number of units kept, or has entries
            of another start.
    """
    backbone, settings = seen_by(zoo, model), settings or Settings.of_zoo(zoo)
    structure = bind(backbone, zoo, settings)
    with parallel.first_alone():
        _bind_start(zoo, start)
    jobs = [EntryJob(backbone, task, settings, start) for task in tasks]
    return build_entries(jobs, structure, zoo, progress, run)


def build_entries(
    jobs: Sequence[EntryJob], structure: Structure, zoo: Zoo, progress: Progress | None, run: Run
) -> list[Result]:
    """Add the entries of these jobs that the zoo lacks, each when it is finished.

    They need nothing of each other: inside of ``data_parallel`` each process makes some of them, by itself.
    """
    share = parallel.mine(jobs)
    # None adds an entry before all know which are missing.
    parallel.wait()

    def missing() -> Iterator[EntryJob]:
        for job in share:
            name = job.task.name
            if zoo.is_sound(name):
                entry = zoo[name]
                _check_same_budget(entry, structure, job.settings)
                _tell_done(progress, name, entry.steps)
            else:
                yield job

    made = {}
    with parallel.alone():
        for result in run(missing(), progress):
            # Another process may have been faster.
            zoo.add(result, if_absent=True)
            made[result.task.name] = result
    parallel.wait()
    return [made[job.task.name] for job in jobs if job.task.name in made]


def build_refined_zoo(
    model: nn.Module | Backbone,
    tasks: Sequence[Task],
    zoo: Zoo,
    settings: Settings | None = None,
    *,
    share: float = UNIVERSAL_SHARE,
    progress: Progress | None = None,
    run: Run = one_by_one,
) -> list[Result]:
    """One pruned model of all tasks, and for each task an entry that refines it: what ``prune`` serves best from.

    It takes as many optimizer steps as ``build_zoo`` with the same schedule: ``share`` of them go into the universal
    model, the rest into the entries. All have the universal model's mask, so that the neighbours vote by their weights.
    May be interrupted and called again like ``build_zoo``. Tasks added later refine the model that is there. Where that
    is damaged, or was and ``Zoo.verify`` removed it, it is made again as it was. The universal model is made by this
    process, the entries by ``run`` (see ``build_zoo``).

    Raises:
        ValueError: ``share`` outside (0, 1).
        ZooError: the zoo is of another backbone, of another keep ratio, or its entries do not refine a universal model.
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"build_refined_zoo: share: expected a value in (0, 1), got {share}")
    if CLUSTERS in zoo.facts():
        raise ZooError(
            f"build_refined_zoo: {zoo.path}: its entries are experts of kinds of tasks; use another zoo"
        )
    backbone, settings = seen_by(zoo, model), settings or Settings.of_zoo(zoo)
    structure = bind(backbone, zoo, settings)
    steps, each = planned_zoo_steps(structure, settings, len(tasks), share)
    start = universal_start(backbone, tasks, zoo, settings, steps, progress)
    settings = replace(settings, schedule=replace(settings.schedule, final_steps=each))
    return build_zoo(backbone, tasks, zoo, settings, start=start, progress=progress, run=run)


def universal_start(
    backbone: Backbone,
    tasks: Sequence[Task],
    zoo: Zoo,
    settings: Settings,
    steps: int,
    progress: Progress | None,
) -> PrunedCheckpoint:
    """The universal model that a zoo's entries refine: made if it is not there, or again as it was if it was lost."""
    start, lost = zoo.shared(START), zoo.facts().get(f"lost {START}") or {}
    if start is not None and "keep" in start.extra and not start.is_sound():
        lost, start = start.extra, None
    if len(zoo) > 0 and start is None and "keep" not in lost:
        raise ZooError(
            f"build_refined_zoo: {zoo.path}: its {len(zoo)} entries refine no universal model; use another zoo"
        )
    if start is None:
        pooled = pooled_task(tasks, START, settings.seed)
        if lost:
            # Of the tasks at that time, which need not be these.
            pooled = replace(pooled, classes=tuple(lost["classes"]))
            steps = int(lost["result"]["cost"]["steps"])
        make_universal(backbone, pooled, zoo, settings, steps, progress)
        start = zoo.shared(START)
    else:
        _tell_done(progress, START, steps)
    assert start is not None
    if start.extra.get("keep") != settings.keep:
        raise ZooError(
            f"build_refined_zoo: {start.path}: expected a universal model with keep {settings.keep}, got "
            f"{start.extra.get('keep', 'one that build_zoo was given')}; use another zoo"
        )
    loaded = start.load()
    if lost and len(zoo) > 0 and all(entry.mask != loaded.mask for entry in zoo):
        raise ZooError(
            f"build_refined_zoo: {zoo.path}: the model that its entries refine was lost, and is another one with these "
            "settings or images; give those of before, or use another zoo"
        )
    return loaded


def planned_zoo_steps(
    structure: Structure, settings: Settings, tasks: int, share: float = UNIVERSAL_SHARE
) -> tuple[int, int]:
    """Optimizer steps of the model that a zoo's entries refine, and of each of ``tasks`` entries.

    With ``share`` 0 they refine none: those of ``build_zoo``.
    """
    each = planned_steps(structure, settings)
    return round(share * each * tasks), max(1, round((1 - share) * each)) if share else each


def zoo_steps(zoo: Zoo, tasks: Sequence[Task]) -> int:
    """Optimizer steps of these tasks' entries, and of the model that they start from.

    Raises:
        ZooError: the zoo lacks one of the tasks.
    """
    start = zoo.shared(START)
    made = {} if start is None else start.extra.get("result", {})
    return sum(zoo[task.name].steps for task in tasks) + int(made.get("cost", {}).get("steps", 0))


def build_universal(
    model: nn.Module | Backbone,
    tasks: Sequence[Task],
    zoo: Zoo,
    settings: Settings | None = None,
    *,
    steps: int | None = None,
    progress: Progress | None = None,
) -> Result | None:
    """One pruned model for all classes of the tasks together, distilled, at the whole zoo's number of steps.

    It is the control that a vote has to beat: where all tasks come from one distribution, one well healed model serves
    them all. None if the zoo has it already.

    Args:
        settings: default: those of the zoo.
        steps: all optimizer steps; default: as many as the zoo took for these tasks (``zoo_steps``).

    Raises:
        ZooError: ``steps`` is not given and the zoo lacks one of the tasks.
    """
    settings, known = settings or Settings.of_zoo(zoo), zoo.shared(UNIVERSAL)
    if known is not None and known.extra.get("keep") == settings.keep and known.is_sound():
        _tell_done(progress, UNIVERSAL, int(known.extra.get("result", {}).get("cost", {}).get("steps", 0)))
        return None
    steps = steps if steps is not None else zoo_steps(zoo, tasks)
    pooled = pooled_task(tasks, UNIVERSAL, settings.seed)
    return make_universal(seen_by(zoo, model), pooled, zoo, settings, steps, progress)


def make_universal(
    backbone: Backbone,
    pooled: Task,
    zoo: Zoo,
    settings: Settings,
    steps: int,
    progress: Progress | None,
    start: PrunedCheckpoint | None = None,
) -> Result:
    """Its name seeds nothing: two models of the same arguments are the same, whatever they are for.

    Inside of ``data_parallel`` all processes train it together, and the first one saves it.

    ``start``: a wider model that it is cut from, instead of the dense one.
    """
    structure, name = find_structure(backbone.model, settings.scope), pooled.name
    first = zoo.shared(name) is None
    removing = replace(settings, schedule=replace(settings.schedule, final_steps=0))
    result = prune(
        backbone,
        pooled,
        settings=settings,
        method="ifp",
        steps=max(0, steps - planned_steps(structure, removing, None if start is None else start.mask)),
        run=RunOptions(on_step=_named(progress, name), resume=zoo.path / f"{name}.partial", start=start),
    )
    extra = {"keep": settings.keep, "classes": list(pooled.classes), "result": result.summary()}
    if parallel.rank() == 0:
        # Another process may have been faster, and its file may be in use by now.
        zoo.save_shared(
            name, result.model, result.mask, result.structure, extra, card=result.card, if_absent=first
        )
    parallel.wait()
    return result


def pooled_task(tasks: Sequence[Task], name: str, seed: int = 0) -> Task:
    """All classes of these tasks as one task, with as many training images a class as the one that sees most."""
    classes = tuple(sorted({c for task in tasks for c in task.classes}))
    limits = [task.max_train_per_class for task in tasks]
    limit = None if None in limits else max(limit for limit in limits if limit is not None)
    return Task(name, tasks[0].data, classes, seed, limit)


def bind(backbone: Backbone, zoo: Zoo, settings: Settings) -> Structure:
    """Record whose models the zoo holds and with which settings; what is recorded of the backbone is compared."""
    structure = find_structure(backbone.model, settings.scope)
    zoo.bind(BackboneIdentity.of(backbone.model, structure))
    zoo.bind_preprocessing(backbone.preprocessing)
    if "settings" not in zoo.facts():
        zoo.record_facts(settings=settings.resolved(backbone.model).to_dict())
    return structure


def _bind_start(zoo: Zoo, start: PrunedCheckpoint | None) -> None:
    """Record what the zoo's entries start from, or compare it with what is recorded."""
    known = zoo.shared(START)
    if known is None and start is not None and len(zoo) == 0:
        zoo.save_shared(START, start.model, start.mask, start.structure, card=start.card)
        return
    if (known is None) != (start is None) or (known and start and not _same_model(known.load(), start)):
        raise ZooError(
            f"build_zoo: {zoo.path}: its entries start from another model than the one given "
            f"(expected {'the dense model' if known is None else known.path}); use another zoo"
        )


def _same_model(a: PrunedCheckpoint, b: PrunedCheckpoint) -> bool:
    mine, theirs = a.model.state_dict(), b.model.state_dict()
    return (
        a.mask == b.mask
        and mine.keys() == theirs.keys()
        and all(torch.equal(t.cpu(), theirs[n].cpu()) for n, t in mine.items())
    )


def _check_same_budget(entry: ZooEntry, structure: Structure, settings: Settings) -> None:
    """An entry of another budget is not what was asked for, and must not be passed over as if it were."""
    if settings.schedule.global_ranking:
        # Its counts follow from its scores.
        return
    expected = kept_counts(structure, settings.keep, settings.align)
    if tuple(entry.mask.kept.values()) != expected:
        raise ZooError(
            f"build_zoo: entry {entry.name!r} was made with keep {entry.keep:.4g} of all units, not "
            f"{settings.keep:.4g} (expected {sum(expected)} units, got {sum(entry.mask.kept.values())}); remove it or "
            "use another zoo"
        )


def _tell_done(progress: Progress | None, name: str, steps: int) -> None:
    if progress is not None:
        progress(name, steps, steps)


def _named(progress: Progress | None, name: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(name, done, total)
