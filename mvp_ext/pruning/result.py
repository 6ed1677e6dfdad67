"""What making a small model gives back: the model, its mask, how good it is and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mvp_ext.data.tasks import Task, TaskData
from mvp_ext.model.card import ModelCard
from mvp_ext.model.checkpoint import PrunedCheckpoint, save_pruned
from mvp_ext.model.mask import Mask
from mvp_ext.model.measure import Measurement, count_flops, count_parameters, measure
from mvp_ext.model.preprocessing import Preprocessing
from mvp_ext.model.structure import Structure
from mvp_ext.train.cost import Cost

# What a card says under "metrics": each in [0, 1], of the task's test images.
METRICS = ("accuracy", "expected_calibration_error", "mean_confidence")


@dataclass(frozen=True)
class Point:
    """Accuracy on the test images after some steps: with the head as trained so far, and with a ridge head refitted."""

    step: int
    accuracy: float
    refit_accuracy: float


@dataclass
class Result:
    """A small model for one task.

    Attributes:
        model: a plain timm module at its real, small shapes, in eval mode, with a ridge-refitted classifier. Its
            input is what ``preprocessing`` makes of images.
        mask: the units it kept, of ``structure`` (the dense model's).
        accuracy: top-1 on the task's test images, in [0, 1]. trained_accuracy: before the ridge refit.
        expected_calibration_error: how far the probabilities are from the shares that are right, in [0, 1].
        mean_confidence: mean of the largest probability, in [0, 1].
        class_accuracy: of each class's test images, in [0, 1]; None of a class without any.
        neighbours: (zoo entry, similarity) of the voters, nearest first; empty for other methods.
        choice: what was chosen for the task: by "clustered" the share of its classes that the zoo knows, in all and by
            expert, and of its images that experts have told; by steps "auto" how many, and the error that asked for
            them. None where nothing was.
        tensors: what a zoo needs to compare and to run it later: "class_means" f32 [k, F] and "temperature" f32 []
            under the dense backbone, "head_weight" f32 [k, F] and "head_bias" f32 [k] as trained, before the refit.
    """

    model: nn.Module
    mask: Mask
    structure: Structure
    task: Task | TaskData
    method: str
    keep: float
    accuracy: float
    trained_accuracy: float
    cost: Cost
    preprocessing: Preprocessing
    expected_calibration_error: float
    mean_confidence: float
    class_accuracy: tuple[float | None, ...]
    history: list[Point] = field(default_factory=list)
    neighbours: list[tuple[str, float]] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    choice: dict[str, Any] | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.task.class_names

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return (3, self.preprocessing.size, self.preprocessing.size)

    @property
    def flops(self) -> int:
        """Of one image's forward pass; a multiply-add counts as two."""
        return count_flops(self.model, self.input_shape)

    @property
    def parameters(self) -> int:
        return count_parameters(self.model)

    def latency(self, batches: Sequence[int] = (1,), **options: Any) -> Measurement:
        """Measured latency of the small model; ``model.measure.measure`` times it beside others in turn."""
        return measure({"pruned": self.model}, self.input_shape, batches=batches, **options)["pruned"]

    def save(self, path: str | Path) -> None:
        """One safetensors file: weights, mask, shape specification, and what ``summary`` says. No pickle."""
        save_pruned(self.model, path, mask=self.mask, structure=self.structure, card=self.card)

    @property
    def card(self) -> ModelCard:
        """What a file says of the model beside its weights."""
        summary = self.summary()
        metrics = {name: summary.pop(name) for name in METRICS}
        return ModelCard(self.preprocessing, self.class_names, summary.pop("task"), metrics, summary)

    def checkpoint(self) -> PrunedCheckpoint:
        """What ``load_pruned`` would give of a file of this, without one: to predict, or to export."""
        return PrunedCheckpoint(self.model, self.mask, self.structure, card=self.card)

    def summary(self) -> dict[str, Any]:
        """The numbers, as JSON values."""
        return {
            "task": self.task.name,
            "method": self.method,
            "keep": self.keep,
            "accuracy": self.accuracy,
            "trained_accuracy": self.trained_accuracy,
            "expected_calibration_error": self.expected_calibration_error,
            "mean_confidence": self.mean_confidence,
            "class_accuracy": list(self.class_accuracy),
            "cost": self.cost.to_dict(),
            "history": [asdict(point) for point in self.history],
            "neighbours": self.neighbours,
            "choice": self.choice,
            "parameters": self.parameters,
            "flops": self.flops,
            "kept": self.mask.kept,
        }
