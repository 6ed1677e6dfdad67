"""Similarities of tasks: by hand, against brute force, at the ends of their ranges."""

from __future__ import annotations

import math

import pytest
import torch

from mvp_ext.zoo.similarity import leep


def entropy(labels) -> float:
    """H(y) of the empirical distribution, in nats."""
    share = torch.bincount(labels).double() / len(labels)
    share = share[share > 0]
    return float(-(share * share.log()).sum())


def softmax(count, classes, sharpness=2.0):
    return torch.softmax(sharpness * torch.randn(count, classes), 1)


def test_leep_by_hand():
    """Four images, two source classes.

    P(y,z): y=0: (.9 + .6)/4, (.1 + .4)/4; y=1: (.2 + .3)/4, (.8 + .7)/4 → P(y=0|z) = .75, .25.
    """
    theta = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]])
    labels = torch.tensor([0, 0, 1, 1])
    expected = (
        math.log(0.75 * 0.9 + 0.25 * 0.1)
        + math.log(0.75 * 0.6 + 0.25 * 0.4)
        + math.log(0.25 * 0.2 + 0.75 * 0.8)
        + math.log(0.25 * 0.3 + 0.75 * 0.7)
    ) / 4
    assert leep(theta, labels) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("balanced", [True, False])
def test_range(balanced):
    """In [−H(y), 0]; so for ten balanced classes at least −ln 10."""
    labels = torch.arange(200) % 10 if balanced else torch.randint(0, 10, (200,)) % 7
    for sources in (2, 5, 20):
        value = leep(softmax(200, sources), labels)
        assert -entropy(labels) - 1e-9 <= value <= 1e-9
    if balanced:
        assert leep(softmax(200, 5), labels) >= -math.log(10) - 1e-9


def test_ends_of_the_range():
    """A source that tells the classes apart under other names: 0. One that always says the same: −H(y)."""
    labels = torch.tensor([0, 1, 2, 2, 1, 0, 2])
    perfect = torch.nn.functional.one_hot((labels + 1) % 3, 4).float()
    assert leep(perfect, labels) == pytest.approx(0, abs=1e-12)
    same = torch.tensor([[0.7, 0.2, 0.1]]).expand(7, 3)
    assert leep(same, labels) == pytest.approx(-entropy(labels), abs=1e-6)  # float32 rows


def test_leep_prefers_the_more_informative_source():
    labels = torch.arange(60) % 3
    truth = torch.nn.functional.one_hot(labels, 3).float()
    values = [
        leep(torch.softmax(sharpness * truth + torch.randn(60, 3), 1), labels) for sharpness in (0, 2, 6)
    ]
    assert values == sorted(values)


def test_labels_may_skip_a_class():
    theta = softmax(6, 3)
    assert leep(theta, torch.tensor([0, 0, 0, 1, 1, 1])) == pytest.approx(
        leep(theta, torch.tensor([0, 0, 0, 5, 5, 5]))
    )


def test_errors():
    labels = torch.tensor([0, 1, 1])
    good = softmax(3, 2)
    with pytest.raises(ValueError, match="leep: expected finite values"):
        leep(torch.tensor([[0.5, 0.5], [float("nan"), 0.5], [1.0, 0.0]]), labels)
    for values, wrong in ((good[0], labels), (good, labels[:2]), (good[:0], labels[:0]), (good, good)):
        with pytest.raises(ValueError, match=r"leep: expected \[n, width\] and labels \[n\]"):
            leep(values, wrong)


def test_order_and_dtype_do_not_matter():
    labels = torch.arange(40) % 4
    values = softmax(40, 6)
    order = torch.randperm(40)
    assert leep(values[order], labels[order]) == pytest.approx(leep(values, labels), rel=1e-6)
    assert leep(values.double(), labels) == pytest.approx(leep(values, labels), rel=1e-6)
