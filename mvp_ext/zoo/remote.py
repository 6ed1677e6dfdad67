"""A folder at a URL, by fsspec: files are put there whole and read back, and what is fetched is a file on the disk.

fsspec is the extra ``remote``, imported where it is used; each protocol may need a package of its own (s3fs, gcsfs, …).
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mvp_ext.zoo.index import ZooError

# A file that is read into memory is no longer than this, whatever the store says.
MOST_BYTES = 64 << 20


class Remote:
    """The folder at a URL; a plain path is one on this machine.

    Raises:
        ImportError: fsspec, or the package of the URL's protocol, is not installed; the message says how to have it.
        ValueError: fsspec knows no such protocol.
        ZooError (every method): the store cannot be reached, or refuses; the message names the file.
    """

    def __init__(self, url: str) -> None:
        self.url = shown_url(url)
        self._fs, self._root = _file_system(url, self.url)
        from fsspec.asyn import AsyncFileSystem
        from fsspec.implementations.local import LocalFileSystem

        if isinstance(self._fs, LocalFileSystem):
            self.url = self._fs.unstrip_protocol(self._root)
        # Object stores put a file in place whole, and make a commit of it (hf); their folders are but names.
        self._puts_whole = isinstance(self._fs, AsyncFileSystem) or "hf" in self._fs.protocol
        # A file system lives as long as its process: others may have written since it looked.
        self._fs.invalidate_cache()

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def _asking(self, name: str) -> Iterator[None]:
        try:
            yield
        except ZooError:
            raise
        # Each store has errors of its own.
        except Exception as error:
            raise ZooError(
                f"{self.url}: {name}: {str(error) or type(error).__name__}; what was moved stays, and the same call "
                "goes on from there"
            ) from error

    def size(self, name: str) -> int | None:
        """Of a file in bytes; None where there is none."""
        with self._asking(name):
            try:
                return int(self._fs.info(self._path(name))["size"])
            except FileNotFoundError:
                return None

    def read(self, name: str) -> bytes | None:
        """A small file; None where there is none."""
        with self._asking(name):
            try:
                data = bytes(self._fs.cat_file(self._path(name), start=0, end=MOST_BYTES + 1))
            except FileNotFoundError:
                return None
        if len(data) > MOST_BYTES:
            raise ZooError(f"{self.url}: {name}: expected at most {MOST_BYTES} bytes, got more")
        return data

    def write(self, name: str, data: bytes) -> None:
        """Put a file there, or in place of one. Who reads meets the old one or the new one, as far as the store can.

        It is read back: ZooError where the store has other bytes than it was given.
        """
        path = self._path(name)
        folder, _, last = path.rpartition("/")
        draft = path if self._puts_whole else f"{folder}/.{last}.{secrets.token_hex(6)}.part"
        # What was there before is never removed: who reads may be needing it.
        new = draft != path or self.size(name) is None
        with self._asking(name):
            if not self._puts_whole:
                self._fs.makedirs(folder, exist_ok=True)
            try:
                self._fs.pipe_file(draft, data)
                got = hashlib.sha256(self._fs.cat_file(draft)).hexdigest()
                if got != hashlib.sha256(data).hexdigest():
                    raise ZooError(f"{self.url}: {name}: the store has other bytes than it was given")
                if draft != path:
                    self._fs.mv(draft, path)
            except BaseException:
                with contextlib.suppress(Exception):
                    if new:
                        self._fs.rm_file(draft)
                raise

    def fetch(self, name: str, file: Path) -> None:
        """Copy a file to this machine."""
        with self._asking(name):
            self._fs.get_file(self._path(name), str(file))


def shown_url(url: str) -> str:
    """The URL without a password: whoever reads a message or a card shall not learn it."""
    return re.sub(r"//[^/@]*@", "//", url).rstrip("/")


def _file_system(url: str, shown: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ImportError as error:
        raise ImportError(f"{shown}: a URL needs fsspec: pip install 'mvp_ext[remote]' ({error})") from error
    try:
        file_system, root = fsspec.url_to_fs(url)
    except ImportError as error:
        from fsspec.registry import known_implementations
        from fsspec.utils import get_protocol

        protocol = get_protocol(url)
        package = known_implementations.get(protocol, {}).get("class", "").partition(".")[0]
        how = f"pip install {package} ({error})" if package not in ("", "fsspec") else error
        raise ImportError(f"{shown}: {protocol}:// needs a package that is missing: {how}") from error
    except ValueError as error:
        raise ValueError(f"{shown}: expected a folder or a URL that fsspec knows ({error})") from error
    return file_system, root.rstrip("/")
