"""Reading images from files: each reader returns the fields of ``ImageData`` as NumPy arrays.

``test_images`` and ``test_labels`` are None where the source has no test split. A reader returns everything
or raises ``DataError``; nothing is left out silently.
"""

from __future__ import annotations

import functools
import glob
import os
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mvp_ext.model.preprocessing import square_rgb
from mvp_ext.timm_compat import import_timm

# Beyond this, stored squares cost memory (150 kB an image) that the models' usual input size cannot use.
LARGEST_DEFAULT_SIZE = 224


class DataError(ValueError):
    """Images or labels that cannot be used; the message names the file and what to do about it."""


def read_digits() -> dict[str, Any]:
    """scikit-learn's handwritten digits."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    # Stored as 0..16.
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return {
        "name": "digits",
        "train_images": _as_rgb(grey, "digits"),
        "train_labels": digits.target,
        "test_images": None,
        "test_labels": None,
        "class_names": tuple(str(digit) for digit in range(10)),
        "flip": False,
    }


def read_cifar100(folder: str) -> dict[str, Any]:
    """torchvision's copy in ``folder``, or in the user's cache ("")."""
    # Makes torchvision importable beside a CPU-only torch.
    import_timm()
    from torchvision.datasets import CIFAR100

    root = Path(folder).expanduser() if folder else Path.home() / ".cache" / "mvp_ext"
    try:
        root.mkdir(parents=True, exist_ok=True)
        splits = {
            split: CIFAR100(str(root), train=split == "train", download=True) for split in ("train", "test")
        }
    # URLError is an OSError; a bad checksum is a RuntimeError.
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"cifar100: no usable copy under {root} and the download failed ({error}). Without network, "
            f"unpack cifar-100-python.tar.gz there, or give an .npz file or an image folder"
        ) from error
    data: dict[str, Any] = {"name": "cifar100", "class_names": tuple(splits["train"].classes)}
    for split, dataset in splits.items():
        data[f"{split}_images"] = np.asarray(dataset.data)
        data[f"{split}_labels"] = np.asarray(dataset.targets)
    return data | _cifar100_superclasses(root / CIFAR100.base_folder)


def _cifar100_superclasses(folder: Path) -> dict[str, Any]:
    """torchvision leaves the superclasses out; they lie in the same files, whose checksums it has just compared."""
    train, meta = (
        pickle.loads((folder / name).read_bytes(), encoding="latin1") for name in ("train", "meta")
    )
    group_of = dict(zip(train["fine_labels"], train["coarse_labels"], strict=True))
    return {
        "superclass_of_class": tuple(group_of[label] for label in range(len(meta["fine_label_names"]))),
        "superclass_names": tuple(meta["coarse_label_names"]),
    }


def existing_paths(source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The existing paths that a source means; a file whose own name has a comma is taken as it is."""
    if isinstance(source, (str, os.PathLike)):
        whole = Path(source).expanduser()
        parts = (
            [whole]
            if whole.exists()
            else [Path(part.strip()).expanduser() for part in str(source).split(",")]
        )
    else:
        parts = [Path(part).expanduser() for part in source]
    for part in parts:
        if not part.exists():
            raise DataError(
                f"load_data: no such data: {str(part)!r}; expected 'digits', 'cifar100', .npz file(s), "
                f"a directory of .npz parts, or an image folder (class/image.png)"
            )
    if not parts:
        raise DataError("load_data: an empty list of files")
    return parts


def read_paths(paths: list[Path], image_size: int | None) -> dict[str, Any]:
    """``.npz`` parts, a directory of them, or an image folder."""
    if len(paths) == 1 and paths[0].is_dir():
        folder = paths[0]
        paths = sorted(folder.glob("*.npz"))
        if not paths:
            return _read_folder(folder, image_size)
        name = folder.resolve().name
    else:
        name = paths[0].stem if len(paths) == 1 else f"{paths[0].stem}+{len(paths) - 1}"
    return {"name": name, **_join_parts([(path, _read_npz(path)) for path in paths])}


_NPZ_KEYS = (
    *("train_images", "train_labels", "test_images", "test_labels"),
    *("class_names", "superclass_of_class", "superclass_names"),
)


