"""Folders as people have them: whatever their splits are called, and whatever else lies in them."""

from __future__ import annotations

import os
import random
import re
import tracemalloc
import unicodedata
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mvp_ext.data import decoding
from mvp_ext.data.images import DataError, ImageData, load_data
from mvp_ext.data.sources import find_images
from mvp_ext.data.tasks import Task, sample_tasks

TRAIN, VALIDATION, TEST = ("train", "training"), ("val", "valid", "validation"), ("test", "testing")


def draw(path: Path, shade: int = 0, side: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), (shade % 256, shade // 256, 0)).save(path)


def fill(root: Path, counts: dict[str, int], first: int = 0) -> None:
    """``root/<class>/<number>.png``; each image tells its number from ``first``."""
    for name, count in counts.items():
        for _ in range(count):
            draw(root / name / f"{first}.png", first)
            first += 1


def quietly(source: Any) -> tuple[ImageData, str]:
    """The data, and what was told of what is left out."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = load_data(source)
    assert len(caught) <= 1, "one line says it all"
    return data, str(caught[0].message) if caught else ""


def numbers(data: ImageData, split: str) -> dict[str, set[int]]:
    """Class → the numbers of its images."""
    images, labels = data.split(split)
    shown = images[:, 0, 0, 0].int() + 256 * images[:, 0, 0, 1].int()
    found: dict[str, set[int]] = {}
    for label, number in zip(labels.tolist(), shown.tolist(), strict=True):
        found.setdefault(data.class_names[label], set()).add(number)
    return found


def in_some_case(name: str, rng: random.Random) -> str:
    return "".join(rng.choice((letter.lower(), letter.upper())) for letter in name)


@pytest.mark.parametrize("measured", [*VALIDATION, *TEST])
def test_the_users_own_split_is_used_whatever_it_is_called(tmp_path: Path, measured: str) -> None:
    rng = random.Random(measured)
    fill(tmp_path / in_some_case(rng.choice(TRAIN), rng), {"a": 3, "b": 2})
    fill(tmp_path / in_some_case(measured, rng), {"b": 2, "a": 1}, first=100)
    data, told = quietly(tmp_path)
    assert numbers(data, "train") == {"a": {0, 1, 2}, "b": {3, 4}}
    assert numbers(data, "test") == {"a": {102}, "b": {100, 101}}
    assert told == ""


@pytest.mark.parametrize(("validation", "test"), list(zip(VALIDATION, (*TEST, "Test"), strict=True)))
def test_of_three_splits_it_says_which_is_for_what(tmp_path: Path, validation: str, test: str) -> None:
    fill(tmp_path / "train", {"a": 3, "b": 2})
    fill(tmp_path / validation, {"a": 4, "only here": 1}, first=50)
    fill(tmp_path / test, {"a": 1, "b": 1}, first=100)
    data, told = quietly(tmp_path)
    assert numbers(data, "test") == {"a": {100}, "b": {101}}
    assert f"5 image(s) of {validation}/, for train/ is trained on, {test}/ measured on" in told


@pytest.mark.parametrize("where", ["", "unknown"])
def test_unlabelled_test_images_are_left_out(tmp_path: Path, where: str) -> None:
    fill(tmp_path / "train", {"a": 3, "b": 2})
    fill(tmp_path / "test", {where: 4}, first=50)
    fill(tmp_path / "val", {"a": 1, "b": 1}, first=100)
    data, told = quietly(tmp_path)
    assert numbers(data, "test") == {"a": {100}, "b": {101}}
    assert re.search(r"4 image\(s\) .*in no class", told)
    # Without a labelled split, too: a share of the training images is measured on.
    fill(tmp_path / "other" / "train", {"a": 5, "b": 5})
    fill(tmp_path / "other" / "test", {where: 4}, first=50)
    data, told = quietly(tmp_path / "other")
    assert {name: len(each) for name, each in numbers(data, "test").items()} == {"a": 1, "b": 1}
    assert "4 image(s)" in told


REASONS = {
    "hidden": "hidden or system file(s) and folder(s)",
    "broken": "link(s) are broken",
    "again": "linked folder(s) lead back, or are read already",
    "other": "file(s) are no images",
    "loose": "image(s) are in no class folder",
    "empty": "class folder(s) have no images",
}
HIDDEN = ("__MACOSX", ".ipynb_checkpoints", ".hidden", "lost+found", "$RECYCLE.BIN", "@eaDir", "__macosx")
HIDDEN_FILES = (".DS_Store", "Thumbs.db", "desktop.ini", "._0.png", "THUMBS.DB")
NAMES = ("cat", "Dog", "a b", "fox, red", 'the "x"', "été", "a.b", "-", "[1]", "*")


def litter(place: Path, outside: Path, rng: random.Random, expected: Counter[str]) -> None:
    """Put into a class's folder what must be left out."""
    for kind in rng.sample(sorted(REASONS), 4):
        if kind == "hidden":
            draw(place / rng.choice(HIDDEN) / "0.png", 9999)
            (place / rng.choice(HIDDEN_FILES)).write_text("x")
            expected[kind] += 2
        elif kind == "broken":
            (place / "gone.png").symlink_to(outside / "no such file.png")
            (place / "gone").symlink_to(outside / "no such folder")
            (place / "round").symlink_to(place / "round")
            expected[kind] += 3
        elif kind == "again":
            for target in (".", "..", "../..", "/"):
                (place / f"back {target.count('/')}{len(target)}").symlink_to(target)
                expected[kind] += 1
        elif kind == "other":
            (place / "notes.txt").write_text("x")
            os.mkfifo(place / "pipe.png")
            expected[kind] += 2


@pytest.mark.parametrize("seed", range(6))
def test_every_image_of_a_class_is_taken_once_and_what_is_not_is_counted(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    root, outside = tmp_path / "work" / "photos", tmp_path / "elsewhere" / "pool"
    outside.mkdir(parents=True)
    expected: Counter[str] = Counter()
    images: dict[str, set[int]] = {}
    number = 0

    def some(place: Path, name: str, suffixes: tuple[str, ...] = (".png", ".PNG", ".Bmp")) -> None:
        nonlocal number
        for _ in range(rng.randint(2, 3)):
            draw(place / f"{number}{rng.choice(suffixes)}", number)
            images.setdefault(name, set()).add(number)
            number += 1

    chosen = rng.sample(NAMES, 4)
    for name in chosen[:3]:
        some(root / name, name)
        some(root / name / "deep" / "er", name)
        # Linked in twice, by a file's link, and with a link back from there.
        folder = outside / str(number)
        some(folder, name)
        (root / name / "linked").symlink_to(folder)
        (root / name / "linked again").symlink_to(folder)
        (folder / "home").symlink_to(root / name)
        expected["again"] += 2
        litter(root / name, outside, rng, expected)
    # A class of links alone, and a link into another class, which takes nothing from that one.
    some(tmp_path / "elsewhere" / "whole", chosen[3])
    (root / chosen[3]).symlink_to(tmp_path / "elsewhere" / "whole")
    (root / chosen[0] / "theirs").symlink_to(root / chosen[2] / "deep")
    (root / "0 alias").symlink_to(root / chosen[1])
    (root / "loop").symlink_to(root)
    expected["again"] += 3
    draw(root / "loose.png")
    (root / "no images" / "deep").mkdir(parents=True)
    (root / "README.md").write_text("of no class")
    (root / rng.choice(HIDDEN)).mkdir()
    expected += Counter(loose=1, empty=1, hidden=1)
    data, told = quietly(root)
    both = [numbers(data, split) for split in ("train", "test")]
    assert {name: both[0][name] | both[1][name] for name in both[0]} == images
    assert len(data.train_labels) + len(data.test_labels) == number
    found = {
        kind: int(match[1])
        for kind, reason in REASONS.items()
        if (match := re.search(rf"(\d+) {re.escape(reason)}", told))
    }
    assert found == {kind: count for kind, count in expected.items() if count}, told


def spelled(name: str) -> str:
    return unicodedata.normalize("NFD", name)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (
            ("train/cat", "train/dog", "val/Cat"),
            "class 'Cat' has no training images.*'cat' is spelled otherwise",
        ),
        ((f"train/{spelled('été')}", "val/été", "train/a"), "has no training images.*is spelled otherwise"),
        (("train/cat", "val/cat", "val/new"), "class 'new' has no training images in .*train"),
        (("train/a", "Training/a"), "Training/ and train/ are both named as train images"),
        (("train/a", "val/a", "valid/a"), "val/ and valid/ are both named as validation images"),
        (("test/a", "val/a"), "has test/ and val/, but no train/"),
        (("train", "val/a"), "train: no class folders with images"),
        (("train", "test"), "train: no class folders with images"),
    ],
)
def test_splits_that_do_not_fit_are_named(tmp_path: Path, folders: tuple[str, ...], message: str) -> None:
    fill(tmp_path, dict.fromkeys(folders, 2))
    with pytest.raises(DataError, match=message):
        load_data(tmp_path)


