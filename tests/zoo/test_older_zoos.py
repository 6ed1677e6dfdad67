"""Zoos that were made before the index knew class means and shared models: read as they are, and brought up to date."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch

from mvp_ext.model.checkpoint import save_pruned
from mvp_ext.model.create import create_model
from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.surgery import prune_model
from mvp_ext.zoo.index import SCHEMA_VERSION
from mvp_ext.zoo.shared import START, UNIVERSAL, is_refined
from mvp_ext.zoo.travel import merge_zoos, pull_zoo, push_zoo
from mvp_ext.zoo.zoo import NewEntry, Zoo, ZooError

# As version 1 wrote it, to the letter.
SCHEMA_1 = """
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


@pytest.fixture(scope="module")
def small():
    """A pruned model, its mask and structure."""
    torch.manual_seed(0)
    dense = create_model("test_resnet", num_classes=3)
    structure = find_structure(dense)
    mask = Mask.random(structure, 0.5, 0, align=1)
    return prune_model(dense, mask, structure=structure).eval(), mask, structure


@pytest.fixture
def old(tmp_path, small):
    """A zoo of version 1: entries "a" and "b", one without class means, and two shared models in its directory."""
    model, mask, structure = small
    path = tmp_path / "old"
    (path / "entries").mkdir(parents=True)
    connection = sqlite3.connect(path / "index.sqlite")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.executescript(f"BEGIN; {SCHEMA_1} PRAGMA user_version = 1; COMMIT;")
    for key, value in (
        ("architecture", structure.architecture),
        ("structure_fingerprint", structure.fingerprint),
    ):
        connection.execute("INSERT INTO meta VALUES (?, ?)", (key, value))
    for name in ("a", "b"):
        file = path / "entries" / f"{name}-0.safetensors"
        save_pruned(model, file, mask=mask, structure=structure, extra=means(name))
        row = (
            *(name, file.name, hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_size),
            *(structure.architecture, structure.fingerprint, mask.to_bytes(), f'{{"name": "{name}"}}'),
            *(mask.keep, 0.5, 7, "{}", "2026-01-01T00:00:00+00:00"),
        )
        connection.execute(f"INSERT INTO entries VALUES ({', '.join('?' * len(row))})", row)
    connection.commit()
    connection.close()
    extra = {"keep": 0.5, "classes": [0, 1], "result": {"cost": {"steps": 32}}}
    save_pruned(model, path / "start.safetensors", mask=mask, structure=structure, extra=extra)
    save_pruned(model, path / "universal.safetensors", mask=mask, structure=structure, extra={"keep": 0.25})
    return path


def means(name):
    if name == "b":
        return {}
    generator = torch.Generator().manual_seed(1)
    return {
        "class_means": torch.randn(3, 8, generator=generator),
        "temperature": torch.tensor(0.7),
        "head_weight": torch.randn(3, 8),
    }


def version(path):
    connection = sqlite3.connect(path / "index.sqlite")
    found = connection.execute("PRAGMA user_version").fetchone()[0]
    connection.close()
    return found


def assert_answers(zoo, small):
    """Everything that was in the old zoo, whatever its schema is now."""
    _, mask, structure = small
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        entries = zoo.entries(structure.fingerprint)
        (known,) = zoo.class_means(structure.fingerprint)
    assert [(e.name, e.mask, e.accuracy, e.steps) for e in entries] == [
        ("a", mask, 0.5, 7),
        ("b", mask, 0.5, 7),
    ]
    assert known.name == "a"
    assert torch.equal(known.means, means("a")["class_means"])
    assert known.temperature == pytest.approx(0.7)
    assert zoo.is_sound("a")
    entries[0].load()
    start, universal = zoo.shared(START), zoo.shared(UNIVERSAL)
    assert is_refined(zoo)
    assert start.extra == {"keep": 0.5, "classes": [0, 1], "result": {"cost": {"steps": 32}}}
    assert universal.extra == {"keep": 0.25}
    assert start.structure_fingerprint == structure.fingerprint
    assert start.load().mask == mask
    assert universal.is_sound()
    assert zoo.shared("other") is None
    assert zoo.facts() == {}
    assert zoo.verify() == []


def test_a_reader_leaves_it_as_it_is(old, small):
    before = (old / "index.sqlite").read_bytes()
    assert_answers(Zoo(old, create=False), small)
    assert version(old) == 1
    assert (old / "index.sqlite").read_bytes() == before


def test_a_writer_brings_it_up_to_date(old, small, monkeypatch):
    assert_answers(Zoo(old), small)
    assert version(old) == SCHEMA_VERSION
    connection = sqlite3.connect(old / "index.sqlite")
    rows = connection.execute(
        "SELECT name, class_count, length(class_means), temperature FROM entries"
    ).fetchall()
    assert rows == [("a", 3, 3 * 8 * 4, pytest.approx(0.7)), ("b", 0, 0, None)]
    assert connection.execute("SELECT name, file FROM models ORDER BY name").fetchall() == [
        ("start", "start.safetensors"),
        ("universal", "universal.safetensors"),
    ]
    connection.close()
    # From now on no file is opened for it.
    monkeypatch.setattr("mvp_ext.zoo.rows.read_means", pytest.fail)
    monkeypatch.setattr("mvp_ext.zoo.rowless.model_row", pytest.fail)
    assert_answers(Zoo(old), small)


