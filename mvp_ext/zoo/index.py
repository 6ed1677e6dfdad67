"""The zoo's index: one SQLite file, one row an entry. It knows rows and transactions, no model and no weights.

Every operation opens its own connection, so an index can be used from any thread and after a fork. Write-ahead
logging lets readers go on while somebody writes; writers wait for each other.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
# Writers hold the index for milliseconds (weights are written before), so this only runs out where one hangs.
BUSY_TIMEOUT_SECONDS = 60.0

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE entries (
    name TEXT PRIMARY KEY,
    file TEXT NOT NULL UNIQUE,          -- below the folder of entries
    sha256 TEXT NOT NULL,               -- of that file
    bytes INTEGER NOT NULL,
    architecture TEXT,
    structure_fingerprint TEXT NOT NULL,
    mask BLOB NOT NULL,                 -- Mask.to_bytes
    task TEXT NOT NULL,                 -- JSON
    keep REAL NOT NULL,
    accuracy REAL,
    steps INTEGER NOT NULL,
    cost TEXT NOT NULL,                 -- JSON
    created TEXT NOT NULL               -- ISO 8601, UTC
) WITHOUT ROWID;
"""
COLUMNS = (
    *("name", "file", "sha256", "bytes", "architecture", "structure_fingerprint", "mask"),
    *("task", "keep", "accuracy", "steps", "cost", "created"),
)


class ZooError(RuntimeError):
    """A zoo, or one of its entries, that cannot be used; the message names it, what was expected and what was found."""


class Index:
    """The rows of one ``index.sqlite``.

    Raises (every method): ZooError where SQLite fails: a damaged file, a full disk, an index that stays locked.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def version(self) -> int:
        """The schema's version; 0 where there is no index, or one whose creation did not come to its end."""
        if not self.path.exists():
            return 0
        with self._connect() as connection:
            version = int(connection.execute("PRAGMA user_version").fetchone()[0])
            if version == 0 and connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                raise ZooError(f"{self.path}: a database, but not of a zoo")
        if version > SCHEMA_VERSION:
            raise ZooError(
                f"{self.path}: written by a newer mvp_ext (schema {version}, this one knows {SCHEMA_VERSION})"
            )
        return version

    def create(self) -> None:
        """Make the tables. The caller sees to it that only one process does."""
        with self._connect() as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            # Tables and version come in one transaction: a kill leaves an index of version 0, which is made again.
            connection.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")

    def meta(self) -> dict[str, str]:
        with self._connect() as connection:
            return dict(connection.execute("SELECT key, value FROM meta").fetchall())

    def put_meta(self, key: str, value: str) -> None:
        with self._write() as connection:
            connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def check(self, values: Mapping[str, str]) -> None:
        """ZooError where a value of the backbone's contradicts a recorded one; what is unknown contradicts nothing."""
        self._compare(self.meta(), values)

    def record(self, values: Mapping[str, str]) -> None:
        """Record the backbone's values, those that are not yet; ZooError, and nothing recorded, on a contradiction."""
        with self._write() as connection:
            self._record(connection, values)

    def _record(self, connection: sqlite3.Connection, values: Mapping[str, str]) -> None:
        connection.executemany("INSERT OR IGNORE INTO meta VALUES (?, ?)", list(values.items()))
        self._compare(dict(connection.execute("SELECT key, value FROM meta").fetchall()), values)

    def _compare(self, recorded: Mapping[str, str], given: Mapping[str, str]) -> None:
        for key, got in given.items():
            expected = recorded.get(key, got)
            if expected != got:
                raise ZooError(
                    f"zoo {self.path.parent}: it is of another backbone: expected {key.replace('_', ' ')} "
                    f"{expected}, got {got}"
                )

    def rows(self) -> list[dict[str, Any]]:
        """All entries, by name: the order does not depend on which of several builders was faster."""
        with self._connect() as connection:
            found = connection.execute(f"SELECT {', '.join(COLUMNS)} FROM entries ORDER BY name").fetchall()
        return [dict(zip(COLUMNS, row, strict=True)) for row in found]

    def row(self, name: str) -> dict[str, Any] | None:
        with self._connect() as connection:
            query = f"SELECT {', '.join(COLUMNS)} FROM entries WHERE name = ?"
            found = connection.execute(query, (name,)).fetchone()
        return dict(zip(COLUMNS, found, strict=True)) if found else None

    def insert(self, row: Mapping[str, Any], backbone: Mapping[str, str], *, replacing: str | None) -> bool:
        """Record the backbone and insert a row, in place of the one whose file is ``replacing``, in one transaction.

        Returns False where another row has the name by now.
        """
        with self._write() as connection:
            self._record(connection, backbone)
            if replacing is not None:
                query = "DELETE FROM entries WHERE name = ? AND file = ?"
                connection.execute(query, (row["name"], replacing))
            values = [row[column] for column in COLUMNS]
            marks = ", ".join("?" * len(COLUMNS))
            query = f"INSERT OR IGNORE INTO entries ({', '.join(COLUMNS)}) VALUES ({marks})"
            return connection.execute(query, values).rowcount == 1

    def delete(self, name: str, file: str) -> bool:
        """Delete the row of that name and file; False if there is none."""
        with self._write() as connection:
            query = "DELETE FROM entries WHERE name = ? AND file = ?"
            return connection.execute(query, (name, file)).rowcount == 1

    def problems(self) -> list[str]:
        """What SQLite finds wrong in its own file; empty when it is sound."""
        with self._connect() as connection:
            found = [str(line) for (line,) in connection.execute("PRAGMA integrity_check").fetchall()]
        return [] if found == ["ok"] else found

    @contextlib.contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        try:
            # Autocommit: transactions are begun where they are needed, not where Python guesses.
            connection = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_SECONDS, isolation_level=None)
            try:
                connection.execute("PRAGMA synchronous = FULL")  # a commit outlives a power cut
                yield connection
            finally:
                connection.close()
        except sqlite3.Error as error:
            raise ZooError(f"{self.path}: {error}") from error

    @contextlib.contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it, or on any exception nothing."""
        with self._connect() as connection:
            connection.execute("BEGIN IMMEDIATE")  # wait for other writers here, not halfway
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
