"""Images with labels, from wherever a user keeps them, as uint8 tensors.

One representation leaves this module: ``ImageData``, RGB bytes [n, H, W, 3] (a quarter of the memory of
floats, and what augmentation works on fastest). Everything later (tasks, batches) only slices it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mvp_ext.data.sources import DataError, existing_paths, read_cifar100, read_digits, read_paths
from mvp_ext.model.preprocessing import resize

__all__ = ["DataError", "ImageData", "content_hash", "load_data"]


@dataclass(frozen=True, eq=False)
class ImageData:
    """A labelled data set, held in memory.

    Attributes:
        name: short name for tables ("digits", a file or folder name).
        train_images: uint8 [n, H, W, 3], RGB, 0..255, contiguous.
        train_labels: int64 [n], each in [0, len(class_names)).
        test_images: the same for the test split.
        test_labels: likewise.
        class_names: one a class, all different. A class may have no images (only some parts are loaded).
        flip: whether a mirror image shows the same class, so that augmentation may flip.
        superclass_of_class: group of every class, or None where the source knows no groups.
        superclass_names: names of the groups, or None.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]
    flip: bool = True
    superclass_of_class: tuple[int, ...] | None = None
    superclass_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            _check_split(self.name, split, *self.split(split), classes=len(self.class_names))
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            train, test = (list(x.shape[1:]) for x in (self.train_images, self.test_images))
            raise DataError(f"{self.name}: train images are {train}, test images {test}; expected one shape")
        repeated = sorted({name for name in self.class_names if self.class_names.count(name) > 1})
        if repeated:
            raise DataError(f"{self.name}: class names must differ, got more than one {repeated[0]!r}")
        groups = self.superclass_of_class
        if groups is not None:
            known = len(self.superclass_names or ())
            if len(groups) != len(self.class_names) or not all(0 <= group < known for group in groups):
                raise DataError(
                    f"{self.name}: superclass_of_class must give each of {len(self.class_names)} classes "
                    f"one of {known} superclasses, got {len(groups)} values in {sorted(set(groups))}"
                )

    def split(self, which: str) -> tuple[Tensor, Tensor]:
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
    def fingerprint(self) -> str:
        """SHA-256 (hex) of every image, label and class name: equal exactly where the data are equal."""
        return content_hash(
            [self.train_images, self.train_labels, self.test_images, self.test_labels], self.class_names
        )


def content_hash(tensors: Iterable[Tensor], names: Iterable[str]) -> str:
    """SHA-256 (hex) of tensors (shape, dtype, bytes) and names, in order."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(repr(name).encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        # NumPy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_data(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    image_size: int | None = None,
    test_share: float = 0.2,
    seed: int = 0,
    flip: bool | None = None,
) -> ImageData:
    """Load a labelled image data set.

    Args:
        source: one of
            ``"digits"``: scikit-learn's 1,797 handwritten digits, 8×8, nothing to download;
            an ``.npz`` file, several (a list, or joined by commas), or a directory of ``.npz`` parts that
            share one label numbering: ``train_images`` uint8 [n, H, W(, 1 or 3)], ``train_labels`` int [n],
            and optionally ``test_images``, ``test_labels``, ``class_names``, ``superclass_of_class``,
            ``superclass_names``;
            an image folder ``class/image.png`` (anything Pillow reads), or ``train/class/image.png`` with
            ``test/`` or ``val/`` beside it;
            ``"cifar100"``: through torchvision, which downloads it to the user's cache;
            ``"cifar100:FOLDER"`` keeps it in FOLDER, where a copy is used without network.
        image_size: side of the stored squares in pixels (shorter side resized, centre cropped). Default: as
            stored; for folders, the median shorter side, at most 224.
        test_share: share of each class that becomes its test images where the source has no test split.
        seed: of that split.
        flip: whether mirroring keeps the class. Default: False for digits, otherwise True.

    Raises:
        DataError: unknown source, files that do not decode (each is named; nothing is half-loaded),
            parts that do not fit together, a class with too few images to split.
    """
    if image_size is not None and image_size < 1:
        raise DataError(f"load_data: image_size must be at least 1, got {image_size}")
    if not 0 < test_share < 1:
        raise DataError(f"load_data: test_share must be in (0, 1), got {test_share}")

    if source == "digits":
        raw = read_digits()
    elif isinstance(source, str) and source.partition(":")[0] == "cifar100" and not Path(source).exists():
        raw = read_cifar100(source.partition(":")[2])
    else:
        raw = read_paths(existing_paths(source), image_size)

    if raw["test_images"] is None:
        test = _stratified(raw["train_labels"], test_share, seed, raw["class_names"], raw["name"])
        for key in ("images", "labels"):
            whole = raw[f"train_{key}"]
            raw[f"train_{key}"], raw[f"test_{key}"] = whole[~test], whole[test]
    for key in ("train_images", "test_images"):
        raw[key] = _to_squares(torch.from_numpy(np.ascontiguousarray(raw[key])), image_size)
    for key in ("train_labels", "test_labels"):
        raw[key] = torch.from_numpy(raw[key].astype(np.int64))
    if flip is not None:
        raw["flip"] = flip
    return ImageData(**raw)


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
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            raise DataError(
                f"{what}: class {names[label]!r} has one image; a train/test split needs at least 2"
            )
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        test[members[torch.randperm(len(members), generator=generator)[:count].numpy()]] = True
    return test


def _check_split(name: str, split: str, images: Tensor, labels: Tensor, *, classes: int) -> None:
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
