"""Files of tensors with a JSON description: safetensors, no pickle, written whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

_ENTRY = "mvp_ext"
# How files end that are being written.
PART = ".part"
_NO_CHECKSUM = "crc32:--------"  # holds the place of one
# Bytes of a file that are read at once.
_CHUNK = 1 << 20


class FileFormatError(ValueError):
    """A file is damaged, of another kind, or from a newer version; the message names the file and says which."""


def to_bytes(tensors: Mapping[str, Tensor], spec: Mapping[str, Any], *, kind: str, version: int) -> bytes:
    """One safetensors file as bytes. ``spec`` is JSON; it lies in the header, readable without the tensors.

    safetensors knows a file that is too short, but not one with a changed byte: a checksum of description and tensors
    is put into the header's place for it, which has a fixed width, after the tensors are laid out. Tensors that share
    memory, as views of one do, are each written whole.

    Raises:
        TypeError: a tensor without plain memory (sparse, quantised, meta), or a value that is not JSON.
        ValueError: NaN, infinity, or nesting too deep for JSON.
    """
    text, entry = _entry(spec, kind, version)
    data = bytearray(safetensors.torch.save(_apart(tensors), entry))
    start = 8 + int.from_bytes(data[:8], "little")
    place = data.index(_NO_CHECKSUM.encode(), 0, start)
    data[place : place + len(_NO_CHECKSUM)] = _checksum(text, [memoryview(data)[start:]]).encode()
    return bytes(data)


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    spec: Mapping[str, Any],
    *,
    kind: str,
    version: int,
) -> None:
    """What ``to_bytes`` makes of its arguments, as a file (``write_atomic``), and never as a second copy in memory.

    Raises:
        TypeError, ValueError: as ``to_bytes``. OSError: it could not be written; what was at ``path`` is untouched.
    """
    if _is_special(Path(path)):
        Path(path).write_bytes(to_bytes(tensors, spec, kind=kind, version=version))
        return
    text, entry = _entry(spec, kind, version)
    whole = _apart(tensors)

    def fill(draft: Path) -> None:
        try:
            safetensors.torch.save_file(whole, draft, entry)
        except SafetensorError as error:
            raise OSError(f"{os.fspath(path)}: could not be written ({error})") from error
        with open(draft, "r+b") as file:
            header = file.read(8)
            header += file.read(int.from_bytes(header, "little"))
            checksum = _checksum(text, iter(lambda: file.read(_CHUNK), b""))
            file.seek(header.index(_NO_CHECKSUM.encode()))
            file.write(checksum.encode())

    write_together({Path(path): fill})


def _entry(spec: Mapping[str, Any], kind: str, version: int) -> tuple[str, dict[str, str]]:
    """The description as text, and the file's metadata with it and a place for the checksum."""
    text = json.dumps(spec, allow_nan=False)
    # One entry of our own making: safetensors does not promise an order of several, and equal content shall be equal
    # bytes. The checksum comes first in it, so that nothing in the description can be taken for its place.
    entry = json.dumps({"crc32": _NO_CHECKSUM, "format": kind, "version": version, "spec": text})
    return text, {_ENTRY: entry}


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, each with memory of its own, which safetensors demands."""
    whole: dict[str, Tensor] = {}
    owners: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            kind = "meta" if tensor.is_meta else "quantised" if tensor.is_quantized else tensor.layout
            raise TypeError(f"tensor {name!r}: expected one with plain memory, got a tensor of kind {kind}")
        # Negative and conjugate views hold other bits than they mean.
        own = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        if own.untyped_storage().data_ptr() in owners:
            own = own.clone()
        if own.numel():
            owners.add(own.untyped_storage().data_ptr())
        whole[name] = own
    return whole


def _checksum(text: str, tensors: Iterable[bytes | memoryview]) -> str:
    """crc32 of the description and of the tensors' bytes, piece by piece; as wide as _NO_CHECKSUM."""
    value = zlib.crc32(text.encode())
    for piece in tensors:
        value = zlib.crc32(piece, value)
    return f"crc32:{value:08x}"


