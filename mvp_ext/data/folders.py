"""Folders of images: which of their folders are splits, which are classes, and which files are theirs.

What a system or a tool puts beside the images is passed over. Links to folders are followed, each once, and none that
leads back. Whatever is not taken is counted with a reason (``LeftOut``).
"""

from __future__ import annotations

import functools
import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mvp_ext.data.errors import DataError, LeftOut

# By the folder's name in lower case.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# In lower case; whatever begins with a dot is passed over, too.
_OF_SYSTEMS = frozenset(
    (
        "__macosx",
        "thumbs.db",
        "desktop.ini",
        "$recycle.bin",
        "system volume information",
        "lost+found",
        "@eadir",
    )
)

_HIDDEN = "hidden or system file(s) and folder(s)"
_BROKEN = "link(s) are broken"
_READ_ALREADY = "linked folder(s) lead back, or are read already"
_OTHERS = "file(s) are no images"
_LOOSE = "image(s) are in no class folder"
_EMPTY = "class folder(s) have no images"


class Listing(NamedTuple):
    """The files of a data set: fields of ``ImageData``.

    Attributes:
        class_names: in the order of their labels.
        train_images: n files, sorted by class and path.
        train_labels: int64 [n].
        test_images: likewise; None where nothing says what to measure on.
        test_labels: likewise.
    """

    class_names: tuple[str, ...]
    train_images: list[Path]
    train_labels: np.ndarray
    test_images: list[Path] | None
    test_labels: np.ndarray | None


def list_images(root: Path, left_out: LeftOut) -> Listing:
    """The images of ``class/image.png``, or of ``train/class/image.png`` with what is measured on beside it.

    Measured on is ``test/``, or ``val/`` where no ``test/`` has classes (each by any of its names in ``SPLITS``).

    Args:
        root: the folder.
        left_out: gets what is not taken.

    Raises:
        DataError: no class folders with images, two folders for one split, a class that is measured on but not trained
            on, a folder that cannot be read.
    """
    splits = split_folders(root)
    if not splits:
        classes = _classes(root, left_out)
        if not classes:
            raise DataError(
                f"{root}: no class folders with images; expected {root}/<class>/<image>, or .npz files"
            )
        return Listing(*_labelled(classes, _numbers(classes)), None, None)
    place: dict[str, Path] = {}
    for name, split in splits.items():
        if split in place:
            raise DataError(
                f"{root}: {place[split].name}/ and {name}/ are both named as {split} images; keep one"
            )
        place[split] = root / name
    left_out.add_all(_LOOSE, _look(str(root), left_out).images)
    others = [folder for folder in visible_folders(root) if folder.name not in splits]
    left_out.add_all("folder(s) beside those of the splits", others)
    if "train" not in place:
        named = " and ".join(f"{name}/" for name in splits)
        raise DataError(f"{root}: has {named}, but no train/; expected {root}/train/<class>/<image>")
    train = _classes(place["train"], left_out)
    if not train:
        raise DataError(
            f"{place['train']}: no class folders with images; expected {place['train']}/<class>/<image>"
        )
    numbers = _numbers(train)
    measured: dict[str, list[Path]] = {}
    for split in ("test", "validation"):
        if split not in place:
            continue
        folder = place[split]
        if measured:
            used = f"{place['train'].name}/ is trained on, {place['test'].name}/ measured on"
            left_out.add_all(f"image(s) of {folder.name}/, for {used}", images_below(folder))
            continue
        found = _classes(folder, left_out)
        strangers = [name for name in found if name not in train]
        alike = _alike(strangers, train)
        if len(found) == len(strangers) == 1 and not alike:
            # As competitions give their images without labels.
            unknown = f"image(s) of {folder.name}/ are in no class of the training images"
            left_out.add_all(unknown, found[strangers[0]])
        elif strangers:
            hint = f": {alike[1]!r} is spelled otherwise there, use one spelling" if alike else ""
            name = alike[0] if alike else strangers[0]
            raise DataError(f"{folder}: class {name!r} has no training images in {place['train']}{hint}")
        else:
            measured = found
            if not found and not _look(str(folder), LeftOut(root)).images:
                left_out.add("folder(s) of splits have no images", folder)
    trained = _labelled(train, numbers)
    if not measured:
        return Listing(*trained, None, None)
    return Listing(*trained, *_labelled(measured, numbers)[1:])


def split_folders(root: Path) -> dict[str, str]:
    """The names of ``root``'s folders that are splits, with the split; none where its folders are classes.

    They are splits where the one for training has folders itself, or no other folder is there.
    """
    folders = [folder.name for folder in visible_folders(root)]
    splits = {name: SPLITS[name.lower()] for name in folders if name.lower() in SPLITS}
    trained = (root / name for name, split in splits.items() if split == "train")
    if len(splits) == len(folders) or any(map(visible_folders, trained)):
        return splits
    return {}


def visible_folders(root: Path) -> list[Path]:
    """The folders in a folder, linked ones too, but those that are hidden or of systems; sorted."""
    seen = _look(str(root), LeftOut(root))
    return [Path(folder) for folder in sorted(seen.folders + seen.links)]


