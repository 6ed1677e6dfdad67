"""Files whose content is known by its SHA-256: hashed once a process, while size, time and inode stay as they were."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Literal

# path → (size, modified, inode, sha256) of content that was found to be right
_sound: dict[Path, tuple[int, int, int, str]] = {}


class BadFile(Exception):
    """A file that is not what was written; the message says how, without the path."""

    def __init__(self, kind: Literal["missing", "damaged"], message: str) -> None:
        super().__init__(message)
        self.kind: Literal["missing", "damaged"] = kind


def check_size(path: Path, size: int) -> None:
    """In microseconds: BadFile where the file is gone or has another size."""
    try:
        got = path.stat().st_size
    except OSError as error:
        raise _bad(error) from error
    if got != size:
        raise BadFile("damaged", f"the file is damaged: expected {size} bytes, got {got}")


def read_sound(path: Path, sha256: str) -> bytes:
    """The file's bytes; BadFile where it is gone or they are not those that ``sha256`` is of."""
    try:
        with open(path, "rb") as file:
            stat, data = os.fstat(file.fileno()), file.read()
    except OSError as error:
        raise _bad(error) from error
    key = (stat.st_size, stat.st_mtime_ns, stat.st_ino, sha256)
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
        stat = path.stat()
    except OSError as error:
        raise _bad(error) from error
    if _sound.get(path) != (stat.st_size, stat.st_mtime_ns, stat.st_ino, sha256):
        read_sound(path, sha256)


def forget(path: Path) -> None:
    """Hash the file again when it is read next: somebody asks because they doubt."""
    _sound.pop(path, None)


def _bad(error: OSError) -> BadFile:
    if isinstance(error, FileNotFoundError):
        return BadFile("missing", "the file is gone")
    return BadFile("damaged", f"the file cannot be read ({error})")