@pytest.mark.parametrize(
    "write",
    [
        lambda zoo, small: zoo.record_facts(x=1),
        lambda zoo, small: zoo.add_model(NewEntry("c", *small, {"name": "c"})),
        lambda zoo, small: zoo.save_shared("other", *small),
        lambda zoo, small: zoo.remove("b"),
    ],
)
def test_any_transaction_brings_the_schema_up_to_date(old, small, write):
    """Also of one that opened it to read; the next that opens it to write gives rows to the rest."""
    write(Zoo(old, create=False), small)
    assert version(old) == SCHEMA_VERSION
    for zoo in (Zoo(old, create=False), Zoo(old)):
        assert torch.equal(zoo.class_means()[0].means, means("a")["class_means"])
        assert is_refined(zoo)
        assert zoo.verify() == []


def test_a_zoo_that_may_not_be_written(old, small, monkeypatch):
    """On a read-only disk: nothing is written, not even SQLite's own files, and every question is answered."""

    def content():
        return {path: path.read_bytes() for path in sorted(old.rglob("*")) if path.is_file()}

    before = content()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK and access(path, mode))
    with monkeypatch.context() as patch:
        # Its lock could not be made either.
        patch.setattr("mvp_ext.zoo.layout.os.open", refuse)
        assert_answers(Zoo(old), small)
    assert content() == before
    with pytest.raises(ZooError, match="readonly"):
        Zoo(old).record_facts(x=1)
    assert content() == before


def refuse(*_):
    raise PermissionError(13, "Permission denied")


def test_what_cannot_be_read_is_named_and_does_not_hinder(old, small):
    (old / "start.safetensors").write_bytes(b"no model")
    (old / "entries" / "a-0.safetensors").unlink()
    for zoo in (Zoo(old, create=False), Zoo(old)):
        with pytest.warns(UserWarning, match="skipped missing: entry 'a'"):
            assert zoo.class_means() == []
        with pytest.raises(ZooError, match=r"model 'start': .*start\.safetensors"):
            zoo.shared(START)
        assert zoo.shared(UNIVERSAL) is not None
        assert [(p.kind, p.entry, p.model) for p in zoo.verify()] == [
            ("missing", "a", None),
            ("damaged", None, "start"),
        ]
    zoo.verify(repair=True)
    assert zoo.verify() == []
    assert zoo.shared(START) is None


def test_its_index_is_made_again_from_what_its_files_say(old, small):
    """They have no record of their rows: names are those of the files."""
    (old / "index.sqlite").unlink()
    with pytest.warns(UserWarning, match="its index is gone; it was made again from the files of 2 entries"):
        zoo = Zoo(old, create=False)
    assert [(entry.name, entry.mask) for entry in zoo] == [("a", small[1]), ("b", small[1])]
    assert torch.equal(zoo.class_means()[0].means, means("a")["class_means"])
    assert zoo.shared(START).extra["keep"] == 0.5
    assert zoo.shared(UNIVERSAL).load().mask == small[1]
    assert zoo.verify() == []


def test_kill_while_it_is_brought_up_to_date(old, small):
    """At any statement of the transaction: the old zoo is left, or the new one."""
    script = """
        import os, signal, sqlite3, sys
        from mvp_ext.zoo.zoo import Zoo
        left = int(sys.argv[2])
        connect = sqlite3.connect

        def killing(*args, **kwargs):
            def count(statement):
                global left
                left -= statement.startswith(("ALTER", "CREATE", "UPDATE", "INSERT", "COMMIT"))
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            connection = connect(*args, **kwargs)
            connection.set_trace_callback(count)
            return connection

        sqlite3.connect = killing
        Zoo(sys.argv[1])
    """
    for moment in (1, 4, 6, 8, 9):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), str(old), str(moment)], check=False
        )
        assert done.returncode == -9, moment
        assert version(old) == 1
        assert_answers(Zoo(old, create=False), small)
    assert_answers(Zoo(old), small)


def test_travels(old, small, tmp_path):
    """As it is, also where it may not be brought up to date; what is pulled is."""
    pytest.importorskip("fsspec")
    push_zoo(Zoo(old, create=False), str(tmp_path / "shelf"))
    assert version(old) == 1
    pulled = pull_zoo(str(tmp_path / "shelf"), tmp_path / "pulled")
    assert version(pulled.path) == SCHEMA_VERSION
    assert_answers(pulled, small)
    assert pulled.verify() == []
    merged = merge_zoos([Zoo(old, create=False), pulled], tmp_path / "merged")
    assert_answers(merged, small)
    assert merged.verify() == []
