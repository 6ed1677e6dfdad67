"""Similarities of tasks: by hand, against brute force, at the ends of their ranges."""

from __future__ import annotations

import math

import pytest
import torch
from label_measures import assert_ends_of_range, assert_in_range, softmax

from mvp_ext.zoo.similarity import leep


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
    assert_in_range(leep, balanced)


def test_ends_of_the_range():
    assert_ends_of_range(leep)


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
