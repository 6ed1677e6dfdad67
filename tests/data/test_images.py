"""Data sets in memory: how they are split, squared and checked."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mvp_ext.data.images import DataError, ImageData, content_hash, load_data


def test_split_is_stratified_seeded_and_without_overlap():
    from sklearn.datasets import load_digits

    total = np.bincount(load_digits().target)
    data = load_data("digits", test_share=0.25, seed=3)
    test = data.test_labels.bincount().numpy()
    assert np.abs(test - total * 0.25).max() <= 0.5 + 1e-9
    assert (test + data.train_labels.bincount().numpy() == total).all()
    again, other = (load_data("digits", test_share=0.25, seed=seed) for seed in (3, 4))
    assert again.fingerprint == data.fingerprint != other.fingerprint
    assert torch.equal(again.test_images, data.test_images)


def test_grey_becomes_rgb_of_the_size_asked_for(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (10, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "g.npz", train_images=grey, train_labels=np.arange(10) % 2)
    data = load_data(tmp_path / "g.npz", image_size=16)
    assert data.train_images.shape[1:] == (16, 16, 3)
    assert data.train_images.dtype == torch.uint8


def test_tall_arrays_are_cropped_to_their_middle(tmp_path):
    tall = np.zeros((10, 9, 3, 3), np.uint8)
    tall[:, 3:6] = 200
    np.savez(tmp_path / "t.npz", train_images=tall, train_labels=np.arange(10) % 2)
    data = load_data(tmp_path / "t.npz")
    assert data.image_size == (3, 3)
    assert (data.train_images == 200).all()


def test_unknown_source():
    with pytest.raises(DataError, match="no such data: 'nowhere'; expected 'digits'"):
        load_data("nowhere")


@pytest.mark.parametrize("arguments", [{"image_size": 0}, {"test_share": 0.0}, {"test_share": 1.0}])
def test_bad_arguments(arguments):
    with pytest.raises(DataError, match=next(iter(arguments))):
        load_data("digits", **arguments)


def test_image_data_checks_itself():
    good = load_data("digits")
    fields = {name: getattr(good, name) for name in ("name", "test_images", "test_labels", "class_names")}
    for changed, message in (
        ({"train_images": good.train_images.float()}, "train_images must be uint8"),
        ({"train_labels": good.train_labels.int()}, "train_labels must be int64"),
        ({"train_images": good.train_images[:0], "train_labels": good.train_labels[:0]}, "is empty"),
        ({"train_images": good.train_images[:, :4]}, "expected one shape"),
        ({"class_names": ("0",) * 10}, "more than one '0'"),
        ({"superclass_of_class": (0,) * 9, "superclass_names": ("x",)}, "superclass_of_class"),
    ):
        arguments = {
            "train_images": good.train_images,
            "train_labels": good.train_labels,
            **fields,
            **changed,
        }
        with pytest.raises(DataError, match=message):
            ImageData(**arguments)


def test_a_hash_of_tensors_of_any_type():
    kinds = (
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float64,
        torch.int64,
        torch.uint8,
        torch.bool,
    )
    seen = {
        content_hash([torch.tensor(bits).to(kind)], ["a"])
        for kind in kinds
        for bits in ([0, 1], [1, 0], 1, [])
    }
    assert len(seen) == 4 * len(kinds)
