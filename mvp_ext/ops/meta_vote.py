"""The vote of N pruned models on the units of all layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mvp_ext.ops._native import native
from mvp_ext.ops.checks import FLOATS, check_float, check_int, check_shape, check_tensor
from mvp_ext.ops.define import define
from mvp_ext.ops.device import cuda_kernels, device_and_stream, on_cuda
from mvp_ext.ops.vote import Vote, as_ints, count_kept


def meta_vote(
    masks: Tensor,
    weights: Tensor | None = None,
    *,
    layers: Sequence[int],
    keep: float | Sequence[float] | Sequence[int],
    prior: Tensor | None = None,
    temperature: float | None = None,
    seed: int | None = None,
    align: int = 1,
) -> Vote:
    """Vote of N pruned models on the units of all layers; each layer keeps the winners. One call for T targets.

    votes[t, u] = Σ_j weights[t, j] · 1[voter j kept unit u]. Each layer keeps the units with the most votes; or, with a
    temperature τ, draws them without replacement from softmax(votes / τ) (Gumbel-top-k). With few voters and τ = 1
    most of that softmax's mass lies on units that nobody voted for: choose τ well below the weight of one voter.

    Args:
        masks: bool [N, U], the units that each voter kept, all layers one after the other.
        weights: float [N], or [T, N] for T targets, used as float32; any sign. Default: 1 for each voter.
        layers: units of each layer, sum U.
        keep: a ratio in (0, 1], or for each layer a ratio (float) or an exact count (int); see ``kept_units``.
        prior: float [U], or [T, U] beside weights [T, N], used as float32: breaks ties, the higher one wins.
        temperature: draw at this temperature (> 0) instead of taking the largest.
        seed: of the draw, in [0, 2⁶³); needed with ``temperature`` and only then used.
        align: round each layer's count to a multiple of this.

    Returns:
        Vote(mask, index, votes, kept), with a leading dimension T where weights has one.

    Raises:
        TypeError, ValueError: kinds, shapes, ranges, devices.

    Exact and the same on every device and with every number of threads: votes are added in the order of the voters;
    equal votes are decided by the prior, then by the lower unit; NaN votes or priors rank below every number. A voter
    with weight NaN spoils only the units it kept. Drawn noise depends on (seed, target, unit) alone.

    Source: the vote of Meta-Vote Pruning (Zhao et al., ECML PKDD 2023, arXiv 2301.11560), from its abstract.
    """
    check_tensor("meta_vote", "masks", masks, ndim=2, dtypes=(torch.bool,))
    voters, units = masks.shape
    device = masks.device
    if weights is not None:
        check_tensor("meta_vote", "weights", weights, ndim=(1, 2), dtypes=FLOATS, device=device)
        if weights.shape[-1] != voters:
            shape = (*weights.shape[:-1], voters)
            check_shape("meta_vote", "weights", weights, shape, "[N] or [T, N]")
        weights = _contiguous_f32(weights)
    if prior is not None:
        check_tensor("meta_vote", "prior", prior, ndim=(1, 2), dtypes=FLOATS, device=device)
        if prior.ndim == 1:
            check_shape("meta_vote", "prior", prior, (units,), "[U]")
        else:
            targets = weights.shape[0] if weights is not None and weights.ndim == 2 else None
            if targets is None:
                raise ValueError(
                    "meta_vote: prior: expected [U] where weights is not [T, N], got two dimensions"
                )
            check_shape("meta_vote", "prior", prior, (targets, units), "[T, U]")
        prior = _contiguous_f32(prior)
    layers = as_ints("meta_vote", "layers", layers)
    if sum(layers) != units:
        raise ValueError(f"meta_vote: layers: expected a sum of {units} (masks.shape[1]), got {sum(layers)}")
    kept = count_kept("meta_vote", layers, keep, align)
    if temperature is None:
        seed = 0
    else:
        temperature = check_float("meta_vote", "temperature", temperature)
        if not 1e-30 <= temperature < float("inf"):
            raise ValueError(f"meta_vote: temperature: expected a number in [1e-30, inf), got {temperature}")
        if seed is None:
            raise ValueError("meta_vote: seed: expected an int where temperature is given, got None")
        seed = check_int("meta_vote", "seed", seed)
        if not 0 <= seed < 2**63:
            raise ValueError(f"meta_vote: seed: expected an int in [0, 2**63), got {seed}")
    mask, index, votes = meta_vote_op(masks.contiguous(), weights, prior, layers, kept, temperature, seed)
    return Vote(mask, index, votes, kept)


def _contiguous_f32(x: Tensor) -> Tensor:
    return (x if x.dtype is torch.float32 else x.to(torch.float32)).contiguous()


def _fake(
    masks: Tensor,
    weights: Tensor | None,
    prior: Tensor | None,
    layers: Sequence[int],
    kept: Sequence[int],
    temperature: float | None,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    lead = () if weights is None or weights.ndim == 1 else (weights.shape[0],)
    units = masks.shape[1]
    return (
        masks.new_empty(*lead, units),
        masks.new_empty(*lead, sum(kept), dtype=torch.int32),
        masks.new_empty(*lead, units, dtype=torch.float32),
    )


def _run(
    masks: Tensor,
    weights: Tensor | None,
    prior: Tensor | None,
    layers: Sequence[int],
    kept: Sequence[int],
    temperature: float | None,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = (masks, weights, prior, layers, kept, temperature, seed)
    outputs = _fake(*arguments)
    if on_cuda(masks):
        cuda_kernels().meta_vote_cuda(*arguments, *outputs, *device_and_stream(masks))
    else:
        native().meta_vote_cpu(*arguments, *outputs, torch.get_num_threads())
    return outputs


meta_vote_op = define(
    "meta_vote(Tensor masks, Tensor? weights, Tensor? prior, int[] layers, int[] kept, float? temperature, int seed)"
    " -> (Tensor mask, Tensor index, Tensor votes)",
    fake=_fake,
    run=_run,
)
