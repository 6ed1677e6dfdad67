"""The zoo's index: one SQLite file with a row for each model. It knows rows and transactions, no model and no weights.

Every operation opens its own connection, so an index can be used from any thread and after a fork. Write-ahead
logging lets readers go on while somebody writes; writers wait for each other. An index that may not be written is read
as it lies. Older schemas are read, and brought up to date by the next transaction that writes.

Rows are data of others: text that is not UTF-8 costs no more than its row, and no statement of an index's own is run.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Writers hold the index for milliseconds (weights are written before), so this only runs out where one hangs.
BUSY_TIMEOUT_SECONDS = 60.0

# A commit outlives a power cut.
DURABLE = "PRAGMA synchronous = FULL"

# What leads from each version of the schema to the next; all of them make a new index.
_MIGRATIONS = (
    (
        "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
        """
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
        ) WITHOUT ROWID
        """,
    ),
    (
        # NULL: not known, the entry's file says it; 0: the entry has no class means and cannot vote
        "ALTER TABLE entries ADD COLUMN class_count INTEGER",
        "ALTER TABLE entries ADD COLUMN class_means BLOB",  # little-endian f32 [class_count, F]
        "ALTER TABLE entries ADD COLUMN temperature REAL",
        """
        CREATE TABLE models (
            name TEXT PRIMARY KEY,
            file TEXT NOT NULL UNIQUE,          -- below the zoo's directory
            sha256 TEXT NOT NULL,
            bytes INTEGER NOT NULL,
            structure_fingerprint TEXT NOT NULL,
            extra TEXT NOT NULL,                -- JSON
            created TEXT NOT NULL
        ) WITHOUT ROWID
        """,
        "CREATE TABLE facts (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",  # JSON
    ),
)
SCHEMA_VERSION = len(_MIGRATIONS)
# That each version of the schema has beside those before it.
_TABLES = (("meta", "entries"), ("models", "facts"))
FILE_COLUMNS = ("name", "file", "sha256", "bytes", "structure_fingerprint", "created")
ENTRY_COLUMNS = (*FILE_COLUMNS, "architecture", "mask", "task", "keep", "accuracy", "steps", "cost")
MEANS_COLUMNS = ("class_count", "class_means", "temperature")
MODEL_COLUMNS = (*FILE_COLUMNS, "extra")


class ZooError(RuntimeError):
    """A zoo, or one of its entries, that cannot be used; the message names it, what was expected and what was found."""


class DamagedIndexError(ZooError):
    """An index that SQLite cannot read; it can be made again from the files of the zoo's models."""


# What SQLite says of a damaged database beside its plain DatabaseError ("malformed", "not a database").
_DAMAGE = ("no such table", "no such column", "has no column", "unsupported file format", "malformed")


