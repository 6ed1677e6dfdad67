"""The decoded images of a folder, in a file beside it: decoded once, whoever and however many use them.

A file is a header (JSON, padded), a number for each image (of its name, size and time of change), and the pixels. While
it is being made it is a draft, locked by its maker: an image's number is written once its pixels are on the disk, so
that what a killed maker left is known and kept. Only a whole draft gets the name under which it is looked for.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mvp_ext.data.decoding import check_decoded, decode_images
from mvp_ext.data.errors import DataError
from mvp_ext.data.stored import Part
from mvp_ext.storage import PART, is_abandoned, user_cache

__all__ = ["CacheFile", "FolderCache", "cache_files", "clear_cache"]

# What of the header says that pixels are those that would be decoded now. To be raised with any change of them.
_SETTINGS = {"format": "mvp_ext.images", "version": 1, "resize": "centre, bilinear"}
# Bytes of the header; also what the pixels are aligned to.
_HEADER = 4096
_SUFFIX = ".images"
# Bytes of pixels between two waits for the disk, which is what a kill can cost.
_CHUNK = 1 << 25
# Between two looks at another maker's draft.
_WAIT_SECONDS = 0.2

# progress(images done, images in all)
Progress = Callable[[int, int], None]


class CacheFile(NamedTuple):
    """One file of decoded images.

    Attributes:
        path: where it is.
        images: how many it is for.
        done: how many of them it has; fewer are a draft's.
        size: their side in pixels.
        bytes: what it takes on the disk.
    """

    path: Path
    images: int
    done: int
    size: int
    bytes: int


def cache_files(
    folder: str | os.PathLike[str], where: str | os.PathLike[str] | None = None
) -> list[CacheFile]:
    """The decoded images of a folder that are kept, drafts too.

    Args:
        folder: of the images; it need not be there any more.
        where: the folder that ``load_data`` was given as ``cache``. Default: beside ``folder``, and the user's cache.
    """
    found = []
    for home in _homes(folder, where):
        for path in sorted([*home.glob(f"*{_SUFFIX}"), *home.glob(f"*{_SUFFIX}{PART}")]):
            with contextlib.suppress(OSError), open(path, "rb") as file:
                header = _read_header(file.fileno())
                # A maker that was killed at once leaves an empty draft.
                if header is None and os.fstat(file.fileno()).st_size:
                    continue
                count, size = (header["count"], header["size"]) if header else (0, 0)
                done = int(np.count_nonzero(_read_numbers(file.fileno(), count)))
                taken = os.fstat(file.fileno()).st_blocks * 512
                found.append(CacheFile(path, count, done, size, taken))
    return found


def clear_cache(
    folder: str | os.PathLike[str], where: str | os.PathLike[str] | None = None
) -> list[CacheFile]:
    """Remove the decoded images of a folder that are kept. Who uses them now can go on; the next decodes them again.

    Args:
        folder: as of ``cache_files``.
        where: likewise.

    Returns:
        What was removed: not a draft that is being written.
    """
    removed = []
    for file in cache_files(folder, where):
        if file.path.suffix != PART:
            file.path.unlink(missing_ok=True)
        elif not is_abandoned(file.path, remove=True):
            continue
        removed.append(file)
    for home in _homes(folder, where):
        # One that has something else stays.
        with contextlib.suppress(OSError):
            home.rmdir()
    return removed


class FolderCache:
    """The images of one folder, and their decoded pixels.

    Args:
        folder: where the images are.
        files: all of them, below it.
        where: the folder for the decoded; None: beside ``folder``, or where that may not be written the user's cache.
    """

    def __init__(self, folder: Path, files: Sequence[Path], where: str | os.PathLike[str] | None) -> None:
        self.folder, self._homes = folder, _homes(folder, where)
        # One order, however they are split into those for training and for measuring. A class's are together.
        self.files = sorted(files, key=lambda file: os.fspath(file).split(os.sep))

    def rows(self, files: Sequence[Path]) -> np.ndarray:
        """int64 [m]: where some of the files have their pixels."""
        row = {file: number for number, file in enumerate(self.files)}
        return np.array([row[file] for file in files], np.int64)

    def known_side(self) -> int | None:
        """``default_size`` of the files, if a cache of the same files knows it."""
        for path in (path for home in self._homes for path in home.glob(f"*{_SUFFIX}")):
            with contextlib.suppress(OSError), open(path, "rb") as file:
                header = _read_header(file.fileno())
                if header and header["side"] and header["files"] == self._stamps[1]:
                    return header["side"]
        return None

    def pixels(self, size: int, side: int | None, progress: Progress) -> Part:
        """uint8 [n, size, size, 3] of all files, decoded now unless they were.

        Where another process is decoding them, its result is waited for, and its work taken over if it dies.

        Args:
            size: in pixels.
            side: ``default_size`` of the files, where it is known, to be remembered.
            progress: called after each image.

        Raises:
            DataError: files that do not decode (what does is kept, so that it is not decoded again), or no place where
                the pixels can be kept.
        """
        header = {
            **_SETTINGS,
            "files": self._stamps[1],
            "count": len(self.files),
            "size": size,
            "side": side,
        }
        key = hashlib.sha256(json.dumps({**header, "side": None}).encode()).hexdigest()
        name = f"{size}-{key[:16]}{_SUFFIX}"
        path = self._homes[0] / name
        try:
            for home in self._homes:
                part = self._open(home / name, header)
                if part is not None:
                    return part
            path = self._writable_home() / name
            return self._made(path, header, progress)
        except OSError as error:
            raise DataError(
                f"{path}: the decoded images could not be kept there ({error.strerror or error}); {_ELSEWHERE}"
            ) from error

    def _made(self, path: Path, header: dict[str, Any], progress: Progress) -> Part:
        draft = path.with_name(path.name + PART)
        while (part := self._open(path, header)) is None:
            with _claimed(draft) as handle:
                if handle is None:
                    with contextlib.suppress(OSError), open(draft, "rb") as file:
                        done = np.count_nonzero(_read_numbers(file.fileno(), header["count"]))
                        progress(int(done), header["count"])
                    time.sleep(_WAIT_SECONDS)
                # Another process may have finished it just before.
                elif self._open(path, header) is None:
                    self._fill(handle, path, header, progress)
                    os.replace(draft, path)
                    _remove_outdated(path, header)
                else:
                    os.unlink(draft)
        return part

    def _fill(self, handle: int, path: Path, header: dict[str, Any], progress: Progress) -> None:
        """Decode into a draft what it does not have yet."""
        count, size = header["count"], header["size"]
        start, image = _start(count), size * size * 3
        found = _read_header(handle)
        if found is None or not _same(found, header):
            os.ftruncate(handle, 0)
            os.ftruncate(handle, start + count * image)
            _write(handle, json.dumps(header).encode().ljust(_HEADER), 0)
        numbers, have = self._stamps[0], _read_numbers(handle, count)
        need = int((numbers != have).sum()) * image
        free = shutil.disk_usage(path.parent).free
        if need > free:
            raise DataError(
                f"{path.parent}: the decoded images of {self.folder} need {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are "
                f"free; {_ELSEWHERE}"
            )

        def keep(rows: np.ndarray, pixels: list[Any]) -> None:
            for row, each in zip(rows.tolist(), pixels, strict=True):
                _write(handle, each, start + row * image)
            os.fsync(handle)
            have[rows] = numbers[rows]
            _write(handle, have, _HEADER)

        step = max(1, _CHUNK // image)
        self._take_over(path, header, have, keep, step)
        missing = np.flatnonzero(numbers != have)
        bad: dict[Path, str] = {}
        # The disk is waited for while the next are decoded.
        with ThreadPoolExecutor(1) as writer:
            kept: Future[None] | None = None
            for first in range(0, len(missing), step):
                rows = missing[first : first + step]
                before = count - len(missing) + first
                progress(before, count)
                pixels = np.empty((len(rows), size, size, 3), np.uint8)
                files = [self.files[row] for row in rows]
                told = partial(_tell_more, progress, before, count)
                failed = decode_images(files, pixels, np.arange(len(rows)), told)
                bad |= failed
                good = np.array([file not in failed for file in files])
                if kept is not None:
                    kept.result()
                kept = writer.submit(keep, rows[good], list(itertools.compress(pixels, good)))
            if kept is not None:
                kept.result()
        check_decoded(bad, count)
        os.fsync(handle)

    def _take_over(
        self,
        path: Path,
        header: dict[str, Any],
        have: np.ndarray,
        keep: Callable[[np.ndarray, list[Any]], None],
        step: int,
    ) -> None:
        """Copy the images that did not change since from files for fewer, more or others of the folder."""
        numbers, image = self._stamps[0], header["size"] ** 2 * 3
        for other in _of_size(path, header):
            with contextlib.suppress(OSError), open(other, "rb") as file:
                found = _read_header(file.fileno())
                if found is None:
                    continue
                missing = np.flatnonzero(numbers != have)
                theirs = _read_numbers(file.fileno(), found["count"])
                _, mine, its = np.intersect1d(numbers[missing], theirs, return_indices=True)
                for first in range(0, len(mine), step):
                    places = (_start(found["count"]) + its[first : first + step] * image).tolist()
                    pixels = [os.pread(file.fileno(), image, place) for place in places]
                    keep(missing[mine[first : first + step]], pixels)

    def _open(self, path: Path, header: dict[str, Any]) -> Part | None:
        """The pixels of a finished file; None where it is not there, cut off, or of something else."""
        try:
            file = open(path, "rb")  # noqa: SIM115
        except OSError:
            return None
        with file:
            found = _read_header(file.fileno())
            if found is None or not _same(found, header):
                return None
            if not np.array_equal(_read_numbers(file.fileno(), found["count"]), self._stamps[0]):
                return None
            return Part.mapped(file, (found["count"], found["size"], found["size"], 3))

    @cached_property
    def _stamps(self) -> tuple[np.ndarray, str]:
        """uint64 [n], a number above 0 of each file's name, size and time of change; a hash of all of these."""
        # Paths in "." do not begin with it.
        below = len(os.fspath(self.folder / "x")) - 1
        digest, numbers = hashlib.sha256(), np.empty(len(self.files), np.uint64)
        for row, file in enumerate(self.files):
            try:
                status = os.stat(file)
                state = f"{status.st_size} {status.st_mtime_ns}"
            # Decoding it will say what is wrong.
            except OSError:
                state = "gone"
            text = os.fsencode(file)[below:] + b"\0" + state.encode() + b"\0"
            digest.update(text)
            numbers[row] = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") | 1
        return numbers, digest.hexdigest()

    def _writable_home(self) -> Path:
        for home in self._homes:
            with contextlib.suppress(OSError):
                home.mkdir(parents=True, exist_ok=True)
                if os.access(home, os.W_OK | os.X_OK):
                    return home
        tried = " or ".join(map(str, self._homes))
        raise DataError(
            f"{self.folder}: its decoded images cannot be kept in {tried} (no permission); {_ELSEWHERE}"
        )