def _read_npz(path: Path) -> dict[str, np.ndarray | None]:
    try:
        with np.load(path, allow_pickle=False) as file:
            part = {key: file.get(key) for key in _NPZ_KEYS}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise DataError(f"{path}: not a readable .npz file ({error})") from error
    for key in ("train_images", "train_labels"):
        if part[key] is None:
            raise DataError(f"{path}: has no {key!r}; expected at least train_images and train_labels")
    if (part["test_images"] is None) != (part["test_labels"] is None):
        raise DataError(f"{path}: test_images and test_labels must come together")
    for split in ("train", "test"):
        images, labels = part[f"{split}_images"], part[f"{split}_labels"]
        if images is None or labels is None:
            continue
        part[f"{split}_images"] = _as_rgb(images, f"{path}: {split}_images")
        if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != len(images):
            raise DataError(
                f"{path}: {split}_labels must be {len(images)} integers, "
                f"got {labels.dtype} {list(labels.shape)}"
            )
    return part


def _join_parts(parts: list[tuple[Path, dict[str, Any]]]) -> dict[str, Any]:
    first_path, first = parts[0]
    for path, part in parts[1:]:
        for key in ("class_names", "superclass_of_class", "superclass_names"):
            same = np.array_equal(first[key], part[key]) if first[key] is not None else part[key] is None
            if not same:
                raise DataError(
                    f"{path}: its {key} differ from those of {first_path}; parts share one numbering"
                )
        if (part["test_images"] is None) != (first["test_images"] is None):
            raise DataError(f"{path} and {first_path}: either every part has a test split or none")
        if part["train_images"].shape[1:] != first["train_images"].shape[1:]:
            got, expected = list(part["train_images"].shape[1:]), list(first["train_images"].shape[1:])
            raise DataError(f"{path}: images are {got}, those of {first_path} {expected}")

    def join(key: str) -> np.ndarray | None:
        return None if first[key] is None else np.concatenate([part[key] for _, part in parts])

    data: dict[str, Any] = {key: join(key) for key in _NPZ_KEYS[:4]}
    labels = np.concatenate([data[key] for key in ("train_labels", "test_labels") if data[key] is not None])
    if first["class_names"] is None:
        data["class_names"] = tuple(str(label) for label in range(int(labels.max(initial=-1)) + 1))
    else:
        data["class_names"] = tuple(str(name) for name in first["class_names"])
    if first["superclass_of_class"] is not None:
        groups = tuple(int(group) for group in first["superclass_of_class"])
        names = first["superclass_names"]
        data["superclass_of_class"] = groups
        data["superclass_names"] = tuple(map(str, range(max(groups) + 1) if names is None else names))
    return data


def _read_folder(root: Path, image_size: int | None) -> dict[str, Any]:
    train_root = root / "train"
    has_splits = train_root.is_dir() and any(child.is_dir() for child in train_root.iterdir())
    test_root = next((root / name for name in ("test", "val") if has_splits and (root / name).is_dir()), None)
    class_names, files, labels = _list_folder(train_root if has_splits else root)
    count = len(files)
    if test_root is not None:
        test_names, test_files, test_labels = _list_folder(test_root)
        unknown = [name for name in test_names if name not in class_names]
        if unknown:
            raise DataError(f"{test_root}: class {unknown[0]!r} has no training images")
        files += test_files
        labels += [class_names.index(test_names[label]) for label in test_labels]
    images, targets = _decode(files, image_size), np.asarray(labels)
    return {
        "name": root.resolve().name,
        "train_images": images[:count],
        "train_labels": targets[:count],
        "test_images": images[count:] if test_root is not None else None,
        "test_labels": targets[count:] if test_root is not None else None,
        "class_names": class_names,
    }


class FoundImage(NamedTuple):
    """An image file; ``group`` names the subfolder of the given folder that it is in, None where it is in none."""

    path: Path
    group: str | None = None


def find_images(places: Sequence[str | os.PathLike[str]]) -> list[FoundImage]:
    """The image files that files, folders and patterns name: in the order given, sorted within each, each once.

    Args:
        places: files, taken as they are whatever their names; folders, searched with all their subfolders for names
            with the suffix of an image; patterns as of ``glob``, ``**`` too, of both. Hidden files and folders, and
            what a Mac puts into archives (``__MACOSX``), are passed over.

    Raises:
        DataError: one of them names nothing, or a folder or pattern no image.
    """
    found: dict[Path, FoundImage] = {}
    for given in places:
        place = os.fspath(given)
        path = Path(place).expanduser()
        if path.is_dir():
            images = list(_images_in(path))
        elif path.exists():
            images = [FoundImage(path)]
        else:
            matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
            if not matches:
                raise DataError(f"find_images: no such file or folder, nor a match of a pattern: {place!r}")
            images = []
            for match in matches:
                images += _images_in(match) if match.is_dir() else [FoundImage(match)] * _is_image(match)
        if not images:
            raise DataError(f"find_images: no image in {place!r}; known by suffixes like .png, .jpg, .webp")
        for image in images:
            found.setdefault(image.path, image)
    return list(found.values())


