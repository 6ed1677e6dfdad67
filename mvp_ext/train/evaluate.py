"""How often a classifier is right, and how well it knows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mvp_ext.data.tasks import TaskData
from mvp_ext.model.preprocessing import Preprocessing
from mvp_ext.train.backbone import classify, extract_features

# Of equal width, as is usual (Guo et al. 2017, arXiv 1706.04599).
CALIBRATION_BINS = 15


class Quality(NamedTuple):
    """A classifier on a task's test images; every number is in [0, 1].

    ``accuracy`` is top-1, ``mean_confidence`` the mean of the largest probability, ``expected_calibration_error`` the
    mean over images of |share that is right − mean confidence| of the images that are about as confident, and
    ``class_accuracy`` the accuracy of each of the k classes; None of one without images.
    """

    accuracy: float
    expected_calibration_error: float
    mean_confidence: float
    class_accuracy: tuple[float | None, ...]

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> Quality:
        """From logits f32 [n, k] and labels int64 [n], n ≥ 1."""
        confidence, answers = logits.double().softmax(1).max(1)
        right = (answers == labels).double()
        bins = (confidence * CALIBRATION_BINS).ceil().long().clamp_(1, CALIBRATION_BINS) - 1
        gaps = torch.zeros(CALIBRATION_BINS, dtype=torch.float64).index_add_(0, bins, right - confidence)
        images, rights = (labels.bincount(part, logits.shape[1]).tolist() for part in (None, right))
        return cls(
            accuracy_of(logits, labels),
            float(gaps.abs().sum() / len(labels)),
            float(confidence.mean()),
            tuple(right / n if n else None for right, n in zip(rights, images, strict=True)),
        )


def accuracy_of(logits: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest logit is the label's, in [0, 1]."""
    return float((logits.argmax(1) == labels).double().mean())


def evaluate(
    model: nn.Module, data: TaskData, preprocessing: Preprocessing, precision: str = "auto"
) -> Quality:
    """The model's quality on the task's test images."""
    features = extract_features(model, data.test_images, preprocessing, precision)
    with torch.no_grad():
        return Quality.of(classify(model, features).cpu(), data.test_labels)
