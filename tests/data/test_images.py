"""Data sets in memory: how they are split, squared and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mvp_ext.data.images import DataError, ImageData, content_hash, load_data, load_joined
from mvp_ext.data.tasks import sample_tasks


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


# ---- several data sets


def arrays_of(path: Path, classes: str, size: int = 4, **more: Any) -> Path:
    """Six images a class, all of one shade: 10 for the first class, 11 for the next."""
    labels = np.repeat(np.arange(len(classes)), 6)
    shades = np.broadcast_to((10 + labels).astype(np.uint8)[:, None, None], (len(labels), size, size))
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, train_images=shades, train_labels=labels, class_names=np.array(list(classes)), **more)
    return path


def test_joined_data_are_each_ones_own(tmp_path: Path) -> None:
    groups = {"superclass_of_class": np.array([0, 1, 0]), "superclass_names": np.array(["x", "y"])}
    first = arrays_of(tmp_path / "a" / "shapes.npz", "abc", **groups)
    second = arrays_of(tmp_path / "b" / "shapes.npz", "ab", size=6)
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (5, 7), (90 + number, 0, 0)).save(tmp_path / "photos" / name / f"{number}.png")
    sources = [first, second, str(tmp_path / "photos"), "digits"]
    data = load_joined(sources, seed=3)
    assert data.name == "shapes+shapes-2+photos+digits"
    assert data.class_names[:7] == (
        *("shapes/a", "shapes/b", "shapes/c", "shapes-2/a", "shapes-2/b"),
        *("photos/a", "photos/b"),
    )
    assert data.domains == (range(3), range(3, 5), range(5, 7), range(7, 17))
    assert data.superclass_names == ("shapes/x", "shapes/y", "shapes-2", "photos", "digits")
    assert data.superclass_of_class == (0, 1, 0, 2, 2, 3, 3, *[4] * 10)
    assert data.image_size == (8, 8)
    assert not data.flip
    assert load_joined(sources, flip=True).flip
    for source, domain in zip(sources, data.domains or (), strict=True):
        alone = load_data(source, image_size=8, seed=3)
        for which in ("train", "test"):
            images, labels = data.split(which)
            own = (labels >= domain.start) & (labels < domain.stop)
            assert torch.equal(images[own], alone.split(which)[0])
            assert torch.equal(labels[own] - domain.start, alone.split(which)[1])
    assert load_joined(sources, image_size=3).image_size == (3, 3)


def test_one_alone_is_itself(tmp_path: Path) -> None:
    assert load_joined(["digits"]).fingerprint == load_data("digits").fingerprint
    path = arrays_of(tmp_path / "a.npz", "ab")
    assert load_joined([path]).class_names == ("a", "b")


def test_joined_data_are_others(tmp_path: Path) -> None:
    path = arrays_of(tmp_path / "a.npz", "ab")
    (tmp_path / "again.npz").symlink_to(path)
    for sources, message in (
        ([], "at least one data set"),
        (["digits", "digits"], "'digits' is given twice"),
        ([path, tmp_path / "again.npz"], r"a\.npz' is given twice"),
        (["digits", "nowhere"], "no such data: 'nowhere'"),
    ):
        with pytest.raises(DataError, match=message):
            load_joined(sources)
    with pytest.raises(TypeError, match="expected a list of data sets, got 'digits'"):
        load_joined("digits")


def test_tasks_of_joined_data_are_of_one_each(tmp_path: Path) -> None:
    names = ["abcdef", "abcd", "abcde"]
    paths = [arrays_of(tmp_path / f"{i}.npz", classes) for i, classes in enumerate(names)]
    data = load_joined(paths)
    tasks = sample_tasks(data, 12, 3, seed=5, prefix="zoo")
    assert [task.name for task in tasks] == [f"zoo-{i:03d}" for i in range(12)]
    assert len({task.classes for task in tasks}) == 12
    for number, task in enumerate(tasks):
        assert {name.partition("/")[0] for name in task.class_names} == {str(number % 3)}
    assert [task.classes for task in sample_tasks(data, 7, 3, seed=5)] == [t.classes for t in tasks[:7]]
    # Not of a data set whose classes are all held out; the second has four sets of three classes.
    pool = [label for label in data.classes if label not in range(6)]
    assert {sample.classes[0] >= 6 for sample in sample_tasks(data, 4, 3, seed=0, classes=pool)} == {True}
    with pytest.raises(ValueError, match=r"5 different sets of 3 classes .* 4 classes of '1' \(0 sets"):
        sample_tasks(data, 15, 3, seed=0)
    later = sample_tasks(data, 9, 3, seed=0, exclude=tasks[:3])
    assert not {task.classes for task in tasks[:3]} & {task.classes for task in later}


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
