"""How weights are trained, as a value."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mvp_ext.ops.checks import plain_numbers


@dataclass(frozen=True)
class Recipe:
    """How weights are trained. The defaults come from ``Recipe.for_model``; each field can be replaced.

    AdamW is the default for every family: its steps do not depend on the scale of the features, which differs by orders
    of magnitude between backbones. With SGD a rate that suits one backbone's head makes another's diverge.

    Attributes:
        learning_rate: peak rate of the whole model.
        optimizer: "adamw", or "sgd" (Nesterov momentum 0.9).
        batch_size: images a step; shuffled epochs laid end to end.
        weight_decay: of matrices and filters; biases and normalisation are never decayed.
        distillation: weight of ‖f − f_dense‖² / var f_dense beside the cross-entropy, where a teacher is; 0: none.
            For a new task f is what a head reads of the features (``trainer.HeadTeacher``).
        crop: share of the side by which a training image may be shifted (reflection padding); 0 = never.
        flip: mirror half of the training images. None: as the data says (digits are never mirrored).
        precision: "auto" (bfloat16 autocast where the processor computes in it), "bfloat16" or "float32". On the CPU a
            model whose wide convolutions get maps of one pixel is trained in float32 all the same: torch's bfloat16
            weight gradient is wrong there.
    """

    learning_rate: float = 5e-4
    optimizer: Literal["adamw", "sgd"] = "adamw"
    batch_size: int = 32
    weight_decay: float = 0.01
    distillation: float = 4.0
    crop: float = 0.125
    flip: bool | None = None
    precision: str = "auto"

    def __post_init__(self) -> None:
        plain_numbers(self)

    @classmethod
    def for_model(cls, model: nn.Module) -> Recipe:
        """Networks with batch normalisation stand a higher rate than the others (transformers)."""
        if any(isinstance(m, _BatchNorm) for m in model.modules()):
            return cls()
        return cls(learning_rate=2e-4, weight_decay=0.05)

    def with_rate(self, learning_rate: float) -> Recipe:
        return replace(self, learning_rate=learning_rate)
