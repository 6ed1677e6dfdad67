"""The training loop: repeatable, honest about its cost, and its parts against their definitions."""

from __future__ import annotations

import copy
import time
from dataclasses import replace

import pytest
import torch
from digits import digits_task, few_digits, tiny_backbone
from torch import nn

from mvp_ext.data.batches import shuffled_indices, to_batch
from mvp_ext.model.measure import count_flops
from mvp_ext.train import trainer as training
from mvp_ext.train.backbone import Backbone, autocast, extract_features, forward_features
from mvp_ext.train.cost import Cost
from mvp_ext.train.heads import class_mean_head, ridge_head
from mvp_ext.train.trainer import (
    Recipe,
    Teacher,
    Trainer,
    accuracy_of,
    evaluate,
    fit_head,
    reestimate_statistics,
)

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


def equal(a: nn.Module, b: nn.Module) -> bool:
    other = b.state_dict()
    return all(torch.equal(value, other[name]) for name, value in a.state_dict().items())


def images_of(data, backbone):
    p = backbone.preprocessing
    return to_batch(data.train_images, p.size, p.mean, p.std)


# ---- repeatable


def test_the_seed_decides_everything(backbone, data):
    trained = []
    for seed, global_seed in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(global_seed)
        trainer = make(backbone, data, seed=seed)
        trainer.run(3)
        trained.append(trainer.model)
    assert equal(trained[0], trained[1])
    assert not equal(trained[0], trained[2])


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
    second.run(5, start=3)
    assert equal(second.model, straight.model)


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
    augment = training.augment
    monkeypatch.setattr(
        training,
        "augment",
        lambda images, generator, *, pad, flip: (
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
    images = images_of(data, backbone)
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
    assert evaluate(trainer.model, data, trainer.preprocessing, "float32") > 0.7


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
    larger = Backbone(
        backbone.model, replace(backbone.preprocessing, size=64)
    )  # at 32 a ResNet's last maps are one pixel
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


def test_autocast():
    with autocast("cpu", "float32"):
        assert not torch.is_autocast_enabled("cpu")
    with autocast("cpu", "bfloat16"):
        assert torch.is_autocast_enabled("cpu")
    with pytest.raises(ValueError, match="precision: expected auto, bfloat16 or float32, got 'fp8'"):
        autocast("cpu", "fp8")


# ---- distillation


def test_the_teacher_loss_is_relative(backbone, data):
    """0 for the teacher's own features, 1 for their mean, and the same if both are a thousand times as large."""
    batch = images_of(data, backbone)
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
    assert equal(backbone.model, before)
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
    student, target = forward_features(twin, images_of(data, backbone)), features
    variance = (2 * features).var(0, unbiased=False).sum()
    loss = nn.functional.cross_entropy(twin.get_classifier()(student), data.train_labels)
    loss = loss + weight * (student - target).square().sum(1).mean() / variance
    gradients = torch.autograd.grad(loss, list(twin.parameters()))
    for before, gradient, after in zip(twin.parameters(), gradients, trainer.model.parameters(), strict=True):
        expected = before.detach() - rate * 1.9 * gradient  # Nesterov's first step: g + 0.9 g
        moved = float((expected - before).detach().abs().max())
        torch.testing.assert_close(after, expected, rtol=1e-6, atol=0.02 * moved + 1e-7)


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


def test_costs_add_up():
    a, b = Cost(steps=1, train_flops=10, score_flops=1, seconds=0.5), Cost(steps=2, refit_flops=7, seconds=1)
    total = a + b
    assert total == Cost(steps=3, train_flops=10, score_flops=1, refit_flops=7, seconds=1.5)
    assert total.flops == 18
    assert total.to_dict()["flops"] == 18
    assert Cost.from_dict(total.to_dict()) == total


def test_zero_steps_do_nothing(backbone, data):
    trainer = make(backbone, data)
    before = copy.deepcopy(trainer.model)
    trainer.run(0)
    assert equal(trainer.model, before)
    assert trainer.cost == Cost()


# ---- statistics


def batch_norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}


def test_statistics_are_those_of_the_images(data):
    """Mean and (unbiased) variance of what each normalisation gets, with the layers before it normalising likewise."""
    backbone = tiny_backbone()
    model, inputs = backbone.copy_model(), {}
    momenta = {name: module.momentum for name, module in batch_norms(model).items()}
    seen = reestimate_statistics(model, data.train_images, backbone.preprocessing, precision="float32")
    assert seen == len(data.train_images) == 36
    twin = backbone.copy_model().train()
    for name, module in batch_norms(twin).items():
        module.register_forward_pre_hook(
            lambda m, args, n=name: inputs.__setitem__(n, args[0].detach().clone())
        )
    twin(images_of(data, backbone))
    for name, module in batch_norms(model).items():
        values = inputs[name].transpose(0, 1).flatten(1)
        torch.testing.assert_close(module.running_mean, values.mean(1), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(module.running_var, values.var(1, unbiased=True), rtol=1e-3, atol=1e-4)
        assert module.momentum == momenta[name]
    assert not any(module.training for module in model.modules())
    dense = dict(backbone.model.named_parameters())
    assert all(torch.equal(value, dense[name]) for name, value in model.named_parameters())


def test_statistics_of_many_images_are_averaged_over_chunks():
    backbone = tiny_backbone()
    few = few_digits(train=30).train_images  # 300: two chunks of 150
    model = backbone.copy_model()
    assert reestimate_statistics(model, few, backbone.preprocessing, precision="float32") == 300
    p, stem = backbone.preprocessing, backbone.copy_model()
    first = next(iter(batch_norms(stem)))
    got = []
    stem.get_submodule(first).register_forward_pre_hook(lambda m, args: got.append(args[0].detach()))
    with torch.no_grad():
        stem.eval()(to_batch(few, p.size, p.mean, p.std))
    values = got[0].transpose(0, 1).flatten(1)
    norm = model.get_submodule(first)
    torch.testing.assert_close(norm.running_mean, values.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, values.var(1), rtol=0.05, atol=1e-4)


def test_statistics_look_at_a_bounded_seeded_sample(data, monkeypatch):
    monkeypatch.setattr(training, "STATISTICS_IMAGES", 10)
    backbone = tiny_backbone()
    models = [backbone.copy_model() for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        assert reestimate_statistics(model, data.train_images, backbone.preprocessing, seed=seed) == 10
    assert equal(models[0], models[1])
    assert not equal(models[0], models[2])


def test_no_statistics_without_batch_normalisation(data):
    backbone = tiny_backbone("test_vit")
    model = backbone.copy_model()
    assert reestimate_statistics(model, data.train_images, backbone.preprocessing) == 0
    assert equal(model, backbone.model)


# ---- heads and evaluation


@pytest.mark.parametrize(("kind", "fit"), [("class_mean", class_mean_head), ("ridge", ridge_head)])
def test_fit_head_puts_the_closed_form_on_the_model(backbone, data, kind, fit):
    model = backbone.copy_model()
    features = extract_features(model, data.train_images, backbone.preprocessing, "float32")
    expected = fit(features, data.train_labels, 3)
    fit_head(model, data, backbone.preprocessing, kind, "float32")
    assert torch.equal(model.get_classifier().weight, expected.weight)
    assert torch.equal(model.get_classifier().bias, expected.bias)
    assert model.num_classes == 3
    with torch.no_grad():
        torch.testing.assert_close(
            model.eval()(images_of(data, backbone)), expected(features), rtol=1e-3, atol=1e-3
        )


def test_evaluate_is_the_share_of_right_answers(backbone, data):
    model = backbone.copy_model()
    fit_head(model, data, backbone.preprocessing, "ridge", "float32")
    p = backbone.preprocessing
    with torch.no_grad():
        answers = model.eval()(to_batch(data.test_images, p.size, p.mean, p.std)).argmax(1)
    expected = sum(int(a == b) for a, b in zip(answers, data.test_labels, strict=True)) / len(answers)
    assert evaluate(model, data, p, "float32") == pytest.approx(expected)
    assert accuracy_of(
        torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.4, 0.6]]), torch.tensor([1, 0, 0])
    ) == pytest.approx(2 / 3)


def test_features_do_not_depend_on_mode_or_chunk(backbone, data, monkeypatch):
    model = backbone.copy_model().train()
    whole = extract_features(model, data.train_images, backbone.preprocessing, "float32")
    assert model.training
    assert equal(model, backbone.model)
    monkeypatch.setattr("mvp_ext.train.backbone.FEATURE_BATCH", 5)
    chunks = extract_features(model, data.train_images, backbone.preprocessing, "float32")
    torch.testing.assert_close(chunks, whole, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        direct = forward_features(model.eval(), images_of(data, backbone))
    torch.testing.assert_close(whole, direct, rtol=1e-4, atol=1e-4)


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
        assert training._convolves_one_pixel(model, size) == (min(smallest) == 1)
        assert training._convolves_one_pixel(model, size) == (size < 64)
    for handle in handles:
        handle.remove()
