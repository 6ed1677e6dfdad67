"""Closed-form classifiers against their definitions, computed the long way."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from mvp_ext.train import heads
from mvp_ext.train.heads import (
    ClassStatistics,
    LinearHead,
    class_mean_head,
    class_means,
    fit_temperature,
    left_out_error,
    nearest_mean_head,
    ridge_head,
    soft_labels,
)


def clusters(count=40, width=7, classes=4, spread=0.7):
    """Features f32 [count, width] around one centre a class, far from the origin, and their labels."""
    labels = torch.arange(count) % classes
    centres = 3 + torch.randn(classes, width)
    return centres[labels] + spread * torch.randn(count, width), labels


def test_class_means():
    features, labels = clusters()
    means = class_means(features, labels, 4)
    for label in range(4):
        torch.testing.assert_close(means[label], features[labels == label].mean(0))


def test_class_means_needs_every_class():
    with pytest.raises(ValueError, match=r"images of all 3 classes, got counts \[1, 0, 1\]"):
        class_means(torch.randn(2, 5), torch.tensor([0, 2]), 3)


@pytest.mark.parametrize("temperature", [0.3, 5.0])
def test_nearest_mean_head_is_softmax_of_squared_distances(temperature):
    features, labels = clusters()
    means = class_means(features, labels, 4)
    distances = (features[:, None] - means[None]).square().sum(2)
    expected = torch.softmax(-distances / temperature, 1)
    got = torch.softmax(nearest_mean_head(means, temperature)(features), 1)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_temperature_has_the_least_cross_entropy():
    features, labels = clusters(spread=2.0)
    means = class_means(features, labels, 4)
    distances = (features.double()[:, None] - means.double()[None]).square().sum(2)
    fitted = fit_temperature(features, labels, means)

    def loss(temperature):
        return float(functional.cross_entropy(-distances / temperature, labels))

    finer = [fitted * 10 ** (k / 100) for k in range(-200, 201)]
    assert loss(fitted) <= min(map(loss, finer)) + 1e-3
    assert loss(fitted) < min(loss(fitted * 3), loss(fitted / 3))
    head = class_mean_head(features, labels, 4)
    expected = nearest_mean_head(means, fitted)
    assert torch.equal(head.weight, expected.weight)
    assert torch.equal(head.bias, expected.bias)


def test_temperature_of_identical_features_is_finite():
    labels = torch.arange(6) % 2
    head = class_mean_head(torch.zeros(6, 3), labels, 2)
    assert torch.isfinite(head.weight).all()
    assert torch.isfinite(head.bias).all()


def explicit_ridge(features, labels, classes, strength) -> LinearHead:
    """(XᵀX + λ)⁻¹ XᵀY of centred X and Y, in float64."""
    x, y = features.double(), functional.one_hot(labels, classes).double()
    xm, ym = x.mean(0), y.mean(0)
    gram = (x - xm).T @ (x - xm) + strength * torch.eye(x.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(gram, (x - xm).T @ (y - ym))
    return LinearHead(weight.T, ym - xm @ weight)


def strengths(features):
    """The grid that ridge_head searches: relative to the largest eigenvalue of the centred Gram matrix."""
    centred = features.double() - features.double().mean(0)
    largest = float(torch.linalg.matrix_norm(centred, 2)) ** 2
    return [largest * 10.0**k for k in range(-8, 3)]


@pytest.mark.parametrize(("count", "width", "spread"), [(40, 7, 0.7), (24, 60, 0.5), (30, 12, 4.0)])
def test_ridge_is_the_solution_with_the_least_leave_one_out_error(count, width, spread):
    """Left out one by one, by brute force; n > F, n < F, and noise that asks for a strong ridge."""
    features, labels = clusters(count, width, 3, spread)
    targets = functional.one_hot(labels, 3).double()
    errors = []
    for strength in strengths(features):
        error = 0.0
        for i in range(count):
            rest = torch.arange(count) != i
            head = explicit_ridge(features[rest], labels[rest], 3, strength)
            error += float((head(features[i].double()) - targets[i]).square().sum())
        errors.append(error)
    best = strengths(features)[errors.index(min(errors))]
    expected = explicit_ridge(features, labels, 3, best)
    got = ridge_head(features, labels, 3)
    assert got.weight.dtype == got.bias.dtype == torch.float32
    # One scale and one bias for all classes: the order of the regression's scores is that of the logits.
    scale = float(got.weight.norm() / expected.weight.norm())
    torch.testing.assert_close(got.weight.double() / scale, expected.weight, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(got.bias.double() / scale, expected.bias - 1 / 3, atol=1e-4, rtol=1e-3)
    # The scale is the one that fits what brute force says of images left out.
    left_out = []
    for i in range(count):
        rest = torch.arange(count) != i
        left_out.append(explicit_ridge(features[rest], labels[rest], 3, best)(features[i].double()))
    smooth = (targets * count + 1) / (count + 3)

    def loss(factor):
        return float(-(smooth * (factor * torch.stack(left_out)).log_softmax(1)).sum(1).mean())

    assert loss(scale) <= min(loss(0.98 * scale), loss(1.02 * scale))
    wrong = torch.stack(left_out).argmax(1) != labels
    assert left_out_error(features, labels, 3) == pytest.approx(float(wrong.double().mean()))


def test_statistics_are_all_that_a_ridge_asks():
    """The head of some of the classes, as many images of each: the ridge regression on those images."""
    features, labels = clusters(60, 9, 5)
    chosen = [3, 0, 4]
    head = ClassStatistics.of(features, labels, 5).head(chosen)
    x = torch.cat([features[labels == c] for c in chosen]).double()
    y = torch.arange(3).repeat_interleave(12)
    centred = torch.cat([features[labels == c] - features[labels == c].mean(0) for c in range(5)]).double()
    means = torch.stack([features[labels == c].double().mean(0) for c in chosen])
    # With the scatter of all five classes.
    total = centred.T @ centred / 60 + (means - means.mean(0)).T @ (means - means.mean(0)) / 3
    strength = 0.03 * float(torch.linalg.eigvalsh(total)[-1])
    cross = (x - x.mean(0)).T @ (functional.one_hot(y, 3) - 1 / 3).double() / len(x)
    weight = torch.linalg.solve(total + strength * torch.eye(9, dtype=torch.float64), cross)
    torch.testing.assert_close(head.weight.double(), weight.T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(head(features).sum(1), torch.ones(60), atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", range(4))
def test_who_is_heard_and_how_much_is_what_explains_images_left_out(seed):
    """By a search of shares, over heads from one that knows the classes to one that takes them for each other."""
    draw = torch.Generator().manual_seed(seed)
    classes = torch.randn(3, 20, generator=draw)
    labels = torch.arange(3).repeat_interleave(6)
    features = classes[labels] + 1.5 * torch.randn(18, 20, generator=draw)
    hot = functional.one_hot(labels, 3).double()
    # What each image gets of the others is tested above, by its errors.
    own = heads._ridge(features, labels, 3)[2]
    heard = []
    for right in torch.linspace(-0.5, 1.5, 9):
        wrong = functional.one_hot((labels + 1) % 3, 3)
        said = (
            (right * hot + (1 - right) * wrong + 0.1 * torch.randn(18, 3, generator=draw)).softmax(1).float()
        )
        shares = torch.linspace(0, 1, 1001, dtype=torch.float64)
        errors = torch.stack(
            [(share * said.double() + (1 - share) * own - hot).square().sum() for share in shares]
        )
        best, soft = float(shares[errors.argmin()]), soft_labels(said, features, labels)
        heard.append(soft is not None)
        errs_less = bool(errors[-1] < errors[0])
        assert (soft is not None) == errs_less
        if soft is None:
            continue
        torch.testing.assert_close(soft, (best * said + (1 - best) * hot).float(), atol=2e-3, rtol=0)
        torch.testing.assert_close(soft.sum(1), torch.ones(18), atol=1e-5, rtol=0)
    assert heard == sorted(heard)
    assert (heard[0], heard[-1]) == (False, True)


def test_soft_labels_take_the_labels_place():
    features, labels = clusters()
    plain = ridge_head(features, labels, 4)
    same = ridge_head(features, labels, 4, functional.one_hot(labels, 4))
    assert torch.equal(plain.weight, same.weight)
    soft = plain(features)
    scale = float(soft.std())
    # What is linear in the features is found, up to the logits' scale.
    found = ridge_head(features, labels, 4, soft / scale + 1 / 4)
    factor = float(found.weight.norm() / plain.weight.norm())
    torch.testing.assert_close(found.weight, factor * plain.weight, atol=1e-3, rtol=1e-3)


def test_ridge_of_constant_features_is_the_prior():
    labels = torch.tensor([0, 0, 0, 1])
    head = ridge_head(torch.ones(4, 3), labels, 2)
    assert torch.equal(head.weight, torch.zeros(2, 3))
    assert torch.isfinite(head.bias).all()
    assert float(head.bias.sum()) == pytest.approx(0, abs=1e-6)
