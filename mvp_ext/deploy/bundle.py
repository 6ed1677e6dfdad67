"""Many tasks in one file: small models that differ in their classifier alone share everything else.

Models of a vote without steps after it differ so; batch norms, too, may have running means and variances of each task's
own. Every other tensor, the mask, how the model is built and how it sees images must be the same, and are stored, and
held in memory, once.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from mvp_ext import storage
from mvp_ext.model.card import ModelCard
from mvp_ext.model.checkpoint import (
    PrunedCheckpoint,
    PrunedState,
    cut_from_dict,
    cut_to_dict,
    describe,
    read_pruned,
)
from mvp_ext.model.create_args import check_args
from mvp_ext.model.ends import Features, as_input, classifiers, hidden_classifiers
from mvp_ext.model.mask import Mask
from mvp_ext.model.prediction import PREDICT_BATCH, Predictions, predict, predict_tasks
from mvp_ext.model.preprocessing import Preprocessing
from mvp_ext.model.structure import Structure
from mvp_ext.storage import FileFormatError

# Of a file, as ``storage.kind_of`` tells it.
BUNDLE = "mvp_ext.bundle"
_VERSION = 1
# Of a batch norm: what a task may have of its own beside its classifier.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

Source: TypeAlias = "PrunedCheckpoint | str | os.PathLike[str]"


class Part(NamedTuple):
    """A task's own part of a bundle: rows of ``classifier``, one a class, and one row of ``statistics``."""

    rows: slice
    statistics: int


