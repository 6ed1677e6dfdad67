"""The files of a zoo: regular ones in its own folders, their content known by its SHA-256.

Who may write into a zoo's directory shall get nothing else read or removed than what lies in it: a row's file is a bare
name, no link is followed, and pipes and devices are not opened. Content is hashed once a process, while size, time and
inode stay as they were.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from pathlib import Path
from typing import Any, Literal

# path → (size, modified, inode, sha256) of content that was found to be right
_sound: dict[Path, tuple[int, int, int, str]] = {}


class BadFile(Exception):
    """A file that is not what was written; the message says how, without the path."""

    def __init__(self, kind: Literal["missing", "damaged"], message: str) -> None:
        super().__init__(message)
        self.kind: Literal["missing", "damaged"] = kind


def in_folder(folder: Path, name: Any) -> Path:
    """The file of that name in a folder; BadFile unless ``name`` is a bare one."""
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
        raise BadFile("missing", f"expected the bare name of a file, got {name!r}")
    return folder / name


def is_regular(path: Path) -> bool:
    """Whether a regular file lies there, and no link to one."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def files_in(folder: Path) -> list[Path]:
    """All but folders in a folder, by name; none where it cannot be read."""
    with contextlib.suppress(OSError):
        return sorted(path for path in folder.iterdir() if path.is_symlink() or not path.is_dir())
    return []


def regular_files(folder: Path) -> list[Path]:
    """The regular ones of these."""
    return [path for path in files_in(folder) if is_regular(path)]


def check_size(path: Path, size: int) -> None:
    """In microseconds: BadFile where the file is gone, is no regular one, or has another size."""
    try:
        found = path.lstat()
    except OSError as error:
        raise _bad(error) from error
    _check_regular(found)
    if found.st_size != size:
        raise BadFile("damaged", f"the file is damaged: expected {size} bytes, got {found.st_size}")


def read_regular(path: Path) -> tuple[os.stat_result, bytes]:
    """The file's state and bytes; BadFile where it is gone or no regular file."""
    try:
        # Before it is opened: a pipe would be waited for.
        _check_regular(path.lstat())
        with open(path, "rb") as file:
            found = os.fstat(file.fileno())
            return found, file.read()
    except OSError as error:
        raise _bad(error) from error


def read_sound(path: Path, sha256: str) -> bytes:
    """The file's bytes; BadFile where it is gone or they are not those that ``sha256`` is of."""
    found, data = read_regular(path)
    key = (found.st_size, found.st_mtime_ns, found.st_ino, sha256)
    if _sound.get(path) != key:
        got = hashlib.sha256(data).hexdigest()
        if got != sha256:
            _sound.pop(path, None)
            raise BadFile("damaged", f"the file is damaged: expected SHA-256 {sha256[:16]}…, got {got[:16]}…")
        _sound[path] = key
    return data


def check_sound(path: Path, sha256: str) -> None:
    """As ``read_sound``; reads nothing where that was done, and the file is as it was."""
    try:
        found = path.lstat()
    except OSError as error:
        raise _bad(error) from error
    if _sound.get(path) != (found.st_size, found.st_mtime_ns, found.st_ino, sha256):
        read_sound(path, sha256)


def forget(path: Path) -> None:
    """Hash the file again when it is read next: somebody asks because they doubt."""
    _sound.pop(path, None)


def remove_file(path: Path) -> None:
    """What cannot be removed stays as a stray file, which ``Zoo.verify`` names."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _check_regular(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise BadFile("damaged", "expected a regular file, got a link, folder, pipe or device")


def _bad(error: OSError) -> BadFile:
    if isinstance(error, FileNotFoundError):
        return BadFile("missing", "the file is gone")
    return BadFile("damaged", f"the file cannot be read ({error})")