def _images_in(root: Path) -> Iterator[FoundImage]:
    def fail(error: OSError) -> None:
        raise error

    # Links to folders are followed, but no folder is read twice: a link may lead back.
    read: set[str] = set()
    for folder, inner, names in os.walk(root, onerror=fail, followlinks=True):
        real = os.path.realpath(folder)
        inner[:] = (
            [] if real in read else sorted(n for n in inner if not n.startswith(".") and n != "__MACOSX")
        )
        parts = Path(folder).relative_to(root).parts
        if real not in read:
            images = (Path(folder, name) for name in sorted(names))
            yield from (FoundImage(path, parts[0] if parts else None) for path in images if _is_image(path))
        read.add(real)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _image_suffixes() and not path.name.startswith(".")


@functools.cache
def _image_suffixes() -> frozenset[str]:
    """Of what Pillow reads, in lower case, with their dots."""
    from PIL import Image

    return frozenset(s for s, form in Image.registered_extensions().items() if form in Image.OPEN)


def _list_folder(root: Path) -> tuple[tuple[str, ...], list[Path], list[int]]:
    """Class names, image files and their labels of a ``class/image`` tree, in sorted, repeatable order."""
    known = _image_suffixes()
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise DataError(f"{root}: no class folders; expected {root}/<class>/<image>, or .npz files")
    files: list[Path] = []
    labels: list[int] = []
    others: list[Path] = []
    for label, name in enumerate(names):
        found = sorted(p for p in (root / name).rglob("*") if p.is_file() and not p.name.startswith("."))
        images = [path for path in found if path.suffix.lower() in known]
        others += [path for path in found if path.suffix.lower() not in known]
        if not images:
            raise DataError(f"{root / name}: a class folder without images")
        files += images
        labels += [label] * len(images)
    if others:
        warnings.warn(
            f"{root}: {len(others)} file(s) are no images and were left out, e.g. {others[0]}", stacklevel=2
        )
    return tuple(names), files, labels


def _decode(files: list[Path], image_size: int | None) -> np.ndarray:
    """Decode to uint8 [n, S, S, 3]; DataError names every file that does not decode."""
    from PIL import Image

    # Pillow's decoders raise almost anything on damaged bytes.
    bad: dict[Path, str] = {}

    def shorter_side(path: Path) -> int:
        try:
            with Image.open(path) as image:
                return min(image.size)
        except Exception as error:
            bad[path] = str(error) or type(error).__name__
            return 0

    def square(path: Path) -> np.ndarray | None:
        try:
            with Image.open(path) as image:
                return square_rgb(image, size)
        except Exception as error:
            bad[path] = str(error) or type(error).__name__
            return None

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        if image_size is not None:
            size = image_size
        else:
            sides = [side for side in pool.map(shorter_side, files) if side > 0]
            size = min(int(np.median(sides)) if sides else 1, LARGEST_DEFAULT_SIZE)
        images = np.empty((len(files), size, size, 3), np.uint8)
        for row, decoded in zip(images, pool.map(square, files), strict=True):
            if decoded is not None:
                row[:] = decoded
    if bad:
        listed = "; ".join(f"{path}: {reason}" for path, reason in sorted(bad.items())[:10])
        more = f"; and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise DataError(
            f"{len(bad)} of {len(files)} image(s) do not decode, nothing was loaded: {listed}{more}"
        )
    return images


def _as_rgb(images: np.ndarray, what: str) -> np.ndarray:
    """uint8 [n, H, W], [n, H, W, 1] or [n, H, W, 3] → uint8 [n, H, W, 3]."""
    if images.dtype != np.uint8:
        raise DataError(f"{what}: expected uint8 pixels in 0..255, got {images.dtype}")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        raise DataError(f"{what}: expected [n, H, W], [n, H, W, 1] or [n, H, W, 3], got {list(images.shape)}")
    return np.repeat(images, 3, axis=3) if images.shape[3] == 1 else images
