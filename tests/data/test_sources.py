"""Reading from files: what each source gives, and everything that can be wrong with one."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from mvp_ext.data import sources
from mvp_ext.data.decoding import decode_images
from mvp_ext.data.images import DataError, load_data


def images(count: int, size: int = 6, seed: int = 0, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def write_folder(root, counts: dict[str, int], *, size=(6, 6), suffix=".png") -> None:
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.full((*size, 3), 10 * i, np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:02d}{suffix}")


# ---- digits


def test_digits():
    data = load_data("digits")
    assert data.name == "digits"
    assert not data.flip  # a mirrored 2 is no 2
    assert data.class_names == tuple("0123456789")
    assert len(data.train_images) + len(data.test_images) == 1797
    assert data.train_images.dtype == torch.uint8
    assert data.train_images.shape[1:] == (8, 8, 3)
    assert data.train_images.is_contiguous()
    assert int(data.train_images.max()) == 255  # 16 of 16 became white
    assert torch.equal(data.train_images[..., 0], data.train_images[..., 2])
    assert data.classes == tuple(range(10))


# ---- npz


def test_npz_with_plain_keys(tmp_path):
    np.savez(tmp_path / "a.npz", train_images=images(20), train_labels=np.arange(20) % 4)
    data = load_data(tmp_path / "a.npz")
    assert data.class_names == ("0", "1", "2", "3")
    assert data.superclass_names is None
    assert data.flip
    assert data.test_labels.bincount().tolist() == [1, 1, 1, 1]  # one fifth of five each
    assert not load_data(tmp_path / "a.npz", flip=False).flip


def write_parts(folder, **changes) -> list:
    paths = []
    for part in range(2):
        arrays = {
            "train_images": images(6, seed=part),
            "train_labels": np.uint8([2 * part, 2 * part + 1] * 3),
            "test_images": images(4, seed=part + 10),
            "test_labels": np.uint8([2 * part, 2 * part + 1] * 2),
            "class_names": np.array(["a", "b", "c", "d"]),
            "superclass_of_class": np.uint8([0, 0, 1, 1]),
            "superclass_names": np.array(["first", "second"]),
        }
        if part == 1:
            arrays |= changes
        paths.append(folder / f"part{part}.npz")
        np.savez(paths[-1], **{key: value for key, value in arrays.items() if value is not None})
    return paths


def test_npz_parts_directory_list_and_commas(tmp_path):
    paths = write_parts(tmp_path)
    data = load_data(tmp_path)
    assert data.train_labels.tolist() == [0, 1] * 3 + [2, 3] * 3
    assert len(data.test_images) == 8
    assert data.superclass_of_class == (0, 0, 1, 1)
    assert data.superclass_names == ("first", "second")
    for source in (paths, f"{paths[0]}, {paths[1]}"):
        assert load_data(source).fingerprint == data.fingerprint
    one = load_data(paths[1])
    assert one.class_names == ("a", "b", "c", "d")  # the numbering stays
    assert one.classes == (2, 3)  # of which these have images


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": np.array(["a", "b", "d", "c"])}, "part1.npz: its class_names differ"),
        ({"superclass_of_class": np.uint8([0, 1, 1, 1])}, "superclass_of_class differ"),
        ({"test_images": None, "test_labels": None}, "either every part has a test split or none"),
        ({"test_labels": None}, "part1.npz: test_images and test_labels must come together"),
        ({"train_images": None}, "part1.npz: has no 'train_images'"),
        ({"train_images": images(6).astype(np.float32)}, "part1.npz: train_images: expected uint8"),
        ({"train_images": images(6, channels=4)}, "or \\[n, H, W, 3\\], got \\[6, 6, 6, 4\\]"),
        ({"train_images": images(6, size=5)}, "part1.npz: images are"),
        ({"train_labels": np.float32([0] * 6)}, "part1.npz: train_labels must be 6 integers"),
        ({"train_labels": np.uint8([0] * 5)}, "got uint8 \\[5\\]"),
        ({"train_labels": np.uint8([4] * 6)}, "labels must be in \\[0, 4\\)"),
        ({"class_names": np.array([{"x": 1}], dtype=object)}, "part1.npz: not a readable .npz file"),
    ],
)
def test_npz_errors_name_the_file(tmp_path, changes, message):
    write_parts(tmp_path, **changes)
    with pytest.raises(DataError, match=message):
        load_data(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut off"])
def test_damaged_npz_is_named(tmp_path, content):
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.npz: not a readable"):
        load_data(tmp_path / "bad.npz")


def test_truncated_npz_is_named(tmp_path):
    path = write_parts(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"part0\.npz: not a readable"):
        load_data(path)


# ---- image folders


def test_folder_with_unequal_classes(tmp_path):
    write_folder(tmp_path / "pets", {"dog": 3, "cat": 11})
    data = load_data(tmp_path / "pets")
    assert data.name == "pets"
    assert data.class_names == ("cat", "dog")
    assert data.test_labels.bincount().tolist() == [2, 1]
    assert data.train_labels.bincount().tolist() == [9, 2]


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_folder_with_splits(tmp_path, test_name):
    write_folder(tmp_path / "train", {"a": 2, "b": 3})
    write_folder(tmp_path / test_name, {"b": 1})
    data = load_data(tmp_path)
    assert data.train_labels.bincount().tolist() == [2, 3]
    assert data.test_labels.tolist() == [1]
    assert data.classes == (1,)


def test_folder_with_train_only_is_split(tmp_path):
    write_folder(tmp_path / "train", {"a": 5, "b": 5})
    assert load_data(tmp_path).test_labels.bincount().tolist() == [1, 1]


def test_test_class_without_training_images(tmp_path):
    write_folder(tmp_path / "train", {"a": 2})
    write_folder(tmp_path / "test", {"a": 1, "new": 1})
    with pytest.raises(DataError, match="class 'new' has no training images"):
        load_data(tmp_path)


def test_images_that_do_not_decode_are_all_named(tmp_path):
    write_folder(tmp_path, {"a": 3, "b": 3})
    (tmp_path / "a" / "01.png").write_bytes(b"no image")
    whole = (tmp_path / "b" / "02.png").read_bytes()
    (tmp_path / "b" / "02.png").write_bytes(whole[: len(whole) // 2])  # its header is fine
    with pytest.raises(DataError, match=r"2 of 6 image\(s\) do not decode.*a/01\.png.*b/02\.png"):
        load_data(tmp_path)


def test_other_files_are_left_out_with_a_warning(tmp_path):
    write_folder(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "a" / "notes.txt").write_text("hello")
    (tmp_path / "a" / ".DS_Store").write_text("not of a user")
    with pytest.warns(
        UserWarning, match=r"1 hidden or system file.*DS_Store.*1 file\(s\) are no images.*notes\.txt"
    ):
        assert len(load_data(tmp_path).train_images) == 2


@pytest.mark.parametrize("counts", [{}, {"a": 0, "b": 0}])
def test_folder_without_images(tmp_path, counts):
    write_folder(tmp_path, counts)
    with pytest.raises(DataError, match="no class folders with images"):
        load_data(tmp_path)


def test_single_image_class_cannot_be_split(tmp_path):
    write_folder(tmp_path, {"a": 2, "lonely": 1})
    with pytest.raises(DataError, match="class 'lonely' has one image"):
        load_data(tmp_path)


def test_modes_become_rgb(tmp_path):
    """Grey, 16-bit grey, palette, and transparency show what a viewer would show."""
    size = (4, 4)
    (tmp_path / "a").mkdir()
    sixteen = np.full(size, 257 * 100, np.uint16)
    made = {
        "0_grey": Image.new("L", size, 100),
        "1_grey16": Image.fromarray(sixteen),
        "2_opaque": Image.new("RGBA", size, (100, 100, 100, 255)),
        "3_clear": Image.new("RGBA", size, (0, 0, 0, 0)),  # black hides under full transparency
        "4_palette": Image.new("RGB", size, (100, 100, 100)).quantize(2),
        "5_bits": Image.new("1", size, 1),
    }
    for name, image in made.items():
        image.save(tmp_path / "a" / f"{name}.png")
    files = sorted((tmp_path / "a").iterdir())
    decoded = np.empty((6, 4, 4, 3), np.uint8)
    decode_images(files, decoded, np.arange(6))
    assert [int(image[0, 0, 0]) for image in decoded] == [100, 100, 100, 255, 100, 255]
    assert all((image == image[0, 0, 0]).all() for image in decoded)


def test_default_size_is_the_median_shorter_side(tmp_path):
    for name, sizes in {"a": [(10, 30), (20, 20)], "b": [(12, 12), (50, 12)]}.items():
        (tmp_path / name).mkdir()
        for i, size in enumerate(sizes):
            Image.new("RGB", size).save(tmp_path / name / f"{i}.jpg")
    assert load_data(tmp_path).image_size == (12, 12)
    assert load_data(tmp_path, image_size=7).image_size == (7, 7)


def test_camera_rotation_is_applied(tmp_path):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255  # bright above
    exif = Image.Exif()
    exif[0x0112] = 3  # taken upside down
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "0.png", exif=exif)
    decoded = np.empty((1, 8, 8, 3), np.uint8)
    decode_images([tmp_path / "a" / "0.png"], decoded, np.arange(1))
    assert decoded[0, :4].max() == 0
    assert decoded[0, 4:].min() == 255


# ---- cifar100


def test_cifar100_without_network_says_what_to_do(tmp_path, monkeypatch):
    from mvp_ext.timm_compat import import_timm

    import_timm()
    import torchvision.datasets.cifar as cifar

    def no_network(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(cifar, "download_and_extract_archive", no_network)
    with pytest.raises(DataError, match=r"cifar100: no usable copy.*Network is unreachable.*npz"):
        load_data(f"cifar100:{tmp_path}")


def test_cifar100_from_a_local_copy(tmp_path, monkeypatch):
    """The files of torchvision's copy, three images large."""
    from mvp_ext.timm_compat import import_timm

    import_timm()
    from torchvision.datasets import CIFAR100

    folder = tmp_path / CIFAR100.base_folder
    folder.mkdir()
    planar = np.arange(3 * 3072, dtype=np.int64).astype(np.uint8).reshape(3, 3072)
    split = {"data": planar, "fine_labels": [0, 1, 1], "coarse_labels": [1, 0, 0]}
    names = {"fine_label_names": ["apple", "bee"], "coarse_label_names": ["insects", "fruit"]}
    for name, value in {"train": split, "test": split, "meta": names}.items():
        (folder / name).write_bytes(pickle.dumps(value))
    monkeypatch.setattr(CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr(
        CIFAR100, "_load_meta", lambda self: setattr(self, "classes", names["fine_label_names"])
    )
    data = load_data(f"cifar100:{tmp_path}")
    assert data.class_names == ("apple", "bee")
    assert data.train_labels.tolist() == [0, 1, 1]
    assert torch.equal(data.test_images[2].permute(2, 0, 1).flatten(), torch.from_numpy(planar[2]))
    assert data.superclass_of_class == (1, 0)
    assert data.superclass_names == ("insects", "fruit")


def test_find_images_passes_over_what_is_none_and_is_repeatable(tmp_path):
    for name in (
        *("cat/2.PNG", "cat/10.jpg", "cat/deep/3.webp", "dog/1.png", "top.jpeg", "a[1].png"),
        *(
            ".hidden.png",
            ".hidden/4.png",
            "__MACOSX/cat/._2.png",
            "cat/Thumbs.db",
            "cat/.DS_Store",
            "notes.txt",
        ),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = sources.find_images([tmp_path])
    assert {(str(i.path.relative_to(tmp_path)), i.group) for i in found} == {
        *(("cat/2.PNG", "cat"), ("cat/10.jpg", "cat"), ("cat/deep/3.webp", "cat"), ("dog/1.png", "dog")),
        *(("top.jpeg", None), ("a[1].png", None)),
    }
    assert found == sources.find_images([tmp_path, tmp_path / "cat"])

    def names(*places):
        return [image.path.name for image in sources.find_images([tmp_path / place for place in places])]

    # As named, whatever its suffix; a name that is a pattern, too, is taken as it is.
    assert names("notes.txt", "a[1].png") == ["notes.txt", "a[1].png"]
    assert names("*/1.png", "c*") == ["1.png", "10.jpg", "2.PNG", "3.webp"]
    assert names("**/*.png") == ["a[1].png", "1.png"]


def test_find_images_follows_links_once(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "1.png").touch()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "back").symlink_to(tmp_path / "photos")
    found = sources.find_images([tmp_path / "photos"])
    assert [(image.path.name, image.group) for image in found] == [("1.png", "cat")]


@pytest.mark.parametrize("place", ["no.png", "no*", "notes", "note*"])
def test_find_images_names_what_names_nothing(tmp_path, place):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").touch()
    with pytest.raises(DataError, match="find_images: no ") as error:
        sources.find_images([tmp_path / place])
    assert place in str(error.value)
