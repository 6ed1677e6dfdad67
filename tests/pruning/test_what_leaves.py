"""What leaves is what was measured: plain timm code gets the reported accuracy from the file, as ``predict`` does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from digits import digits_task
from PIL import Image
from sklearn.datasets import load_digits
from tiny import tiny_model

from mvp_ext.data.images import load_data
from mvp_ext.data.tasks import Task
from mvp_ext.model.checkpoint import load_pruned
from mvp_ext.model.preprocessing import Preprocessing
from mvp_ext.pruning.prune import prune
from mvp_ext.timm_compat import import_timm
from mvp_ext.train.backbone import Backbone
from mvp_ext.train.evaluate import Quality

pytestmark = pytest.mark.usefixtures("one_thread")


def photos(folder: Path, classes: str = "013", count: int = 40) -> Path:
    """train/ and test/ folders of digits under names whose order is not that of the labels."""
    digits, names = load_digits(), {"0": "pear", "1": "apple", "3": "fig"}
    for label in classes:
        chosen = digits.images[digits.target == int(label)][: 2 * count]
        for number, pixels in enumerate(chosen):
            path = folder / ("train" if number < count else "test") / names[label] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels * 15).astype("uint8")).resize((32, 32)).save(path)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small model's file, and the photos it was made for."""
    home = tmp_path_factory.mktemp("home")
    folder = photos(home / "photos")
    data = load_data(folder)
    # No class of preprocessing that timm would guess: another size, mean and std than the model declares.
    backbone = Backbone(tiny_model("test_resnet").eval(), Preprocessing(40, (0.1, 0.2, 0.3), (0.5, 0.4, 0.3)))
    task = Task.of("fruit", data, ["pear", "fig", "apple"])
    prune(backbone, task, method="random", steps=8).save(home / "small.safetensors")
    return home / "small.safetensors", folder


def test_plain_timm_gets_the_reported_accuracy(saved: tuple[Path, Path]) -> None:
    path, folder = saved
    timm, small = import_timm(), load_pruned(path)
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=small.model))
    right = total = 0
    for image in sorted(folder.glob("test/*/*.png")):
        with torch.no_grad(), Image.open(image) as opened:
            answer = int(small.model(transform(opened.convert("RGB"))[None]).argmax())
        right += small.class_names[answer] == image.parent.name
        total += 1
    assert total == 120
    assert 0.6 < small.card.metrics["accuracy"] < 1
    # One image may be a tie that Pillow and torch round to different sides.
    assert right / total == pytest.approx(small.card.metrics["accuracy"], abs=1 / total + 1e-9)


def test_predict_gets_the_reported_numbers(saved: tuple[Path, Path]) -> None:
    path, folder = saved
    small, images = load_pruned(path), sorted(folder.glob("test/*/*.png"))
    assert small.class_names == ("apple", "fig", "pear")
    predictions = small.predict(images, batch=7)
    labels = torch.tensor([small.class_names.index(image.parent.name) for image in images])
    quality = Quality.of(predictions.probabilities.log(), labels)
    assert quality.accuracy == pytest.approx(small.card.metrics["accuracy"], abs=1 / len(images) + 1e-9)
    for name in ("expected_calibration_error", "mean_confidence"):
        assert getattr(quality, name) == pytest.approx(small.card.metrics[name], abs=0.02)
    assert small.card.task == "fruit"
    assert small.transform()(images[0]).shape == (3, 40, 40)


def test_probabilities_are_worth_their_name() -> None:
    """A ridge head's scores, taken as logits, know nothing; scaled, they are about as often right as they say."""
    backbone = Backbone(tiny_model("test_resnet").eval(), Preprocessing(32, (0.3,) * 3, (0.35,) * 3))
    result = prune(backbone, digits_task((0, 1, 2, 3, 4)), method="random", steps=8)
    assert 0 <= result.expected_calibration_error <= 1
    assert abs(result.mean_confidence - result.accuracy) < 0.2
    classifier = result.model.get_classifier()  # type: ignore[operator]
    # The logits of the classes sum to 0, whatever the image.
    assert float(classifier.weight.sum(0).abs().max()) < 1e-3 * float(classifier.weight.abs().max())
    assert float(classifier.bias.sum().abs()) < 1e-3 * float(classifier.bias.abs().max())


def test_quality_by_hand() -> None:
    logits = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.95, 0.05]]).log()
    quality = Quality.of(logits, torch.tensor([0, 1, 1, 0]))
    assert quality.accuracy == 0.75
    assert quality.mean_confidence == pytest.approx((0.9 + 0.6 + 0.7 + 0.95) / 4)
    # Four bins of one image each: (0.1 + 0.6 + 0.3 + 0.05) / 4.
    assert quality.expected_calibration_error == pytest.approx(0.2625)
    sure = Quality.of(torch.tensor([[50.0, 0.0]] * 4), torch.tensor([0, 0, 0, 1]))
    assert sure.expected_calibration_error == pytest.approx(0.25)
