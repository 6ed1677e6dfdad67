"""How often a classifier is right."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mvp_ext.data.tasks import TaskData
from mvp_ext.train.backbone import Preprocessing, extract_features


def accuracy_of(logits: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest logit is the label's, in [0, 1]."""
    return float((logits.argmax(1) == labels).double().mean())


def evaluate(
    model: nn.Module, data: TaskData, preprocessing: Preprocessing, precision: str = "auto"
) -> float:
    """Top-1 accuracy on the task's test images, in [0, 1]."""
    features = extract_features(model, data.test_images, preprocessing, precision)
    classifier = model.get_classifier()  # type: ignore[operator]
    with torch.no_grad():
        return accuracy_of(classifier(features.to(classifier.weight.device)).cpu(), data.test_labels)
