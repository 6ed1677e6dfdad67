"""Two zoos that were built in different ways from the same seeds are equal, to the bit."""

from __future__ import annotations

import warnings

import torch

from mvp_ext.zoo.shared import START, UNIVERSAL
from mvp_ext.zoo.zoo import Zoo


def assert_equal_zoos(expected: Zoo, found: Zoo) -> None:
    """Names, tasks, metrics, masks and tensors of all entries and shared models, and the facts; not what they cost."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pairs = list(zip(expected.entries(), found.entries(), strict=True))
    for mine, theirs in pairs:
        assert (mine.name, mine.task, mine.accuracy, mine.steps, mine.keep) == (
            *(theirs.name, theirs.task, theirs.accuracy, theirs.steps, theirs.keep),
        )
    shared = [(expected.shared(name), found.shared(name)) for name in (START, UNIVERSAL)]
    for mine, theirs in [*pairs, *shared]:
        assert (mine is None) == (theirs is None)
        if mine is None or theirs is None:
            continue
        a, b = mine.read(), theirs.read()
        assert a.mask == b.mask
        assert a.card.metrics == b.card.metrics
        tensors = [
            {**each.state, **{k: v for k, v in each.extra.items() if isinstance(v, torch.Tensor)}}
            for each in (a, b)
        ]
        assert tensors[0].keys() == tensors[1].keys()
        assert all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items()), mine.name
    assert found.facts() == expected.facts()
