"""Classifiers in closed form on a model's features: where fine-tuning starts (class means) and ends (ridge)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LinearHead(NamedTuple):
    """logits = features · weightᵀ + bias, with weight f32 [k, F] and bias f32 [k]."""

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        return torch.nn.functional.linear(features, self.weight, self.bias)


def class_means(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Mean feature of each class: [n, F] and labels [n] in 0..classes−1 → f32 [classes, F].

    Raises:
        ValueError: a class has no image.
    """
    counts = torch.bincount(labels, minlength=classes)
    if int(counts.min()) == 0:
        raise ValueError(
            f"class_means: expected images of all {classes} classes, got counts {counts.tolist()}"
        )
    sums = torch.zeros(classes, features.shape[1], dtype=torch.float64).index_add_(
        0, labels, features.double()
    )
    return (sums / counts[:, None]).float()


def nearest_mean_head(means: Tensor, temperature: float) -> LinearHead:
    """The classifier softmax(−‖f − μ_c‖² / temperature), which is linear in f: ‖f‖² is the same for every class."""
    return LinearHead(2.0 * means / temperature, -means.square().sum(1) / temperature)


def fit_temperature(features: Tensor, labels: Tensor, means: Tensor) -> float:
    """The temperature of ``nearest_mean_head`` with the least cross-entropy on these images, from a logarithmic grid.

    A grid, not a descent: the loss has one valley in log-temperature, and 0.1 of a decade is finer than it matters.
    """
    squared = features.double().square().sum(1, keepdim=True) - 2 * features.double() @ means.double().T
    squared = squared + means.double().square().sum(1)
    scale = float(squared.mean().clamp_min(1e-12))
    grid = [scale * 10 ** (k / 10) for k in range(-40, 11)]
    losses = [float(torch.nn.functional.cross_entropy(-squared / t, labels)) for t in grid]
    return grid[losses.index(min(losses))]


def class_mean_head(features: Tensor, labels: Tensor, classes: int) -> LinearHead:
    """Nearest class mean with fitted temperature: a calibrated head to start fine-tuning from. Shapes as above."""
    means = class_means(features, labels, classes)
    return nearest_mean_head(means, fit_temperature(features, labels, means))


def ridge_head(features: Tensor, labels: Tensor, classes: int) -> LinearHead:
    """Ridge regression of one-hot labels on the features; its strength is chosen by leave-one-out error.

    For the centred feature matrix X = U S Vᵀ the leave-one-out residual of ridge has a closed form, so the whole grid
    costs one decomposition. Float64 inside. Do not start fine-tuning from this head: its logits are no
    log-probabilities.

    Args:
        features: f32 [n, F], n ≥ 2. labels: int64 [n] in 0..classes−1.
    """
    x, y = features.double(), torch.nn.functional.one_hot(labels, classes).double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    uty, energy = u.T @ y, s.square()
    best_error, best_weight = float("inf"), torch.zeros(x.shape[1], classes, dtype=torch.float64)
    for exponent in range(-8, 3):
        strength = float(energy[0]) * 10.0**exponent + 1e-12
        shrink = energy / (energy + strength)
        residual = y - u @ (shrink[:, None] * uty)
        # 1/n: the mean is fitted too. With n < F and the weakest ridge 1 − leverage is about 1e-8 and its residual as
        # small: a coarser clamp would make that ridge look best where it is not.
        leverage = (u.square() @ shrink + 1.0 / len(x)).clamp_max(1 - 1e-12)
        error = float((residual / (1 - leverage)[:, None]).square().mean())
        if error < best_error:
            best_error, best_weight = error, vt.T @ ((s / (energy + strength))[:, None] * uty)
    return LinearHead(best_weight.T.float().contiguous(), (y_mean - x_mean @ best_weight).float())
