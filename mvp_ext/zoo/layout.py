"""Where a zoo's files lie in its directory, and how one is written: whole, and nobody's until the index says whose."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mvp_ext.zoo.index import ZooError


class Layout:
    """The paths below a zoo's directory, and its lock."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.index = root / "index.sqlite"
        self.entries = root / "entries"
        self.shared = root / "shared"

    def create(self) -> None:
        """Make the directory; ZooError where it is there and holds something else."""
        self.root.mkdir(parents=True, exist_ok=True)
        ours = {self.entries.name, self.shared.name}
        ours |= {f"{self.index.name}{end}" for end in ("", "-wal", "-shm", "-journal")}
        others = sorted(p.name for p in self.root.iterdir() if p.name not in ours and p.name[0] != ".")
        if others:
            raise ZooError(
                f"{self.root} is not a zoo and not empty (it has {others[0]!r}); name another directory"
            )
        self.entries.mkdir(exist_ok=True)

    # Of what a row says only the file's name counts: nothing outside the zoo's folders is ever read or removed.

    def of_entry(self, row: Mapping[str, Any]) -> Path:
        """The file of an entry's row."""
        return self.entries / os.path.basename(row["file"])

    def of_model(self, row: Mapping[str, Any]) -> Path:
        """The file of a shared model's row; those of an older version lie in the zoo's directory itself."""
        file = Path(row["file"])
        return (self.shared if file.parent.name == self.shared.name else self.root) / file.name

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
            handle = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            if wait:
                raise ZooError(f"zoo {self.root}: it cannot be written ({error})") from error
            yield False
            return
        with open(handle, "a") as file:
            mode = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
            try:
                fcntl.flock(file, mode if wait else mode | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True  # closing the file releases the lock


@dataclass
class NewFile:
    """A file that is being added; ``used`` once a row names it."""

    path: Path
    used: bool = False

    def facts(self) -> dict[str, Any]:
        """What its row says of its content."""
        data = self.path.read_bytes()
        return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def remove_file(path: Path) -> None:
    """What cannot be removed stays as a stray file, which ``Zoo.verify`` names."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
