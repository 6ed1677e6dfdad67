"""What a user's words name: data sets, and image files.

Each reader returns the fields of ``ImageData`` as NumPy arrays; images may also be a list of files, which are not
decoded yet, beside ``folder``, the one they are in. ``test_images`` and ``test_labels`` are None where the source has
no test split.
"""

from __future__ import annotations

import glob
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mvp_ext.data.errors import DataError, LeftOut
from mvp_ext.data.folders import images_below, is_image, list_images, split_folders, visible_folders
from mvp_ext.data.npz import as_rgb, read_npz
from mvp_ext.timm_compat import import_timm


def read_digits() -> dict[str, Any]:
    """scikit-learn's handwritten digits."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    # Stored as 0..16.
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return {
        "name": "digits",
        "train_images": as_rgb(grey, "digits"),
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
        # Path.exists raises where many names joined are longer than one may be.
        parts = (
            [whole]
            if os.path.exists(whole)
            else [Path(part.strip()).expanduser() for part in str(source).split(",")]
        )
    else:
        parts = [Path(part).expanduser() for part in source]
    several = "; data sets are joined by load_joined, or by --data for each" if len(parts) > 1 else ""
    for part in parts:
        if not os.path.exists(part):
            raise DataError(
                f"load_data: no such data: {str(part)!r}; expected 'digits', 'cifar100', .npz file(s), "
                f"a directory of .npz parts, or an image folder (class/image.png){several}"
            )
        if several and part.is_dir():
            raise DataError(
                f"load_data: several parts must be .npz files, got the folder {str(part)!r}{several}"
            )
    if not parts:
        raise DataError("load_data: an empty list of files")
    return parts


def read_paths(paths: list[Path], left_out: LeftOut) -> dict[str, Any]:
    """``.npz`` parts, a directory of them, or an image folder: that one's images are lists of files."""
    if len(paths) == 1 and paths[0].is_dir():
        folder = paths[0]
        name = folder.resolve().name
        paths = sorted(p for p in folder.iterdir() if p.suffix.lower() == ".npz" and p.name[0] != ".")
        if not paths:
            return {"name": name, "folder": folder, **list_images(folder, left_out)._asdict()}
        left_out.add_all("folder(s) beside .npz files", visible_folders(folder))
    else:
        name = paths[0].stem if len(paths) == 1 else f"{paths[0].stem}+{len(paths) - 1}"
    return {"name": name, **read_npz(paths, left_out)}


class FoundImage(NamedTuple):
    """An image file; ``group`` names the subfolder of the given folder that it is in, None where it is in none.

    Of ``train/class/image`` (or another split's name in ``train``'s place) that is the class.
    """

    path: Path
    group: str | None = None


def find_images(places: Sequence[str | os.PathLike[str]]) -> list[FoundImage]:
    """The image files that files, folders and patterns name: in the order given, sorted within each, each once.

    Args:
        places: files, taken as they are whatever their names; folders, searched with all their subfolders for names
            with the suffix of an image; patterns as of ``glob``, ``**`` too, of both. Hidden files and folders, and
            those of systems (``__MACOSX``, ``Thumbs.db``), are passed over.

    Raises:
        DataError: one of them names nothing, or a folder or pattern no image.
    """
    found: dict[Path, FoundImage] = {}
    for given in places:
        place = os.fspath(given)
        path = Path(place).expanduser()
        if path.is_dir():
            images = _images_in(path)
        elif path.exists():
            images = [FoundImage(path)]
        else:
            matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
            if not matches:
                raise DataError(f"find_images: no such file or folder, nor a match of a pattern: {place!r}")
            images = []
            for match in matches:
                images += _images_in(match) if match.is_dir() else [FoundImage(match)] * is_image(match.name)
        if not images:
            raise DataError(f"find_images: no image in {place!r}; known by suffixes like .png, .jpg, .webp")
        for image in images:
            found.setdefault(image.path, image)
    return list(found.values())


def _images_in(root: Path) -> list[FoundImage]:
    # Below train/ and its like the classes are, as for load_data.
    splits = split_folders(root)
    found = []
    for path in images_below(root):
        folders = path.relative_to(root).parts[:-1]
        if folders and folders[0] in splits:
            folders = folders[1:]
        found.append(FoundImage(path, folders[0] if folders else None))
    return found