_ELSEWHERE = (
    "give another folder with cache=DIR (--cache DIR), or keep them in memory with False (--cache off)"
)


def _homes(folder: str | os.PathLike[str], where: str | os.PathLike[str] | None) -> list[Path]:
    """The folders that may have the decoded images, the preferred one first."""
    real = Path(os.path.realpath(os.path.expanduser(folder)))
    # Where there are others', too: two folders of images may have one name.
    own = f"{real.name}-{hashlib.sha256(os.fsencode(real)).hexdigest()[:8]}"
    if where is not None:
        return [Path(where).expanduser() / own]
    return [real.parent / f"{real.name}.mvp_cache", user_cache("images") / own]


def _tell_more(progress: Progress, before: int, count: int, done: int) -> None:
    progress(before + done, count)


def _start(count: int) -> int:
    """Where the pixels begin."""
    return -(-(_HEADER + 8 * count) // _HEADER) * _HEADER


def _read_header(handle: int) -> dict[str, Any] | None:
    """The header of a file of today's format that is as long as it says; None of any other."""
    try:
        header = json.loads(os.pread(handle, _HEADER, 0))
        count, size = header["count"], header["size"]
        same = all(header[key] == value for key, value in _SETTINGS.items()) and {"files", "side"} <= set(
            header
        )
        whole = os.fstat(handle).st_size == _start(count) + count * size * size * 3
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return header if same and whole else None


def _same(found: dict[str, Any], header: dict[str, Any]) -> bool:
    return {**found, "side": None} == {**header, "side": None}


def _read_numbers(handle: int, count: int) -> np.ndarray:
    """uint64 [count]: 0 for an image that the file does not have yet."""
    numbers = np.zeros(count, np.uint64)
    data = os.pread(handle, 8 * count, _HEADER)
    numbers[: len(data) // 8] = np.frombuffer(data[: len(data) // 8 * 8], np.uint64)
    return numbers


def _write(handle: int, data: Any, place: int) -> None:
    left = memoryview(data).cast("B")
    while left:
        written = os.pwrite(handle, left, place)
        left, place = left[written:], place + written


@contextlib.contextmanager
def _claimed(draft: Path) -> Iterator[int | None]:
    """The draft, locked, or None while it is another process's. The kernel gives the lock back when a process dies."""
    handle = os.open(draft, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # It may have been finished, or removed, before it was locked.
        same = os.path.samestat(os.fstat(handle), os.stat(draft))
    except (BlockingIOError, FileNotFoundError):
        same = False
    except OSError:
        os.close(handle)
        raise
    try:
        yield handle if same else None
    finally:
        os.close(handle)


def _of_size(path: Path, header: dict[str, Any]) -> list[Path]:
    """Other files of decoded images of this size beside ``path``, drafts too."""
    pattern = f"{header['size']}-*{_SUFFIX}"
    found = [*path.parent.glob(pattern), *path.parent.glob(pattern + PART)]
    return sorted(other for other in found if other.name not in (path.name, path.name + PART))


def _remove_outdated(path: Path, header: dict[str, Any]) -> None:
    """Files for images that the folder had before; who uses one can go on."""
    for other in _of_size(path, header):
        if other.suffix == PART:
            is_abandoned(other, remove=True)
            continue
        with contextlib.suppress(OSError), open(other, "rb") as file:
            # That of another version may be in use by one.
            if _read_header(file.fileno()) is not None:
                os.unlink(other)
