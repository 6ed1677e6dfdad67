"""The vote: a new task's nearest entries of the zoo decide which units stay, and bring the weights to start from.

Each step can be used alone: ``nearest_entries`` (of the zoo) → ``vote_mask`` → ``merge_voters`` → ``small_model``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mvp_ext.model.budget import voted_counts
from mvp_ext.model.mask import Mask
from mvp_ext.model.structure import Structure
from mvp_ext.model.surgery import prune_model
from mvp_ext.ops import backend_for, meta_vote
from mvp_ext.pruning.scores import score_units
from mvp_ext.train.backbone import Backbone
from mvp_ext.zoo.neighbours import Neighbour


def voter_weights(neighbours: Sequence[Neighbour], weighting: float | Literal["auto"] | None) -> Tensor:
    """f32 [N]: 1 for each voter, or N · softmax(similarity / weighting)."""
    if weighting is None or weighting == "auto":
        return torch.ones(len(neighbours))
    similarity = torch.tensor([n.similarity for n in neighbours], dtype=torch.float64)
    return (len(neighbours) * torch.softmax(similarity / weighting, 0)).float()


def weight_prior(model: nn.Module, structure: Structure) -> Tensor:
    """Tie-breaker f32 [U] from the pre-trained model alone: each unit's L2 norm of weights over its layer's largest."""
    return normalised_scores(score_units(model, structure, "l2"), structure)


def normalised_scores(scores: Mapping[str, Tensor], structure: Structure) -> Tensor:
    """f32 [U] in [0, 1] from non-negative scores: each unit's over its layer's largest."""
    return torch.cat([scores[name] / scores[name].max().clamp_min(1e-30) for name in structure.names])


def vote_mask(
    masks: Sequence[Mask],
    structure: Structure,
    *,
    keep: float,
    weights: Tensor | None = None,
    prior: Tensor | None = None,
    rule: str = "topk",
    temperature: float = 1.0,
    align: int = 8,
    seed: int = 0,
    score: Tensor | None = None,
) -> Mask:
    """The voters' mask: per layer the units with the most (weighted) votes, or a draw from them.

    Args:
        masks: the voters' masks, all of ``structure``. weights: f32 [N], default 1 each.
        keep: share of units that stays; see ``voted_counts`` for how layers share it, and for ``align``.
        prior: f32 [U], breaks ties (higher first), then the lower index.
        score: f32 [U], added to the votes of "topk" as a share of all votes: units rank by votes / Σw + score.
    """
    counts = voted_counts(structure, masks, keep, align)
    if score is not None:
        return _scored_vote(masks, structure, counts, weights, prior, score)
    vote = meta_vote(
        torch.stack([m.to_vector() for m in masks]),
        weights,
        layers=structure.units_per_layer,
        keep=counts,
        prior=prior,
        temperature=temperature if rule == "sample" else None,
        seed=seed if rule == "sample" else None,
    )
    return Mask.from_vector(structure, vote.mask)


def _scored_vote(
    masks: Sequence[Mask],
    structure: Structure,
    counts: Sequence[int],
    weights: Tensor | None,
    prior: Tensor | None,
    score: Tensor,
) -> Mask:
    """Per layer the ``counts`` units with the largest votes / Σw + score; ties by prior, then by the lower index."""
    share = torch.ones(len(masks), dtype=torch.float64) if weights is None else weights.double()
    votes = share @ torch.stack([m.to_vector() for m in masks]).double()
    ranked = votes / share.sum() + score.double()
    kept = torch.zeros(structure.total_units, dtype=torch.bool)
    start = 0
    for units, count in zip(structure.units_per_layer, counts, strict=True):
        order = torch.arange(start, start + units)
        # Stable sorts: the last one decides first.
        for key in (prior, ranked):
            if key is not None:
                order = order[key[order].sort(descending=True, stable=True).indices]
        kept[order[:count]] = True
        start += units
    return Mask.from_vector(structure, kept)


def merge_voters(
    dense_state: Mapping[str, Tensor],
    voter_states: Sequence[Mapping[str, Tensor]],
    voter_masks: Sequence[Mask],
    structure: Structure,
    mask: Mask,
    weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """Weights for the sub-network of ``mask``: per element the weighted mean of the voters that have it.

    Element (unit k, input c) is averaged over the voters that kept BOTH k and c; where none did, it is the pre-trained
    value. Likewise biases, affine parameters and running statistics, and tensors that no layer cuts.

    Args:
        dense_state: the pre-trained model's state dict. Tensors that some voter lacks (the classifier) are left out.
        voter_states: the voters' compact state dicts, on any device.

    Returns:
        name → tensor at the sub-network's shapes, on ``dense_state``'s device.
    """
    index, voter_index = mask.index_in(structure), [m.index_in(structure) for m in voter_masks]
    everything: tuple[None, None] = (None, None)

    def in_every_voter(name: str, tensor: Tensor) -> bool:
        indices = [i.get(name, everything) for i in voter_index]
        return all(_fits(tensor, i, s.get(name)) for i, s in zip(indices, voter_states, strict=True))

    names = [n for n, t in dense_state.items() if t.is_floating_point() and in_every_voter(n, t)]
    device = next(iter(dense_state.values())).device
    # The tensors of a model share few index tensors: each is moved once.
    on_device: dict[int, Tensor] = {}

    def move(index: Tensor | None) -> Tensor | None:
        if index is not None and id(index) not in on_device:
            on_device[id(index)] = index.to(device)
        return None if index is None else on_device[id(index)]

    def side(of: Mapping[str, tuple[Tensor | None, Tensor | None]], dim: int) -> list[Tensor | None]:
        return [move(of.get(n, everything)[dim]) for n in names]

    merged = backend_for(device).merge(
        [dense_state[n] for n in names],
        [[state[n].to(device) for n in names] for state in voter_states],
        [side(i, 0) for i in voter_index],
        [side(i, 1) for i in voter_index],
        (torch.ones(len(voter_states)) if weights is None else weights).to(device),
        side(index, 0),
        side(index, 1),
    )
    return dict(zip(names, merged, strict=True))


def _fits(dense: Tensor, index: tuple[Tensor | None, Tensor | None], compact: Tensor | None) -> bool:
    if compact is None or compact.ndim != dense.ndim:
        return False
    expected = list(dense.shape)
    for dim, kept in enumerate(index):
        if kept is not None:
            expected[dim] = len(kept)
    return list(compact.shape) == expected


def small_model(
    backbone: Backbone, structure: Structure, mask: Mask, weights: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """The sub-network of ``mask`` at its real shapes: with the pre-trained weights, or those given (same shapes)."""
    model = backbone.copy_model()
    prune_model(model, mask, structure=structure)
    if weights is not None:
        state = model.state_dict()
        with torch.no_grad():
            for name, value in weights.items():
                if name not in state or state[name].shape != value.shape:
                    got = tuple(state[name].shape) if name in state else "no such tensor"
                    raise ValueError(f"small_model: {name}: expected shape {tuple(value.shape)}, got {got}")
                state[name].copy_(value)
    return model
