"""The public ops: check the arguments, then call the op (through an autograd.Function where a gradient is needed).

Dimension letters: B batch, T target tasks, N voters, L layers, U units of all layers (concatenated), C channels,
H heads, D head dim, M rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mvp_ext.ops import registry
from mvp_ext.ops.checks import FLOATS, check_shape, check_tensor, surely_alike
from mvp_ext.ops.vote import Vote, kept_units

IMPORTANCE_KINDS = ("taylor", "taylor2", "activation")


def importance(
    a: Tensor, grad: Tensor | None = None, *, kind: str, dim: int = 1, heads: int | None = None
) -> Tensor:
    """Importance of units (filters, channels, heads) from an activation and the loss's gradient there, in one pass.

    With s[b, u] = Σ a · grad over the positions (and, for heads, the head's dimensions) of example b:
    ``taylor`` Σ_b |s[b, u]|, ``taylor2`` Σ_b s[b, u]². ``activation``: the mean of |a| over examples and positions.
    The abs is per example: the gradient of one mask shared by the batch would give |Σ_b s[b, u]| instead.

    Args:
        a: float [B, ..., C, ...]: NCHW, channels_last, [B, n, H·D], or any other strided tensor; dim 0 is the batch.
        grad: like ``a`` (another memory layout costs a copy); not used by ``activation``.
        kind: "taylor", "taylor2" or "activation".
        dim: the dimension of the units, not 0.
        heads: the units are this many equal blocks of ``dim``, instead of its single entries.

    Returns:
        float32 [C] or [heads], summed in float32 and over the batch in float64; float64 for float64 input (slow: for
        checks). Not differentiable. NaN and inf go through. ``activation`` of no elements is NaN.

    Raises:
        TypeError, ValueError: kinds, shapes, ranges, devices; on a GPU more than 2^30 positions of an example, or more
            than 2^30 channels of all examples (B · a.shape[dim]).

    The same bits in every run and with every number of threads. Sources: Molchanov et al., ICLR 2017 and CVPR 2019
    (taylor, taylor2); Michel et al., NeurIPS 2019 (heads).
    """
    if kind not in IMPORTANCE_KINDS:
        raise ValueError(f"importance: kind: expected one of {', '.join(IMPORTANCE_KINDS)}, got {kind!r}")
    known = kind != "activation" and surely_alike(a, grad)
    if not known:
        check_tensor("importance", "a", a, dtypes=FLOATS)
    if not -a.ndim < dim < a.ndim or dim == 0:
        raise ValueError(
            f"importance: dim: expected a dimension of a after the batch, got {dim} for {a.ndim} dimensions"
        )
    dim %= a.ndim
    channels = a.shape[dim]
    if heads is not None and (heads < 1 or channels % heads):
        raise ValueError(f"importance: heads: expected a divisor of a.shape[{dim}] = {channels}, got {heads}")
    if kind == "activation":
        grad = None
    elif grad is None:
        raise ValueError(f"importance: grad: expected the gradient at a, which {kind} needs, got None")
    else:
        if not known:
            check_tensor("importance", "grad", grad, dtypes=(a.dtype,), device=a.device)
            check_shape("importance", "grad", grad, a.shape, "like a")
        grad = grad.detach() if grad.requires_grad else grad
    a = a.detach() if a.requires_grad else a
    return registry.importance(a, grad, kind, dim, channels if heads is None else heads)


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
    if sum(layers) != units:
        raise ValueError(f"meta_vote: layers: expected a sum of {units} (masks.shape[1]), got {sum(layers)}")
    kept = kept_units(layers, keep, align)
    if temperature is None:
        seed = 0
    else:
        if not 1e-30 <= temperature < float("inf"):
            raise ValueError(f"meta_vote: temperature: expected a number in [1e-30, inf), got {temperature}")
        if seed is None:
            raise ValueError("meta_vote: seed: expected an int where temperature is given, got None")
        if not 0 <= seed < 2**63:
            raise ValueError(f"meta_vote: seed: expected an int in [0, 2**63), got {seed}")
    mask, index, votes = registry.meta_vote(
        masks.contiguous(), weights, prior, layers, kept, temperature, seed
    )
    return Vote(mask, index, votes, kept)


def _contiguous_f32(x: Tensor) -> Tensor:
    return (x if x.dtype is torch.float32 else x.to(torch.float32)).contiguous()
