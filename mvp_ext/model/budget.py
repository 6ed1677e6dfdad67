"""How many units each layer keeps."""

from __future__ import annotations

from collections.abc import Sequence

from mvp_ext.model.mask import ALIGN, Mask
from mvp_ext.model.structure import Structure
from mvp_ext.ops import kept_units


def kept_counts(structure: Structure, keep: float, align: int = ALIGN) -> tuple[int, ...]:
    """Units kept per layer at one ratio; filters and neurons in multiples of ``align``.

    Heads are not aligned: each already is a whole number of aligned blocks, and there are few of them.
    """
    return tuple(kept_units([layer.units], keep, layer.multiple(align))[0] for layer in structure.layers)


def voted_counts(
    structure: Structure, masks: Sequence[Mask], keep: float, align: int = ALIGN
) -> tuple[int, ...]:
    """Units kept per layer for a vote: like the voters share theirs out, scaled to ``keep``.

    Voters that were ranked within each layer have the same ratio in all, and so has the result. Where they were ranked
    across layers, layer l gets its voters' mean ratio, all scaled by one factor so that the total is ``keep``.
    """
    if all(_is_uniform(structure, mask, align) for mask in masks):
        return kept_counts(structure, keep, align)
    rates = [
        sum(mask.kept[layer.name] for mask in masks) / (len(masks) * layer.units)
        for layer in structure.layers
    ]
    target = keep * structure.total_units
    low, high = 0.0, 1.0 / min(rates)
    # Bisection: the total rises with the factor; layers saturate at all of their units.
    for _ in range(60):
        factor = (low + high) / 2
        total = sum(min(1.0, factor * r) * n for r, n in zip(rates, structure.units_per_layer, strict=True))
        low, high = (factor, high) if total < target else (low, factor)
    ratios = [min(1.0, max(1e-9, high * rate)) for rate in rates]
    return tuple(
        kept_units([layer.units], ratio, layer.multiple(align))[0]
        for layer, ratio in zip(structure.layers, ratios, strict=True)
    )


def _is_uniform(structure: Structure, mask: Mask, align: int) -> bool:
    """Whether all layers keep the same share, up to rounding."""
    kept, share = mask.kept, mask.keep
    return all(
        abs(kept[layer.name] - share * layer.units) <= layer.multiple(align) for layer in structure.layers
    )
