"""From images to class names with probabilities, whatever computes the logits."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from mvp_ext.model.card import ModelCard
from mvp_ext.model.preprocessing import Preprocessing

# Images a pass: bounds memory, not results.
PREDICT_BATCH = 32


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a classifier says of n images.

    Attributes:
        probabilities: float32 [n, k], rows sum to 1.
        class_names: k names.
    """

    probabilities: Tensor
    class_names: tuple[str, ...]

    @property
    def labels(self) -> list[str]:
        """The most probable class of each image."""
        return [self.class_names[at] for at in self.probabilities.argmax(1).tolist()]

    def top(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """For each image its k most probable classes (all, where there are fewer) with their probabilities."""
        values, indices = self.probabilities.topk(min(k, len(self.class_names)), dim=1)
        return [
            [(self.class_names[at], value) for at, value in zip(row, chances, strict=True)]
            for row, chances in zip(indices.tolist(), values.tolist(), strict=True)
        ]


def predict(
    logits_of: Callable[[Tensor], Tensor], images: Any, card: ModelCard, *, batch: int = PREDICT_BATCH
) -> Predictions:
    """Predictions of a model for images.

    Args:
        logits_of: float32 [B, 3, S, S] → float [B, k]; called for one batch after the other, without gradients.
        images: one image, or a sequence of them: paths, Pillow images, uint8 arrays [H, W(, 3)]; or uint8 [n, H, W, 3].
        card: the model's: how it sees images, the names of its outputs.
        batch: images a pass, ≥ 1.

    Raises:
        ValueError: the card does not say how images are seen, or an image is of another kind. OSError: no image.
    """
    parts = []
    with torch.inference_mode():
        for chunk in batches_of(images, card.need_preprocessing("predict"), batch):
            parts.append(logits_of(chunk).float().softmax(1).cpu())
    if not parts:
        return Predictions(torch.empty(0, len(card.class_names)), card.class_names)
    probabilities = torch.cat(parts)
    return Predictions(probabilities, card.names(probabilities.shape[1]))


def batches_of(images: Any, preprocessing: Preprocessing, batch: int) -> Iterator[Tensor]:
    """``images`` as a model takes them: float32 [B, 3, S, S], B ≤ ``batch``; arguments and errors as of ``predict``."""
    if batch < 1:
        raise ValueError(f"predict: batch: expected at least 1, got {batch}")
    yield from map(preprocessing.batch, _bytes(images, preprocessing, batch))


def _bytes(images: Any, preprocessing: Preprocessing, batch: int) -> Iterator[Tensor]:
    if isinstance(images, Tensor) and images.ndim == 4:
        yield from images.split(batch)
        return
    single = isinstance(images, (str, os.PathLike)) or not isinstance(images, (Sequence, Iterable))
    one_array = getattr(images, "ndim", 4) < 4
    left = iter([images] if single or one_array else images)
    while chunk := list(islice(left, batch)):
        yield torch.stack([preprocessing.bytes_of(image) for image in chunk])