def test_a_class_has_a_name_that_can_be_written(tmp_path: Path) -> None:
    fill(tmp_path, {os.fsdecode(b"\xe9t\xe9"): 2, "bus": 2})
    with pytest.raises(
        DataError, match=r"class folder '\\udce9t\\udce9' has a name that is no text in UTF-8"
    ):
        load_data(tmp_path)


@pytest.mark.parametrize("name", [*TRAIN, *TEST, *VALIDATION])
def test_a_class_may_be_called_as_a_split(tmp_path: Path, name: str) -> None:
    fill(tmp_path, {name: 2, "bus": 2})
    assert load_data(tmp_path).class_names == ("bus", name)


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, {"a/deep": 2, "b": 2})
    scandir = os.scandir

    def locked(path: str) -> Any:
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(DataError, match=r"a/deep: cannot be read \(Permission denied\)"):
        load_data(tmp_path)


def test_images_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "train", {"a": 3, "b": 4, "c": 3})
    fill(tmp_path / "val", {"a": 2, "b": 2, "c": 2})
    decoded = []
    square_rgb = decoding.square_rgb

    def counted(image: Any, size: int) -> np.ndarray:
        decoded.append(image.filename)
        return square_rgb(image, size)

    monkeypatch.setattr(decoding, "square_rgb", counted)
    data = load_data(tmp_path)
    for task in [*sample_tasks(data, 3, 2, seed=0), Task("all", data, data.classes, max_train_per_class=2)]:
        assert task.fingerprint
        assert task.split().num_classes > 1
    assert sorted(decoded) == sorted(str(path) for path in tmp_path.rglob("*.png"))


