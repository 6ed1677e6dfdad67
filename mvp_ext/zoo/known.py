"""Which of a task's classes a zoo knows: where none of its experts has seen them, none is better than any other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mvp_ext.train.heads import class_means
from mvp_ext.zoo.entry import ClassMeans
from mvp_ext.zoo.similarity import check_values

# Of the squared distance from a class of the zoo to its nearest other: a mean that lies nearer is that class's.
_NEAR = 0.5


class KnownClasses(NamedTuple):
    """How well a zoo's classes explain a task's.

    Attributes:
        share: of the task's classes, those that the zoo knows, in [0, 1].
        by_entry: entry → share of the task's classes that are among its own.
        found: entry → {class of the task: which of the entry's classes it is}; a class that several entries have is
            that of the one which has most of the task's.
    """

    share: float
    by_entry: dict[str, float]
    found: dict[str, dict[int, int]]


def known_classes(known: Sequence[ClassMeans], features: Tensor, labels: Tensor) -> KnownClasses:
    """Compares the means of a task's classes with those of a zoo's entries, by one model's features.

    A class is known where its mean is one of the zoo's up to what few images allow: where the squared distance, less
    what the spread within the class adds to it (tr Σ / n), is below a share of that from the zoo's class to its nearest
    other. Both are in the same features, so no threshold depends on a backbone. Where several of the task's classes lie
    near one of the zoo's, it is the nearest of them.

    Args:
        known: f32 [k, F] each. features: of the task's training images, f32 [n, F], two of a class at least.
            labels: int64 [n], of all classes 0..k−1.
    """
    check_values("known_classes", features, labels)
    classes = int(labels.max()) + 1
    owners = [entry.name for entry in known for _ in entry.means]
    if not owners:
        return KnownClasses(0.0, {}, {})
    theirs = torch.cat([entry.means for entry in known]).double()
    x, counts = features.double(), torch.bincount(labels, minlength=classes).double()
    means = class_means(features, labels, classes).double()
    spread = (x - means[labels]).square().sum() / max(1, len(x) - classes)
    between = _squared_distances(theirs, theirs)
    # A class of two entries is not another one.
    scale = theirs.square().sum(1).mean()
    same = between <= 1e-9 * scale
    between = between.masked_fill(same, torch.inf)
    own = _squared_distances(means, theirs)
    distance, nearest = own.min(1)
    is_known = distance - spread / counts < _NEAR * between.min(1).values[nearest]
    used: set[int] = set()
    for c in distance.argsort(stable=True).tolist():
        first = int(same[nearest[c]].int().argmax())
        is_known[c] &= first not in used
        if is_known[c]:
            used.add(first)
    has: dict[str, dict[int, int]] = {}
    for entry, of_entry in zip(known, own.split([len(entry.means) for entry in known], 1), strict=True):
        least, number = of_entry.min(1)
        # Several entries may have the class.
        hit = (least <= distance + 1e-9 * scale) & is_known
        has[entry.name] = {c: int(number[c]) for c in hit.nonzero().flatten().tolist()}
    found: dict[str, dict[int, int]] = {}
    left = set(is_known.nonzero().flatten().tolist())
    for name in sorted(has, key=lambda name: -len(has[name])):
        if taken := {c: number for c, number in has[name].items() if c in left}:
            found[name] = taken
            left -= taken.keys()
    by_entry = {name: len(numbers) / classes for name, numbers in has.items()}
    return KnownClasses(float(is_known.double().mean()), by_entry, found)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    # By differences, not by products: that of a class to itself is 0.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
