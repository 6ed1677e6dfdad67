"""The training loop: repeatable, honest about its cost, and its parts against their definitions."""

from __future__ import annotations

import copy
import time
from dataclasses import replace

import pytest
import torch
from digits import digits_task, equal_weights, tiny_backbone, train_batch
from torch import nn

from mvp_ext.data.batches import shuffled_indices
from mvp_ext.model.measure import count_flops
from mvp_ext.train import trainer as trainer_module
from mvp_ext.train.backbone import Backbone, extract_features, forward_features
from mvp_ext.train.cost import Cost
from mvp_ext.train.evaluate import evaluate
from mvp_ext.train.heads import ridge_head
from mvp_ext.train.recipe import Recipe
from mvp_ext.train.refit import fit_head
from mvp_ext.train.trainer import HeadTeacher, Teacher, Trainer

RECIPE = Recipe(batch_size=8, precision="float32")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data():
    return digits_task().split()


@pytest.fixture(params=["test_resnet", "test_vit"])
def backbone(request):
    return tiny_backbone(request.param)


def make(backbone: Backbone, data, *, seed=0, recipe=RECIPE, teacher=None, cost=None):
    """A trainer of a copy of the backbone with a head for the task."""
    model = backbone.copy_model()
    fit_head(model, data, backbone.preprocessing, "class_mean", "float32")
    return Trainer(model, data, backbone.preprocessing, recipe, seed=seed, teacher=teacher, cost=cost)


# ---- repeatable


def test_the_seed_decides_everything(backbone, data):
    trained = []
    for seed, global_seed in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(global_seed)
        trainer = make(backbone, data, seed=seed)
        trainer.run(3)
        trained.append(trainer.model)
    assert equal_weights(trained[0], trained[1])
    assert not equal_weights(trained[0], trained[2])


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_restored_trainer_goes_on_as_if_nothing_had_happened(backbone, data, optimizer):
    recipe = replace(RECIPE, optimizer=optimizer)
    straight = make(backbone, data, recipe=recipe)
    straight.run(5)
    first = make(backbone, data, recipe=recipe)
    states = {}

    def at_three(done):
        if done == 3:
            states["model"], states["trainer"] = copy.deepcopy(first.model), first.snapshot()

    first.run(5, on_step=at_three)
    second = Trainer(states["model"], data, backbone.preprocessing, recipe, seed=0)
    second.restore(states["trainer"])
    second.run(5, done=3)
    assert equal_weights(second.model, straight.model)


def test_the_rate_warms_up_and_falls(data):
    trainer = make(tiny_backbone(), data)
    rates = []
    trainer.run(30, on_step=lambda done: rates.append(trainer.optimizer.param_groups[0]["lr"]))
    peak = rates.index(max(rates))
    assert peak <= 3
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0.9 * RECIPE.learning_rate < max(rates) <= RECIPE.learning_rate
    assert 0 < rates[-1] < 0.01 * RECIPE.learning_rate
    rates.clear()
    trainer.run(2, "constant", lambda done: rates.append(trainer.optimizer.param_groups[0]["lr"]))
    assert rates == [RECIPE.learning_rate] * 2


def test_only_matrices_and_filters_decay(backbone, data):
    trainer = make(backbone, data)
    decayed, others = trainer.optimizer.param_groups
    assert {p.ndim for p in others["params"]} == {1}
    assert min(p.ndim for p in decayed["params"]) == 2
    assert (decayed["weight_decay"], others["weight_decay"]) == (RECIPE.weight_decay, 0.0)
    assert len(decayed["params"]) + len(others["params"]) == len(list(trainer.model.parameters()))


def test_flip_follows_the_data_unless_the_recipe_says(data, monkeypatch):
    asked = []
    augment = trainer_module.augment
    monkeypatch.setattr(
        trainer_module,
        "augment",
        lambda images, generator, *, pad, flip, part: (
            asked.append((pad, flip)) or augment(images, generator, pad=pad, flip=flip)
        ),
    )
    assert not data.flip  # digits
    make(tiny_backbone(), data).next_batch()
    make(tiny_backbone(), data, recipe=replace(RECIPE, flip=True, crop=0)).next_batch()
    assert asked == [(1, False), (0, True)]  # an eighth of 8 px


