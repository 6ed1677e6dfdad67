"""How alike two tasks are: how well a source model's outputs predict the target's labels. Higher = more alike.

All work in float64 on the target's TRAINING images. Range and source are with each measure.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_TINY = 1e-30  # below every probability that matters; keeps log(0) and 0/0 out


def _check(name: str, values: Tensor, labels: Tensor) -> None:
    if values.ndim != 2 or labels.ndim != 1 or len(values) != len(labels) or len(labels) == 0:
        raise ValueError(
            f"{name}: expected [n, width] and labels [n] with n ≥ 1, "
            f"got {tuple(values.shape)} and {tuple(labels.shape)}"
        )
    if not torch.isfinite(values).all():
        raise ValueError(f"{name}: expected finite values, got NaN or inf")


def _joint(probabilities: Tensor, labels: Tensor) -> Tensor:
    """P(y, z) = 1/n Σ_{i: y_i = y} θ(x_i)_z as f64 [Y, Z]."""
    rows = int(labels.max()) + 1
    joint = torch.zeros(rows, probabilities.shape[1], dtype=torch.float64)
    return joint.index_add_(0, labels, probabilities) / len(labels)


def leep(probabilities: Tensor, labels: Tensor) -> float:
    """LEEP (Nguyen et al. 2020): 1/n Σ_i log Σ_z P(y_i|z) θ(x_i)_z, in [−H(y), 0].

    Args:
        probabilities: [n, Z], the source model's softmax over ITS classes on the target's images; rows sum to 1.
        labels: int64 [n], the target's labels.
    """
    _check("leep", probabilities, labels)
    theta = probabilities.double()
    joint = _joint(theta, labels)
    conditional = joint / joint.sum(0).clamp_min(_TINY)  # P(y|z), [Y, Z]
    expected = (theta * conditional[labels]).sum(1)  # [n]
    return float(expected.clamp_min(_TINY).log().mean())


def nce(probabilities: Tensor, labels: Tensor) -> float:
    """Negative conditional entropy −H(Y|Z) with z = argmax of the source's output (Tran et al. 2019), in [−H(y), 0]."""
    _check("nce", probabilities, labels)
    hard = torch.nn.functional.one_hot(probabilities.argmax(1), probabilities.shape[1]).double()
    joint = _joint(hard, labels)
    conditional = joint / joint.sum(0).clamp_min(_TINY)
    return float((joint * conditional.clamp_min(_TINY).log()).sum())


def h_score(features: Tensor, labels: Tensor) -> float:
    """H-score (Bao et al. 2019): trace(cov(f)⁻¹ · cov(E[f|y])), with pseudo-inverse; in [0, number of classes − 1]."""
    _check("h_score", features, labels)
    f = features.double() - features.double().mean(0)
    between = torch.zeros_like(f)
    for label in labels.unique():
        members = labels == label
        between[members] = f[members].mean(0)
    covariance, between_covariance = f.T @ f / len(f), between.T @ between / len(f)
    return float(torch.trace(torch.linalg.pinv(covariance, hermitian=True, rtol=1e-9) @ between_covariance))


def logme(features: Tensor, labels: Tensor, iterations: int = 100) -> float:
    """LogME (You et al. 2021): maximised log evidence per image of a Bayesian linear regression, mean over classes.

    Unbounded; comparable between sources for one target only. ``iterations`` bounds the fixed-point search for the
    precisions α (of the weights) and β (of the noise).
    """
    _check("logme", features, labels)
    f = features.double()
    n, width = f.shape
    u, s, _ = torch.linalg.svd(f, full_matrices=False)
    energy = s.square()
    evidences = []
    for label in range(int(labels.max()) + 1):
        y = (labels == label).double()
        projected = (u.T @ y).square()
        outside = float((y.square().sum() - projected.sum()).clamp_min(0))
        alpha, beta = 1.0, 1.0
        for _ in range(iterations):
            denominator = alpha + beta * energy
            gamma = float((beta * energy / denominator).sum())
            weight_norm = float((beta**2 * energy * projected / denominator.square()).sum())
            residual = float((alpha**2 * projected / denominator.square()).sum()) + outside
            new_alpha = gamma / max(weight_norm, _TINY)
            new_beta = (n - gamma) / max(residual, _TINY)
            moved = abs(new_alpha / new_beta - alpha / beta) / max(alpha / beta, _TINY)
            # Features that say everything, or nothing, about a class have their optimum at infinity or at 0.
            alpha, beta = (min(max(precision, 1e-12), 1e12) for precision in (new_alpha, new_beta))
            if moved < 1e-4:
                break
        denominator = alpha + beta * energy
        weight_norm = float((beta**2 * energy * projected / denominator.square()).sum())
        residual = float((alpha**2 * projected / denominator.square()).sum()) + outside
        log_determinant = float(denominator.log().sum()) + (width - len(s)) * math.log(alpha)
        evidence = width * math.log(alpha) + n * math.log(beta) - n * math.log(2 * math.pi)
        evidence += -beta * residual - alpha * weight_norm - log_determinant
        evidences.append(evidence / (2 * n))
    return sum(evidences) / len(evidences)


# What each measure looks at: the source model's class probabilities, or its features.
ON_PROBABILITIES: dict[str, Callable[[Tensor, Tensor], float]] = {"leep": leep, "nce": nce}
ON_FEATURES: dict[str, Callable[[Tensor, Tensor], float]] = {"logme": logme, "h_score": h_score}
SIMILARITIES = ("proxy_leep", *ON_PROBABILITIES, *ON_FEATURES)
