"""Votes and merged weights: by hand count and by brute force."""

from __future__ import annotations

import pytest
import torch
from digits import tiny_backbone

from mvp_ext.model.budget import kept_counts, voted_counts
from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.surgery import expand_state, prune_model
from mvp_ext.pruning.settings import VoteOptions
from mvp_ext.pruning.vote import (
    merge_voters,
    small_model,
    vote_mask,
    voter_weights,
    weight_prior,
)
from mvp_ext.zoo.neighbours import Neighbour

pytestmark = pytest.mark.usefixtures("one_thread")
SCOPES = [("test_resnet", "inner"), ("test_resnet", "all"), ("test_vit", "heads"), ("test_vit", "heads+mlp")]


@pytest.fixture(scope="module", params=SCOPES, ids="-".join)
def case(request):
    backbone = tiny_backbone(request.param[0])
    return backbone, find_structure(backbone.model, request.param[1])


def random_masks(structure, count, keep=0.5, align=4):
    return [Mask.random(structure, keep, seed, align) for seed in range(count)]


# ---- the vote


@pytest.mark.parametrize("weighted", [False, True])
def test_topk_by_hand(case, weighted):
    """Most votes first, then the higher prior, then the lower index."""
    _, structure = case
    masks = random_masks(structure, 3)
    weights = [0.5, 2.0, 1.0] if weighted else [1.0, 1.0, 1.0]
    prior = torch.randint(0, 3, (structure.total_units,)).float()  # with ties
    got = vote_mask(
        masks,
        structure,
        keep=0.3,
        align=4,
        weights=torch.tensor(weights) if weighted else None,
        prior=prior,
    )
    start = 0
    for layer, count in zip(structure, kept_counts(structure, 0.3, 4), strict=True):
        votes = [
            sum(w * bool(m.layers[layer.name][u]) for w, m in zip(weights, masks, strict=True))
            for u in range(layer.units)
        ]
        order = sorted(range(layer.units), key=lambda u: (-votes[u], -float(prior[start + u]), u))
        expected = torch.zeros(layer.units, dtype=torch.bool)
        expected[order[:count]] = True
        assert torch.equal(got.layers[layer.name], expected), layer.name
        start += layer.units


def test_votes_and_score_by_hand(case):
    """votes / Σw + score, then the prior, then the lower index."""
    _, structure = case
    masks, weights = random_masks(structure, 3), [0.5, 2.0, 1.0]
    score = torch.randint(0, 3, (structure.total_units,)) / 4  # multiples of what a voter weighs: ties
    prior = torch.randint(0, 3, (structure.total_units,)).float()
    got = vote_mask(
        masks, structure, keep=0.3, align=4, weights=torch.tensor(weights), prior=prior, score=score
    )
    start = 0
    for layer, count in zip(structure, kept_counts(structure, 0.3, 4), strict=True):
        ranked = [
            sum(w * bool(m.layers[layer.name][u]) for w, m in zip(weights, masks, strict=True)) / 3.5
            + float(score[start + u])
            for u in range(layer.units)
        ]
        order = sorted(range(layer.units), key=lambda u: (-ranked[u], -float(prior[start + u]), u))
        expected = torch.zeros(layer.units, dtype=torch.bool)
        expected[order[:count]] = True
        assert torch.equal(got.layers[layer.name], expected), layer.name
        start += layer.units
    zero = vote_mask(masks, structure, keep=0.3, align=4, prior=prior, score=torch.zeros_like(prior))
    assert zero == vote_mask(masks, structure, keep=0.3, align=4, prior=prior)


def test_one_voter_is_copied(case):
    _, structure = case
    (mask,) = random_masks(structure, 1)
    assert vote_mask([mask], structure, keep=0.5, align=4) == mask


def test_sampling_is_seeded_and_cold_sampling_follows_the_votes(case):
    _, structure = case
    masks = random_masks(structure, 3)

    def sample(seed, temperature):
        return vote_mask(
            masks, structure, keep=0.5, align=4, rule="sample", temperature=temperature, seed=seed
        )

    assert sample(1, 1.0) == sample(1, 1.0)
    assert sample(1, 1.0) != sample(2, 1.0)
    top = vote_mask(masks, structure, keep=0.5, align=4)
    votes = torch.stack([m.to_vector() for m in masks]).sum(0)
    cold = sample(3, 0.01)
    assert int(votes[cold.to_vector()].sum()) == int(votes[top.to_vector()].sum())
    assert cold.kept == top.kept


def test_weight_prior_ranks_within_layers(case):
    backbone, structure = case
    prior = weight_prior(backbone.model, structure)
    assert prior.shape == (structure.total_units,)
    for part in prior.split(structure.units_per_layer):
        assert float(part.max()) == 1
        assert float(part.min()) >= 0


def test_uniform_voters_get_the_uniform_budget(case):
    _, structure = case
    for align in (1, 8):
        masks = random_masks(structure, 3, 0.3, align)
        assert voted_counts(structure, masks, 0.5, align) == kept_counts(structure, 0.5, align)


