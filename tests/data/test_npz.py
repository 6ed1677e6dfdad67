"""``.npz`` files of others: MedMNIST's, ids of any size, and everything that is no array of images."""

from __future__ import annotations

import io
import os
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mvp_ext.data.images import DataError, ImageData, load_data
from mvp_ext.data.tasks import Task, few_of_each, sample_tasks


def pixels(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *(shape or (4, 4, 3))), dtype=np.uint8)


def arrays(count: int = 8, **more: Any) -> dict[str, Any]:
    return {"train_images": pixels(count), "train_labels": np.arange(count) % 2, **more}


def saved(path: Path, **given: Any) -> Path:
    np.savez(path, **{key: value for key, value in given.items() if value is not None})
    return path


@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 3)])
@pytest.mark.parametrize("splits", [("val", "test"), ("val",), ("test",), ("validation",), ("valid", "test")])
def test_medmnists_files(tmp_path: Path, shape: tuple[int, ...], splits: tuple[str, ...]) -> None:
    counts = {"train": 12, **dict.fromkeys(splits, 4)}
    given = {f"{split}_images": pixels(n, *shape, seed=n + len(split)) for split, n in counts.items()}
    given |= {f"{split}_labels": (np.arange(n, dtype=np.uint8) % 3)[:, None] for split, n in counts.items()}
    path = saved(tmp_path / "bloodmnist.npz", **given)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = load_data(path)
    assert data.class_names == ("0", "1", "2")
    assert data.train_labels.tolist() == [0, 1, 2] * 4
    assert data.test_labels.tolist() == [0, 1, 2, 0]
    used = given[f"{splits[-1]}_images"]
    assert np.array_equal(data.test_images.numpy(), used if used.ndim == 4 else used[..., None].repeat(3, 3))
    told = [str(each.message) for each in caught]
    assert len(told) == len(splits) - 1
    assert all(f"left out: 4 {splits[0]} image(s), for test images are measured on" in each for each in told)


def test_images_without_labels_are_left_out(tmp_path: Path) -> None:
    measured = {"val_images": pixels(2, seed=3), "val_labels": np.array([0, 1])}
    path = saved(tmp_path / "a.npz", **arrays(4, test_images=pixels(3), **measured))
    with pytest.warns(UserWarning, match=r"1 array\(s\) of images without labels.*\(e.g. test\)"):
        data = load_data(path)
    assert np.array_equal(data.test_images.numpy(), measured["val_images"])


@pytest.mark.parametrize("ids", [(5, 10**9, 2**40), (10**9 + 7, 10**9 + 9), (0, 3), (2**62, 2**63 - 1)])
def test_ids_of_any_size_are_classes(tmp_path: Path, ids: tuple[int, ...]) -> None:
    labels = np.array(ids * 6, np.int64)
    path = saved(tmp_path / "a.npz", train_images=pixels(len(labels)), train_labels=labels)
    data = load_data(path)
    assert data.class_names == tuple(map(str, ids))
    for which in ("train", "test"):
        named = {data.class_names[label] for label in data.split(which)[1].tolist()}
        assert named == set(map(str, ids))
    # The labels of both splits are of one numbering.
    path = saved(
        tmp_path / "b.npz",
        **arrays(4, test_images=pixels(2), test_labels=np.array(ids[-1:] * 2)) | {"train_labels": labels[:4]},
    )
    assert {load_data(path).class_names[label] for label in load_data(path).test_labels} == {str(ids[-1])}


def test_group_numbers_of_any_size(tmp_path: Path) -> None:
    data = load_data(saved(tmp_path / "a.npz", **arrays(superclass_of_class=np.array([10**12, 7, 7]))))
    assert data.class_names == ("0", "1", "2")
    assert data.superclass_names == ("7", str(10**12))
    assert data.superclass_of_class == (1, 0, 0)


def test_names_are_texts_whatever_their_type(tmp_path: Path) -> None:
    for number, names in enumerate((np.array([b"a", b"\xc3\xa9"]), np.array(["a", "é"]))):
        path = saved(tmp_path / f"{number}.npz", **arrays(class_names=names))
        assert load_data(path).class_names == ("a", "é")


