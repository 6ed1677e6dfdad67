"""What a model's file says of it beside its weights: how it sees images, what its outputs mean, how good it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mvp_ext.model.preprocessing import Preprocessing


@dataclass(frozen=True)
class ModelCard:
    """The description that goes with a small model wherever it goes: its file, exported formats, bundles.

    Attributes:
        preprocessing: how images become its input; None where nobody said.
        class_names: of its outputs, in their order; empty where nobody said.
        task: name of the task that it was made for.
        metrics: measured on the task's test images: "accuracy", "expected_calibration_error", "mean_confidence", each
            in [0, 1].
        made_with: JSON values: method, keep, steps, cost, settings, voters.
    """

    preprocessing: Preprocessing | None = None
    class_names: tuple[str, ...] = ()
    task: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    made_with: Mapping[str, Any] = field(default_factory=dict)

    def need_preprocessing(self, what: str) -> Preprocessing:
        """The preprocessing; ValueError, beginning with ``what``, where nobody said which."""
        if self.preprocessing is None:
            raise ValueError(
                f"{what}: this model does not say how it sees images; save it with card=ModelCard(preprocessing=…)"
            )
        return self.preprocessing

    def names(self, outputs: int) -> tuple[str, ...]:
        """The class names; where nobody said, the numbers of the outputs."""
        return self.class_names or tuple(map(str, range(outputs)))

    def to_dict(self) -> dict[str, Any]:
        """JSON values; ``from_dict`` reads them back."""
        return {
            "preprocessing": None if self.preprocessing is None else self.preprocessing.to_dict(),
            "class_names": list(self.class_names),
            "task": self.task,
            "metrics": dict(self.metrics),
            "made_with": dict(self.made_with),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelCard:
        """The inverse of ``to_dict``; ValueError where a value is of another kind."""
        try:
            seen, names, task = data["preprocessing"], data["class_names"], data["task"]
            metrics = {str(name): float(value) for name, value in data["metrics"].items()}
            made_with = dict(data["made_with"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"ModelCard.from_dict: not a model's description ({error!r})") from error
        texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if (
            not texts
            or not (task is None or isinstance(task, str))
            or not all(map(math.isfinite, metrics.values()))
        ):
            raise ValueError(
                "ModelCard.from_dict: expected class names and a task of text, and finite metrics"
            )
        return cls(
            None if seen is None else Preprocessing.from_dict(seen), tuple(names), task, metrics, made_with
        )