def from_bytes(
    data: bytes, *, kind: str, version: int, source: str = "these bytes"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and the description; FileFormatError if ``data`` is not a whole file of this kind."""
    try:
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
        tensors = safetensors.torch.load(data)  # also checks that nothing is missing
    except (SafetensorError, ValueError, AttributeError, KeyError, MemoryError, RecursionError) as error:
        raise FileFormatError(f"{source}: damaged, truncated or not a safetensors file ({error})") from error
    if _ENTRY not in metadata:
        raise FileFormatError(f"{source}: not a file of mvp_ext (its header has no entry {_ENTRY!r})")
    try:
        entry = json.loads(metadata[_ENTRY])
        found_kind, found, text, checksum = (entry[key] for key in ("format", "version", "spec", "crc32"))
        spec = json.loads(text)
        if not (isinstance(found, int) and isinstance(spec, dict)):
            raise TypeError("a value of another kind")
        written = _checksum(text, [memoryview(data)[8 + length :]])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise FileFormatError(f"{source}: its description is damaged ({error!r})") from error
    if found_kind != kind:
        raise FileFormatError(f"{source}: expected a file of format {kind!r}, got {found_kind!r}")
    if found > version:
        raise FileFormatError(
            f"{source}: format version {found} is newer than this mvp_ext reads ({version}); update it"
        )
    if checksum != written:
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
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return kind if isinstance(kind, str) else None


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` so that a kill, a full disk or a power cut leaves the old file, or the new one, never a part.

    A file that is replaced keeps its mode and owner; a link stays, and what it points to is replaced. What is no file
    (``/dev/stdout``, a pipe) is written to as it is.

    Raises:
        OSError: it could not be written; what was at ``path`` is untouched.
    """
    write_together({Path(path): data})


def write_together(files: Mapping[Path, bytes | Callable[[Path], None]]) -> None:
    """``write_atomic`` of files that make sense together only: their bytes, or what writes into a draft of one.

    All are on the disk before the first is put in place. While several are, the old ones are away: a kill just then
    leaves no old one beside a new one.

    Raises:
        OSError: one could not be written; what was there is untouched.
    """
    with contextlib.ExitStack() as temporaries:
        drafts: list[tuple[Path, Path]] = []
        for path, data in files.items():
            if _is_special(path) and not callable(data):
                path.write_bytes(data)
                continue
            # A link is the user's choice of a place: it stays.
            target = Path(os.path.realpath(path))
            drafts.append((temporaries.enter_context(_draft(target, data)), target))
        _put_in_place(drafts)
        for folder in {target.parent for _, target in drafts}:
            sync_names(folder)


def _is_special(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


@contextlib.contextmanager
def _draft(target: Path, data: bytes | Callable[[Path], None]) -> Iterator[Path]:
    """A file beside ``target`` with its mode and these bytes, on the disk; removed unless it was put in place.

    It is locked while its writer lives, so that others can tell one that a killed writer left.
    """
    while True:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:50]}.", suffix=PART)
        with contextlib.suppress(OSError):  # file systems without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        # Who cleans up may have met it before it was locked.
        if os.fstat(handle).st_nlink:
            break
        os.close(handle)
    with os.fdopen(handle, "wb") as file:
        try:
            if callable(data):
                data(Path(name))
            else:
                file.write(data)
                file.flush()
            _make_alike(handle, target)
            os.fsync(handle)
            yield Path(name)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(name)


def _make_alike(handle: int, target: Path) -> None:
    """Give a new file mode and owner of the one that it will replace."""
    try:
        old = os.stat(target)
    except FileNotFoundError:
        os.fchmod(handle, 0o666 & ~_umask())  # mkstemp makes private files
        return
    with contextlib.suppress(OSError):  # not everybody may give files away
        os.fchown(handle, old.st_uid, old.st_gid)
    os.fchmod(handle, stat.S_IMODE(old.st_mode))


def _put_in_place(drafts: list[tuple[Path, Path]]) -> None:
    old: list[tuple[Path, Path]] = []
    new: list[Path] = []
    try:
        for draft, target in drafts if len(drafts) > 1 else []:
            if target.is_file():
                aside = draft.with_suffix(f".old{PART}")
                os.replace(target, aside)
                old.append((aside, target))
        for draft, target in drafts:
            os.replace(draft, target)
            new.append(target)
    except BaseException:
        for target in new:
            os.unlink(target)
        for aside, target in old:
            os.replace(aside, target)
        raise
    for aside, _ in old:
        with contextlib.suppress(OSError):
            os.unlink(aside)


def user_cache(what: str) -> Path:
    """Where one kind of things is kept for this user, by the XDG standard; it need not exist."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "mvp_ext", what)


def sync_names(folder: Path) -> None:
    """Wait until the names in a folder are on the disk: they must survive a power cut, too."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def is_abandoned(path: Path, *, remove: bool = False) -> bool:
    """Whether a ``*.part`` file is nobody's any more, its writer killed; with ``remove`` it then goes."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            return False
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if remove:
            os.unlink(path)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read(
    path: str | os.PathLike[str], *, kind: str, version: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A file that ``to_bytes`` and ``write_atomic`` made; FileNotFoundError or FileFormatError otherwise."""
    return from_bytes(Path(path).read_bytes(), kind=kind, version=version, source=os.fspath(path))