FLOATS, INTEGERS = pixels(8) / 255, pixels(8).astype(np.int64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_images": FLOATS}, "train_images: expected uint8 .* got float64; store .255 . images"),
        ({"train_images": INTEGERS}, "train_images: expected uint8 .* got int64; store .*astype"),
        ({"train_images": pixels(8, 3, 5, 5)}, r"got \[8, 3, 5, 5\]; channels come last: .*\(0, 2, 3, 1\)"),
        ({"train_images": pixels(8, 1, 5, 5)}, "channels come last"),
        ({"train_images": pixels(8, 5, 5, 5)}, r"got \[8, 5, 5, 5\]$"),
        ({"train_images": pixels(8, 5)}, r"got \[8, 5\]$"),
        ({"train_images": np.uint8(3)}, r"got \[\]$"),
        (
            {"train_labels": np.eye(8, dtype=int)},
            r"8 integers, got int64 \[8, 8\]; one class number an image",
        ),
        ({"train_labels": np.array(3)}, r"8 integers, got int64 \[\]"),
        ({"train_labels": np.array(["a", "b"] * 4)}, "8 integers, got <U1"),
        ({"train_labels": np.array([0, -1] * 4)}, "class numbers from 0, got -1 to 0"),
        ({"train_labels": np.array([0, 2**64 - 1] * 4, np.uint64)}, "class numbers from 0, got 0 to 1844"),
        ({"val_images": pixels(2)}, "val_images and val_labels must come together"),
        ({"class_names": np.array("ab")}, r"class_names must be a row of texts, got <U2 \[\]"),
        ({"class_names": np.array([[0.5, 1]])}, r"class_names must be a row of texts, got float64 \[1, 2\]"),
        ({"superclass_of_class": np.array([0.5, 1])}, "superclass_of_class must be a row of integers"),
        ({"class_names": np.array(["a", {}], object)}, "not a readable .npz file .Object arrays cannot"),
        ({"train_labels": np.array([0, None] * 4, object)}, "not a readable .npz file .Object arrays cannot"),
        ({"class_names": np.array(["a", "a"])}, "class names must differ, got more than one 'a'"),
        ({"train_images": None}, "has no 'train_images'; .* got train_labels .unpack an archive"),
    ],
)
def test_what_is_no_data_set_is_said_with_its_remedy(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = saved(tmp_path / "a.npz", **arrays() | change)
    with pytest.raises(DataError, match=message) as error:
        load_data(path)
    assert "a.npz" in str(error.value) or "a: class names" in str(error.value)


def test_nothing_in_a_file_is_unpickled(tmp_path: Path) -> None:
    class Call:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    path = saved(tmp_path / "a.npz", **arrays(class_names=np.array([Call(), Call()], object)))
    with pytest.raises(DataError):
        load_data(path)
    assert not (tmp_path / "ran").exists()


def header(shape: str) -> bytes:
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    "member",
    [
        header("(1000000000000000,)"),
        header(f"({2**62}, {2**62})"),
        header("('x',)"),
        header("(-1,)"),
        header("(" * 50),
        b"no array",
        b"",
    ],
)
def test_a_member_that_is_no_array(tmp_path: Path, member: bytes) -> None:
    good = io.BytesIO()
    np.save(good, np.arange(8))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("train_images.npy", member)
        file.writestr("train_labels.npy", good.getvalue())
    with pytest.raises(DataError, match=r"a\.npz: "):
        load_data(tmp_path / "a.npz")


def test_bytes_that_changed_are_named(tmp_path: Path) -> None:
    """Whatever byte changes: the data, or one line."""
    np.savez_compressed(tmp_path / "good.npz", **arrays())
    whole = (tmp_path / "good.npz").read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(whole), 150).tolist():
        changed = bytearray(whole)
        changed[place] ^= int(rng.integers(1, 256))
        (tmp_path / "a.npz").write_bytes(changed)
        try:
            data = load_data(tmp_path / "a.npz")
        except DataError:
            continue
        assert len(data.train_labels) + len(data.test_labels) == 8


@pytest.mark.parametrize("name", ["a.csv", "a.png", "a.zip", "a.npy", "a.npz"])
def test_a_path_of_another_kind(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("cat/1.png", b"")
    elif name == "a.npy":
        np.save(path, pixels(3))
    elif name == "a.npz":
        # Opened, it would wait for somebody to write.
        os.mkfifo(path)
    else:
        path.write_text("cat,1.png")
    with pytest.raises(DataError, match=rf"{name}: (not a readable .npz file|has no 'train_images'.*unpack)"):
        load_data(path)


def test_folders_beside_parts_are_told(tmp_path: Path) -> None:
    saved(tmp_path / "a.NPZ.npz", **arrays())
    (tmp_path / "cat").mkdir()
    with pytest.warns(UserWarning, match=r"1 folder\(s\) beside .npz files \(e.g. .*cat\)"):
        load_data(tmp_path)
    with pytest.raises(DataError, match=r"must be .npz files, got the folder .*--data for each"):
        load_data([tmp_path, tmp_path])
    with pytest.raises(DataError, match=r"no such data: 'digits'.*--data for each"):
        load_data(f"{tmp_path}/a.NPZ.npz,digits")


def test_many_parts_joined_by_commas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [saved(tmp_path / f"part {number}.npz", **arrays(4)).name for number in range(30)]
    assert len(load_data(",".join(names)).train_labels) > 60


CLASSES = 100_000


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> ImageData:
    """As many classes as nobody has, in seconds: whatever is done once a class does not look at all of them."""
    labels = np.arange(3 * CLASSES) % CLASSES
    names = np.array([f"class {label}" for label in range(CLASSES)])
    path = saved(
        tmp_path_factory.mktemp("many") / "many.npz",
        train_images=np.zeros((len(labels), 1, 1), np.uint8),
        train_labels=labels,
        class_names=names,
    )
    return in_seconds(lambda: load_data(path))


def in_seconds(call: Any) -> Any:
    start = time.process_time()
    result = call()
    assert time.process_time() - start < 10
    return result


def test_many_classes_are_split(many: ImageData) -> None:
    assert len(many.classes) == CLASSES
    assert torch.equal(many.test_labels.bincount(), torch.ones(CLASSES, dtype=torch.int64))


def test_many_classes_are_a_task(many: ImageData) -> None:
    task = in_seconds(lambda: Task.of("all", many, many.class_names, max_train_per_class=1))
    assert len(in_seconds(task.split).train_labels) == CLASSES
    assert len(in_seconds(lambda: few_of_each(many.train_labels, 10, seed=0))) == CLASSES
    assert len({each.classes for each in in_seconds(lambda: sample_tasks(many, 100, 5, seed=0))}) == 100
    with pytest.raises(ValueError, match="did you mean 'class 9'"):
        in_seconds(lambda: Task.of("t", many, ["clas 9"]))
