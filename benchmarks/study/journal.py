"""Finished units of work, one JSON line each, and who works on what; both survive kill -9 at any moment."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Journal:
    """``journal.jsonl`` in a folder. Several processes may read and append at once.

    A line counts once it is whole; a torn last line, left by a killed writer, is passed over and never glued to the
    next. The first whole line of a key is its result.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._locks = folder / "journal.jsonl", folder / "locks"
        self._locks.mkdir(exist_ok=True)
        self._read = 0
        self.records: dict[str, dict[str, Any]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Take in what other processes have finished since."""
        if not self._path.exists():
            return
        with open(self._path, "rb") as file:
            file.seek(self._read)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            try:
                record = json.loads(line)
                self.records.setdefault(record["key"], record)
            except (ValueError, KeyError, TypeError):
                continue  # torn by a kill

    def __contains__(self, key: str) -> bool:
        return key in self.records

    def result(self, key: str) -> dict[str, Any]:
        return self.records[key]["result"]

    def append(self, key: str, result: Mapping[str, Any], seconds: float) -> None:
        """Record a finished unit; on the disk when this returns."""
        line = json.dumps({"key": key, "result": result, "seconds": round(seconds, 3)}, allow_nan=False)
        with open(self._path, "ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                torn = file.read(1) != b"\n"
            else:
                torn = False
            file.write((b"\n" if torn else b"") + line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.refresh()

    @contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Whether this process may work on a unit now. The kernel gives the claim back when a process dies."""
        name = hashlib.sha256(key.encode()).hexdigest()[:24]
        with open(self._locks / name, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            self.refresh()  # another process may have finished it just before
            yield key not in self.records