def test_batches_are_seeded_and_whole_without_augmentation(data):
    """Two trainers of one seed draw the same batches; without augmentation they are the images themselves."""
    backbone, recipe = tiny_backbone(), replace(RECIPE, crop=0, flip=False)
    first, again = (make(backbone, data) for _ in range(2))
    for _ in range(3):
        (batch, labels), (same, same_labels) = first.next_batch(), again.next_batch()
        assert batch.shape == (8, 3, 32, 32)
        assert batch.dtype == torch.float32
        assert torch.equal(batch, same)
        assert torch.equal(labels, same_labels)
    unchanged = make(backbone, data, recipe=recipe)
    images = train_batch(data, backbone)
    for index in shuffled_indices(len(data.train_labels), 8, 3, seed=0):
        batch, labels = unchanged.next_batch()
        assert torch.equal(batch, images[index])
        assert torch.equal(labels, data.train_labels[index])


def test_training_learns(data):
    trainer = make(
        tiny_backbone(), data, recipe=Recipe(batch_size=36, learning_rate=3e-3, precision="float32")
    )
    trainer.run(25)
    assert not trainer.model.training
    assert evaluate(trainer.model, data, trainer.preprocessing, "float32").accuracy > 0.7


# ---- what can go wrong


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_loss_that_is_not_finite_stops_with_step_and_rate(data, optimizer):
    trainer = make(tiny_backbone(), data, recipe=replace(RECIPE, learning_rate=1e30, optimizer=optimizer))
    with pytest.raises(
        FloatingPointError, match=r"the loss is (nan|inf) at step [2-5] with learning rate 1e\+30"
    ):
        trainer.run(5, "constant")


def test_unknown_optimizer(data):
    with pytest.raises(ValueError, match="optimizer: expected sgd or adamw, got 'lion'"):
        make(tiny_backbone(), data, recipe=replace(RECIPE, optimizer="lion"))


# ---- precision


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "auto"])
def test_every_precision_trains_and_keeps_float32_weights(backbone, data, precision):
    # At 32 a ResNet's last maps are one pixel.
    larger = Backbone(backbone.model, replace(backbone.preprocessing, size=64))
    if hasattr(backbone.model, "patch_embed"):
        larger = backbone
    trainer = make(larger, data, recipe=replace(RECIPE, precision=precision))
    seen = []
    trainer.model.get_classifier().register_forward_hook(
        lambda module, inputs, output: seen.append(output.dtype) if module.training else None
    )
    trainer.run(2)
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    if precision != "auto":
        assert set(seen) == {getattr(torch, precision)}


# ---- distillation


def test_the_teacher_loss_is_relative(backbone, data):
    """0 for the teacher's own features, 1 for their mean, and the same if both are a thousand times as large."""
    batch = train_batch(data, backbone)
    features = extract_features(backbone.model, data.train_images, backbone.preprocessing, "float32")
    teacher = Teacher.from_features(backbone, features)
    assert float(teacher.loss(features, batch)) == pytest.approx(0, abs=1e-6)
    mean = features.mean(0).expand_as(features)
    assert float(teacher.loss(mean, batch)) == pytest.approx(1, rel=1e-4)
    other = features + torch.randn_like(features)
    expected = (other - features).square().sum(1).mean() / (features - features.mean(0)).square().sum(
        1
    ).mean()
    assert float(teacher.loss(other, batch)) == pytest.approx(float(expected), rel=1e-3)


def test_the_teacher_is_only_read(backbone, data):
    before = backbone.copy_model()
    features = extract_features(backbone.model, data.train_images, backbone.preprocessing, "float32")
    backbone.model.train()
    trainer = make(backbone, data, teacher=Teacher.from_features(backbone, features))
    trainer.run(2)
    assert backbone.model.training  # its mode too
    assert equal_weights(backbone.model, before)
    assert all(p.grad is None for p in backbone.model.parameters())


