"""Finished work, one JSON line each in one file, and who works on what; both survive kill -9 at any moment."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Journal:
    """A file of finished work. Several processes may read and append at once.

    A line counts once it is whole; what a killed writer or a bad disk left is passed over with a warning, and never
    glued to the next line. The first whole line of a key is its result.

    Args:
        path: the file, made with the first result; its folder also gets ``locks`` (see ``claim``). None: results are
            only held in memory.
        identity: JSON values of what every result depends on beside its key. Lines of another identity do not count.

    Attributes:
        records: key → {"key", "result" and, where they were given, "seconds", "identity"}, in the file's order.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, identity: Mapping[str, Any] | None = None
    ) -> None:
        self._path = None if path is None else Path(path)
        # As it comes back from the file: lists for tuples.
        self._identity = json.loads(json.dumps(identity))
        self._read = 0
        self.records: dict[str, dict[str, Any]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Take in what other processes have finished since."""
        if self._path is None or not self._path.exists():
            return
        with open(self._path, "rb") as file:
            file.seek(self._read)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        damaged = 0
        for line in filter(None, whole.split(b"\n")):
            try:
                self._take(_record_of(line))
            except (ValueError, KeyError, TypeError, RecursionError):
                damaged += 1
        if damaged:
            warnings.warn(f"{self._path}: passed over {damaged} damaged line(s)", stacklevel=2)

    def __contains__(self, key: str) -> bool:
        return key in self.records

    def result(self, key: str) -> Any:
        """What ``append`` was given; KeyError for what is not finished."""
        return self.records[key]["result"]

    def append(self, key: str, result: Any, seconds: float | None = None) -> None:
        """Record finished work; on the disk when this returns. ``result``: JSON values, no NaN (ValueError)."""
        record = {"key": key, "result": result}
        if seconds is not None:
            record["seconds"] = round(seconds, 3)
        if self._identity is not None:
            record["identity"] = self._identity
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        if self._path is None:
            self._take(record)
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    line = b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.refresh()

    @contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Whether this process may work on a key now. The kernel gives the claim back when a process dies."""
        if self._path is None:
            yield key not in self
            return
        locks = self._path.parent / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with open(locks / hashlib.sha256(key.encode()).hexdigest()[:24], "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            # Another process may have finished it just before.
            self.refresh()
            yield key not in self

    def _take(self, record: dict[str, Any]) -> None:
        if record.get("identity") == self._identity:
            self.records.setdefault(record["key"], record)


def _record_of(line: bytes) -> dict[str, Any]:
    """A line's record; ValueError, KeyError, TypeError or RecursionError for what is none."""
    record = json.loads(line.decode())
    # Version 0.1 named the results of `compare` "run".
    result = record["run"] if "run" in record else record["result"]
    return {**record, "result": result}
