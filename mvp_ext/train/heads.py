"""Classifiers in closed form on a model's features: where fine-tuning starts (class means) and ends (ridge)."""

from __future__ import annotations

import math
from collections.abc import Sequence
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


def ridge_head(features: Tensor, labels: Tensor, classes: int, targets: Tensor | None = None) -> LinearHead:
    """Ridge regression of one-hot labels on the features; its strength is chosen by leave-one-out error.

    For the centred feature matrix X = U S Vᵀ the leave-one-out residual of ridge has a closed form, so the whole grid
    costs one decomposition. Float64 inside. The regression's scores sum to 1 and are no logits; they become some by a
    common scale and bias (``_logit_scale``), fitted to what the regression says of each image when it is left out. The
    order stays, and so does accuracy. What fine-tuning has seen makes the probabilities a little too sure.

    Args:
        features: f32 [n, F], n ≥ 2. labels: int64 [n] in 0..classes−1.
        targets: [n, classes], soft labels to regress in their place, each row of sum 1.
    """
    weight, bias, left_out = _ridge(features, labels, classes, targets)
    scale = _logit_scale(left_out, labels)
    # Scores sum to 1: less 1/k their logits sum to 0, as those of a trained classifier nearly do.
    return LinearHead((scale * weight).T.float().contiguous(), (scale * (bias - 1 / classes)).float())


# Of the largest eigenvalue: what a ridge is worth that cannot be chosen, for there are no images to leave out.
_STRENGTH = 0.03


class ClassStatistics(NamedTuple):
    """All that a linear classifier asks of images: means f32 [k, F] of their classes, and scatter f32 [F, F], the mean
    of (f − μ_c)(f − μ_c)ᵀ over all of them.
    """

    means: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, classes: int) -> ClassStatistics:
        """Of features f32 [n, F] with labels int64 [n] in 0..classes−1, all of them there."""
        means = class_means(features, labels, classes)
        centred = features.double() - means.double()[labels]
        return cls(means, (centred.T @ centred / len(centred)).float())

    def head(self, classes: Sequence[int]) -> LinearHead:
        """Ridge regression of one-hot labels on these features, as many images of each of these classes: scores that
        sum to 1.
        """
        means = self.means[list(classes)].double()
        mean, share = means.mean(0), 1 / len(means)
        centred = means - mean
        total = self.scatter.double() + share * centred.T @ centred
        ridge = _STRENGTH * torch.linalg.eigvalsh(total)[-1] + 1e-12
        weight = torch.linalg.solve(
            total + ridge * torch.eye(len(total), dtype=torch.float64), share * centred.T
        )
        return LinearHead(weight.T.float().contiguous(), (share - mean @ weight).float())


def left_out_error(features: Tensor, labels: Tensor, classes: int) -> float:
    """Share of the images, in [0, 1], that ``ridge_head`` takes for another class when it is fitted to all others.

    Features that were fine-tuned on these very images make it too small.
    """
    return float((_ridge(features, labels, classes)[2].argmax(1) != labels).double().mean())


def soft_labels(said: Tensor, features: Tensor, labels: Tensor) -> Tensor | None:
    """Labels mixed with what another head says of the images, f32 [n, k]; None where that is better not heard.

    The other's share is what it has in the mix that comes nearest to the labels (least squares: stacking, Wolpert 1992,
    Breiman 1996) of its scores and those of a ridge head on these features, of each image left out. It is heard where
    that is a half or more, which is to say: where it errs no more than what can be learned of these images alone.

    Args:
        said: f32 [n, k], scores of a ridge head that has not seen the images: those of an image sum to 1.
        features: f32 [n, F]. labels: int64 [n] in 0..k−1.
    """
    hot = torch.nn.functional.one_hot(labels, said.shape[1]).double()
    own = _ridge(features, labels, said.shape[1])[2]
    apart = said.double() - own
    share = float(((hot - own) * apart).sum() / apart.square().sum().clamp_min(1e-12))
    if share < 0.5:
        return None
    share = min(1.0, share)
    return (share * said.double() + (1 - share) * hot).float()


def _ridge(
    features: Tensor, labels: Tensor, classes: int, targets: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """f64: weight [F, k] and bias [k] of the regression, and its scores [n, k] of each image left out."""
    x, y = features.double(), torch.nn.functional.one_hot(labels, classes).double()
    if targets is not None:
        y = targets.double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    uty, energy = u.T @ y, s.square()
    best_error, best_weight = float("inf"), torch.zeros(x.shape[1], classes, dtype=torch.float64)
    best_scores = y_mean.expand_as(y)
    for exponent in range(-8, 3):
        strength = float(energy[0]) * 10.0**exponent + 1e-12
        shrink = energy / (energy + strength)
        residual = y - u @ (shrink[:, None] * uty)
        # 1/n: the mean is fitted too. With n < F and the weakest ridge 1 − leverage is about 1e-8 and its residual as
        # small: a coarser clamp would make that ridge look best where it is not.
        leverage = (u.square() @ shrink + 1.0 / len(x)).clamp_max(1 - 1e-12)
        left_out = residual / (1 - leverage)[:, None]
        error = float(left_out.square().mean())
        if error < best_error:
            best_error, best_weight = error, vt.T @ ((s / (energy + strength))[:, None] * uty)
            best_scores = y + y_mean - left_out
    return best_weight, y_mean - x_mean @ best_weight, best_scores


def _logit_scale(scores: Tensor, labels: Tensor) -> float:
    """The scale by which softmax(scale · scores) has the least cross-entropy.

    The targets are not 0 and 1 but their estimates from n images (Platt 1999): where classes are separated, the best
    scale would be infinite.

    Args:
        scores: f64 [n, k], of images that had no part in them. labels: int64 [n].
    """
    from scipy.optimize import minimize_scalar

    n, k = scores.shape
    targets = torch.full((n, k), 1 / (n + k), dtype=torch.float64)
    targets[torch.arange(n), labels] = (n + 1) / (n + k)

    def loss(log_scale: float) -> float:
        return float(-(targets * (math.exp(log_scale) * scores).log_softmax(1)).sum(1).mean())

    # Convex in the scale, so with one valley in its logarithm, too.
    return math.exp(minimize_scalar(loss, bounds=(-3.0, 7.0), method="bounded").x)
