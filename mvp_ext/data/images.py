"""Images with labels, from wherever a user keeps them, as uint8 tensors.

One representation leaves this module: ``ImageData``, RGB bytes [n, H, W, 3] (a quarter of the memory of
floats, and what augmentation works on fastest). Everything later (tasks, batches) only slices it. Where the images are
too many for the memory they are ``StoredImages``, which stay in a file (``cache.py``).
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvp_ext.data.cache import FolderCache, Progress
from mvp_ext.data.decoding import check_decoded, decode_images, default_size
from mvp_ext.data.errors import DataError, LeftOut
from mvp_ext.data.sources import existing_paths, read_cifar100, read_digits, read_paths
from mvp_ext.data.stored import Images, Part, StoredImages
from mvp_ext.model.preprocessing import resize

__all__ = ["DataError", "ImageData", "content_hash", "load_data", "load_joined", "members_of", "number_of"]

# Images that are copied or resized at once.
_CHUNK = 512
# Image folders whose pixels take more bytes are kept in a file, unless the caller says otherwise.
CACHED_ABOVE = 1 << 30

# As of ``load_data``.
Cache = bool | str | os.PathLike[str] | None


@dataclass(frozen=True, eq=False)
class ImageData:
    """A labelled data set.

    Attributes:
        name: short name for tables ("digits", a file or folder name).
        train_images: uint8 [n, H, W, 3], RGB, 0..255, contiguous; ``StoredImages`` where they stay in a file.
        train_labels: int64 [n], each in [0, len(class_names)).
        test_images: the same for the test split.
        test_labels: likewise.
        class_names: one a class, all different. A class may have no images (only some parts are loaded).
        flip: whether a mirror image shows the same class, so that augmentation may flip.
        superclass_of_class: group of every class, or None where the source knows no groups.
        superclass_names: names of the groups, or None.
        domains: the classes of each data set that was joined, or None. See ``load_joined``.
    """

    name: str
    train_images: Images
    train_labels: Tensor
    test_images: Images
    test_labels: Tensor
    class_names: tuple[str, ...]
    flip: bool = True
    superclass_of_class: tuple[int, ...] | None = None
    superclass_names: tuple[str, ...] | None = None
    domains: tuple[range, ...] | None = None

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            _check_split(self.name, split, *self.split(split), classes=len(self.class_names))
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            train, test = (list(x.shape[1:]) for x in (self.train_images, self.test_images))
            raise DataError(f"{self.name}: train images are {train}, test images {test}; expected one shape")
        if len(self.number_of_class) < len(self.class_names):
            repeated = min(name for name, count in Counter(self.class_names).items() if count > 1)
            raise DataError(f"{self.name}: class names must differ, got more than one {repeated!r}")
        groups = self.superclass_of_class
        if groups is not None:
            known = len(self.superclass_names or ())
            if len(groups) != len(self.class_names) or not all(0 <= group < known for group in groups):
                raise DataError(
                    f"{self.name}: superclass_of_class must give each of {len(self.class_names)} classes "
                    f"one of {known} superclasses, got {len(groups)} values in {sorted(set(groups))}"
                )

    def split(self, which: str) -> tuple[Images, Tensor]:
        """The images and labels of ``"train"`` or ``"test"``."""
        return getattr(self, f"{which}_images"), getattr(self, f"{which}_labels")

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the stored images."""
        return self.train_images.shape[1], self.train_images.shape[2]

    @cached_property
    def classes(self) -> tuple[int, ...]:
        """The classes that have both training and test images, ascending: those a task can be made of."""
        train, test = (
            torch.bincount(self.split(s)[1], minlength=len(self.class_names)) for s in ("train", "test")
        )
        return tuple(torch.nonzero((train > 0) & (test > 0)).flatten().tolist())

    @cached_property
    def usable(self) -> frozenset[int]:
        """``classes``, to look one up."""
        return frozenset(self.classes)

    @cached_property
    def number_of_class(self) -> Mapping[str, int]:
        """The number of each class name."""
        return {name: number for number, name in enumerate(self.class_names)}

    def numbers_of(self, class_names: Iterable[str]) -> tuple[int, ...]:
        """The number of each of these classes; ValueError names an unknown one and the nearest known."""
        return tuple(number_of("class", name, self.number_of_class, self.name) for name in class_names)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of every image, label and class name: equal exactly where the data are equal."""
        return content_hash(
            [self.train_images, self.train_labels, self.test_images, self.test_labels], self.class_names
        )


def number_of(kind: str, name: str, known: Mapping[str, int], where: str) -> int:
    """The number of ``name``, or a ValueError that suggests which known name may have been meant."""
    if name in known:
        return known[name]
    # Of a name with a comma that was taken for several.
    near = [each for each in known if "," in each and name in map(str.strip, each.split(","))][:3]
    near = near or difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {', '.join(map(repr, near))}?" if near else f"known: {', '.join(list(known)[:20])}"
    raise ValueError(f"unknown {kind} {name!r} in {where!r}; {hint}")


def content_hash(tensors: Iterable[Images], names: Iterable[str]) -> str:
    """SHA-256 (hex) of tensors (shape, dtype, bytes) and names, in order; the same wherever images lie."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(repr(name).encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        for piece in tensor.split(_CHUNK // 8) if isinstance(tensor, StoredImages) else (tensor,):
            # NumPy has no bfloat16.
            digest.update(piece.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_data(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    image_size: int | None = None,
    test_share: float = 0.2,
    seed: int = 0,
    flip: bool | None = None,
    cache: Cache = None,
    progress: Progress | None = None,
) -> ImageData:
    """Load a labelled image data set. What of it is left out is told in one warning, with counts and reasons.

    Args:
        source: one of
            ``"digits"``: scikit-learn's 1,797 handwritten digits, 8×8, nothing to download;
            an ``.npz`` file, several (a list, or joined by commas), or a directory of ``.npz`` parts that
            share one label numbering: ``train_images`` uint8 [n, H, W(, 1 or 3)], ``train_labels`` int [n] or [n, 1],
            and optionally the same of ``test`` or ``val`` (MedMNIST's files, say), ``class_names``,
            ``superclass_of_class``, ``superclass_names``;
            an image folder ``class/image.png`` (anything Pillow reads), or ``train/class/image.png`` with
            ``test/`` or ``val/`` beside it (also ``training``, ``testing``, ``valid``, ``validation``, in any case).
            Where there are both, ``test`` is measured on and ``val`` left out;
            ``"cifar100"``: through torchvision, which downloads it to the user's cache;
            ``"cifar100:FOLDER"`` keeps it in FOLDER, where a copy is used without network.
        image_size: side of the stored squares in pixels (shorter side resized, centre cropped). Default: as
            stored; for folders, the median shorter side, at most 224.
        test_share: share of each class that becomes its test images where the source has no test split.
        seed: of that split.
        flip: whether mirroring keeps the class. Default: False for digits, otherwise True.
        cache: whether the pixels of an image folder are kept in a file (in ``FOLDER.mvp_cache`` beside it, or in the
            user's cache where that cannot be written; a path: there), from which batches are read: nothing is decoded
            twice, and no more than a batch is in memory. Default: where they take more than 1 GiB. What is computed of
            the images is the same. ``clear_cache`` removes the file.
        progress: called with (images decoded, images to decode in all) after each image of a folder.

    Raises:
        DataError: unknown source, files that do not decode (each is named; nothing is half-loaded),
            parts that do not fit together, a class with too few images to split, a class with test images alone, no
            place for the cache.
    """
    raw = _read(source, image_size, test_share, seed)
    if isinstance(raw["train_images"], list):
        return _gathered([raw], image_size, flip, cache, progress)
    for key in ("train_images", "test_images"):
        raw[key] = _to_squares(torch.from_numpy(np.ascontiguousarray(raw[key])), image_size)
    for key in ("train_labels", "test_labels"):
        raw[key] = torch.from_numpy(raw[key].astype(np.int64))
    if flip is not None:
        raw["flip"] = flip
    return ImageData(**raw)


def load_joined(
    sources: Sequence[str | os.PathLike[str] | Sequence[str | os.PathLike[str]]],
    *,
    image_size: int | None = None,
    test_share: float = 0.2,
    seed: int = 0,
    flip: bool | None = None,
    cache: Cache = None,
    progress: Progress | None = None,
) -> ImageData:
    """Load several data sets as one. Of one alone: as ``load_data``.

    Classes are named ``data set/class`` (``photos/cat``), superclasses likewise; a data set without superclasses is
    one. The second data set of a name is called ``name-2``, and so on. ``domains`` tells which classes are whose;
    ``sample_tasks`` draws each task from one of them, in turn.

    Args:
        sources: at least one, each as ``load_data`` takes it.
        image_size: side of all stored squares. Default: the largest that ``load_data`` would store one of them with.
        test_share: as of ``load_data``, of each data set that has no test split.
        seed: of these splits.
        flip: whether mirroring keeps the class. Default: whether it does in all of them.
        cache: as of ``load_data``, a file for each image folder. Default: where all pixels take more than 1 GiB.
        progress: as of ``load_data``, of all image folders together.

    Raises:
        DataError: as ``load_data``; no source, or one that is given twice. TypeError: one that is in no list.
    """
    if isinstance(sources, (str, os.PathLike)):
        raise TypeError(f"load_joined: sources: expected a list of data sets, got {os.fspath(sources)!r}")
    if not sources:
        raise DataError("load_joined: expected at least one data set, got none")
    if len(sources) == 1:
        return load_data(
            sources[0],
            image_size=image_size,
            test_share=test_share,
            seed=seed,
            flip=flip,
            cache=cache,
            progress=progress,
        )
    places = [_place(source) for source in sources]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise DataError(f"load_joined: {place!r} is given twice")
    raws = [_read(source, image_size, test_share, seed) for source in sources]
    return _gathered(raws, image_size, flip, cache, progress)


def _place(source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> str:
    if isinstance(source, (str, os.PathLike)):
        path = os.path.expanduser(source)
        return os.path.realpath(path) if os.path.exists(path) else os.fspath(source)
    return ", ".join(map(_place, source))


def _read(source: Any, image_size: int | None, test_share: float, seed: int) -> dict[str, Any]:
    """What a reader gives, with a test split; images in files are not decoded yet."""
    if image_size is not None and image_size < 1:
        raise DataError(f"load_data: image_size must be at least 1, got {image_size}")
    if not 0 < test_share < 1:
        raise DataError(f"load_data: test_share must be in (0, 1), got {test_share}")

    if source == "digits":
        raw = read_digits()
    elif isinstance(source, str) and source.partition(":")[0] == "cifar100" and not os.path.exists(source):
        raw = read_cifar100(source.partition(":")[2])
    else:
        paths = existing_paths(source)
        left_out = LeftOut(", ".join(map(str, paths)))
        raw = read_paths(paths, left_out)
        left_out.tell()
    if raw["test_images"] is None:
        labels = raw["train_labels"]
        test = _stratified(labels, test_share, seed, raw["class_names"], raw["name"])
        raw["train_images"], raw["test_images"] = _parted(raw["train_images"], test)
        raw["train_labels"], raw["test_labels"] = labels[~test], labels[test]
    return raw


def _gathered(
    raws: list[dict[str, Any]],
    size: int | None,
    flip: bool | None,
    cache: Cache,
    progress: Progress | None,
) -> ImageData:
    """Data sets as one, the images of files decoded."""
    where = None if cache is None or isinstance(cache, bool) else cache
    folders = [
        FolderCache(raw["folder"], raw["train_images"] + raw["test_images"], where)
        if "folder" in raw and cache is not False
        else None
        for raw in raws
    ]
    sides: list[int | None] = [None] * len(raws)
    if size is None:
        sides = list(map(_side, raws, folders))
    size = size or max(side for side in sides if side is not None)
    ends = np.cumsum([len(raw[f"{split}_labels"]) for split in ("train", "test") for raw in raws]).tolist()
    large = int(ends[-1]) * size * size * 3 > CACHED_ABOVE
    train: Images
    test: Images
    if any(folders) and (large if cache is None else cache is not False):
        train, test = _stored(raws, size, folders, sides, progress)
    else:
        train, test = _in_memory(raws, size, ends, progress)
    counts = [len(raw["class_names"]) for raw in raws]
    first_class = np.cumsum([0, *counts[:-1]]).tolist()
    labels = [
        raw[f"{split}_labels"].astype(np.int64) + first
        for split in ("train", "test")
        for raw, first in zip(raws, first_class, strict=True)
    ]
    every = torch.from_numpy(np.concatenate(labels))
    return ImageData(
        train_images=train,
        train_labels=every[: len(train)],
        test_images=test,
        test_labels=every[len(train) :],
        flip=all(raw.get("flip", True) for raw in raws) if flip is None else flip,
        **_named(raws),
    )


def _in_memory(
    raws: list[dict[str, Any]], size: int, ends: list[int], progress: Progress | None
) -> tuple[Tensor, Tensor]:
    """Training and test images: the pixels of all in one array, so that they are in memory once."""
    splits = [(raw, split) for split in ("train", "test") for raw in raws]
    pixels = np.empty((ends[-1], size, size, 3), np.uint8)
    files: list[Path] = []
    rows: list[np.ndarray] = []
    for (raw, split), start, end in zip(splits, [0, *ends], ends, strict=False):
        images = raw.pop(f"{split}_images")
        if isinstance(images, list):
            files += images
            rows.append(np.arange(start, end))
            continue
        for first in range(0, len(images), _CHUNK):
            chunk = torch.from_numpy(np.ascontiguousarray(images[first : first + _CHUNK]))
            pixels[start + first : start + first + len(chunk)] = _to_squares(chunk, size).numpy()
    if files:
        told = None if progress is None else lambda done: progress(done, len(files))
        check_decoded(decode_images(files, pixels, np.concatenate(rows), told), len(files))
    middle = ends[len(raws) - 1]
    return torch.from_numpy(pixels[:middle]), torch.from_numpy(pixels[middle:])


def _stored(
    raws: list[dict[str, Any]],
    size: int,
    folders: list[FolderCache | None],
    sides: list[int | None],
    progress: Progress | None,
) -> tuple[StoredImages, StoredImages]:
    """Training and test images: those of folders in their caches, others in memory."""
    parts: list[Part] = []
    rows: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    start, done, total = 0, 0, sum(len(folder.files) for folder in folders if folder)

    def told(count: int, of: int) -> None:
        if progress is not None:
            progress(done + count, total)

    for raw, folder, side in zip(raws, folders, sides, strict=True):
        if folder is not None:
            parts.append(folder.pixels(size, side, told))
            done += len(folder.files)
        for split in ("train", "test"):
            images = raw.pop(f"{split}_images")
            if folder is not None:
                rows[split].append(start + folder.rows(images))
                continue
            squares = _to_squares(torch.from_numpy(np.ascontiguousarray(images)), size)
            rows[split].append(start + np.arange(len(squares)))
            parts.append(Part(squares.numpy()))
            start += len(squares)
        start += len(folder.files) if folder is not None else 0
    train, test = (
        StoredImages(parts, torch.from_numpy(np.concatenate(rows[split]))) for split in ("train", "test")
    )
    return train, test


def _named(raws: list[dict[str, Any]]) -> dict[str, Any]:
    """The name of the whole, of its classes and of its superclasses."""
    if len(raws) == 1:
        keys = ("name", "class_names", "superclass_of_class", "superclass_names")
        return {key: raws[0][key] for key in keys if key in raws[0]}
    names: list[str] = []
    for raw in raws:
        numbered = (f"{raw['name']}-{number}" if number > 1 else raw["name"] for number in itertools.count(1))
        names.append(next(name for name in numbered if name not in names))
    class_names: list[str] = []
    groups: list[int] = []
    group_names: list[str] = []
    domains: list[range] = []
    for name, raw in zip(names, raws, strict=True):
        own = raw["class_names"]
        domains.append(range(len(class_names), len(class_names) + len(own)))
        class_names += (f"{name}/{each}" for each in own)
        groups += (len(group_names) + group for group in raw.get("superclass_of_class", [0] * len(own)))
        group_names += (
            (f"{name}/{each}" for each in raw["superclass_names"]) if "superclass_names" in raw else [name]
        )
    return {
        "name": "+".join(names),
        "class_names": tuple(class_names),
        "superclass_of_class": tuple(groups),
        "superclass_names": tuple(group_names),
        "domains": tuple(domains),
    }


def _side(raw: dict[str, Any], folder: FolderCache | None) -> int:
    """Of the squares that ``load_data`` stores by default, in pixels."""
    images = raw["train_images"]
    if not isinstance(images, list):
        return min(images.shape[1:3])
    return (folder and folder.known_side()) or default_size(images + raw["test_images"])


def _to_squares(images: Tensor, size: int | None) -> Tensor:
    """Centre crop uint8 [n, H, W, 3] to squares and resize them to ``size`` (None: as they are)."""
    height, width = images.shape[1:3]
    side = min(height, width)
    if height != width:
        top, left = (height - side) // 2, (width - side) // 2
        images = images[:, top : top + side, left : left + side]
    return images.contiguous() if size is None else resize(images, size)


def _stratified(labels: np.ndarray, share: float, seed: int, names: Sequence[str], what: str) -> np.ndarray:
    """bool [n], True for test: ``share`` of every class, at least one image each way."""
    generator = torch.Generator().manual_seed(seed)
    test = np.zeros(len(labels), bool)
    for label, members in members_of(labels):
        if len(members) < 2:
            raise DataError(
                f"{what}: class {names[label]!r} has one image; a train/test split needs at least 2"
            )
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        test[members[torch.randperm(len(members), generator=generator)[:count].numpy()]] = True
    return test


def members_of(labels: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Of each label in int [n], ascending: the label and its places, ascending. One sort, however many labels."""
    if not len(labels):
        return
    order = np.argsort(labels, kind="stable")
    found, starts = np.unique(labels[order], return_index=True)
    yield from zip(found.tolist(), np.split(order, starts[1:]), strict=True)


def _parted(images: Any, test: np.ndarray) -> tuple[Any, Any]:
    """(those that are not for ``test``, those that are). Of an array the first are moved together within it: a copy
    would need its memory again."""
    if isinstance(images, list):
        marked = list(zip(images, test.tolist(), strict=True))
        return [file for file, held in marked if not held], [file for file, held in marked if held]
    held, kept = images[test], np.flatnonzero(~test)
    for start in range(0, len(kept), _CHUNK):
        chunk = images[kept[start : start + _CHUNK]]
        images[start : start + len(chunk)] = chunk
    return images[: len(kept)], held


def _check_split(name: str, split: str, images: Images, labels: Tensor, *, classes: int) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise DataError(
            f"{name}: {split}_images must be uint8 [n, H, W, 3], got {images.dtype} {list(images.shape)}"
        )
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise DataError(
            f"{name}: {split}_labels must be int64 [{len(images)}], got {labels.dtype} {list(labels.shape)}"
        )
    if not len(images) or 0 in images.shape:
        raise DataError(f"{name}: {split}_images is empty, got {list(images.shape)}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise DataError(f"{name}: {split}_labels must be in [0, {classes}), got values in [{low}, {high}]")