class Index:
    """The rows of one ``index.sqlite``.

    Raises (every method): ZooError where SQLite fails: a full disk, an index that stays locked; DamagedIndexError of a
    damaged file.

    Args:
        path: of the file.
        kept_in: of an index outside of its zoo, which is never written: the folder that goes with it.
    """

    def __init__(self, path: Path, *, kept_in: Path | None = None) -> None:
        self.path = path
        self._read_only = kept_in is not None
        self._folder: Path | None = None
        if kept_in is not None:
            self._keep(kept_in)

    def _keep(self, folder: Path) -> None:
        self._folder = folder
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    def version(self) -> int:
        """The schema's version; 0 where there is no index, or one whose creation did not come to its end."""
        if not self.path.exists():
            return 0
        with self._read() as connection:
            version = _version(connection)
            parts = connection.execute("SELECT type, name FROM sqlite_master").fetchall()
        if version == 0 and parts:
            raise ZooError(f"{self.path}: a database, but not of a zoo")
        if version > SCHEMA_VERSION:
            raise ZooError(
                f"{self.path}: written by a newer mvp_ext (schema {version}, this one knows {SCHEMA_VERSION})"
            )
        tables = {name for kind, name in parts if kind == "table"}
        # Triggers and views would run statements of their maker's.
        if not {kind for kind, _ in parts} <= {"table", "index"} or not tables >= {
            name for names in _TABLES[:version] for name in names
        }:
            raise DamagedIndexError(f"{self.path}: its tables are not those of a zoo")
        return version

    def writable(self) -> bool:
        """Whether this process may write: the index, and beside it, where SQLite keeps its log."""
        if self._read_only or not os.access(self.path.parent, os.W_OK):
            return False
        return not self.path.exists() or os.access(self.path, os.W_OK)

    def create(self) -> None:
        """Make the tables. The caller sees to it that only one process does."""
        with self._connect() as connection:
            connection.execute("PRAGMA journal_mode = WAL")
        with self._write():
            # Tables and version come in one transaction: a kill leaves an index of version 0, which is made again.
            pass

    # ---- the zoo's own values

    def meta(self) -> dict[str, str]:
        """The backbone's recorded values."""
        with self._read() as connection:
            return dict(connection.execute("SELECT key, value FROM meta").fetchall())

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

    def facts(self) -> dict[str, str]:
        """What else is recorded of the zoo: key → JSON."""
        with self._read() as connection:
            if _version(connection) < 2:
                return {}
            return dict(connection.execute("SELECT key, value FROM facts").fetchall())

    def record_facts(self, facts: Mapping[str, str]) -> None:
        """Record these, each in place of what its key had."""
        with self._write() as connection:
            connection.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", list(facts.items()))

    # ---- entries

    def rows(
        self, columns: Sequence[str] = ENTRY_COLUMNS, *, names: Sequence[str] | None = None
    ) -> list[dict[str, Any]]:
        """All entries, or those of these names, by name: the order does not depend on which builder was faster.

        Beside ``columns`` each has "zoo_fingerprint": the structure's that is recorded of the zoo, or None.
        """
        with self._read() as connection:
            rest, values = "ORDER BY name", tuple[str, ...]()
            if names is not None:
                rest = "WHERE name IN (SELECT value FROM json_each(?)) ORDER BY name"
                values = (json.dumps(list(names)),)
            found = _select(connection, "entries", columns, rest, values)
            known = dict(connection.execute("SELECT key, value FROM meta").fetchall())
        return [{**row, "zoo_fingerprint": known.get("structure_fingerprint")} for row in found]

    def without_means(self) -> list[dict[str, Any]]:
        """Name and file of the entries whose class means the index does not know."""
        with self._read() as connection:
            unknown = "WHERE class_count IS NULL" if _version(connection) >= 2 else ""
            return _select(connection, "entries", ("name", "file"), unknown)

    def insert(self, row: Mapping[str, Any], backbone: Mapping[str, str], *, replacing: str | None) -> bool:
        """Record the backbone and insert a row, in place of the one whose file is ``replacing``, in one transaction.

        Returns False where another row has the name by now.
        """
        with self._write() as connection:
            self._record(connection, backbone)
            if replacing is not None:
                _delete(connection, "entries", row["name"], replacing)
            return _insert(connection, "entries", row)

    def delete(self, name: Any, file: Any, table: str = "entries") -> bool:
        """Delete the row of that name and file, as ``rows`` gave them; False if there is none."""
        with self._write() as connection:
            return _delete(connection, table, name, file)

    # ---- models that the entries share

    def models(self) -> list[dict[str, Any]]:
        """All of them, by name."""
        with self._read() as connection:
            if _version(connection) < 2:
                return []
            return _select(connection, "models", MODEL_COLUMNS, "ORDER BY name")

    def put_model(
        self, row: Mapping[str, Any], backbone: Mapping[str, str], *, if_absent: bool = False
    ) -> Any:
        """Record the backbone and put a row in place of the one of its name; with ``if_absent`` that one stays.

        Returns the file that no row names any more, or None: that of the old row, or of this one.
        """
        with self._write() as connection:
            self._record(connection, backbone)
            old = _select(connection, "models", ("file",), "WHERE name = ?", (row["name"],))
            if old and if_absent:
                return row["file"]
            connection.execute("DELETE FROM models WHERE name = ?", (row["name"],))
            _insert(connection, "models", row)
            return old[0]["file"] if old else None

    def adopt(self, means: Iterable[Mapping[str, Any]], models: Iterable[Mapping[str, Any]]) -> None:
        """What an older schema had no room for, in one transaction.

        Args:
            means: ``MEANS_COLUMNS`` with the name and file of the entry whose they are.
            models: rows of models; one whose name has a row by now is passed over.
        """
        with self._write() as connection:
            assignments = ", ".join(f"{column} = :{column}" for column in MEANS_COLUMNS)
            query = f"UPDATE entries SET {assignments} WHERE name = :name AND file = :file"
            connection.executemany(query, list(means))
            for row in models:
                _insert(connection, "models", row)

    # ---- as a whole

    def copy_to(self, path: Path) -> Index:
        """A copy as of one moment, whoever writes meanwhile: one file, without what was deleted."""
        copy = Index(path)
        with self._connect() as source, copy._connect() as target:
            source.backup(target)
            target.execute("PRAGMA journal_mode = DELETE")
            # Rows of models that were removed are no reader's business.
            target.execute("VACUUM")
        return copy

    def restore(self, copy: Index) -> None:
        """Become what ``copy`` is, in one transaction: who reads has the old rows or the new ones."""
        with copy._connect() as source, self._connect() as target:
            source.backup(target)

    # ---- SQLite

    def problems(self) -> list[str]:
        """What SQLite finds wrong in its own file; empty when it is sound."""
        with self._read() as connection:
            found = [str(line) for (line,) in connection.execute("PRAGMA integrity_check").fetchall()]
        return [] if found == ["ok"] else found

    @contextlib.contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        try:
            # Autocommit: transactions are begun where they are needed, not where Python guesses.
            connection = sqlite3.connect(
                self._uri(), uri=True, timeout=BUSY_TIMEOUT_SECONDS, isolation_level=None
            )
            try:
                connection.text_factory = _text
                connection.execute(DURABLE)
                yield connection
            finally:
                connection.close()
        # Python cannot read all that SQLite says of a damaged schema.
        except (sqlite3.Error, UnicodeDecodeError) as error:
            plain = type(error) in (sqlite3.DatabaseError, UnicodeDecodeError)
            if plain or any(text in str(error) for text in _DAMAGE):
                raise DamagedIndexError(
                    f"{self.path}: {error}; `mvp-ext zoo verify --repair` makes the index again from the entries"
                ) from error
            raise ZooError(f"{self.path}: {error}") from error

    def _uri(self) -> str:
        uri = self.path.absolute().as_uri()
        if self.writable():
            return uri
        # SQLite wants to make files beside a database with a log, unless told that nobody writes it.
        log, shared = (self.path.with_name(f"{self.path.name}{end}") for end in ("-wal", "-shm"))
        if not log.exists() or log.stat().st_size == 0:
            return f"{uri}?immutable=1"
        if shared.exists():
            return f"{uri}?mode=ro"
        # A killed writer's log, and no place to recover it in.
        if self._folder is None:
            self._keep(Path(tempfile.mkdtemp(prefix="mvp_ext-index-")))
            assert self._folder is not None
            for path in (self.path, log):
                shutil.copyfile(path, self._folder / path.name)
            # Whoever closes a database last puts its log into it.
            with contextlib.closing(sqlite3.connect(self._folder / self.path.name)) as connection:
                _version(connection)
        copy = self._folder / self.path.name
        return f"{copy.as_uri()}?immutable=1"

    @contextlib.contextmanager
    def _read(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all statements see the index as of one moment, whoever writes meanwhile."""
        with self._connect() as connection:
            connection.execute("BEGIN")
            yield connection

    @contextlib.contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        """One transaction on the newest schema: all of it, or on any exception nothing."""
        with self._connect() as connection:
            connection.execute("BEGIN IMMEDIATE")  # wait for other writers here, not halfway
            try:
                missing = _MIGRATIONS[_version(connection) :]
                for statement in (line for migration in missing for line in migration):
                    connection.execute(statement)
                if missing:
                    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _select(
    connection: sqlite3.Connection, table: str, columns: Sequence[str], rest: str, values: Sequence[Any] = ()
) -> list[dict[str, Any]]:
    """Rows as dicts; a column that an older schema lacks is None."""
    known = {column for _, column, *_ in connection.execute(f"PRAGMA table_info({table})")}
    wanted = ", ".join(column if column in known else "NULL" for column in columns)
    found = connection.execute(f"SELECT {wanted} FROM {table} {rest}", values).fetchall()
    return [dict(zip(columns, row, strict=True)) for row in found]


def _delete(connection: sqlite3.Connection, table: str, name: Any, file: Any) -> bool:
    """By their bytes: what is no text, or of another kind, can be deleted, too."""
    values = [v.encode("utf-8", "surrogateescape") if isinstance(v, str) else v for v in (name, file)]
    query = f"DELETE FROM {table} WHERE CAST(name AS BLOB) IS ? AND CAST(file AS BLOB) IS ?"
    return connection.execute(query, values).rowcount == 1


def _insert(connection: sqlite3.Connection, table: str, row: Mapping[str, Any]) -> bool:
    """False where there is a row of that name."""
    marks = ", ".join("?" * len(row))
    query = f"INSERT OR IGNORE INTO {table} ({', '.join(row)}) VALUES ({marks})"
    return connection.execute(query, list(row.values())).rowcount == 1
