"""Training a backbone on all classes of a data set, where no pre-trained weights are at hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from mvp_ext.data.images import ImageData
from mvp_ext.data.tasks import Task
from mvp_ext.model.borrowed import own_random_numbers, with_gradients
from mvp_ext.model.preprocessing import Preprocessing
from mvp_ext.train.backbone import Backbone, fresh_head
from mvp_ext.train.cost import Cost
from mvp_ext.train.evaluate import evaluate
from mvp_ext.train.recipe import Recipe
from mvp_ext.train.refit import reestimate_statistics
from mvp_ext.train.resume import RunFile
from mvp_ext.train.trainer import Trainer

# Bytes of pixels that become floats together, as all once did: another order of sums is another last bit.
_AT_ONCE = 192 << 20
# Images that are counted at once.
_CHUNK = 64


def measured_normalisation(data: ImageData) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of the training images, of values in 0..1."""
    images = data.train_images
    if images.shape.numel() <= _AT_ONCE:
        pixels = images[:].reshape(-1, 3).float().div_(255)
        return tuple(pixels.mean(0).tolist()), tuple(pixels.std(0).clamp_min(1e-3).tolist())
    counts = torch.zeros(3, 256, dtype=torch.int64)
    for batch in images.split(_CHUNK):
        counts += torch.stack([batch[..., c].flatten().bincount(minlength=256).cpu() for c in range(3)])
    values = torch.arange(256) / 255
    shares = counts.double() / counts.sum(1, keepdim=True)
    mean = (shares * values).sum(1)
    std = (shares * (values - mean[:, None]).square()).sum(1).sqrt()
    return tuple(mean.tolist()), tuple(std.clamp_min(1e-3).tolist())


@own_random_numbers()
@with_gradients()
def pretrain(
    model: nn.Module,
    data: ImageData,
    *,
    steps: int,
    image_size: int,
    recipe: Recipe | None = None,
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
    resume: Path | None = None,
) -> tuple[Backbone, float, Cost]:
    """Train ``model`` on all classes of ``data`` with a cosine schedule.

    Args:
        model: a timm classifier; its head is replaced by one for the data's classes. Changed in place.
        data: what it learns.
        steps: optimizer steps.
        image_size: side of the model's input in pixels.
        recipe: default: the family's, at six times its fine-tuning rate.
        seed: of the fresh head and the batches.
        on_step: called with (steps done, steps in all) after each step.
        resume: a file for the state of an interrupted run, from which the same call goes on to the same weights (see
            ``resume.py``).

    Returns:
        The backbone (normalised by the data's own mean and deviation), its top-1 accuracy on the data's test images
        in [0, 1], and the cost.

    Raises:
        ValueError: ``steps`` < 1, or a model that cannot be trained so (``Backbone.check``).
        FloatingPointError: the loss is no longer finite.
    """
    if steps < 1:
        raise ValueError(f"pretrain: steps: expected at least 1, got {steps}")
    if recipe is None:
        recipe = Recipe.for_model(model)
        recipe = recipe.with_rate(6 * recipe.learning_rate)
    preprocessing = Preprocessing(image_size, *measured_normalisation(data))
    Backbone(model, preprocessing).check()
    everything = Task("pretrain", data, data.classes, seed=seed).split()
    # The seed draws the fresh head's weights; the head follows the model to its device and type.
    torch.manual_seed(seed)
    fresh_head(model, everything.num_classes)
    cost = Cost()
    trainer = Trainer(model, everything, preprocessing, recipe, seed=seed, cost=cost)
    run = RunFile(
        resume,
        {
            "data": data.fingerprint,
            "tensors": {name: list(t.shape) for name, t in model.state_dict().items()},
            "recipe": asdict(recipe),
            "others": [steps, image_size, seed],
        },
    )
    saved = run.load()
    if saved is not None:
        saved.restore(trainer)

    def stepped(done: int) -> None:
        if on_step is not None:
            on_step(done, steps)
        run.save_if_due(trainer, done)

    trainer.run(steps, "cosine", stepped, done=0 if saved is None else saved.done)
    run.remove()
    reestimate_statistics(
        model, everything.train_images, preprocessing, seed=seed, precision=recipe.precision
    )
    backbone = Backbone(model.eval(), preprocessing, everything.class_names)
    return backbone, evaluate(model, everything, preprocessing, recipe.precision).accuracy, cost
