"""The training loop: seeded batches, bfloat16 where the processor has it, optional distillation, statistics, heads."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mvp_ext.data.batches import augment, shuffled_indices, to_batch
from mvp_ext.data.tasks import TaskData
from mvp_ext.model.measure import count_flops
from mvp_ext.train.backbone import (
    Backbone,
    Preprocessing,
    autocast,
    extract_features,
    forward_features,
    set_head,
)
from mvp_ext.train.cost import BACKWARD_FACTOR, Cost
from mvp_ext.train.heads import LinearHead, class_mean_head, ridge_head

STATISTICS_IMAGES = 512  # METHOD asks for at least 100; more is cheap and steadier


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
        distillation: weight of ‖f − f_dense‖² / var f_dense beside the cross-entropy, where a teacher is given.
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

    @classmethod
    def for_model(cls, model: nn.Module) -> Recipe:
        """Networks with batch normalisation stand a higher rate than the others (transformers)."""
        if any(isinstance(m, _BatchNorm) for m in model.modules()):
            return cls()
        return cls(learning_rate=2e-4, weight_decay=0.05)

    def with_rate(self, learning_rate: float) -> Recipe:
        return replace(self, learning_rate=learning_rate)


class Teacher:
    """The dense backbone as a target of feature distillation (METHOD: "Zoo models are healed with distillation").

    Args:
        backbone: the dense model; it is read, never changed.
        variance: total variance of its features on the task's images, so that the loss is a relative error.
    """

    def __init__(self, backbone: Backbone, variance: float) -> None:
        self.model = backbone.model
        self.variance = max(variance, 1e-12)
        self.flops = count_flops(self.model, (3, backbone.preprocessing.size, backbone.preprocessing.size))

    @classmethod
    def from_features(cls, backbone: Backbone, features: Tensor) -> Teacher:
        """``features``: the backbone's own on the task's training images, f32 [n, F]."""
        return cls(backbone, float(features.double().var(0, unbiased=False).sum()))

    def loss(self, features: Tensor, batch: Tensor) -> Tensor:
        """Mean over the batch of ‖f − f_dense‖² / var f_dense."""
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            target = forward_features(self.model, batch)
        self.model.train(was_training)
        return (features - target).square().sum(1).mean() / self.variance


class Trainer:
    """Trains one model on one task, in as many pieces as the caller likes; shapes may change between the pieces.

    Everything random comes from ``seed``. ``cost`` is filled as the work goes. ``precision`` is the recipe's,
    or float32 where bfloat16 gradients would be wrong; whoever takes gradients of its model uses it too.
    """

    def __init__(
        self,
        model: nn.Module,
        data: TaskData,
        preprocessing: Preprocessing,
        recipe: Recipe,
        *,
        seed: int,
        teacher: Teacher | None = None,
        cost: Cost | None = None,
    ) -> None:
        self.model, self.preprocessing, self.recipe = model, preprocessing, recipe
        self.teacher, self.cost = teacher, cost if cost is not None else Cost()
        self.device = next(model.parameters()).device
        self.data = data.to(self.device)  # uint8: a few megabytes; batches are made where they are used
        self.precision = recipe.precision
        if self.device.type == "cpu" and _convolves_one_pixel(model, preprocessing.size):
            self.precision = "float32"
        self._generator = torch.Generator().manual_seed(seed)
        self._indices = shuffled_indices(len(data.train_labels), recipe.batch_size, sys.maxsize, seed)
        self._drawn = 0  # batches so far
        self.optimizer = self._make_optimizer()

    def _make_optimizer(self) -> torch.optim.Optimizer:
        recipe = self.recipe
        # Biases and normalisation are not decayed: they are few, and decay only biases them.
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [
            {"params": decayed, "weight_decay": recipe.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        if recipe.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=0.9, nesterov=True)
        if recipe.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=recipe.learning_rate)
        raise ValueError(f"Recipe: optimizer: expected sgd or adamw, got {recipe.optimizer!r}")

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """The next training batch, augmented: f32 [B, 3, S, S] (channels_last) and labels [B]."""
        index = next(self._indices).to(self.device)
        self._drawn += 1
        flip = self.data.flip if self.recipe.flip is None else self.recipe.flip
        images = self.data.train_images[index]
        images = augment(images, self._generator, pad=int(self.recipe.crop * images.shape[1]), flip=flip)
        p = self.preprocessing
        return to_batch(images, p.size, p.mean, p.std), self.data.train_labels[index]

    def snapshot(self) -> dict[str, Tensor]:
        """What, beside the model's weights, a later ``restore`` needs to go on as if nothing had happened."""
        tensors = {"generator": self._generator.get_state(), "drawn": torch.tensor(self._drawn)}
        for number, parameter in enumerate(self._parameters()):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{number}/{key}"] = torch.as_tensor(value).clone()
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up a ``snapshot`` of a trainer with the same data, seed, recipe and shapes."""
        for _ in range(int(tensors["drawn"]) - self._drawn):
            next(self._indices)
        self._drawn = int(tensors["drawn"])
        self._generator.set_state(tensors["generator"])
        parameters = self._parameters()
        for name, value in tensors.items():
            if name.startswith("optimizer/"):
                _, number, key = name.split("/")
                parameter = parameters[int(number)]
                # Counters (no dimensions) stay on the CPU, where torch's optimizers keep them.
                device = parameter.device if value.ndim else value.device
                self.optimizer.state[parameter][key] = value.to(device, copy=True)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def run(
        self,
        steps: int,
        schedule: Literal["constant", "cosine"] = "cosine",
        on_step: Callable[[int], None] | None = None,
        *,
        start: int = 0,
    ) -> None:
        """Train ``steps`` steps. "cosine" warms up over a tenth (at most 10) and then falls to zero.

        ``on_step(done)`` is called after each step, outside the clock. ``start`` steps were done before (``restore``).

        Raises:
            FloatingPointError: the loss is no longer finite; the message names the step and the learning rate.
        """
        if steps <= start:
            return
        self._image_flops = self._count_flops(self.model)
        warmup = min(10, max(1, steps // 10))
        self.model.train()
        for step in range(start, steps):
            with self.cost.timed():
                factor = 1.0
                if schedule == "cosine":
                    factor = min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
                for group in self.optimizer.param_groups:
                    group["lr"] = self.recipe.learning_rate * factor
                batch, labels = self.next_batch()
                self._step(batch, labels, step)
                self.cost.steps += 1
                self.cost.train_flops += self._image_flops * len(labels)
            if on_step is not None:
                on_step(step + 1)
        self.model.eval()

    def _count_flops(self, model: nn.Module) -> int:
        """FLOPs of one image's part in a training step of ``model``."""
        size = self.preprocessing.size
        teacher = self.teacher.flops if self.teacher is not None else 0
        return BACKWARD_FACTOR * count_flops(model, (3, size, size)) + teacher

    def _step(self, batch: Tensor, labels: Tensor, step: int) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._backward(batch, labels, step)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"training: the loss is {loss} at step {step + 1} with learning rate "
                f"{self.recipe.learning_rate:g}; a smaller one may help"
            )
        self.optimizer.step()

    def _backward(self, batch: Tensor, labels: Tensor, step: int) -> float:
        """Leaves the gradients of a batch in the model's parameters; returns the loss."""
        loss = self._loss(self.model, batch, labels)
        loss.backward()
        return float(loss.detach())

    def _loss(self, model: nn.Module, batch: Tensor, labels: Tensor) -> Tensor:
        with autocast(self.device, self.precision):
            features = forward_features(model, batch)
            logits = model.get_classifier()(features)  # type: ignore[operator]
            loss = nn.functional.cross_entropy(logits.float(), labels)
            if self.teacher is not None and self.recipe.distillation > 0:
                loss = loss + self.recipe.distillation * self.teacher.loss(features, batch)
        return loss