@pytest.mark.parametrize("weight", [0.0, 4.0])
def test_a_step_descends_cross_entropy_plus_weighted_distillation(backbone, data, weight):
    """One SGD step over all images, whose order does not matter, against the gradient of the loss as documented."""
    features = extract_features(backbone.model, data.train_images, backbone.preprocessing, "float32")
    teacher = Teacher.from_features(backbone, 2 * features)  # so that variance and features tell apart
    rate = 1e-3
    recipe = Recipe(rate, "sgd", 36, 0.0, weight, crop=0, precision="float32")
    trainer = make(backbone, data, recipe=recipe, teacher=teacher)
    with torch.no_grad():
        trainer.model.get_parameter(next(name for name, _ in trainer.model.named_parameters())).mul_(1.5)
    twin = copy.deepcopy(trainer.model).train()
    trainer.run(1, "constant")
    student, target = forward_features(twin, train_batch(data, backbone)), features
    variance = (2 * features).var(0, unbiased=False).sum()
    loss = nn.functional.cross_entropy(twin.get_classifier()(student), data.train_labels)
    loss = loss + weight * (student - target).square().sum(1).mean() / variance
    gradients = torch.autograd.grad(loss, list(twin.parameters()))
    for before, gradient, after in zip(twin.parameters(), gradients, trainer.model.parameters(), strict=True):
        expected = before.detach() - rate * 1.9 * gradient  # Nesterov's first step: g + 0.9 g
        moved = float((expected - before).detach().abs().max())
        torch.testing.assert_close(after, expected, rtol=1e-6, atol=0.02 * moved + 1e-7)


def test_a_head_teaches_the_directions_that_it_reads_and_no_others(backbone, data):
    """0 for the known features, also far from them where the head does not look; 1 for their mean."""
    features = extract_features(backbone.model, data.train_images, backbone.preprocessing, "float32")
    index = torch.arange(1, len(features), 2)
    labels = data.train_labels[index]
    teacher = HeadTeacher(features[index], labels, data.num_classes, index)
    drawn = torch.tensor([len(index) - 1, 0, 3, 3])
    known = features[index[drawn]]
    head = ridge_head(features[index], labels, data.num_classes).weight
    unread = torch.linalg.svd(head)[2][data.num_classes :]
    assert float(teacher.loss(known, known, index[drawn])) == pytest.approx(0, abs=1e-6)
    assert float(teacher.loss(known + 10 * unread[0], known, index[drawn])) == pytest.approx(0, abs=1e-4)
    assert float(teacher.loss(known + head[0] / head[0].norm(), known, index[drawn])) > 1e-3
    mean = features[index].mean(0).expand_as(features[index])
    assert float(teacher.loss(mean, mean, index)) == pytest.approx(1, rel=1e-4)


# ---- cost


def test_cost_of_training(backbone, data):
    cost = Cost()
    features = extract_features(backbone.model, data.train_images, backbone.preprocessing, "float32")
    teacher = Teacher.from_features(backbone, features)
    trainer = make(backbone, data, teacher=teacher, cost=cost)
    begin = time.perf_counter()
    trainer.run(2, on_step=lambda done: time.sleep(0.1))
    wall = time.perf_counter() - begin
    forward = count_flops(trainer.model, (3, 32, 32))
    dense = count_flops(backbone.model, (3, 32, 32))
    assert cost.steps == 2
    assert cost.train_flops == 2 * RECIPE.batch_size * (3 * forward + dense)
    assert 0 < cost.seconds <= wall - 0.2  # what on_step does is not the method's
    assert (cost.score_flops, cost.similarity_flops, cost.refit_flops) == (0, 0, 0)


def test_zero_steps_do_nothing(backbone, data):
    trainer = make(backbone, data)
    before = copy.deepcopy(trainer.model)
    trainer.run(0)
    assert equal_weights(trainer.model, before)
    assert trainer.cost == Cost()


def test_one_pixel_maps_are_trained_in_float32():
    """torch's bfloat16 convolution leaves weight gradients of taps that see only padding unwritten on the CPU."""
    model = tiny_backbone().model
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and max(m.kernel_size) > 1]
    smallest = []
    handles = [
        m.register_forward_pre_hook(lambda _, x: smallest.append(min(x[0].shape[-2:]))) for m in convolutions
    ]
    for size in (16, 32, 64):
        smallest.clear()
        model.eval()(torch.zeros(1, 3, size, size))
        assert trainer_module._convolves_one_pixel(model, size) == (min(smallest) == 1)
        assert trainer_module._convolves_one_pixel(model, size) == (size < 64)
    for handle in handles:
        handle.remove()
