"""Files of tensors with a JSON description: safetensors, no pickle, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor


class FileFormatError(ValueError):
    """A file is damaged, of another kind, or from a newer version; the message names the file and says which."""


def to_bytes(tensors: Mapping[str, Tensor], spec: Mapping[str, Any], *, kind: str, version: int) -> bytes:
    """One safetensors file as bytes. ``spec`` is JSON; it lies in the header, readable without the tensors."""
    metadata = {"format": kind, "version": str(version), "spec": json.dumps(spec, allow_nan=False)}
    return safetensors.torch.save(
        {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata
    )


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
    if metadata.get("format") != kind:
        raise FileFormatError(f"{source}: expected a file of format {kind!r}, got {metadata.get('format')!r}")
    try:
        found, spec = int(metadata["version"]), json.loads(metadata["spec"])
    except (KeyError, ValueError) as error:
        raise FileFormatError(f"{source}: its description is damaged ({error!r})") from error
    if found > version:
        raise FileFormatError(
            f"{source}: format version {found} is newer than this mvp_ext reads ({version}); update it"
        )
    return tensors, spec


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` so that a kill, a full disk or a power cut leaves the old file, or the new one, never a part.

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
    """A file that :func:`to_bytes` and :func:`write_atomic` made; FileNotFoundError or FileFormatError otherwise."""
    return from_bytes(Path(path).read_bytes(), kind=kind, version=version, source=os.fspath(path))
