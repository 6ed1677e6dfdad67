"""Similarities of tasks that the study compares with LEEP: higher = more alike.

All work in float64 on the target's TRAINING images. ``MEASURES`` has them as ``VoteOptions.similarity`` takes them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mvp_ext.zoo.similarity import TINY, Similarity, check_values, joint_distribution


def nce(probabilities: Tensor, labels: Tensor) -> float:
    """Negative conditional entropy −H(Y|Z) with z = argmax of the source's output (Tran et al. 2019), in [−H(y), 0]."""
    check_values("nce", probabilities, labels)
    hard = torch.nn.functional.one_hot(probabilities.argmax(1), probabilities.shape[1]).double()
    joint = joint_distribution(hard, labels)
    conditional = joint / joint.sum(0).clamp_min(TINY)
    return float((joint * conditional.clamp_min(TINY).log()).sum())


def h_score(features: Tensor, labels: Tensor) -> float:
    """H-score (Bao et al. 2019): trace(cov(f)⁻¹ · cov(E[f|y])), with pseudo-inverse; in [0, number of classes − 1]."""
    check_values("h_score", features, labels)
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
    check_values("logme", features, labels)
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
            new_alpha = gamma / max(weight_norm, TINY)
            new_beta = (n - gamma) / max(residual, TINY)
            moved = abs(new_alpha / new_beta - alpha / beta) / max(alpha / beta, TINY)
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


MEASURES: dict[str, Similarity] = {
    "nce": lambda features, head, labels: nce(torch.softmax(head(features), 1), labels),
    "h_score": lambda features, head, labels: h_score(features, labels),
    "logme": lambda features, head, labels: logme(features, labels),
}
