"""A task's neighbours: the entries of a zoo whose tasks are most like it.

The whole zoo is ranked by proxy-LEEP from the class means in its index, in one go; no file is read for that. A measure
that looks at an entry's own model then ranks the nearest ones again.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from mvp_ext.data.tasks import TaskData
from mvp_ext.model.checkpoint import PrunedState
from mvp_ext.model.measure import count_flops
from mvp_ext.model.structure import Structure
from mvp_ext.train.backbone import Backbone, extract_features
from mvp_ext.train.cost import Cost
from mvp_ext.train.heads import LinearHead
from mvp_ext.zoo.entry import ClassMeans, ZooEntry
from mvp_ext.zoo.index import ZooError
from mvp_ext.zoo.similarity import SIMILARITIES, TINY, Similarity, check_values, leep
from mvp_ext.zoo.zoo import Zoo

# Columns of class probabilities that are worked on together: they stay in the cache
_COLUMNS = 512


@dataclass(frozen=True)
class Target:
    """The task whose neighbours are sought.

    Attributes:
        backbone, structure: the dense model, and what of it is pruned.
        data: the task's images; looked at where entries' own models are run.
        features: the dense backbone's features of some training images of the task, f32 [n, F].
        labels: of those images, int64 [n].
    """

    backbone: Backbone
    structure: Structure
    data: TaskData
    features: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Neighbour:
    """One entry of the zoo and how near it is (higher = nearer, in the unit of the similarity that was used).

    ``stored``: its weights, where the search has read them.
    """

    entry: ZooEntry
    similarity: float
    stored: PrunedState | None = field(default=None, repr=False, compare=False)

    def read(self) -> PrunedState:
        """Its weights and extra tensors; ZooError as ``ZooEntry.read``."""
        return self.entry.read() if self.stored is None else self.stored


def nearest_entries(
    zoo: Zoo,
    target: Target,
    n: int,
    *,
    similarity: str | Similarity = "proxy_leep",
    shortlist: int = 10,
    images: int = 200,
    seed: int = 0,
    cost: Cost | None = None,
    exclude: Sequence[str] = (),
    read_weights: bool = True,
) -> list[Neighbour]:
    """The zoo's ``n`` entries nearest to a task, nearest first; ties by name. Fewer where the zoo has fewer.

    Args:
        similarity: "proxy_leep" runs no model of the zoo. "leep", or a measure of one's own, first takes the
            ``shortlist`` nearest by proxy-LEEP and ranks them again by what their own models say of ``images`` images
            of the task, drawn by ``seed``.
        cost: what the search costs is added to it.
        exclude: names of entries that must not vote (the task's own, say).
        read_weights: also read the weights of the entries that are returned, since they will vote: one whose file is
            damaged is then named in a warning, and the next nearest takes its place. Without it "proxy_leep" reads no
            file at all.

    Raises:
        ZooError: the zoo has no usable entry for this backbone. ValueError: an unknown similarity.
    """
    if not callable(similarity) and similarity not in SIMILARITIES:
        raise ValueError(
            f"nearest_entries: similarity: expected one of {', '.join(SIMILARITIES)} or a function, got {similarity!r}"
        )
    cost = cost if cost is not None else Cost()
    with cost.timed():
        ranked = _by_class_means(zoo, target, exclude)
        if similarity == "proxy_leep":
            nearest = list(islice(_usable(zoo, ranked, n, read_weights), n))
        else:
            measure = similarity if callable(similarity) else _leep
            order = torch.randperm(
                len(target.data.train_labels), generator=torch.Generator().manual_seed(seed)
            )
            nearest = []
            count = max(shortlist, n)
            for candidate in islice(_usable(zoo, ranked, count, True), count):
                nearest.append(_measured(candidate, target, order[:images], measure, cost))
                nearest.sort(key=lambda neighbour: (-neighbour.similarity, neighbour.entry.name))
                # Of those that are out the weights need not stay in memory.
                del nearest[n:]
    if not nearest:
        raise ZooError(
            f"zoo {zoo.path}: expected at least one entry to vote, got none (after excluding {list(exclude)})"
        )
    return nearest


def proxy_leep(known: Sequence[ClassMeans], features: Tensor, labels: Tensor) -> Tensor:
    """LEEP of zoo entries without running their models: f64 [N], in [−H(y), 0].

    θ comes from the class means of an entry's task under the SHARED dense backbone (the classifier
    ``nearest_mean_head``), so one dense pass over the target serves the whole zoo. Float64 inside.

    Args:
        known: the entries' class means, f32 [k, F] each. features: the dense backbone's features of the target's
            training images, f32 [n, F]. labels: int64 [n].
    """
    check_values("proxy_leep", features, labels)
    found = torch.empty(len(known), dtype=torch.float64)
    # Images of a class lie together, so that a class is a slice.
    labels, order = labels.cpu().sort()
    features = features.cpu().double()[order]
    sizes = labels.unique_consecutive(return_counts=True)[1].tolist()
    for positions in _alike(known):
        some = [known[i] for i in positions]
        means = torch.stack([entry.means for entry in some]).double()
        temperature = torch.tensor([entry.temperature for entry in some], dtype=torch.float64)[:, None]
        count, classes, width = means.shape
        # softmax(−‖f − μ‖² / t) = softmax((2 f·μ − ‖μ‖²) / t), as [n, N, k]
        logits = torch.addmm(-means.square().sum(2).flatten(), features, means.view(-1, width).T, alpha=2.0)
        theta = torch.softmax(logits.view(-1, count, classes).div_(temperature), 2).split(sizes)
        joint = torch.stack([of_class.sum(0) for of_class in theta])
        conditional = joint / joint.sum(0).clamp_min(TINY)
        expected = [(t * c).sum(2) for t, c in zip(theta, conditional, strict=True)]
        found[positions] = torch.cat(expected).clamp_min(TINY).log().mean(0)
    return found


def _alike(known: Sequence[ClassMeans]) -> Iterator[list[int]]:
    """Positions of entries with equally many classes, a block of columns at a time."""
    groups: dict[torch.Size, list[int]] = {}
    for position, entry in enumerate(known):
        groups.setdefault(entry.means.shape, []).append(position)
    for (classes, _), positions in groups.items():
        step = max(1, _COLUMNS // classes)
        for start in range(0, len(positions), step):
            yield positions[start : start + step]


def _by_class_means(zoo: Zoo, target: Target, exclude: Sequence[str]) -> list[tuple[float, str]]:
    """(proxy-LEEP, name) of all entries that can be compared, nearest first; ties by name."""
    width = target.features.shape[1]
    known = [k for k in zoo.class_means(target.structure.fingerprint) if k.name not in exclude]
    fitting = [k for k in known if k.means.shape[1] == width]
    values = proxy_leep(fitting, target.features, target.labels).tolist()
    ranked = [(value, k.name) for value, k in zip(values, fitting, strict=True) if math.isfinite(value)]
    for name in {k.name for k in known} - {name for _, name in ranked}:
        warnings.warn(
            f"zoo {zoo.path}: entry {name!r} cannot vote: expected finite class means of {width} features",
            stacklevel=4,
        )
    return sorted(ranked, key=lambda pair: (-pair[0], pair[1]))


def _usable(zoo: Zoo, ranked: Sequence[tuple[float, str]], n: int, read: bool) -> Iterator[Neighbour]:
    """In this order, but what is damaged, or was removed just now, is passed over; ``n`` at a time."""
    for start in range(0, len(ranked), n):
        some = ranked[start : start + n]
        entries = {entry.name: entry for entry in zoo.entries(names=[name for _, name in some])}
        for value, name in some:
            if name in entries:
                try:
                    stored = entries[name].read() if read else None
                except ZooError as error:
                    warnings.warn(f"passed over for the vote: {error}", stacklevel=4)
                    continue
                yield Neighbour(entries[name], value, stored)


def _measured(
    candidate: Neighbour, target: Target, order: Tensor, measure: Similarity, cost: Cost
) -> Neighbour:
    """Run the entry's own model on some of the task's images and measure what it says."""
    backbone, stored = target.backbone, candidate.read()
    if not {"head_weight", "head_bias"} <= stored.extra.keys():
        raise ZooError(
            f"entry {candidate.entry.name!r}: expected head_weight and head_bias among its tensors"
        )
    # The trained head: ridge gives no probabilities.
    head = LinearHead(stored.extra["head_weight"], stored.extra["head_bias"])
    model = stored.build().to(backbone.device)
    features = extract_features(model, target.data.train_images[order], backbone.preprocessing)
    size = backbone.preprocessing.size
    cost.similarity_flops += len(order) * count_flops(model, (3, size, size))
    return Neighbour(candidate.entry, measure(features, head, target.data.train_labels[order]), stored)


def _leep(features: Tensor, head: LinearHead, labels: Tensor) -> float:
    return leep(torch.softmax(head(features), 1), labels)
