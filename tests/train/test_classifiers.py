"""What a model's classifiers read, whatever lies before them, and a task's head in their place."""

from __future__ import annotations

import pytest
import torch
from family_models import family_model
from torch import nn

from mvp_ext.model.ends import Features, built_for, classifiers, linear_weight
from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.surgery import prune_model
from mvp_ext.train.backbone import classify, forward_features, fresh_head, set_head
from mvp_ext.train.heads import LinearHead

pytestmark = pytest.mark.usefixtures("one_thread")
# Of each, small, what lies at its end.
ENDS = {
    "a convolution": ("dla46_c", {}),
    "hidden layers": ("caformer_s18", {}),
    "two, each behind a norm": ("levit_128s", {}),
    "a norm": ("efficientvit_m0", {}),
    "two": ("deit_tiny_distilled_patch16_224", {}),
}


def made(end: str) -> nn.Module:
    """In eval mode, with drawn norms: those of a fresh model are the identity."""
    name, kwargs = ENDS[end]
    model, draw = family_model(name, num_classes=7, **kwargs), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.ndim == 1 and tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=draw))
    return model


@pytest.fixture(params=ENDS)
def model(request):
    return made(request.param)


def images_of(model: nn.Module) -> torch.Tensor:
    side = built_for(model) or (64, 64)
    return torch.randn(2, 3, *side, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_outputs_are_a_linear_function_of_the_features(model):
    images = images_of(model)
    features = forward_features(model, images)
    assert features.ndim == 2
    draw = torch.Generator().manual_seed(1)
    head = LinearHead(torch.randn(3, features.shape[1], generator=draw), torch.randn(3, generator=draw))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    ends = {f"{n}." for n, m in model.named_modules() if any(m is each for each in classifiers(model))}
    set_head(model, head)
    assert model.num_classes == 3
    torch.testing.assert_close(forward_features(model, images), features, rtol=0, atol=0)
    torch.testing.assert_close(model(images), head(features), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(classify(model, features), head(features), rtol=1e-4, atol=1e-4)
    # What was learned before the classifier is still there.
    after = model.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert name.startswith(tuple(ends)) or torch.equal(tensor, after[name])


@torch.no_grad()
def test_features_share_the_model(model):
    """Its tensors, its modes; it keeps its classifiers."""
    images, outputs = images_of(model), model(images_of(model))
    features = Features(model)
    own = {id(t) for t in model.parameters()}
    assert own >= {id(t) for t in features.parameters()}
    features(images)
    torch.testing.assert_close(model(images), outputs, rtol=0, atol=0)
    assert len(classifiers(model)) in (1, 2)


def test_gradients_reach_what_lies_before_the_classifier():
    model = made("hidden layers")
    classify(model, forward_features(model, images_of(model))).sum().backward()
    assert all(p.grad is not None for p in model.head.fc.parameters())


def test_a_head_of_the_features_that_are_left():
    """timm's own reset asks for the width that the model was made with."""
    model = family_model("lcnet_050")
    structure = find_structure(model, "inner")
    small = prune_model(model, Mask.random(structure, 0.5, 0), structure=structure)
    fresh_head(small, 4)
    assert small(torch.randn(2, 3, 64, 64)).shape == (2, 4)
    assert linear_weight(classifiers(small)[0]).shape[0] == 4


class Own(nn.Linear):
    """Somebody else's."""


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("classes", [1, 9])
def test_a_fresh_head_is_of_the_same_kind(classes, bias):
    model = family_model("test_efficientnet")
    model.classifier = Own(model.num_features, model.num_classes, bias=bias)
    fresh_head(model, classes)
    fresh = model.get_classifier()
    assert type(fresh) is Own
    assert (fresh.out_features, fresh.bias is not None) == (classes, bias)
    assert fresh.weight.requires_grad
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, classes)
