"""What holds for every measure of how well a source's class probabilities predict labels: it lies in [−H(y), 0]."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

Measure = Callable[[Tensor, Tensor], float]


def entropy(labels: Tensor) -> float:
    """H(y) of the empirical distribution, in nats."""
    share = torch.bincount(labels).double() / len(labels)
    share = share[share > 0]
    return float(-(share * share.log()).sum())


def softmax(count: int, classes: int, sharpness: float = 2.0) -> Tensor:
    return torch.softmax(sharpness * torch.randn(count, classes), 1)


def assert_in_range(measure: Measure, balanced: bool) -> None:
    """In [−H(y), 0]; so for ten balanced classes at least −ln 10."""
    labels = torch.arange(200) % 10 if balanced else torch.randint(0, 10, (200,)) % 7
    for sources in (2, 5, 20):
        value = measure(softmax(200, sources), labels)
        assert -entropy(labels) - 1e-9 <= value <= 1e-9
    if balanced:
        assert measure(softmax(200, 5), labels) >= -math.log(10) - 1e-9


def assert_ends_of_range(measure: Measure) -> None:
    """A source that tells the classes apart under other names: 0. One that always says the same: −H(y)."""
    labels = torch.tensor([0, 1, 2, 2, 1, 0, 2])
    perfect = torch.nn.functional.one_hot((labels + 1) % 3, 4).float()
    assert measure(perfect, labels) == pytest.approx(0, abs=1e-12)
    same = torch.tensor([[0.7, 0.2, 0.1]]).expand(7, 3)
    # The rows are float32.
    assert measure(same, labels) == pytest.approx(-entropy(labels), abs=1e-6)