@dataclass(frozen=True, eq=False)
class Bundle:
    """Models of many tasks with one backbone, of ``load_bundle``.

    Attributes:
        cards: task → what its file said of its model, in the order that the tasks were given in.
        parts: task → which part of ``classifier`` and ``statistics`` is its own; tasks with equal statistics are beside
            each other.
        classifier: weight float [K, F] and bias float [K] by their names in the state dict, K the classes of all tasks
            together.
        statistics: name in the state dict → [G, …], of the G different sets of them.
        shared: what all tasks have; its state has neither classifier nor statistics.
        features: the backbone, with the first task's statistics.
    """

    cards: Mapping[str, ModelCard]
    parts: Mapping[str, Part] = field(repr=False)
    classifier: Mapping[str, Tensor] = field(repr=False)
    statistics: Mapping[str, Tensor] = field(repr=False)
    shared: PrunedState = field(repr=False)
    features: Features = field(repr=False)
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(self.cards)

    @property
    def mask(self) -> Mask:
        """Of the dense model: which of its units stayed."""
        return self.shared.mask

    @property
    def structure(self) -> Structure:
        """Of the dense model."""
        return self.shared.structure

    @cached_property
    def groups(self) -> dict[int, list[str]]:
        """Row of ``statistics`` → the tasks that have it: those need one pass of the backbone."""
        found: dict[int, list[str]] = {}
        for task, part in self.parts.items():
            found.setdefault(part.statistics, []).append(task)
        return found

    @cached_property
    def linear(self) -> tuple[Tensor, Tensor | None]:
        """The classifier's weight and bias, where it has one."""
        by_kind = {name.rpartition(".")[2]: tensor for name, tensor in self.classifier.items()}
        return by_kind["weight"].flatten(1), by_kind.get("bias")

    def classes(self, task: str) -> int:
        """How many the task has; ValueError where there is no such task."""
        rows = self._part(task).rows
        return int(rows.stop - rows.start)

    def rows_of(self, tasks: Sequence[str]) -> slice:
        """The rows of ``classifier`` of tasks that are beside each other, as those of a group are."""
        return slice(self.parts[tasks[0]].rows.start, self.parts[tasks[-1]].rows.stop)

    def checkpoint_of(self, task: str) -> PrunedCheckpoint:
        """What ``load_pruned`` gave of the task's own file, without ``extra``; the tensors are the bundle's own.

        Raises:
            ValueError: there is no such task.
        """
        part, card = self._part(task), self.cards[task]
        return _built(self.shared, self.classifier, self.statistics, part, card)

    def model_of(self, task: str) -> nn.Module:
        """The model of ``checkpoint_of``: a plain timm module in eval mode."""
        return self.checkpoint_of(task).model

    @overload
    def predict(self, images: Any, task: str, *, batch: int = ...) -> Predictions: ...

    @overload
    def predict(self, images: Any, task: None = None, *, batch: int = ...) -> dict[str, Predictions]: ...

    def predict(
        self, images: Any, task: str | None = None, *, batch: int = PREDICT_BATCH
    ) -> Predictions | dict[str, Predictions]:
        """Class names with probabilities, of one task or of all.

        Args:
            images: one image, or a sequence of them: paths, Pillow images, uint8 arrays [H, W(, 3)]; or a tensor uint8
                [n, H, W, 3].
            task: one of ``tasks``; None: all, in one pass of the backbone for each different set of statistics.
            batch: images a pass.

        Returns:
            Of one task what its own file predicts, to the bit where its classifier is a linear layer; of all tasks,
            task → the same up to rounding.

        Raises:
            ValueError: there is no such task, nobody said how the models see images, or an image is of another kind.
            OSError: no image.
        """
        if task is not None:
            part = self._part(task)
            return predict(lambda x: self._logits(x, *part), images, self.cards[task], batch=batch)
        return predict_tasks(self.logits, images, self.cards, batch=batch)

    def logits(self, x: Tensor) -> dict[str, Tensor]:
        """Task → float [B, k], of a batch as the preprocessing makes it, float32 [B, 3, S, S]."""
        return self.by_task(
            [self._logits(x, self.rows_of(tasks), group) for group, tasks in self.groups.items()]
        )

    def by_task(self, joined: Sequence[Tensor]) -> dict[str, Tensor]:
        """Of each group the logits of its tasks side by side, [B, Σk] → task → [B, k]."""
        found: dict[str, Tensor] = {}
        for tasks, logits in zip(self.groups.values(), joined, strict=True):
            found |= zip(tasks, logits.split([self.classes(task) for task in tasks], 1), strict=True)
        return {task: found[task] for task in self.tasks}

    def _part(self, task: str) -> Part:
        if task not in self.parts:
            shown = ", ".join(self.tasks[:10]) + (", …" if len(self.tasks) > 10 else "")
            raise ValueError(f"Bundle: task: expected one of {shown}, got {task!r}")
        return self.parts[task]

    def _logits(self, x: Tensor, rows: slice, statistics: int) -> Tensor:
        weight, bias = self.linear
        x = as_input(self.features.model, x)
        if len(self.groups) == 1:
            features = self.features(x)
        else:
            own = {f"model.{name}": each[statistics] for name, each in self.statistics.items()}
            # While it computes, the backbone has these statistics: not those of another thread.
            with self._lock:
                features = functional_call(self.features, own, (x,))
        return functional.linear(features, weight[rows], None if bias is None else bias[rows])