@torch.no_grad()
def _convolves_one_pixel(model: nn.Module, size: int) -> bool:
    """Whether a convolution wider than one pixel gets maps of one pixel's height or width.

    Most of its taps then see nothing but padding. In bfloat16 torch's CPU convolution (oneDNN, seen with torch 2.13)
    leaves those taps' weight gradient unwritten: whatever the memory held, NaN now and then, goes into the weights.
    """
    found = False

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal found
        found = found or min(inputs[0].shape[-2:]) == 1

    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1]
    handles = [m.register_forward_pre_hook(look) for m in convolutions]
    was_training = model.training
    parameter = next(model.parameters())
    model.eval()
    model(torch.zeros(1, 3, size, size, dtype=parameter.dtype, device=parameter.device))
    model.train(was_training)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def reestimate_statistics(
    model: nn.Module, images: Tensor, preprocessing: Preprocessing, *, seed: int = 0, precision: str = "auto"
) -> int:
    """Replace the running statistics of every batch normalisation by averages over (up to 512 of) these images.

    A sub-network sees other activations than the network its statistics come from; without this a pruned model can be
    at chance. Weights do not change. Returns the number of images passed through the model (0 without normalisation).
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not layers:
        return 0
    device = next(model.parameters()).device
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:STATISTICS_IMAGES]
    model.eval()
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # cumulative average
        layer.train()
    with autocast(device, precision):
        for index in order.chunk(max(1, len(order) // 128)):
            p = preprocessing
            model(to_batch(images[index].to(device), p.size, p.mean, p.std))
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    model.eval()
    return len(order)


def fit_head(
    model: nn.Module, data: TaskData, preprocessing: Preprocessing, kind: str, precision: str = "auto"
) -> LinearHead:
    """Fit a classifier ("class_mean" or "ridge") on the task's training images and put it on the model."""
    features = extract_features(model, data.train_images, preprocessing, precision)
    fit = {"class_mean": class_mean_head, "ridge": ridge_head}[kind]
    head = fit(features, data.train_labels, data.num_classes)
    set_head(model, head)
    return head


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