def peak(source: Path) -> tuple[int, int]:
    """Bytes at most while the data are loaded, and of their images."""
    tracemalloc.start()
    try:
        data = load_data(source)
        return tracemalloc.get_traced_memory()[1], data.train_images.nbytes + data.test_images.nbytes
    finally:
        tracemalloc.stop()


def test_images_are_in_memory_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for number in range(40):
            draw(tmp_path / "photos" / name / f"{number}.png", side=128)
    pixels = np.zeros((20_000, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "whole.npz", train_images=pixels, train_labels=np.arange(20_000) % 4)
    for source in ("photos", "whole.npz"):
        # What is imported late is no image.
        load_data(tmp_path / source)
        most, needed = peak(tmp_path / source)
        assert most < 1.4 * needed, source


def test_all_of_the_images_are_no_copy(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 5, "b": 5})
    data = load_data(tmp_path)
    split = Task("all", data, data.classes).split()
    assert split.train_images.data_ptr() == data.train_images.data_ptr()
    assert Task("some", data, data.classes, max_train_per_class=1).split().train_labels.tolist() == [0, 1]


def test_thousands_of_class_folders(tmp_path: Path) -> None:
    draw(tmp_path / "one.png")
    for split in ("train", "val"):
        for number in range(1500):
            folder = tmp_path / "many" / split / f"{number:04d}"
            folder.mkdir(parents=True)
            os.link(tmp_path / "one.png", folder / "0.png")
    data = load_data(tmp_path / "many")
    assert len(data.classes) == 1500
    assert data.train_labels.tolist() == data.test_labels.tolist() == list(range(1500))


def test_kinds_of_images(tmp_path: Path) -> None:
    """What a viewer would show, of whatever kind: the first picture, in RGB, over white."""
    grey = Image.new("L", (4, 4), 100)
    clear = grey.convert("LA")
    clear.putalpha(0)
    palette = Image.new("RGB", (4, 4), (100, 100, 100)).quantize(2)
    white = Image.new("RGB", (4, 4), "white")
    made: dict[str, tuple[Image.Image, int, dict[str, Any]]] = {
        "cmyk.jpg": (white.convert("CMYK"), 255, {}),
        "grey alpha.png": (clear, 255, {}),
        "transparent palette.png": (palette, 255, {"transparency": palette.getpixel((0, 0))}),
        "transparent colour.png": (grey.convert("RGB"), 255, {"transparency": (100, 100, 100)}),
        "sixteen bits.tif": (Image.fromarray(np.full((4, 4), 100 * 257, np.uint16)), 100, {}),
        "animated.gif": (white, 255, {"save_all": True, "append_images": [grey.convert("RGB")]}),
        "animated.webp": (
            white,
            255,
            {"save_all": True, "append_images": [grey.convert("RGB")], "lossless": True},
        ),
        "one bit.png": (Image.new("1", (4, 4), 1), 255, {}),
        "ycbcr.jpg": (grey.convert("YCbCr"), 100, {}),
    }
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for name, (image, _, options) in made.items():
        for folder in ("a", "b"):
            image.save(tmp_path / folder / name, **options)
    data = load_data(tmp_path)
    every = [*data.train_images, *data.test_images]
    assert Counter(int(image[0, 0, 0]) for image in every) == Counter(
        2 * [value for _, value, _ in made.values()]
    )
    assert all(int(image.max()) == int(image.min()) for image in every)


def test_predict_reads_labelled_folders_as_load_data_does(tmp_path: Path) -> None:
    fill(tmp_path / "plain", {"cat/deep": 1, "dog": 1})
    fill(tmp_path / "split" / "Train", {"cat/deep": 1, "dog": 1})
    fill(tmp_path / "split" / "Valid", {"cat": 1})
    fill(tmp_path / "classes", {"train": 1, "bus": 1})
    fill(tmp_path / "measured" / "test", {"cat": 1})
    draw(tmp_path / "split" / "Test" / "0.png")

    def groups(name: str) -> list[str | None]:
        return [image.group for image in find_images([tmp_path / name])]

    assert groups("plain") == ["cat", "dog"]
    assert groups("split") == [None, "cat", "dog", "cat"]
    assert groups("classes") == ["bus", "train"]
    assert groups("measured") == ["cat"]