def images_below(root: Path) -> list[Path]:
    """Every image in a folder and its subfolders, sorted, those of linked folders once."""
    walk = _Walk(str(root), os.path.realpath(root), LeftOut(root))
    walk.follow(set())
    return walk.images()


def is_image(name: str) -> bool:
    """Whether a file's name is that of an image which Pillow reads, and not hidden."""
    return os.path.splitext(name)[1].lower() in _image_suffixes() and not _passed_over(name)


def _passed_over(name: str) -> bool:
    return name.startswith(".") or name.lower() in _OF_SYSTEMS


@functools.cache
def _image_suffixes() -> frozenset[str]:
    """Of what Pillow reads, in lower case, with their dots."""
    from PIL import Image

    return frozenset(s for s, form in Image.registered_extensions().items() if form in Image.OPEN)


class _Seen(NamedTuple):
    """What one folder holds, as paths."""

    images: list[str]
    folders: list[str]
    links: list[str]


def _look(folder: str, left_out: LeftOut, others: str | None = None) -> _Seen:
    """Look into one folder; its files that are no images are left out as ``others``, where that is a reason."""
    seen = _Seen([], [], [])
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror or error})") from error
    for entry in found:
        if _passed_over(entry.name):
            left_out.add(_HIDDEN, entry.path)
        elif entry.is_symlink() and not os.path.exists(entry.path):
            left_out.add(_BROKEN, entry.path)
        elif entry.is_dir():
            (seen.links if entry.is_symlink() else seen.folders).append(entry.path)
        elif is_image(entry.name) and entry.is_file():
            seen.images.append(entry.path)
        elif others:
            left_out.add(others, entry.path)
    return seen


class _Walk:
    """The images below a folder: first without what is linked, then that.

    Attributes:
        reached: the real paths of the folders that were read.
    """

    def __init__(self, folder: str, real: str, left_out: LeftOut) -> None:
        self.reached: set[str] = set()
        self._left_out = left_out
        self._images: list[str] = []
        self._links: list[tuple[str, str]] = []
        self._read(folder, real, set())

    def _read(self, folder: str, real: str, known: set[str]) -> None:
        stack = [(folder, real)]
        while stack:
            folder, real = stack.pop()
            if real in known or real in self.reached:
                self._left_out.add(_READ_ALREADY, folder)
                continue
            self.reached.add(real)
            seen = _look(folder, self._left_out, _OTHERS)
            self._images += seen.images
            stack += ((inner, os.path.join(real, os.path.basename(inner))) for inner in seen.folders)
            self._links += ((link, real) for link in seen.links)

    def follow(self, known: set[str]) -> None:
        """Read the linked folders, too, but for those that are ``known`` or lead back."""
        while self._links:
            link, inside = self._links.pop(0)
            target = os.path.realpath(link)
            if _leads_back(target, inside):
                self._left_out.add(_READ_ALREADY, link)
            else:
                self._read(link, target, known)

    def images(self) -> list[Path]:
        # As sorted paths are, but without making two million of them first.
        return [Path(image) for image in sorted(self._images, key=lambda image: image.split(os.sep))]


def _leads_back(target: str, inside: str) -> bool:
    return inside == target or inside.startswith(os.path.join(target, ""))


def _classes(root: Path, left_out: LeftOut) -> dict[str, list[Path]]:
    """Class name → its images; sorted by name, none empty."""
    seen = _look(str(root), left_out)
    left_out.add_all(_LOOSE, seen.images)
    real = os.path.realpath(root)
    walks: dict[str, _Walk] = {}
    # Folders that are there come before what is linked: a link into a class does not take its images away.
    known: set[str] = set()
    for folder in seen.folders:
        name = os.path.basename(folder)
        walks[name] = _Walk(folder, os.path.join(real, name), left_out)
        known |= walks[name].reached
    for link in seen.links:
        target = os.path.realpath(link)
        if target in known or _leads_back(target, real):
            left_out.add(_READ_ALREADY, link)
        else:
            walks[os.path.basename(link)] = _Walk(link, target, left_out)
    known = known.union(*(walk.reached for walk in walks.values()))
    classes: dict[str, list[Path]] = {}
    for name in sorted(walks):
        if any("\ud800" <= character <= "\udfff" for character in name):
            # Bytes that are no UTF-8: no file of text could hold the name.
            raise DataError(
                f"{root}: the class folder {name!r} has a name that is no text in UTF-8; rename it"
            )
        walks[name].follow(known)
        images = walks[name].images()
        if images:
            classes[name] = images
        else:
            left_out.add(_EMPTY, root / name)
    return classes


def _numbers(classes: Iterable[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(classes)}


def _labelled(
    classes: dict[str, list[Path]], numbers: dict[str, int]
) -> tuple[tuple[str, ...], list[Path], np.ndarray]:
    """Their names, all files, and a label for each."""
    counts = [len(files) for files in classes.values()]
    labels = np.repeat(np.array([numbers[name] for name in classes], np.int64), counts)
    return tuple(classes), [file for files in classes.values() for file in files], labels


def _alike(strangers: Iterable[str], known: Iterable[str]) -> tuple[str, str] | None:
    """The first stranger that differs from a known name in letter case or composition alone, and that name."""
    spelled = {_folded(name): name for name in known}
    return next(((name, spelled[_folded(name)]) for name in strangers if _folded(name) in spelled), None)


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
