"""Options that say which images and which tasks."""

from __future__ import annotations

import re
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from typer import Option

from mvp_ext.app.options import DATA
from mvp_ext.app.progress import Advance, progress_bar
from mvp_ext.data.images import ImageData, load_joined
from mvp_ext.data.tasks import Task, sample_tasks

# A name in quotes, up to the comma behind it or the end.
_QUOTED = re.compile(r'\s*"((?:[^"]|"")*)"\s*(?:,|$)')

Data = Annotated[
    list[str] | None,
    Option(
        help="digits; a folder class/image.png; an .npz, several joined by commas, or a folder of them; cifar100. "
        "Given several times, the data sets are joined, and classes named photos/cat. Default: digits.",
        rich_help_panel=DATA,
    ),
]
Cache = Annotated[
    str,
    Option(
        help="Where the decoded images of a folder are kept, so that they need no memory and are not decoded again: "
        "auto (beside the folder, if they take more than 1 GiB), on (beside the folder), off (in memory), or a "
        "folder for them.",
        rich_help_panel=DATA,
    ),
]
# Decoding that takes less is not worth a word.
_QUIET_SECONDS = 2.0


@dataclass(frozen=True)
class DataOptions:
    """Which images."""

    data: Data = None
    cache: Cache = "auto"
    max_train: Annotated[
        int | None, Option(help="At most so many training images a class.", rich_help_panel=DATA)
    ] = None

    def images(self) -> ImageData:
        return load_images(self.data, self.cache)


def load_images(given: list[str] | None, cache: str) -> ImageData:
    """What the options ``--data`` and ``--cache`` name, as one data set; decoding that takes long shows progress."""
    began = time.monotonic()
    advance: Advance | None = None
    with ExitStack() as stack:

        def progress(done: int, total: int) -> None:
            nonlocal advance
            if advance is None and time.monotonic() - began > _QUIET_SECONDS:
                advance = stack.enter_context(progress_bar("images"))
            if advance is not None:
                advance("decoding", done, total)

        known = {"auto": None, "on": True, "off": False}
        return load_joined(given or ["digits"], cache=known.get(cache, cache), progress=progress)


@dataclass(frozen=True)
class SamplingOptions:
    """How tasks are drawn."""

    classes: Annotated[
        str | None,
        Option(
            help="Draw tasks of these classes alone, joined by commas as of `prune`.", rich_help_panel=DATA
        ),
    ] = None
    exclude_classes: Annotated[
        str | None, Option(help="Draw no task with one of these classes.", rich_help_panel=DATA)
    ] = None
    classes_per_task: Annotated[int, Option(help="Classes of each sampled task.", rich_help_panel=DATA)] = 5
    task_seed: Annotated[
        int | None,
        Option(help="Seed of the draw of tasks. Default: 0; held out: 1000.", rich_help_panel=DATA),
    ] = None

    def tasks(
        self, data: ImageData, count: int, prefix: str, options: DataOptions, exclude: list[Task], seed: int
    ) -> list[Task]:
        """``count`` tasks of ``data``, none with the class set of one of ``exclude``; ``seed`` unless given."""
        pool = data.usable
        if self.classes is not None:
            pool = frozenset(data.numbers_of(names_in("classes", self.classes)))
        if self.exclude_classes is not None:
            pool -= set(data.numbers_of(names_in("exclude-classes", self.exclude_classes)))
        return sample_tasks(
            data,
            count,
            self.classes_per_task,
            seed if self.task_seed is None else self.task_seed,
            prefix,
            exclude=exclude,
            classes=pool,
            max_train_per_class=options.max_train,
        )


@dataclass(frozen=True)
class TaskOptions:
    """Which task `prune` prunes for."""

    classes: Annotated[
        str | None,
        Option(
            help="The task: class names joined by commas; a name with a comma in quotes: 'cat,\"fox, red\"'.",
            rich_help_panel=DATA,
        ),
    ] = None
    task: Annotated[
        Path | None, Option(help="The task: a file that --save-task wrote.", rich_help_panel=DATA)
    ] = None
    save_task: Annotated[
        Path | None, Option(help="Write the task's description here.", rich_help_panel=DATA)
    ] = None

    def check(self) -> None:
        """ValueError unless exactly one of the two ways to name a task was used."""
        if (self.classes is None) == (self.task is None):
            raise ValueError("prune: which task? Give either --classes name,name,… or --task FILE")

    def of(self, data: ImageData, options: DataOptions, seed: int) -> Task:
        """The task; its description is written where one wants it."""
        if self.task is not None:
            task = Task.load(self.task, data)
        else:
            names = names_in("classes", str(self.classes))
            limit = options.max_train
            task = Task.of("task", data, names, seed=seed, max_train_per_class=limit)
            # In the order of the outputs, whatever the order on the command line.
            task = replace(task, name="+".join(task.class_names))
        if self.save_task is not None:
            task.save(self.save_task)
        return task


def names_in(option: str, text: str) -> list[str]:
    """Names that are joined by commas. In quotes a name may have commas, a quote twice for one, and outer spaces."""
    names = []
    at = 0
    while at <= len(text):
        quoted = _QUOTED.match(text, at)
        if quoted is not None:
            names.append(quoted[1].replace('""', '"'))
            at = quoted.end()
            continue
        end = text.find(",", at)
        end = len(text) if end < 0 else end
        name = text[at:end].strip()
        if name.startswith('"') and '"' not in name[1:]:
            raise ValueError(f"--{option}: expected a closing quote and then a comma, got {text[at:]!r}")
        names += [name] if name else []
        at = end + 1
    if not names:
        raise ValueError(f"--{option}: expected class names joined by commas, got {text!r}")
    return names
