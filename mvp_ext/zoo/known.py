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
    """

    share: float
    by_entry: dict[str, float]


def known_classes(known: Sequence[ClassMeans], features: Tensor, labels: Tensor) -> KnownClasses:
    """Compares the means of a task's classes with those of a zoo's entries, by one model's features.

    A class is known where its mean is one of the zoo's up to what few images allow: where the squared distance, less
    what the spread within the class adds to it (tr Σ / n), is below a share of that from the zoo's class to its nearest
    other. Both are in the same features, so no threshold depends on a backbone.

    Args:
        known: f32 [k, F] each. features: of the task's training images, f32 [n, F], two of a class at least.
            labels: int64 [n], of all classes 0..k−1.
    """
    check_values("known_classes", features, labels)
    classes = int(labels.max()) + 1
    owners = [entry.name for entry in known for _ in entry.means]
    if not owners:
        return KnownClasses(0.0, {})
    theirs = torch.cat([entry.means for entry in known]).double()
    x, counts = features.double(), torch.bincount(labels, minlength=classes).double()
    means = class_means(features, labels, classes).double()
    spread = (x - means[labels]).square().sum() / max(1, len(x) - classes)
    between = _squared_distances(theirs, theirs)
    # A class of two entries is not another one.
    scale = theirs.square().sum(1).mean()
    between = between.masked_fill(between <= 1e-9 * scale, torch.inf)
    own = _squared_distances(means, theirs)
    distance, nearest = own.min(1)
    is_known = distance - spread / counts < _NEAR * between.min(1).values[nearest]
    by_entry: dict[str, float] = {}
    for name in dict.fromkeys(owners):
        of_entry = torch.tensor([owner == name for owner in owners])
        # Several entries may have the class.
        hit = (own.masked_fill(~of_entry, torch.inf).min(1).values <= distance + 1e-9 * scale) & is_known
        by_entry[name] = float(hit.double().mean())
    return KnownClasses(float(is_known.double().mean()), by_entry)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    # By differences, not by products: that of a class to itself is 0.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
