"""Where a zoo's files lie in its directory, and how one is written: whole, and nobody's until the index says whose."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mvp_ext.storage import PART, is_abandoned
from mvp_ext.zoo.files import BadFile, in_folder, regular_files, remove_file
from mvp_ext.zoo.index import ZooError

# Names of shared models that older versions kept in the zoo's directory as <name>.safetensors.
ROWLESS_MODELS = ("start", "universal")
# SQLite's own files beside a database.
_BESIDE = ("-wal", "-shm", "-journal")


class Layout:
    """The paths below a zoo's directory, and its lock."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.index = root / "index.sqlite"
        self.entries = root / "entries"
        self.shared = root / "shared"

    @property
    def spoilt(self) -> Path:
        """Where a damaged index is put when another is made."""
        return self.index.with_name(f"{self.index.name}.damaged")

    @property
    def beside_index(self) -> list[Path]:
        """SQLite's own files of the index."""
        return [self.index.with_name(f"{self.index.name}{end}") for end in _BESIDE]

    def check(self) -> None:
        """ZooError where a part of the zoo is a link, or something else than it should be: it may lead out of the zoo.

        The zoo's directory itself may be a link.
        """
        kinds = {self.entries: stat.S_IFDIR, self.shared: stat.S_IFDIR}
        kinds |= dict.fromkeys([self.index, *self.beside_index, self.root / ".lock"], stat.S_IFREG)
        for path, kind in kinds.items():
            try:
                found = stat.S_IFMT(path.lstat().st_mode)
            except OSError:
                continue
            if found != kind:
                expected = "folder" if kind == stat.S_IFDIR else "regular file"
                raise ZooError(f"zoo {self.root}: {path.name}: expected a {expected} of its own, and no link")

    def create(self) -> None:
        """Make the directory; ZooError where it is there and holds something else."""
        self.root.mkdir(parents=True, exist_ok=True)
        ours = {
            path.name for path in (self.entries, self.shared, self.index, self.spoilt, *self.beside_index)
        }
        ours |= {f"{name}{end}" for name in ROWLESS_MODELS for end in (".safetensors", ".partial")}
        others = sorted(p.name for p in self.root.iterdir() if p.name not in ours and p.name[0] != ".")
        if others:
            raise ZooError(
                f"{self.root} is not a zoo and not empty (it has {others[0]!r}); name another directory"
            )
        self.entries.mkdir(exist_ok=True)

    # Only bare names count: nothing outside the zoo's folders is ever read or removed.

    def of_entry(self, row: Mapping[str, Any]) -> Path:
        """The file of an entry's row; BadFile where the row names none of the zoo's."""
        return in_folder(self.entries, row["file"])

    def of_model(self, row: Mapping[str, Any]) -> Path:
        """Likewise of a shared model's row; those of an older version lie in the zoo's directory itself."""
        file = row["file"]
        if file in [f"{name}.safetensors" for name in ROWLESS_MODELS]:
            return self.root / str(file)
        folder, _, name = str(file).partition("/")
        return in_folder(self.shared, name if folder == self.shared.name else file)

    def remove_entry(self, row: Mapping[str, Any]) -> None:
        """Remove an entry's file, where its row names one."""
        with contextlib.suppress(BadFile):
            remove_file(self.of_entry(row))

    def remove_model(self, row: Mapping[str, Any]) -> None:
        """Remove a shared model's file, where its row names one."""
        with contextlib.suppress(BadFile):
            remove_file(self.of_model(row))

    def abandoned(self, *, remove: bool = False) -> list[Path]:
        """Files in the zoo's directory that a killed writer left half written; with ``remove`` they go."""
        found = [p for p in regular_files(self.root) if p.name.startswith(".") and PART in p.name]
        return [path for path in found if is_abandoned(path, remove=remove)]

    @contextlib.contextmanager
    def writing(self, path: Path, what: str) -> Iterator[NewFile]:
        """While a file is written and given its row: nothing stays of it unless it is marked as ``used``.

        Raises:
            ZooError: it could not be written.
        """
        file = NewFile(path)
        with self.lock(exclusive=False):
            try:
                path.parent.mkdir(exist_ok=True)
                yield file
            except (OSError, SafetensorError) as error:
                raise ZooError(
                    f"zoo {self.root}: {what} could not be written, the zoo is unchanged ({error})"
                ) from error
            finally:
                if not file.used:
                    remove_file(path)

    @contextlib.contextmanager
    def lock(self, *, exclusive: bool, wait: bool = True) -> Iterator[bool]:
        """Hold the zoo's lock; yields whether it was had. The kernel releases it when a process dies.

        Raises:
            ZooError: with ``wait``, where the zoo may not be written.
        """
        try:
            handle = self._open_lock(wait)
        except OSError as error:
            if wait:
                raise ZooError(f"zoo {self.root}: it cannot be written ({error})") from error
            # Without a lock that others could hold nobody ever wrote here.
            yield isinstance(error, FileNotFoundError)
            return
        with open(handle, "rb") as file:
            mode = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
            try:
                fcntl.flock(file, mode if wait else mode | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True  # closing the file releases the lock

    def _open_lock(self, wait: bool) -> int:
        path, how = self.root / ".lock", os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            return os.open(path, how | os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            if wait:
                raise
        # Of a zoo that may only be read: its writers hold it all the same.
        return os.open(path, how | os.O_RDONLY)


@dataclass
class NewFile:
    """A file that is being added; ``used`` once a row names it."""

    path: Path
    used: bool = False

    def facts(self) -> dict[str, Any]:
        """What its row says of its content."""
        data = self.path.read_bytes()
        return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
