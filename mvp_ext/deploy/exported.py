"""Exported files as something to call, whatever runs them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvp_ext.deploy.formats import format_of
from mvp_ext.deploy.metadata import Metadata, Precision
from mvp_ext.model.card import ModelCard
from mvp_ext.model.prediction import PREDICT_BATCH, Predictions, predict
from mvp_ext.model.preprocessing import Preprocessing


@dataclass(frozen=True, eq=False)
class ExportedModel:
    """A file of ``export``, opened on the CPU.

    Attributes:
        runtime: "onnxruntime", "openvino" or "torch".
        metadata: what the file says of itself: ``card``, ``precision``, ``preprocess``, ``softmax``, ``kept``, the
            ``versions`` of what wrote it.
    """

    runtime: str
    metadata: Metadata
    run: Callable[[Tensor], Tensor] = field(repr=False)

    @property
    def card(self) -> ModelCard:
        """How the model sees images, what its outputs mean, how good it was before the export."""
        return self.metadata.card

    @property
    def precision(self) -> Precision:
        """What it computes in."""
        return self.metadata.precision

    @property
    def preprocess(self) -> bool:
        """Whether it takes uint8 [B, H, W, 3] of any size, not what ``card.preprocessing`` makes of images."""
        return self.metadata.preprocess

    @property
    def softmax(self) -> bool:
        """Whether it gives probabilities, not logits."""
        return self.metadata.softmax

    def __call__(self, images: Tensor) -> Tensor:
        """What the file computes of a batch.

        Args:
            images: float32 [B, C, S, S], as ``card.preprocessing`` makes it of images; where ``preprocess``: uint8
                [B, H, W, 3], RGB, any H and W.

        Returns:
            float32 [B, k] on the CPU: logits, or probabilities where ``softmax``.

        Raises:
            ValueError: a batch of another kind.
        """
        expected = (torch.uint8, "[B, H, W, 3]") if self.preprocess else (torch.float32, "[B, C, S, S]")
        channels_last = not self.preprocess or images.shape[-1:] == (3,)
        if images.dtype != expected[0] or images.ndim != 4 or not channels_last or not len(images):
            raise ValueError(
                f"ExportedModel: images: expected {expected[0]} {expected[1]}, B ≥ 1, got {images.dtype} "
                f"{list(images.shape)}"
            )
        return self.run(images.cpu())

    def predict(self, images: Any, *, batch: int = PREDICT_BATCH) -> Predictions:
        """Class names with probabilities: what ``PrunedCheckpoint.predict`` gives of the same images.

        Args:
            images: one image, or a sequence of them: paths, Pillow images, uint8 arrays [H, W(, 3)]; or a tensor uint8
                [n, H, W, 3].
            batch: images a pass.

        Raises:
            ValueError: the file does not say how the model sees images, or an image is of another kind. OSError: no
                image.
        """
        card = card_before(self.card, self.preprocess)
        # predict puts a softmax behind the outputs; of logarithms of probabilities it is the probabilities.
        return predict(lambda x: self(x).log() if self.softmax else self(x), images, card, batch=batch)


def card_before(card: ModelCard, preprocess: bool) -> ModelCard:
    """The card of what comes before a graph, which does the preprocessing itself where ``preprocess``."""
    if not preprocess:
        return card
    return replace(card, preprocessing=_Bytes(**card.need_preprocessing("predict").to_dict()))


class _Bytes(Preprocessing):
    """Leaves to the graph what the graph does."""

    def batch(self, images: Tensor) -> Tensor:
        return images


def load_exported(path: str | os.PathLike[str], *, threads: int | None = None) -> ExportedModel:
    """Open a file of ``export``: ``.onnx``, ``.xml`` (its ``.bin`` beside it) or ``.pt2``.

    An ``.onnx`` or ``.xml`` file is data. A ``.pt2`` file is read by ``torch.export.load``, which may run what is in
    it: open those that you trust alone.

    Args:
        path: of the file.
        threads: CPU threads of the runtime, ≥ 1; None: its own choice (torch: as many as torch has).

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is of no such format, damaged, or not exported by this
            package.
        ImportError: the runtime is not installed.
    """
    path = Path(path)
    if threads is not None and threads < 1:
        raise ValueError(f"load_exported: threads: expected at least 1, got {threads}")
    found = format_of("load_exported", path)
    if not path.is_file():
        raise FileNotFoundError(f"load_exported: no such file: {path}")
    metadata, run = found.open_file(path, threads)
    return ExportedModel(found.runtime, metadata, run)
