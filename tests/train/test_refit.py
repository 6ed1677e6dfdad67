"""Normalisation statistics and closed-form heads, against their definitions."""

from __future__ import annotations

import pytest
import torch
from digits import digits_task, equal_weights, few_digits, tiny_backbone, train_batch
from torch import nn

from mvp_ext.model.preprocessing import to_batch
from mvp_ext.train import refit
from mvp_ext.train.backbone import extract_features
from mvp_ext.train.heads import class_mean_head, ridge_head
from mvp_ext.train.refit import fit_head, reestimate_statistics

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data():
    return digits_task().split()


@pytest.fixture(params=["test_resnet", "test_vit"])
def backbone(request):
    return tiny_backbone(request.param)


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
    twin(train_batch(data, backbone))
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
    monkeypatch.setattr(refit, "STATISTICS_IMAGES", 10)
    backbone = tiny_backbone()
    models = [backbone.copy_model() for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        assert reestimate_statistics(model, data.train_images, backbone.preprocessing, seed=seed) == 10
    assert equal_weights(models[0], models[1])
    assert not equal_weights(models[0], models[2])


def test_no_statistics_without_batch_normalisation(data):
    backbone = tiny_backbone("test_vit")
    model = backbone.copy_model()
    assert reestimate_statistics(model, data.train_images, backbone.preprocessing) == 0
    assert equal_weights(model, backbone.model)


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
            model.eval()(train_batch(data, backbone)), expected(features), rtol=1e-3, atol=1e-3
        )