def save_bundle(
    models: Mapping[str, Source] | Sequence[Source | tuple[str | None, Source]], path: str | os.PathLike[str]
) -> None:
    """Write models of many tasks, with one backbone, to one file, whole or not at all.

    They may differ in their classifiers and in the running statistics of batch norms; each has a card of its own. What
    ``extra`` holds is left out. ``load_bundle`` reads the file.

    Args:
        models: small models, or paths of their files (of which no model is built), by the names of their tasks: a
            mapping, or pairs. Without a name, or with None, the task is that of the model's card.
        path: of the file; its folder must exist.

    Raises:
        ValueError: no models, one without a name or with that of another, one without one linear classifier, or one
            with another backbone, mask, preprocessing or way to build it: the message names file, part, what was
            expected and what it has. Nothing is written then.
        OSError: a file could not be read or written; what was at ``path`` is untouched.
    """
    pairs = models.items() if isinstance(models, Mapping) else models
    named = [each if isinstance(each, tuple) else (None, each) for each in pairs]
    first: tuple[str, PrunedState] | None = None
    classifier: tuple[str, ...] = ()
    # Of each task: its classifier's tensors, and which of the sets of statistics.
    tasks: dict[str, tuple[dict[str, Tensor], int, ModelCard]] = {}
    sets: dict[bytes, tuple[int, dict[str, Tensor]]] = {}
    for number, (given, source) in enumerate(named, 1):
        if isinstance(source, PrunedCheckpoint):
            what = f"model {number}" if given is None else f"model {given!r}"
            state = describe(source.model, mask=source.mask, structure=source.structure, card=source.card)
        else:
            what, state = os.fspath(source), read_pruned(source)
        task = state.card.task if given is None else given
        if not task:
            raise ValueError(f"save_bundle: {what}: its card names no task; give the model a name")
        if task in tasks:
            raise ValueError(f"save_bundle: {what}: expected a name that no other has, got {task!r} again")
        if first is None:
            first, classifier = (what, state), _classifier_of(state.build(), what)
        else:
            _check_fits(what, state, *first, classifier)
        statistics = {name: tensor for name, tensor in state.state.items() if _is_statistic(name)}
        group, _ = sets.setdefault(_digest(statistics), (len(sets), statistics))
        tasks[task] = ({name: state.state[name] for name in classifier}, group, state.card)
    if first is None:
        raise ValueError("save_bundle: models: expected at least one, got none")
    shared = first[1]
    # Those with equal statistics beside each other: their rows of the classifier are one product's.
    heads = [head for head, *_ in sorted(tasks.values(), key=lambda each: each[1])]
    stacks = [statistics for _, statistics in sets.values()]
    tensors = {
        **{f"model/{n}": t for n, t in shared.state.items() if n not in classifier and not _is_statistic(n)},
        **{f"statistics/{name}": torch.stack([each[name] for each in stacks]) for name in stacks[0]},
        **{f"classifier/{name}": torch.cat([head[name] for head in heads]) for name in classifier},
    }
    see = shared.card.preprocessing
    spec = {
        "recipe": {name: value for name, value in shared.create_args.items() if name != "num_classes"},
        **cut_to_dict(shared.structure, shared.mask),
        "preprocessing": None if see is None else see.to_dict(),
        "tasks": [
            {
                "name": task,
                "classes": len(head[classifier[0]]),
                "statistics": group,
                "card": replace(card, preprocessing=None).to_dict(),
            }
            for task, (head, group, card) in tasks.items()
        ],
        "versions": shared.versions,
    }
    storage.write(path, tensors, spec, kind=BUNDLE, version=_VERSION)


