"""The training loop: seeded batches, bfloat16 where the processor has it, optional distillation."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from mvp_ext.data.batches import augment, shuffled_indices
from mvp_ext.data.tasks import TaskData
from mvp_ext.model.borrowed import borrowed, with_gradients
from mvp_ext.model.ends import as_input, dtype_of
from mvp_ext.model.measure import count_flops
from mvp_ext.model.preprocessing import Preprocessing, to_batch
from mvp_ext.train import parallel
from mvp_ext.train.backbone import Backbone, autocast, check_trainable, classify, forward_features
from mvp_ext.train.cost import BACKWARD_FACTOR, Cost
from mvp_ext.train.heads import ridge_head
from mvp_ext.train.recipe import Recipe


class Teacher:
    """The dense backbone as a target of feature distillation: its features teach a model that was cut from it.

    Args:
        backbone: the dense model; it is read, never changed.
        variance: f64 [F], of each of its features on the task's images, so that the loss is a relative error.

    Attributes:
        kept: int64 [K], those of the features that the model which learns still has; None: all. Whoever cuts it sets
            this.
    """

    def __init__(self, backbone: Backbone, variance: Tensor) -> None:
        self.model = backbone.model
        self.variance = variance
        self.kept: Tensor | None = None
        self.flops = count_flops(self.model, (3, backbone.preprocessing.size, backbone.preprocessing.size))

    @classmethod
    def from_features(cls, backbone: Backbone, features: Tensor) -> Teacher:
        """``features``: the backbone's own on the task's training images, f32 [n, F]."""
        return cls(backbone, features.double().var(0, unbiased=False))

    def loss(self, features: Tensor, batch: Tensor, index: Tensor | None = None) -> Tensor:
        """Mean over the batch of ‖f − f_dense‖² / var f_dense, over the features that the learning model has.

        Args:
            features: f32 [B, K], of the learning model. batch: f32 [B, 3, S, S], what it saw.
            index: not needed: the dense model sees the batch itself.
        """
        with borrowed(self.model) as model, torch.no_grad():
            target = forward_features(model, batch)
        variance = self.variance
        if self.kept is not None:
            variance = variance[self.kept]
            target = target[:, self.kept.to(target.device)]
        return (features - target).square().sum(1).mean() / max(float(variance.sum()), 1e-12)


class HeadTeacher:
    """A ridge head on known features of the dense backbone as a target: what the task needs of them, and no more.

    The loss is the error of the features in the head's row space, as a share of their variance there. No pass of the
    dense model is made: an image that was shifted or mirrored should have the features of the image as it is.

    Args:
        features: f32 [m, K], the dense backbone's on training images of the task, those that the learning model has.
        labels: int64 [m] in 0..classes−1.
        index: int64 [m], ascending: which of the task's training images they are. None: all. No other may be drawn.
    """

    flops = 0

    def __init__(self, features: Tensor, labels: Tensor, classes: int, index: Tensor | None = None) -> None:
        head = ridge_head(features, labels, classes)
        # Its outputs sum to a constant, so the last direction is rounding.
        self.basis = torch.linalg.svd(head.weight.T, full_matrices=False)[0][:, : classes - 1]
        self.targets = features @ self.basis
        self.variance = max(float(self.targets.double().var(0, unbiased=False).sum()), 1e-12)
        self.index = torch.arange(len(features)) if index is None else index

    def loss(self, features: Tensor, batch: Tensor, index: Tensor) -> Tensor:
        """Mean over the batch of ‖P(f − f_dense)‖² / var P f_dense, P the projection on the head's row space.

        Args:
            features: f32 [B, K], of the learning model. batch: not needed.
            index: int64 [B], which training images they are of.
        """
        # In bfloat16 the projection's rounding would be a part of the error.
        targets = self.targets[torch.searchsorted(self.index, index.cpu())].to(features.device)
        with torch.autocast(features.device.type, enabled=False):
            error = features.float() @ self.basis.to(features.device) - targets
        return error.square().sum(1).mean() / self.variance


class Trainer:
    """Trains one model on one task, in as many pieces as the caller likes; shapes may change between the pieces.

    Inside of ``data_parallel`` each process trains its own copy on its part of every batch, and all copies stay equal.

    Args:
        model: a timm classifier with a head for the task; changed in place, on whatever device it is.
        data: the task's images.
        preprocessing: how they become the model's input.
        recipe: how it is trained.
        seed: everything random comes from it.
        teacher: what the model also learns: features, or what a head makes of them; None: labels alone.
        cost: filled as the work goes; None starts one.

    Attributes:
        optimizer: of the model's parameters; surgery replaces them in it.
        precision: the recipe's, or float32 where bfloat16 gradients would be wrong; whoever takes gradients of the
            model uses it too.

    Raises:
        ValueError: the recipe's optimizer is unknown, the model's type cannot be trained, or the processes cannot
            share a batch evenly.
    """

    def __init__(
        self,
        model: nn.Module,
        data: TaskData,
        preprocessing: Preprocessing,
        recipe: Recipe,
        *,
        seed: int,
        teacher: Teacher | HeadTeacher | None = None,
        cost: Cost | None = None,
    ) -> None:
        check_trainable("training", model)
        if recipe.batch_size % parallel.world():
            raise ValueError(
                f"training: batch_size: expected a multiple of the {parallel.world()} processes, got "
                f"{recipe.batch_size}"
            )
        self.model, self.preprocessing, self.recipe = model, preprocessing, recipe
        self.teacher, self.cost = teacher, cost if cost is not None else Cost()
        self.device = next(model.parameters()).device
        # Bytes, so a few megabytes, or stored: batches are made where they are used.
        self.data = data.to(self.device)
        self.precision = recipe.precision
        if self.device.type == "cpu" and _convolves_one_pixel(model, preprocessing.size):
            self.precision = "float32"
        self._generator = torch.Generator().manual_seed(seed)
        self._indices = shuffled_indices(len(data.train_labels), recipe.batch_size, sys.maxsize, seed)
        self._drawn_batches = 0
        # Which training images the last batch is of.
        self._batch_index: Tensor = torch.empty(0, dtype=torch.int64)
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
        """The next training batch, augmented: f32 [B, 3, S, S] (channels_last) and labels [B].

        Inside of ``data_parallel``: this process's part of it.
        """
        part = parallel.rank(), parallel.world()
        index = next(self._indices).chunk(part[1])[part[0]].to(self.device)
        self._drawn_batches += 1
        self._batch_index = index
        flip = self.data.flip if self.recipe.flip is None else self.recipe.flip
        images = self.data.train_images[index]
        images = augment(
            images, self._generator, pad=int(self.recipe.crop * images.shape[1]), flip=flip, part=part
        )
        p = self.preprocessing
        return to_batch(images, p.size, p.mean, p.std), self.data.train_labels[index]

    def snapshot(self) -> dict[str, Tensor]:
        """What, beside the model's weights, a later ``restore`` needs to go on as if nothing had happened."""
        tensors = {"generator": self._generator.get_state(), "drawn": torch.tensor(self._drawn_batches)}
        for number, parameter in enumerate(self._parameters()):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{number}/{key}"] = torch.as_tensor(value).clone()
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up a ``snapshot`` of a trainer with the same data, seed, recipe and shapes."""
        for _ in range(int(tensors["drawn"]) - self._drawn_batches):
            next(self._indices)
        self._drawn_batches = int(tensors["drawn"])
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

    @with_gradients()
    def run(
        self,
        steps: int,
        schedule: Literal["constant", "cosine"] = "cosine",
        on_step: Callable[[int], None] | None = None,
        *,
        done: int = 0,
    ) -> None:
        """Train until ``steps`` steps are done.

        Args:
            steps: how many the run has in all.
            schedule: of the rate; "cosine" warms up over a tenth of the steps (at most 10) and then falls to zero.
            on_step: called after each step, outside the clock, with the number of steps that are done.
            done: steps that the run has behind it (after ``restore``).

        Raises:
            FloatingPointError: the loss is no longer finite; the message names the step and the learning rate.
        """
        if steps <= done:
            return
        self._image_flops = self._count_flops(self.model)
        parallel.begin_alike(list(self.model.state_dict().values()))
        warmup = min(10, max(1, steps // 10))
        self.model.train()
        for step in range(done, steps):
            with self.cost.timed():
                factor = 1.0
                if schedule == "cosine":
                    factor = min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
                for group in self.optimizer.param_groups:
                    group["lr"] = self.recipe.learning_rate * factor
                batch, labels = self.next_batch()
                self._step(batch, labels, step)
                self.cost.steps += 1
                self.cost.train_flops += self._image_flops * len(labels) * parallel.world()
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
        with parallel.whole_batch_norms():
            loss = self._backward(batch, labels, step)
        if parallel.world() > 1:
            mean = torch.tensor(loss, device=self.device)
            parallel.average([mean, *(p.grad for p in self._parameters() if p.grad is not None)])
            loss = float(mean)
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
        with autocast(self.device, self.precision, dtype_of(model)):
            features = forward_features(model, batch)
            loss = nn.functional.cross_entropy(classify(model, features), labels)
            if self.teacher is not None and self.recipe.distillation > 0:
                loss = loss + self.recipe.distillation * self.teacher.loss(features, batch, self._batch_index)
        return loss


@torch.no_grad()
def _convolves_one_pixel(model: nn.Module, size: int) -> bool:
    """Whether a convolution wider than one pixel gets maps of one pixel's height or width.

    Most of its taps then see nothing but padding. In bfloat16 torch's CPU convolution (oneDNN, seen with torch 2.13)
    leaves those taps' weight gradient unwritten: whatever the memory held, NaN now and then, goes into the weights.
    """
    images = as_input(model, torch.zeros(1, 3, size, size))
    found = False

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal found
        found = found or min(inputs[0].shape[-2:]) == 1

    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1]
    with borrowed(model) as inner:
        for convolution in convolutions:
            convolution.register_forward_pre_hook(look)
        inner(images)
    return found
