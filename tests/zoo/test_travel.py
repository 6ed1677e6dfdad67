"""Zoos travel whole: what arrives is equal, a stop costs nothing, and nobody meets half of one."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from mvp_ext.model.card import ModelCard
from mvp_ext.model.preprocessing import Preprocessing
from mvp_ext.train.backbone import BackboneIdentity
from mvp_ext.zoo import travel
from mvp_ext.zoo.remote import Remote
from mvp_ext.zoo.shared import START
from mvp_ext.zoo.travel import merge_zoos, pull_zoo, push_zoo
from mvp_ext.zoo.zoo import NewEntry, Zoo, ZooError

fsspec = pytest.importorskip("fsspec", reason="the extra remote is not installed")
from fsspec.implementations.memory import MemoryFileSystem  # noqa: E402
from fsspec.registry import known_implementations  # noqa: E402

NAMES = ("a", "b", "c")
SEEN = Preprocessing(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@pytest.fixture(autouse=True)
def _not_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody pulls the plug: the disk need not be waited for."""
    monkeypatch.setattr("mvp_ext.zoo.index.DURABLE", "PRAGMA synchronous = OFF")
    monkeypatch.setattr(os, "fsync", lambda handle: None)


class Stopped(OSError):
    pass


class Flaky(MemoryFileSystem):
    """``flaky://``: a store in memory that fails after so many operations, and says which files it moved."""

    protocol = "flaky"
    store: dict[str, Any] = {}  # noqa: RUF012 (fsspec's own way)
    pseudo_dirs: list[str] = [""]  # noqa: RUF012
    left: float = float("inf")
    moved: list[str] = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(str(path).removeprefix("flaky://"))

    @classmethod
    def spend(cls) -> None:
        cls.left -= 1
        if cls.left < 0:
            raise Stopped("the line is down")

    def pipe_file(self, path: str, value: bytes, *args: Any, **kwargs: Any) -> None:
        # Half of it arrives where it stops.
        super().pipe_file(path, value[: len(value) // 2])
        self.spend()
        super().pipe_file(path, value, *args, **kwargs)

    def mv(self, path1: str, path2: str, **kwargs: Any) -> None:
        self.spend()
        self.moved.append(Path(path2).name)
        super().mv(path1, path2, **kwargs)

    def get_file(self, rpath: str, lpath: str, **kwargs: Any) -> None:
        Path(lpath).write_bytes(self.cat_file(rpath)[:10])
        self.spend()
        self.moved.append(Path(rpath).name)
        super().get_file(rpath, lpath, **kwargs)


fsspec.register_implementation("flaky", Flaky, clobber=True)


@pytest.fixture
def flaky() -> Iterator[type[Flaky]]:
    Flaky.store.clear()
    Flaky.pseudo_dirs[:] = [""]
    Flaky.moved.clear()
    Flaky.left = float("inf")
    yield Flaky
    Flaky.store.clear()


@pytest.fixture
def memory() -> Iterator[str]:
    yield "memory://shelf/zoo"
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def new_entry(small: Any, name: str, number: int = 0, **options: Any) -> NewEntry:
    means = {"class_means": torch.full((2, 8), float(number)), "temperature": torch.tensor(0.7)}
    task = {"name": name, "classes": ["x", "y|z"], "seed": number}
    card = ModelCard(SEEN, ("x", "y", "z"), name)
    cost = {"steps": 7, "seconds": 0.5}
    return NewEntry(name, *small[number % 2], task, min(0.25 * number, 1), 7, cost, card, means, **options)


@pytest.fixture(scope="module")
def template(small: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo as builders leave it: backbone, facts, a start model and three entries."""
    path = tmp_path_factory.mktemp("template") / "zoo"
    zoo = Zoo(path, backbone=BackboneIdentity("test_resnet", small[0][2].fingerprint, "5eed"))
    zoo.record_facts(settings={"keep": 0.5}, preprocessing=SEEN)
    zoo.save_shared(START, *small[0], {"keep": 0.5, "classes": [0], "result": {"cost": {"steps": 3}}})
    for number, name in enumerate(NAMES):
        zoo.add_model(new_entry(small, name, number))
    return path


@pytest.fixture
def zoo(template: Path, tmp_path: Path) -> Zoo:
    shutil.copytree(template, tmp_path / "zoo")
    return Zoo(tmp_path / "zoo")


def rows(zoo: Zoo) -> dict[str, Any]:
    """All that the index says, to the last byte."""
    index = zoo._index
    columns = ("name", "file", "sha256", "bytes", "structure_fingerprint", "created", "architecture", "mask")
    columns += ("task", "keep", "accuracy", "steps", "cost", "class_count", "class_means", "temperature")
    return {
        "entries": index.rows(columns),
        "models": index.models(),
        "meta": index.meta(),
        "facts": zoo.facts(),
    }


def names(zoo: Zoo) -> list[str]:
    return [entry.name for entry in zoo.entries()]


def files(zoo: Zoo) -> dict[str, bytes]:
    """All files but the index, whose bytes SQLite orders as it likes, and locks."""
    found = (path for path in sorted(zoo.path.rglob("*")) if path.is_file())
    kept = {str(p.relative_to(zoo.path)): p.read_bytes() for p in found}
    return {name: data for name, data in kept.items() if not name.startswith((".", "index.sqlite"))}


def same(one: Zoo, other: Zoo) -> bool:
    return rows(one) == rows(other) and files(one) == files(other)


# ---- there and back


@pytest.mark.parametrize("where", ["memory", "file", "plain"])
def test_what_is_pulled_is_what_was_pushed(where: str, zoo: Zoo, memory: str, tmp_path: Path) -> None:
    url = {"memory": memory, "file": (tmp_path / "shelf").as_uri(), "plain": f"{tmp_path}/shelf"}[where]
    said: list[tuple[str, int, int]] = []
    push_zoo(zoo, url, progress=lambda *told: said.append(told))
    assert said == [("files", done, 4) for done in range(5)]
    said.clear()
    pulled = pull_zoo(url, tmp_path / "pulled", progress=lambda *told: said.append(told))
    assert said == [("files", done, 4) for done in range(5)]
    assert same(pulled, zoo)
    assert pulled.verify() == []
    assert names(pulled) == list(NAMES)
    assert pulled.preprocessing == SEEN
    assert pulled.shared(START).extra == zoo.shared(START).extra
    assert [k.means.tolist() for k in pulled.class_means()] == [k.means.tolist() for k in zoo.class_means()]
    assert torch.equal(pulled["b"].read().extra["class_means"], zoo["b"].read().extra["class_means"])
    assert not (pulled.path / ".incoming").exists()


def test_nothing_is_moved_twice(zoo: Zoo, flaky: type[Flaky], small: Any, tmp_path: Path) -> None:
    push_zoo(zoo, "flaky://zoo")
    assert len(flaky.moved) == 4 + 3
    flaky.moved.clear()
    push_zoo(Zoo(zoo.path), "flaky://zoo")
    assert flaky.moved == []
    pulled = pull_zoo("flaky://zoo", tmp_path / "pulled")
    assert len(flaky.moved) == 4 + 1
    flaky.moved.clear()
    entry = zoo.add_model(new_entry(small, "d", 3))
    push_zoo(zoo, "flaky://zoo")
    assert [name for name in flaky.moved if name.endswith("tensors")] == [f"{entry.sha256}.safetensors"]
    flaky.moved.clear()
    pulled = pull_zoo("flaky://zoo", tmp_path / "pulled")
    assert flaky.moved[1:] == [f"{entry.sha256}.safetensors"]
    assert same(pulled, zoo)
    zoo.remove("a")
    push_zoo(zoo, "flaky://zoo")
    pulled = pull_zoo("flaky://zoo", tmp_path / "pulled")
    assert same(pulled, zoo)
    assert pulled.verify() == []


def test_what_was_removed_does_not_travel(zoo: Zoo, tmp_path: Path) -> None:
    zoo.remove("b")
    push_zoo(zoo, str(tmp_path / "shelf"))
    (index,) = (tmp_path / "shelf" / "files").glob("*.sqlite")
    assert b'"name": "b"' not in index.read_bytes()
    assert b'"name": "c"' in index.read_bytes()


def test_an_empty_zoo(tmp_path: Path, memory: str) -> None:
    zoo = Zoo(tmp_path / "zoo")
    push_zoo(zoo, memory)
    assert same(pull_zoo(memory, tmp_path / "pulled"), zoo)


# ---- stops


def test_a_push_that_is_stopped_anywhere_goes_on(zoo: Zoo, flaky: type[Flaky], tmp_path: Path) -> None:
    steps = 2 * (4 + 3)
    for stop in range(steps):
        flaky.store.clear()
        flaky.left = stop
        flaky.moved.clear()
        with pytest.raises(ZooError, match=r"flaky://zoo: .*the line is down; what was moved stays"):
            push_zoo(zoo, "flaky://zoo")
        assert len(flaky.moved) == stop // 2
        first = "zoo.json" in flaky.moved
        flaky.left = float("inf")
        if not first:
            with pytest.raises(ZooError, match="no zoo there"):
                pull_zoo("flaky://zoo", tmp_path / "none")
            assert not (tmp_path / "none").exists()
        push_zoo(zoo, "flaky://zoo")
        assert len(flaky.moved) == len(set(flaky.moved)) == steps // 2
        assert not [name for name in flaky.store if name.endswith(".part")]
    assert same(pull_zoo("flaky://zoo", tmp_path / "pulled"), zoo)


def test_a_pull_that_is_stopped_anywhere_goes_on(
    zoo: Zoo, flaky: type[Flaky], small: Any, tmp_path: Path
) -> None:
    push_zoo(zoo, "flaky://zoo")
    old = pull_zoo("flaky://zoo", tmp_path / "old")
    zoo.remove("a")
    for name in ("a", "d"):
        zoo.add_model(new_entry(small, name, 3))
    push_zoo(zoo, "flaky://zoo")
    for stop in range(5):
        flaky.moved.clear()
        flaky.left = stop
        fresh = tmp_path / f"fresh{stop}"
        with pytest.raises(ZooError, match="the line is down"):
            pull_zoo("flaky://zoo", fresh)
        assert len(Zoo(fresh)) == 0
        assert Zoo(fresh).verify() == []
        flaky.left = float("inf")
        assert same(pull_zoo("flaky://zoo", fresh), zoo)
        assert len(flaky.moved) == len(set(flaky.moved)) == 6
    for stop in range(3):
        pulled = Zoo(shutil.copytree(old.path, tmp_path / f"pulled{stop}"))
        flaky.moved.clear()
        flaky.left = stop
        with pytest.raises(ZooError, match="the line is down"):
            pull_zoo("flaky://zoo", pulled.path)
        assert same(pulled, old)
        assert pulled.verify() == []
        flaky.left = float("inf")
        assert same(pull_zoo("flaky://zoo", pulled.path), zoo)
        assert len(flaky.moved) == len(set(flaky.moved)) == 3
        assert pulled.verify() == []


def test_two_pulls_into_one_directory(zoo: Zoo, flaky: type[Flaky], tmp_path: Path) -> None:
    push_zoo(zoo, "flaky://zoo")
    flaky.moved.clear()
    with ThreadPoolExecutor(2) as pool:
        pulled = list(pool.map(lambda _: pull_zoo("flaky://zoo", tmp_path / "pulled"), range(2)))
    assert same(pulled[0], zoo)
    assert len(flaky.moved) == len(set(flaky.moved)) + 1
    assert pulled[1].verify() == []


@pytest.mark.parametrize("moment", ["restore", "remember", "replace"])
def test_a_kill_while_the_pulled_zoo_is_put_in_place(
    moment: str, zoo: Zoo, memory: str, small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_zoo(zoo, memory)
    pulled = pull_zoo(memory, tmp_path / "pulled")
    before = rows(pulled)
    zoo.remove("a")
    zoo.add_model(new_entry(small, "d", 3))
    push_zoo(zoo, memory)
    with monkeypatch.context() as patch:

        def killed(*args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

        if moment == "restore":
            patch.setattr(type(zoo._index), "restore", killed)
        elif moment == "remember":
            # The second time.
            calls = iter([travel._remember, killed])
            patch.setattr(travel, "_remember", lambda *args: next(calls)(*args))
        else:
            patch.setattr(travel, "sync_names", killed)
        with pytest.raises(KeyboardInterrupt):
            pull_zoo(memory, pulled.path)
    assert rows(Zoo(pulled.path)) == (rows(zoo) if moment == "remember" else before)
    # What the URL has changes again before the next pull.
    zoo.remove("d")
    push_zoo(zoo, memory)
    assert rows(pull_zoo(memory, pulled.path)) == rows(zoo)
    # At worst with a file that is nobody's, as every writer that is killed may leave one.
    assert {problem.kind for problem in pulled.verify(repair=True)} <= {"stray"}
    assert same(pulled, zoo)


# ---- snapshots


def test_a_pull_while_another_pushes_gets_one_snapshot(
    zoo: Zoo, memory: str, small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_zoo(zoo, memory)
    before = rows(zoo)
    fetch, write = Remote.fetch, Remote.write
    pushed = []

    def fetch_late(remote: Remote, *args: Any) -> None:
        if not pushed:
            pushed.append(True)
            zoo.remove("a")
            zoo.add_model(new_entry(small, "d", 3))
            push_zoo(zoo, memory)
        fetch(remote, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Remote, "fetch", fetch_late)
        assert rows(pull_zoo(memory, tmp_path / "first")) == before
    second = rows(zoo)
    assert rows(pull_zoo(memory, tmp_path / "second")) == second
    zoo.remove("d")
    pulls = iter(range(100))

    def write_and_pull(remote: Remote, *args: Any) -> None:
        assert rows(pull_zoo(memory, tmp_path / f"pull{next(pulls)}")) == second
        write(remote, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Remote, "write", write_and_pull)
        # The card is written when the snapshot is there.
        patch.setattr(travel, "CARD", "zoo.json")
        patch.setattr(travel, "zoo_card", lambda *args: Remote(memory).read("zoo.json").decode())
        push_zoo(zoo, memory)
    assert next(pulls) >= 2
    assert rows(pull_zoo(memory, tmp_path / "third")) == rows(zoo) != second


def test_models_that_change_during_a_push(
    zoo: Zoo, memory: str, small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Remote.write
    changes = iter([lambda: zoo.remove("c"), lambda: zoo.add_model(new_entry(small, "b", 2), replace=True)])

    def change_and_write(remote: Remote, *args: Any) -> None:
        next(changes, lambda: None)()
        write(remote, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Remote, "write", change_and_write)
        push_zoo(zoo, memory)
    pulled = pull_zoo(memory, tmp_path / "pulled")
    assert names(pulled) == ["a", "b"]
    assert same(pulled, zoo)


# ---- what others push, and entries of one's own


def test_nobody_loses_entries(zoo: Zoo, memory: str, small: Any, tmp_path: Path) -> None:
    push_zoo(zoo, memory)
    pulled = pull_zoo(memory, tmp_path / "pulled")
    pulled.add_model(new_entry(small, "mine", 1))
    zoo.add_model(new_entry(small, "theirs", 1))
    push_zoo(zoo, memory)
    before = rows(pulled)
    with pytest.raises(
        ZooError, match=r"models of its own, which would be lost: entry 'mine'; push it first"
    ):
        pull_zoo(memory, pulled.path)
    with pytest.raises(ZooError, match=r"and would be lost: entry 'theirs'; pull it into"):
        push_zoo(pulled, memory)
    assert rows(pulled) == before
    other = pull_zoo(memory, tmp_path / "other")
    merged = merge_zoos([pulled, other], tmp_path / "merged")
    assert names(merged) == [*NAMES, "mine", "theirs"]
    push_zoo(merged, memory)
    assert same(pull_zoo(memory, zoo.path), merged)
    push_zoo(pulled, memory, replace=True)
    # Made here: it stays, though it was at the URL for a while. Pulled from there, it goes.
    with pytest.raises(ZooError, match="would be lost: entry 'theirs'; push it first"):
        pull_zoo(memory, zoo.path)
    assert names(zoo) == [*NAMES, "mine", "theirs"]
    assert names(pull_zoo(memory, other.path)) == [*NAMES, "mine"]


def test_a_stop_makes_nobodys_entries_look_pulled_or_pushed(
    zoo: Zoo, flaky: type[Flaky], small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A push that ends before its manifest, and a pull that ends before its index, have moved nothing."""
    theirs = Zoo(tmp_path / "theirs", backbone=zoo.backbone)
    theirs.add_model(new_entry(small, "theirs", 1))
    flaky.left = 2 * (4 + 1)
    with pytest.raises(ZooError, match="the line is down"):
        push_zoo(zoo, "flaky://zoo")
    flaky.left = float("inf")
    assert "zoo.json" not in flaky.moved
    push_zoo(theirs, "flaky://zoo")
    with pytest.raises(ZooError, match="models of its own, which would be lost: entry 'a'"):
        pull_zoo("flaky://zoo", zoo.path)

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    mine = Zoo(tmp_path / "mine")
    with monkeypatch.context() as patch:
        patch.setattr(type(mine._index), "restore", killed)
        with pytest.raises(KeyboardInterrupt):
            pull_zoo("flaky://zoo", mine.path)
    mine.add_model(new_entry(small, "mine", 1))
    with pytest.raises(ZooError, match="and would be lost: entry 'theirs'"):
        push_zoo(mine, "flaky://zoo")


def test_a_directory_that_is_no_pull_of_the_url(zoo: Zoo, memory: str, tmp_path: Path) -> None:
    push_zoo(zoo, memory)
    own = Zoo(shutil.copytree(zoo.path, tmp_path / "own"))
    (own.path / ".origins.json").unlink()
    with pytest.raises(ZooError, match="it is no pull of memory://shelf/zoo"):
        pull_zoo(memory, own.path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.png").write_bytes(b"dear to somebody")
    with pytest.raises(ZooError, match="is not a zoo and not empty"):
        pull_zoo(memory, tmp_path / "photos")
    with pytest.raises(ZooError, match="it is the directory of a zoo"):
        push_zoo(zoo, str(own.path))
    (tmp_path / "shelf").mkdir()
    (tmp_path / "shelf" / "README.md").write_text("dear to somebody")
    with pytest.raises(ZooError, match=r"it has a README\.md and no zoo"):
        push_zoo(zoo, str(tmp_path / "shelf"))
    assert [path.name for path in (tmp_path / "shelf").iterdir()] == ["README.md"]


def test_a_pulled_zoo_can_be_read_without_writing(
    zoo: Zoo, memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_zoo(zoo, memory)
    pulled = pull_zoo(memory, tmp_path / "pulled")
    before = {path: path.stat().st_mtime_ns for path in pulled.path.rglob("*")}
    # Whoever runs the tests may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: pulled.path not in (path, *path.parents))
    paths = [pulled.path, *pulled.path.rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        read = Zoo(pulled.path, create=False)
        assert rows(read) == rows(zoo)
        assert [entry.read().mask for entry in read] == [entry.mask for entry in zoo]
        assert read.verify() == []
        assert {path: path.stat().st_mtime_ns for path in pulled.path.rglob("*")} == before
        push_zoo(read, "memory://other")
    finally:
        for path in paths:
            path.chmod(0o755 if path.is_dir() else 0o644)
    monkeypatch.undo()
    assert same(pull_zoo("memory://other", tmp_path / "again"), zoo)


# ---- damage and malice


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("what", ["changed", "cut", "gone", "index"])
def test_what_is_damaged_at_the_url_changes_nothing(what: str, zoo: Zoo, small: Any, tmp_path: Path) -> None:
    shelf = tmp_path / "shelf"
    push_zoo(zoo, str(shelf))
    pulled = pull_zoo(str(shelf), tmp_path / "pulled")
    entry = zoo.add_model(new_entry(small, "d", 3))
    known = set((shelf / "files").iterdir())
    push_zoo(zoo, str(shelf))
    victim = shelf / "files" / f"{entry.sha256}.safetensors"
    if what == "index":
        (victim,) = (p for p in (shelf / "files").iterdir() if p not in known and p.suffix == ".sqlite")
    if what == "cut":
        victim.write_bytes(victim.read_bytes()[:-5])
    elif what == "gone":
        victim.unlink()
    else:
        spoil(victim)
    before = rows(pulled), files(pulled)
    with pytest.raises(ZooError, match=rf"{victim.name}.*nothing was changed. Remove that file") as said:
        pull_zoo(str(shelf), pulled.path)
    assert what == "index" or "(entry 'd')" in str(said.value)
    assert (rows(pulled), files(pulled)) == before
    assert pulled.verify() == []
    # As the message says.
    victim.unlink(missing_ok=True)
    push_zoo(zoo, str(shelf))
    assert same(pull_zoo(str(shelf), pulled.path), zoo)


def test_a_store_that_keeps_other_bytes(
    zoo: Zoo, flaky: type[Flaky], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(self: Any, path: str, value: bytes, *args: Any) -> None:
        MemoryFileSystem.pipe_file(self, path, value[:-1] + bytes([value[-1] ^ 1]))

    monkeypatch.setattr(flaky, "pipe_file", lose)
    with pytest.raises(ZooError, match=r"safetensors: the store has other bytes than it was given"):
        push_zoo(zoo, "flaky://zoo")
    assert flaky.store == {}


def test_a_store_without_names_in_between(
    zoo: Zoo, flaky: type[Flaky], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An object store, where a failure leaves what was there."""
    remote = Remote("flaky://zoo")
    remote._puts_whole = True
    remote.write("zoo.json", b"old")

    def down(*args: Any) -> None:
        raise Stopped("the line is down")

    monkeypatch.setattr(flaky, "pipe_file", down)
    with pytest.raises(ZooError, match="the line is down"):
        remote.write("zoo.json", b"new")
    assert remote.read("zoo.json") == b"old"


def test_a_damaged_model_is_not_pushed(zoo: Zoo, memory: str) -> None:
    spoil(zoo["b"].path)
    with pytest.raises(ZooError, match=r"entry 'b': .*the file is damaged.*verify --repair"):
        push_zoo(zoo, memory)
    zoo.verify(repair=True)
    push_zoo(zoo, memory)


def test_a_damaged_model_is_pulled_again(zoo: Zoo, memory: str, tmp_path: Path) -> None:
    push_zoo(zoo, memory)
    pulled = pull_zoo(memory, tmp_path / "pulled")
    spoil(pulled["b"].path)
    pulled["c"].path.unlink()
    assert same(pull_zoo(memory, pulled.path), zoo)
    assert pulled.verify() == []


BAD = {
    "no JSON": lambda m: b"{",
    "deep": lambda m: b"[" * 100_000,
    "a list": lambda m: b"[]",
    "another format": lambda m: {**m, "format": "recipe"},
    "a newer version": lambda m: {**m, "version": 99},
    "no version": lambda m: {k: v for k, v in m.items() if k != "version"},
    "no index": lambda m: {**m, "index": None},
    "entries are text": lambda m: {**m, "entries": "abc"},
    "entries are gone": lambda m: {**m, "entries": None},
    "an entry twice": lambda m: {**m, "entries": [m["entries"][0], *m["entries"]]},
}
BAD_VALUES = {
    "file": ["../../victim", "/etc/passwd", "..", "", "a/b", "no\0name", 5, None, "\ud800"],
    "name": ["", 5, None, "\ud800"],
    "sha256": ["../../victim", "ABC", "0" * 63, 5, None, "0" * 64 + "\n"],
    "bytes": [-1, 1.5, "7", True, None],
}


def test_a_manifest_is_data_of_others(zoo: Zoo, tmp_path: Path) -> None:
    shelf = tmp_path / "shelf"
    push_zoo(zoo, str(shelf))
    good = json.loads((shelf / "zoo.json").read_text())
    bad = dict(BAD)
    for table in ("entries", "models", "index"):
        for key, values in BAD_VALUES.items():
            for value in values:
                if table == "models" and value == "a/b":
                    continue

                def change(m: Any, table: str = table, key: str = key, value: Any = value) -> Any:
                    rows = m[table] if table == "index" else m[table][0]
                    return {**m, table: {**rows, key: value} if table == "index" else [{**rows, key: value}]}

                if table != "index" or key in ("sha256", "bytes"):
                    bad[f"{table}: {key}: {value!r}"] = change
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    for what, change in bad.items():
        made = change(json.loads(json.dumps(good)))
        (shelf / "zoo.json").write_bytes(made if isinstance(made, bytes) else json.dumps(made).encode())
        with pytest.raises(ZooError, match=r"zoo\.json: expected the manifest of a zoo"):
            pull_zoo(str(shelf), tmp_path / "pulled")
        assert sorted(str(path) for path in tmp_path.rglob("*")) == before, what
    assert len(bad) > 40


def test_an_index_is_data_of_others(zoo: Zoo, tmp_path: Path) -> None:
    shelf = tmp_path / "shelf"
    statements = {
        "UPDATE entries SET file = '../../victim' WHERE name = 'a'": "names other models|cannot be read",
        "UPDATE entries SET mask = x'00' WHERE name = 'a'": "cannot be read",
        "UPDATE entries SET task = '[' WHERE name = 'a'": "cannot be read",
        "UPDATE models SET extra = '5'": "cannot be read",
        "UPDATE facts SET value = '{'": "cannot be read",
        "DELETE FROM entries WHERE name = 'a'": "names other models",
        "CREATE TRIGGER t AFTER INSERT ON entries BEGIN DELETE FROM entries; END": "tables are not those",
        "PRAGMA user_version = 99": "newer mvp_ext",
        "DROP TABLE models": "tables are not those",
        "PRAGMA page_size = 1024": "readonly",
    }
    push_zoo(zoo, str(shelf))
    good = json.loads((shelf / "zoo.json").read_text())
    index = shelf / "files" / f"{good['index']['sha256']}.sqlite"
    for statement, message in statements.items():
        data = altered(index, statement, tmp_path)
        content = travel._content(data)
        (shelf / "files" / f"{content.sha256}.sqlite").write_bytes(data)
        (shelf / "zoo.json").write_text(json.dumps({**good, "index": content._asdict()}))
        with pytest.raises(ZooError, match=message):
            pull_zoo(str(shelf), tmp_path / "pulled")
        assert len(Zoo(tmp_path / "pulled")) == 0
    (shelf / "zoo.json").write_text(json.dumps(good))
    assert same(pull_zoo(str(shelf), tmp_path / "pulled"), zoo)


def altered(index: Path, statement: str, folder: Path) -> bytes:
    copy = folder / "altered.sqlite"
    shutil.copyfile(index, copy)
    connection = sqlite3.connect(copy, isolation_level=None)
    connection.execute(statement)
    connection.execute("VACUUM")
    connection.close()
    return copy.read_bytes()


def test_links_in_the_directory_are_not_followed(zoo: Zoo, memory: str, tmp_path: Path) -> None:
    push_zoo(zoo, memory)
    victim, other = tmp_path / "victim", tmp_path / "other"
    victim.write_text("dear to somebody")
    other.mkdir()
    pulled = Zoo(tmp_path / "pulled")
    (pulled.path / ".origins.json").symlink_to(victim)
    (pulled.path / ".incoming").symlink_to(other)
    with pytest.raises(ZooError, match=r"\.incoming: expected a folder of its own"):
        pull_zoo(memory, pulled.path)
    (pulled.path / ".incoming").unlink()
    (pulled.path / ".incoming" / "entries").mkdir(parents=True)
    for entry in zoo:
        (pulled.path / ".incoming" / "entries" / entry.path.name).symlink_to(victim)
        (pulled.path / "entries" / entry.path.name).symlink_to(victim)
    assert same(pull_zoo(memory, pulled.path), zoo)
    assert victim.read_text() == "dear to somebody"
    assert list(other.iterdir()) == []


# ---- merge


def test_merge(zoo: Zoo, small: Any, tmp_path: Path) -> None:
    other = Zoo(shutil.copytree(zoo.path, tmp_path / "other"))
    other.remove("a")
    other.add_model(new_entry(small, "d", 3))
    other.save_shared("universal", *small[1], {"keep": 0.25})
    other.record_facts(settings={"keep": 0.25}, more=5)
    third = Zoo(tmp_path / "third")
    third.add_model(new_entry(small, "e", 4))
    sources = [zoo, other, third]
    before = [(rows(each), files(each)) for each in sources]
    said: list[tuple[str, int, int]] = []
    merged = merge_zoos(sources, tmp_path / "merged", progress=lambda *told: said.append(told))
    assert said[-1] == ("files", 7, 7)
    assert [(rows(each), files(each)) for each in sources] == before
    assert names(merged) == [*NAMES, "d", "e"]
    assert merged.shared("universal").read().mask == small[1][1]
    assert merged.facts()["settings"] == {"keep": 0.5}
    assert merged.facts()["more"] == 5
    assert merged.backbone == zoo.backbone
    assert merged["d"].sha256 == other["d"].sha256
    assert len(merged.class_means()) == 5
    assert merged.verify() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "other", "third", "zoo"]


def test_a_merge_is_whole_or_not_at_all(zoo: Zoo, small: Any, tmp_path: Path) -> None:
    other = Zoo(tmp_path / "other")
    out = tmp_path / "merged"

    def refused(message: str, *zoos: Zoo) -> None:
        there = sorted(tmp_path.iterdir())
        with pytest.raises(ZooError, match=message):
            merge_zoos(zoos, out)
        assert sorted(tmp_path.iterdir()) == there
        assert not out.exists() or list(out.iterdir()) == []

    for name in ("a", "c", "d"):
        other.add_model(new_entry(small, name, 5))
    refused(r"other models of the same names than .*zoo: entry 'a', entry 'c'$", zoo, other)
    for name in ("a", "c"):
        other.remove(name)
    out.mkdir()
    spoil(other["d"].path)
    refused(r"entry 'd': the file is damaged", zoo, other)
    foreign = Zoo(tmp_path / "foreign", backbone=BackboneIdentity("test_vit", "abc", "5eed"))
    refused(
        r"it is of another backbone than .*: expected architecture test_resnet, got test_vit", zoo, foreign
    )
    large, third = Zoo(tmp_path / "large"), Zoo(tmp_path / "third")
    large.record_facts(preprocessing=Preprocessing(64, SEEN.mean, SEEN.std))
    refused("its models see images as", zoo, large)
    refused("its models see images as", third, zoo, large)
    with pytest.raises(ValueError, match="at least two zoos, got 1"):
        merge_zoos([zoo], out)
    with pytest.raises(ZooError, match="expected a new or an empty directory"):
        merge_zoos([zoo, other], zoo.path)


# ---- the card, and what is not installed


def test_the_card(zoo: Zoo, small: Any, tmp_path: Path) -> None:
    zoo.add_model(new_entry(small, "<b>|`x`\n# d", 3))
    push_zoo(zoo, str(tmp_path / "my shelf"))
    card = (tmp_path / "my shelf" / "README.md").read_text()
    assert "# A zoo of pruned models of test\\_resnet" in card
    assert f"mvp-ext zoo pull 'file://{tmp_path}/my shelf' zoo" in card
    assert "| size | 32 |" in card
    assert "| keep | 0.5 |" in card
    assert "| c | x, y\\|z | 0.5" in card
    assert "| 50.0 | 7 |" in card
    assert "| &lt;b&gt;\\|\\`x\\` # d |" in card
    assert "| start |" in card


def test_a_password_is_in_no_message(memory: str, tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="no zoo there") as said:
        pull_zoo("memory://me:secret@shelf/zoo", tmp_path / "pulled")
    assert "secret" not in str(said.value)


def test_what_is_not_installed_is_named(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="nowhere://x: expected a folder or a URL that fsspec knows"):
        push_zoo(zoo, "nowhere://x")
    monkeypatch.setitem(known_implementations, "s9", {"class": "s9fs.S9", "err": "Install s9fs to access S9"})
    with pytest.raises(ImportError, match=r"s9://x: s9:// needs a package that is missing: pip install s9fs"):
        push_zoo(zoo, "s9://x")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ImportError, match=r"a URL needs fsspec: pip install 'mvp_ext\[remote\]'"):
        pull_zoo("s3://x", tmp_path / "pulled")


def test_on_an_object_store(zoo: Zoo, small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    s3fs = pytest.importorskip("s3fs")
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "test")
    store = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    store.start()
    try:
        host, port = store.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        s3fs.S3FileSystem().mkdir("shelf")
        push_zoo(zoo, "s3://shelf/zoo")
        pulled = pull_zoo("s3://shelf/zoo", tmp_path / "pulled")
        assert same(pulled, zoo)
        zoo.add_model(new_entry(small, "d", 3))
        push_zoo(zoo, "s3://shelf/zoo")
        assert same(pull_zoo("s3://shelf/zoo", pulled.path), zoo)
    finally:
        store.stop()