def load_bundle(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Bundle:
    """Read a file of ``save_bundle``. One model is built, however many tasks there are.

    Args:
        path: of the file.
        device: where the tensors go.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: (a ValueError) it is damaged, truncated, of another kind or from a newer version, or this
            timm builds another model than the one that was saved.
    """
    tensors, spec = storage.read(path, kind=BUNDLE, version=_VERSION)
    try:
        return _parse({name: tensor.to(device) for name, tensor in tensors.items()}, spec)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise FileFormatError(f"{os.fspath(path)}: its description is damaged ({error})") from error


def _parse(tensors: Mapping[str, Tensor], spec: Mapping[str, Any]) -> Bundle:
    structure, mask = cut_from_dict(spec)
    see = None if spec["preprocessing"] is None else Preprocessing.from_dict(spec["preprocessing"])
    state, statistics, classifier = (
        {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        for prefix in ("model/", "statistics/", "classifier/")
    )
    recipe = check_args(spec["recipe"])
    shared = PrunedState(state, mask, structure, ModelCard(see), {}, recipe, spec["versions"])
    tasks = spec["tasks"]
    cards = {each["name"]: replace(ModelCard.from_dict(each["card"]), preprocessing=see) for each in tasks}
    counts = [each["classes"] for each in tasks]
    names = [cards[each["name"]].names(count) for each, count in zip(tasks, counts, strict=True)]
    sets = {each["statistics"] for each in tasks}
    sound = (
        len(cards) == len(tasks) > 0
        and all(len(own) == count > 0 for own, count in zip(names, counts, strict=True))
        and all(len(tensor) == sum(counts) for tensor in classifier.values())
        and sets == set(range(len(sets)))
        and all(len(tensor) == len(sets) for tensor in statistics.values())
    )
    if not sound:
        raise ValueError("its tasks are not those of its tensors")
    ordered = sorted(tasks, key=lambda each: each["statistics"])
    ends = accumulate((each["classes"] for each in ordered), initial=0)
    parts = {
        each["name"]: Part(slice(*rows), each["statistics"])
        for each, rows in zip(ordered, pairwise(ends), strict=True)
    }
    first = next(iter(cards))
    model = _built(shared, classifier, statistics, parts[first], cards[first]).model
    if set(_classifier_of(model, "the model")) != classifier.keys():
        raise ValueError("its classifier is not the model's")
    return Bundle(cards, parts, classifier, statistics, shared, Features(model))


def _built(
    shared: PrunedState,
    classifier: Mapping[str, Tensor],
    statistics: Mapping[str, Tensor],
    part: Part,
    card: ModelCard,
) -> PrunedCheckpoint:
    """One task's model; its tensors are these, or views of them."""
    own = {name: tensor[part.rows] for name, tensor in classifier.items()}
    own |= {name: tensor[part.statistics] for name, tensor in statistics.items()}
    recipe = {**shared.create_args, "num_classes": part.rows.stop - part.rows.start}
    state = replace(shared, state={**shared.state, **own}, card=card, create_args=recipe)
    return state.checkpoint(state.build())


def _classifier_of(model: Any, what: str) -> tuple[str, ...]:
    """The names of its classifier's tensors in the state dict, the weight first."""
    found, others = classifiers(model), hidden_classifiers(model)
    if len(found) != 1 or others:
        kind = ("none", "one beside it", "two (a distilled DeiT)")[min(len(found), 2)]
        raise ValueError(f"save_bundle: {what}: expected a model with one linear classifier, got {kind}")
    prefix = next(name for name, module in model.named_modules() if module is found[0])
    return tuple(f"{prefix}.{name}" for name in found[0].state_dict())


def _is_statistic(name: str) -> bool:
    return name.rpartition(".")[2] in _STATISTICS


def _digest(tensors: Mapping[str, Tensor]) -> bytes:
    digest = hashlib.sha256()
    # By name: safetensors gives a file's tensors in any order.
    for _, tensor in sorted(tensors.items()):
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def _check_fits(
    what: str, state: PrunedState, first_what: str, first: PrunedState, classifier: Sequence[str]
) -> None:
    """ValueError where ``state`` differs from the first in more than a task may have of its own."""

    def refuse(part: str, expected: object, got: object) -> None:
        raise ValueError(
            f"save_bundle: {what} does not fit {first_what}: {part}: expected {expected}, got {got}"
        )

    for name in sorted((first.create_args.keys() | state.create_args.keys()) - {"num_classes"}):
        expected, got = (each.create_args.get(name) for each in (first, state))
        if expected != got:
            refuse(f"the model's argument {name!r}", repr(expected), repr(got))
    if state.structure != first.structure:
        refuse("what can be cut", *(f"scope {each.structure.scope!r}" for each in (first, state)))
    for layer, units in first.mask.indices.items():
        own = state.mask.indices[layer]
        if not torch.equal(own, units):
            refuse(f"the units that stay of {layer}", *(_shown(each) for each in (units, own)))
    if state.card.preprocessing != first.card.preprocessing:
        refuse("preprocessing", first.card.preprocessing, state.card.preprocessing)
    for name in sorted(first.state.keys() | state.state.keys()):
        expected, got = (_kind(each.state.get(name), name in classifier) for each in (first, state))
        if expected != got:
            refuse(f"tensor {name!r}", expected, got)
    for name, tensor in first.state.items():
        if name not in classifier and not _is_statistic(name) and not torch.equal(tensor, state.state[name]):
            difference = float((tensor.double() - state.state[name].double()).abs().max())
            refuse(f"tensor {name!r}", "the same values", f"values that differ by up to {difference:.3g}")


def _kind(tensor: Tensor | None, any_rows: bool) -> str:
    if tensor is None:
        return "none"
    shape = ["k", *tensor.shape[1:]] if any_rows else list(tensor.shape)
    return f"{tensor.dtype} {shape}"


def _shown(units: Tensor) -> str:
    shown = ", ".join(map(str, units[:8].tolist()))
    return f"{len(units)}: {shown}{', …' if len(units) > 8 else ''}"
