"""Files of tensors with a JSON description: safetensors, no pickle, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

_ENTRY = "mvp_ext"
_NO_CHECKSUM = "crc32:--------"  # holds the place of one


class FileFormatError(ValueError):
    """A file is damaged, of another kind, or from a newer version; the message names the file and says which."""


def to_bytes(tensors: Mapping[str, Tensor], spec: Mapping[str, Any], *, kind: str, version: int) -> bytes:
    """One safetensors file as bytes. ``spec`` is JSON; it lies in the header, readable without the tensors.

    safetensors knows a file that is too short, but not one with a changed byte: a checksum of description and tensors
    is put into the header's place for it, which has a fixed width, after the tensors are laid out.
    """
    text = json.dumps(spec, allow_nan=False)
    # One entry of our own making: safetensors does not promise an order of several, and equal content shall be equal
    # bytes. The checksum comes first in it, so that nothing in the description can be taken for its place.
    entry = json.dumps({"crc32": _NO_CHECKSUM, "format": kind, "version": version, "spec": text})
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = bytearray(safetensors.torch.save(whole, {_ENTRY: entry}))
    start = 8 + int.from_bytes(data[:8], "little")
    place = data.index(_NO_CHECKSUM.encode(), 0, start)
    data[place : place + len(_NO_CHECKSUM)] = _checksum(text, data, start).encode()
    return bytes(data)


def _checksum(text: str, data: bytes | bytearray, start: int) -> str:
    """crc32 of the description and of the tensors, which begin at ``start``; as wide as _NO_CHECKSUM."""
    return f"crc32:{zlib.crc32(memoryview(data)[start:], zlib.crc32(text.encode())):08x}"


def from_bytes(
    data: bytes, *, kind: str, version: int, source: str = "these bytes"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and the description; FileFormatError if ``data`` is not a whole file of this kind."""
    try:
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
        tensors = safetensors.torch.load(data)  # also checks that nothing is missing
    except (SafetensorError, ValueError, AttributeError, MemoryError) as error:
        raise FileFormatError(f"{source}: damaged, truncated or not a safetensors file ({error})") from error
    if _ENTRY not in metadata:
        raise FileFormatError(f"{source}: not a file of mvp_ext (its header has no entry {_ENTRY!r})")
    try:
        entry = json.loads(metadata[_ENTRY])
        found_kind, found, text, checksum = (entry[key] for key in ("format", "version", "spec", "crc32"))
        spec = json.loads(text)
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"{source}: its description is damaged ({error!r})") from error
    if found_kind != kind:
        raise FileFormatError(f"{source}: expected a file of format {kind!r}, got {found_kind!r}")
    if found > version:
        raise FileFormatError(
            f"{source}: format version {found} is newer than this mvp_ext reads ({version}); update it"
        )
    if checksum != _checksum(text, data, 8 + length):
        raise FileFormatError(
            f"{source}: damaged (its content does not have the checksum that was written with it)"
        )
    return tensors, spec


def kind_of(path: str | os.PathLike[str]) -> str | None:
    """The kind of a file that ``to_bytes`` made, from its header alone; None of any other file.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        # safetensors allows no longer header.
        header = file.read(min(length, 100_000_000))
    try:
        kind = json.loads(json.loads(header)["__metadata__"][_ENTRY])["format"]
    except (KeyError, TypeError, ValueError):
        return None
    return kind if isinstance(kind, str) else None


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` so that a kill, a full disk or a power cut leaves the old file, or the new one, never a
    part.

    Raises:
        OSError: it could not be written; what was at ``path`` is untouched.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes private files
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if hasattr(os, "O_DIRECTORY"):  # the name itself must survive too
        folder = os.open(path.parent, os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read(
    path: str | os.PathLike[str], *, kind: str, version: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A file that ``to_bytes`` and ``write_atomic`` made; FileNotFoundError or FileFormatError otherwise."""
    return from_bytes(Path(path).read_bytes(), kind=kind, version=version, source=os.fspath(path))