def test_global_voters_hand_on_how_they_share_units_out():
    """Layer l gets the voters' mean rate, all scaled by one factor to the total; saturated layers keep everything."""
    structure = find_structure(tiny_backbone().model)  # 32, 48, 48, 48, 96 units

    def mask(*counts):
        layers = {
            layer.name: torch.arange(layer.units) < count
            for layer, count in zip(structure, counts, strict=True)
        }
        return Mask(layers)

    masks = [mask(16, 6, 12, 24, 10), mask(32, 6, 12, 24, 14)]  # rates .75, .125, .25, .5, .125
    # Σ rate · units = 24 + 6 + 12 + 24 + 12 = 78 of 272
    assert voted_counts(structure, masks, 78 / 272, align=1) == (24, 6, 12, 24, 12)
    assert voted_counts(structure, masks, 39 / 272, align=1) == (12, 3, 6, 12, 6)
    # Twice 78: layers 0 and 3 saturate; the others give 30 f of the other 76, so f = 2.53.
    assert voted_counts(structure, masks, 156 / 272, align=1) == (32, 15, 30, 48, 30)
    assert voted_counts(structure, masks, 1.0, align=1) == structure.units_per_layer
    assert min(voted_counts(structure, masks, 1e-6, align=1)) == 1
    assert all(count % 8 == 0 for count in voted_counts(structure, masks, 0.4, align=8))


def test_voter_weights():
    neighbours = [Neighbour(None, s) for s in (-0.5, -1.0, -3.0)]
    assert torch.equal(voter_weights(neighbours, None), torch.ones(3))
    expected = 3 * torch.softmax(torch.tensor([-0.5, -1.0, -3.0]) / 0.7, 0)
    torch.testing.assert_close(voter_weights(neighbours, 0.7), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neighbours": 0}, "neighbours: expected at least 1, got 0"),
        ({"similarity": "wup"}, "similarity: expected one of auto, proxy_leep, leep, got 'wup'"),
        ({"rule": "best"}, "rule: expected topk or sample, got 'best'"),
        ({"temperature": 0.0}, "temperature: expected a positive number, got 0.0"),
        ({"weighting": float("nan")}, "weighting: expected a positive number, got nan"),
        ({"score_weight": -1.0}, "score_weight: expected at least 0, got -1.0"),
        ({"score_weight": 1.0, "rule": "sample"}, "score_weight: expected rule topk, got 'sample'"),
        ({"prior": "l1"}, "prior: expected l2 or taylor, got 'l1'"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        VoteOptions(**options)


# ---- merging


def voters_of(backbone, masks, structure, classes=4):
    """Compact state dicts of models with weights of their own, and heads of another size than the dense one."""
    states = []
    for seed, mask in enumerate(masks):
        model = backbone.copy_model()
        model.reset_classifier(classes)
        torch.manual_seed(seed)
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    tensor.copy_(torch.rand(tensor.shape) + seed)
        states.append(prune_model(model, mask, structure=structure).state_dict())
    return states


def test_merge_by_brute_force(case):
    """At dense shapes: Σ w·x / Σ w over the voters that have the element, else the pre-trained one; then cut."""
    backbone, structure = case
    masks = random_masks(structure, 3, 0.4)
    mask = Mask.random(structure, 0.6, seed=9, align=4)
    weights = torch.tensor([1.0, 0.25, 3.0])
    states = voters_of(backbone, masks, structure)
    dense = backbone.model.state_dict()
    got = merge_voters(dense, states, masks, structure, mask, weights)
    head = {name for name, value in dense.items() if states[0][name].shape != value.shape} - set(
        masks[0].index_in(structure)
    )
    expected_names = {name for name, value in dense.items() if value.is_floating_point()} - head
    assert len(head) == 2
    assert got.keys() == expected_names
    zeros = {name: torch.zeros_like(value) for name, value in dense.items()}
    total, weight_sum = dict.fromkeys(got, 0.0), dict.fromkeys(got, 0.0)
    for state, voter, weight in zip(states, masks, weights.double(), strict=True):
        ones = {name: torch.ones_like(value) for name, value in state.items()}
        values = expand_state(state, structure, voter, zeros)
        present = expand_state(ones, structure, voter, zeros)
        for name in got:
            total[name] = total[name] + weight * values[name].double()
            weight_sum[name] = weight_sum[name] + weight * present[name].double()
    index, filled = mask.index_in(structure), 0
    for name, value in got.items():
        some = weight_sum[name] > 0
        filled += int((~some).sum())
        expected = torch.where(some, total[name] / weight_sum[name].clamp_min(1e-9), dense[name].double())
        rows, cols = index.get(name, (None, None))
        expected = expected if rows is None else expected[rows]
        expected = expected if cols is None else expected[:, cols]
        assert value.dtype == dense[name].dtype
        torch.testing.assert_close(
            value.double(), expected, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert filled > 0  # some elements really came from the pre-trained model


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_one_voter_with_its_own_mask_is_that_voter(case, keep):
    backbone, structure = case
    mask = Mask.random(structure, keep, seed=1, align=4)
    torch.manual_seed(7)
    voter = backbone.copy_model()
    with torch.no_grad():
        for parameter in voter.parameters():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    prune_model(voter, mask, structure=structure).eval()
    voted = vote_mask([mask], structure, keep=keep, align=4)
    merged = merge_voters(backbone.model.state_dict(), [voter.state_dict()], [mask], structure, voted)
    small = small_model(backbone, structure, voted, merged).eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(small(images), voter(images))


def test_small_model_without_weights_is_the_pruned_backbone(case):
    backbone, structure = case
    mask = Mask.random(structure, 0.5, seed=1, align=4)
    small = small_model(backbone, structure, mask).eval()
    expected = prune_model(backbone.copy_model(), mask, structure=structure).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(small(images), expected(images))


def test_small_model_refuses_weights_of_another_shape(case):
    backbone, structure = case
    mask = Mask.random(structure, 0.5, seed=1, align=4)
    cut = sorted(mask.index_in(structure))[0]
    with pytest.raises(ValueError, match=f"small_model: {cut}: expected shape"):
        small_model(backbone, structure, mask, {cut: backbone.model.state_dict()[cut]})
    with pytest.raises(ValueError, match="no such tensor"):
        small_model(backbone, structure, mask, {"nothing": torch.zeros(1)})
