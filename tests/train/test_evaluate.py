"""Accuracy, counted by hand."""

from __future__ import annotations

import pytest
import torch
from digits import digits_task, tiny_backbone

from mvp_ext.model.preprocessing import to_batch
from mvp_ext.train.evaluate import accuracy_of, evaluate
from mvp_ext.train.refit import fit_head

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data():
    return digits_task().split()


@pytest.fixture(params=["test_resnet", "test_vit"])
def backbone(request):
    return tiny_backbone(request.param)


def test_evaluate_is_the_share_of_right_answers(backbone, data):
    model = backbone.copy_model()
    fit_head(model, data, backbone.preprocessing, "ridge", "float32")
    p = backbone.preprocessing
    with torch.no_grad():
        answers = model.eval()(to_batch(data.test_images, p.size, p.mean, p.std)).argmax(1)
    expected = sum(int(a == b) for a, b in zip(answers, data.test_labels, strict=True)) / len(answers)
    assert evaluate(model, data, p, "float32").accuracy == pytest.approx(expected)
    assert accuracy_of(
        torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.4, 0.6]]), torch.tensor([1, 0, 0])
    ) == pytest.approx(2 / 3)
