"""The similarities that the study compares with LEEP: by hand, against brute force, at the ends of their ranges."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from label_measures import assert_ends_of_range, assert_in_range, softmax

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from study.similarity import MEASURES, h_score, logme, nce

from mvp_ext.train.heads import LinearHead


def test_nce_by_hand():
    """argmax: z = 0, 0, 1, 1, 1 of labels 0, 0, 0, 1, 1 → H(Y|Z) = 3/5 · H(1/3)."""
    theta = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7], [0.4, 0.6]])
    labels = torch.tensor([0, 0, 0, 1, 1])
    expected = 0.6 * (math.log(1 / 3) / 3 + 2 * math.log(2 / 3) / 3)
    assert nce(theta, labels) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("balanced", [True, False])
def test_range(balanced):
    assert_in_range(nce, balanced)


def test_ends_of_the_range():
    assert_ends_of_range(nce)


def test_h_score_against_the_explicit_inverse():
    labels = torch.arange(90) % 3
    features = torch.randn(90, 6).double() + torch.randn(3, 6).double()[labels]
    centred = features - features.mean(0)
    means = torch.stack([centred[labels == c].mean(0) for c in range(3)])[labels]
    expected = torch.trace(torch.linalg.inv(centred.T @ centred / 90) @ (means.T @ means / 90))
    assert h_score(features, labels) == pytest.approx(float(expected), rel=1e-9)
    assert 0 <= h_score(features, labels) <= 2  # at most classes − 1


def test_h_score_ends_and_singular_features():
    labels = torch.arange(30) % 3
    separable = torch.nn.functional.one_hot(labels, 3).float()
    # Singular: repeated and constant features.
    doubled = torch.cat([separable, separable, torch.ones(30, 2)], 1)
    assert h_score(separable, labels) == pytest.approx(2, abs=1e-6)
    assert h_score(doubled, labels) == pytest.approx(2, abs=1e-6)
    assert h_score(torch.ones(30, 2), labels) == pytest.approx(0, abs=1e-9)


def log_evidence(features, y, alpha, beta) -> float:
    """log N(y; 0, I/β + F Fᵀ/α): the evidence of y = F w + noise with w ~ N(0, 1/α), noise ~ N(0, 1/β)."""
    n = len(y)
    covariance = torch.eye(n, dtype=torch.float64) / beta + features @ features.T / alpha
    return float(
        torch.distributions.MultivariateNormal(torch.zeros(n, dtype=torch.float64), covariance).log_prob(y)
    )


@pytest.mark.parametrize(("n", "width"), [(40, 4), (12, 20)])
def test_logme_against_brute_force(n, width):
    """The evidence, maximised over a fine grid of (α, β), per image and averaged over the classes."""
    labels = torch.arange(n) % 2
    features = torch.randn(n, width).double() + 0.7 * torch.randn(2, width).double()[labels]
    best = []
    for label in range(2):
        y = (labels == label).double()
        best.append(
            max(
                log_evidence(features, y, 10 ** (a / 8), 10 ** (b / 8))
                for a in range(-8, 33)
                for b in range(-8, 25)
            )
        )
    expected = sum(best) / len(best) / n
    # The fixed point of the iteration is a stationary point of the evidence; the grid's best is at most a little lower.
    assert logme(features, labels) == pytest.approx(expected, abs=5e-3)
    assert logme(features, labels) >= expected - 1e-3


def test_logme_prefers_features_that_predict():
    labels = torch.arange(60) % 3
    noise = torch.randn(60, 5)
    informative = noise + 3 * torch.randn(3, 5)[labels]
    assert logme(informative, labels) > logme(noise, labels)


def test_logme_of_perfect_and_of_constant_features_is_finite():
    labels = torch.arange(12) % 2
    assert math.isfinite(logme(torch.nn.functional.one_hot(labels, 2).float(), labels))
    assert math.isfinite(logme(torch.ones(12, 3), labels))
    assert math.isfinite(logme(torch.zeros(12, 3), labels))


FUNCTIONS = {"nce": nce, "h_score": h_score, "logme": logme}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_errors(name):
    measure, labels = FUNCTIONS[name], torch.tensor([0, 1, 1])
    good = softmax(3, 2)
    with pytest.raises(ValueError, match=rf"{name}: expected finite values"):
        measure(torch.tensor([[0.5, 0.5], [float("nan"), 0.5], [1.0, 0.0]]), labels)
    for values, wrong in ((good[0], labels), (good, labels[:2]), (good[:0], labels[:0]), (good, good)):
        with pytest.raises(ValueError, match=rf"{name}: expected \[n, width\] and labels \[n\]"):
            measure(values, wrong)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_order_and_dtype_do_not_matter(name):
    labels = torch.arange(40) % 4
    values = softmax(40, 6)
    order = torch.randperm(40)
    assert FUNCTIONS[name](values[order], labels[order]) == pytest.approx(
        FUNCTIONS[name](values, labels), rel=1e-6
    )
    assert FUNCTIONS[name](values.double(), labels) == pytest.approx(
        FUNCTIONS[name](values, labels), rel=1e-6
    )


def test_measures_look_at_what_they_are_of():
    """NCE at the head's answers; the others at the features alone."""
    features, labels = torch.randn(20, 6), torch.arange(20) % 4
    head = LinearHead(torch.randn(3, 6), torch.randn(3))
    got = {name: measure(features, head, labels) for name, measure in MEASURES.items()}
    assert got == {
        "nce": nce(torch.softmax(head(features), 1), labels),
        "h_score": h_score(features, labels),
        "logme": logme(features, labels),
    }
