"""Reading ``.npz`` files: arrays of images with their labels, in one part or several."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mvp_ext.data.errors import DataError, LeftOut

_META = ("class_names", "superclass_of_class", "superclass_names")
# In the order in which they serve as what is measured on.
_MEASURED = ("test", "val", "valid", "validation")


def read_npz(paths: list[Path], left_out: LeftOut) -> dict[str, Any]:
    """The fields of ``ImageData`` but the name, of parts that share one numbering of classes.

    Raises:
        DataError: a file is no ``.npz``, lacks what it must have, has an array of another kind, or does not fit the
            others.
    """
    parts = [_read_part(path, left_out) for path in paths]
    _check_together(paths, parts)
    names, groups, group_names = (parts[0][key] for key in _META)
    data: dict[str, Any] = {
        f"{split}_{what}": _joined([part.pop(f"{split}_{what}") for part in parts])
        for split in ("train", "test")
        for what in ("images", "labels")
    }
    if names is not None:
        data["class_names"] = _texts(names)
    elif groups is not None:
        data["class_names"] = tuple(map(str, range(len(groups))))
    else:
        # As many classes as there are, however large their numbers.
        given = {key: data[key] for key in ("train_labels", "test_labels") if data[key] is not None}
        numbers, labels = np.unique(np.concatenate(list(given.values())), return_inverse=True)
        data["class_names"] = tuple(map(str, numbers.tolist()))
        data |= zip(given, np.split(labels, [len(given["train_labels"])]), strict=False)
    if groups is not None:
        if group_names is None:
            group_names, groups = np.unique(groups, return_inverse=True)
        data["superclass_of_class"] = tuple(groups.tolist())
        data["superclass_names"] = _texts(group_names)
    return data


def as_rgb(images: np.ndarray, what: str) -> np.ndarray:
    """uint8 [n, H, W], [n, H, W, 1] or [n, H, W, 3] → uint8 [n, H, W, 3]."""
    if images.dtype != np.uint8:
        remedy = (
            "(255 * images).round().astype('uint8') of floats in 0..1, images.astype('uint8') of integers"
        )
        raise DataError(f"{what}: expected uint8 pixels in 0..255, got {images.dtype}; store {remedy}")
    shape = list(images.shape)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        remedy = ""
        if images.ndim == 4 and images.shape[1] in (1, 3):
            remedy = "; channels come last: images.transpose(0, 2, 3, 1)"
        raise DataError(f"{what}: expected [n, H, W], [n, H, W, 1] or [n, H, W, 3], got {shape}{remedy}")
    return np.repeat(images, 3, axis=3) if images.shape[3] == 1 else images


def _read_part(path: Path, left_out: LeftOut) -> dict[str, Any]:
    # A pipe would be waited for, a device read without end.
    if not path.is_file() or not zipfile.is_zipfile(path):
        raise DataError(f"{path}: not a readable .npz file (cut off, or of another kind)")
    try:
        with np.load(path, allow_pickle=False) as file:
            if "train_images" not in file.files or "train_labels" not in file.files:
                missing = next(key for key in ("train_images", "train_labels") if key not in file.files)
                has = ", ".join(file.files[:5]) + (", …" if len(file.files) > 5 else "")
                raise DataError(
                    f"{path}: has no {missing!r}; expected at least train_images and train_labels, got "
                    f"{has or 'nothing'} (unpack an archive of image files, and give the folder)"
                )
            found = {name: {f"{name}_images", f"{name}_labels"} & set(file.files) for name in _MEASURED}
            halves = [name for name, keys in found.items() if len(keys) == 1]
            measured = [name for name, keys in found.items() if len(keys) == 2]
            if measured:
                left_out.add_all("array(s) of images without labels, or the reverse", halves)
            else:
                measured = halves
            part = {key: _array(file, key) for key in _META}
            for split, name in (("train", "train"), ("test", measured[0] if measured else "test")):
                for what in ("images", "labels"):
                    part[f"{split}_{what}"] = _array(file, f"{name}_{what}")
                _check_split(part, split, f"{path}: {name}")
            for name in measured[1:]:
                # Their labels alone: the images may be many.
                count = len(np.atleast_1d(file[f"{name}_labels"]))
                left_out.add(f"{name} image(s), for {measured[0]} images are measured on", path, count)
    except DataError:
        raise
    # zlib, zipfile and NumPy raise almost anything on damaged bytes.
    except Exception as error:
        raise DataError(f"{path}: not a readable .npz file ({error or type(error).__name__})") from error
    for key in _META:
        _check_meta(part[key], f"{path}: {key}", numbers=key == "superclass_of_class")
    return part


def _array(file: Mapping[str, Any], key: str) -> np.ndarray | None:
    array = file.get(key)
    if array is not None and not isinstance(array, np.ndarray):
        raise ValueError(f"{key} is no array")
    return array


def _check_split(part: dict[str, Any], split: str, what: str) -> None:
    """Check a split's images and labels, and put them into one form: uint8 [n, H, W, 3] and int64 [n]."""
    images, labels = part[f"{split}_images"], part[f"{split}_labels"]
    if (images is None) != (labels is None):
        name = what.split()[-1]
        raise DataError(f"{what}_images and {name}_labels must come together")
    if images is None:
        return
    part[f"{split}_images"] = images = as_rgb(images, f"{what}_images")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != len(images):
        remedy = "; one class number an image: labels.argmax(1) of one-hot rows" if labels.ndim == 2 else ""
        raise DataError(
            f"{what}_labels must be {len(images)} integers, got {labels.dtype} {list(labels.shape)}{remedy}"
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < 2**63:
        raise DataError(f"{what}_labels must be class numbers from 0, got {labels.min()} to {labels.max()}")
    part[f"{split}_labels"] = labels.astype(np.int64)


def _check_meta(array: np.ndarray | None, what: str, numbers: bool) -> None:
    kinds = "iu" if numbers else "USiu"
    if array is not None and (array.ndim != 1 or array.dtype.kind not in kinds):
        wanted = "integers" if numbers else "texts"
        raise DataError(f"{what} must be a row of {wanted}, got {array.dtype} {list(array.shape)}")


def _check_together(paths: list[Path], parts: list[dict[str, Any]]) -> None:
    first = parts[0]
    for path, part in zip(paths[1:], parts[1:], strict=True):
        for key in _META:
            same = np.array_equal(first[key], part[key]) if first[key] is not None else part[key] is None
            if not same:
                raise DataError(
                    f"{path}: its {key} differ from those of {paths[0]}; parts share one numbering"
                )
        if (part["test_images"] is None) != (first["test_images"] is None):
            raise DataError(f"{path} and {paths[0]}: either every part has a test split or none")
        for key in ("train_images", "test_images"):
            if part[key] is not None and part[key].shape[1:] != first[key].shape[1:]:
                got, expected = list(part[key].shape[1:]), list(first[key].shape[1:])
                raise DataError(f"{path}: images are {got}, those of {paths[0]} {expected}")


def _joined(pieces: list[np.ndarray | None]) -> np.ndarray | None:
    """The pieces as one array; each is given up once it is copied, so that not all are in memory twice."""
    arrays = [piece for piece in pieces if piece is not None]
    if len(arrays) < 2:
        return pieces[0]
    whole = np.empty((sum(map(len, arrays)), *arrays[0].shape[1:]), arrays[0].dtype)
    pieces.clear()
    end = len(whole)
    while arrays:
        piece = arrays.pop()
        whole[end - len(piece) : end] = piece
        end -= len(piece)
    return whole


def _texts(array: np.ndarray) -> tuple[str, ...]:
    return tuple(
        text.decode(errors="replace") if isinstance(text, bytes) else str(text) for text in array.tolist()
    )
