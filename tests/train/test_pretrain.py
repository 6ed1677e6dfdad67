"""Pre-training: repeatable, and on from where it was interrupted."""

from __future__ import annotations

import pytest
from digits import digits_task, equal_weights, tiny_backbone

from mvp_ext.train.pretrain import pretrain
from mvp_ext.train.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPE = Recipe(batch_size=8, precision="float32")


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_pretrain(name):
    data, calls = digits_task().data, []
    made = []
    for _ in range(2):
        model = tiny_backbone(name).model
        made.append(
            pretrain(
                model,
                data,
                steps=3,
                image_size=32,
                recipe=RECIPE,
                on_step=lambda done, total: calls.append((done, total)),
            )
        )
    backbone, accuracy, cost = made[0]
    assert calls[:3] == [(1, 3), (2, 3), (3, 3)]
    assert backbone.classes == data.class_names
    pixels = data.train_images.double() / 255
    assert backbone.preprocessing.mean == pytest.approx(pixels.mean((0, 1, 2)).tolist(), abs=1e-5)
    assert backbone.preprocessing.std == pytest.approx(pixels.flatten(0, 2).std(0).tolist(), abs=1e-4)
    assert 0 <= accuracy <= 1
    assert cost.steps == 3
    assert equal_weights(backbone.model, made[1][0].model)
    assert not backbone.model.training
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        pretrain(model, data, steps=0, image_size=32)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_pretraining_goes_on_where_it_was(name, tmp_path, monkeypatch):
    monkeypatch.setattr("mvp_ext.train.resume.SAVE_EVERY", 2)
    data, path = digits_task().data, tmp_path / "backbone.partial"
    options = {"steps": 7, "image_size": 32, "recipe": RECIPE}
    whole, accuracy, cost = pretrain(tiny_backbone(name).model, data, **options)

    def stop(done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(tiny_backbone(name).model, data, **options, resume=path, on_step=stop)
    assert path.exists()
    steps = []
    again = pretrain(
        tiny_backbone(name).model, data, **options, resume=path, on_step=lambda done, _: steps.append(done)
    )
    assert steps == [5, 6, 7]
    assert equal_weights(again[0].model, whole.model)
    assert (again[1], again[2].steps, again[2].train_flops) == (accuracy, cost.steps, cost.train_flops)
    assert not path.exists()
    # Another run's state, or a damaged one, is no beginning.
    with pytest.raises(KeyboardInterrupt):
        pretrain(tiny_backbone(name).model, data, **options, resume=path, on_step=stop)
    for _ in range(2):
        steps.clear()
        pretrain(
            tiny_backbone(name).model,
            data,
            **{**options, "steps": 1},
            resume=path,
            on_step=lambda done, _: steps.append(done),
        )
        assert steps == [1]
        path.write_bytes(b"no such file")
