"""How an image becomes a model's input, and that timm's own code, told by the model, does the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model

from mvp_ext.model.preprocessing import Preprocessing
from mvp_ext.timm_compat import import_timm

SEEN = Preprocessing(24, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours, uint8 [H, W, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize(("height", "width"), [(24, 24), (8, 8), (60, 60), (40, 90), (31, 24)])
def test_timm_makes_the_same_of_an_image(height: int, width: int) -> None:
    timm = import_timm()
    model = tiny_model("test_resnet")
    SEEN.declare(model, "abcde")
    config = timm.data.resolve_data_config({}, model=model)
    transform = timm.data.create_transform(**config)
    image = Image.fromarray(picture(height, width))
    theirs, ours = transform(image), SEEN(image)
    assert theirs.shape == ours.shape == (3, 24, 24)
    # Where it is not square, timm crops whole pixels of the smaller image and we of the larger: half a pixel's shift.
    difference = (theirs - ours).abs()
    if height == width:
        assert float(difference.max()) <= 2 / 255 / 0.2
    else:
        assert float(difference.mean()) <= 0.1
    assert Preprocessing.of(model) == SEEN
    assert model.pretrained_cfg["label_names"] == tuple("abcde")  # type: ignore[index, call-overload]
    assert model.default_cfg is model.pretrained_cfg


def test_kinds_of_images_are_the_same_image(tmp_path: Path) -> None:
    array = picture(30, 30)
    Image.fromarray(array).save(tmp_path / "a.png")
    expected = SEEN.bytes_of(array)
    assert expected.dtype == torch.uint8
    assert expected.shape == (24, 24, 3)
    for image in (
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        Image.fromarray(array),
        torch.from_numpy(array),
    ):
        assert torch.equal(SEEN.bytes_of(image), expected)
    assert torch.equal(SEEN(array), SEEN.batch(expected[None])[0])
    grey = array[:, :, 0]
    assert torch.equal(SEEN.bytes_of(grey), SEEN.bytes_of(grey[:, :, None]))


def test_alpha_lies_over_white_and_exif_turns(tmp_path: Path) -> None:
    clear = np.zeros((24, 24, 4), np.uint8)
    assert int(SEEN.bytes_of(Image.fromarray(clear)).min()) == 255
    exif = Image.Exif()
    # Turned by 180 degrees.
    exif[0x0112] = 3
    array = picture(24, 24)
    Image.fromarray(array).save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(SEEN.bytes_of(tmp_path / "turned.png"), torch.from_numpy(array[::-1, ::-1].copy()))


@pytest.mark.parametrize("image", [np.zeros((4, 4, 3)), np.zeros((4, 4, 2), np.uint8), np.zeros(4, np.uint8)])
def test_other_arrays_are_refused(image: Any) -> None:
    with pytest.raises(ValueError, match="image: expected a path, a Pillow image or uint8"):
        SEEN.bytes_of(image)


@pytest.mark.parametrize(
    "values",
    [
        {"size": 0},
        {"size": True},
        {"size": 24.0},
        {"size": 24, "mean": (0.1, 0.2)},
        {"size": 24, "std": (0.1, 0.2, 0.0)},
        {"size": 24, "mean": (0.1, 0.2, float("nan"))},
    ],
)
def test_nonsense_is_refused(values: Any) -> None:
    with pytest.raises(ValueError, match="Preprocessing: "):
        Preprocessing(**values)


def test_description_round_trip() -> None:
    assert Preprocessing.from_dict(SEEN.to_dict()) == SEEN
    for damaged in ({}, {"size": 3, "mean": 4, "std": 5}, {"size": 24, "mean": ["a"] * 3, "std": [1, 1, 1]}):
        with pytest.raises(ValueError, match=r"Preprocessing|convert"):
            Preprocessing.from_dict(damaged)
