"""How alike two tasks are: how well a source model's outputs predict the target's labels. Higher = more alike.

Works in float64 on the target's TRAINING images.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mvp_ext.train.heads import LinearHead

# Below every probability that matters; keeps log(0) and 0/0 out
TINY = 1e-30


def check_values(name: str, values: Tensor, labels: Tensor) -> None:
    if values.ndim != 2 or labels.ndim != 1 or len(values) != len(labels) or len(labels) == 0:
        raise ValueError(
            f"{name}: expected [n, width] and labels [n] with n ≥ 1, "
            f"got {tuple(values.shape)} and {tuple(labels.shape)}"
        )
    if not torch.isfinite(values).all():
        raise ValueError(f"{name}: expected finite values, got NaN or inf")


def joint_distribution(probabilities: Tensor, labels: Tensor) -> Tensor:
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
    check_values("leep", probabilities, labels)
    theta = probabilities.double()
    joint = joint_distribution(theta, labels)
    conditional = joint / joint.sum(0).clamp_min(TINY)  # P(y|z), [Y, Z]
    expected = (theta * conditional[labels]).sum(1)  # [n]
    return float(expected.clamp_min(TINY).log().mean())


SIMILARITIES = ("proxy_leep", "leep")
# Of one's own: (features f32 [n, F] of an entry's model, its trained head, labels int64 [n]) → how alike, higher = more
Similarity = Callable[[Tensor, LinearHead, Tensor], float]
