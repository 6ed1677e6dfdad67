"""Zoos of others: what lies there is data. Nothing outside is read or removed, and damage costs its entry alone."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import sqlite3
import stat
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mvp_ext.model.card import ModelCard
from mvp_ext.model.preprocessing import Preprocessing
from mvp_ext.train.backbone import BackboneIdentity
from mvp_ext.zoo.shared import START
from mvp_ext.zoo.zoo import NewEntry, Zoo, ZooError

NAMES = ("a", "b", "c")
SEEN = Preprocessing(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@pytest.fixture(autouse=True)
def _not_durable(monkeypatch):
    """Nobody pulls the plug: the disk need not be waited for."""
    monkeypatch.setattr("mvp_ext.zoo.index.DURABLE", "PRAGMA synchronous = OFF")


@pytest.fixture(scope="module")
def template(small, tmp_path_factory):
    """A zoo as builders leave it: backbone, facts, a start model and three entries."""
    path = tmp_path_factory.mktemp("template") / "zoo"
    structure = small[0][2]
    zoo = Zoo(path, backbone=BackboneIdentity("test_resnet", structure.fingerprint, "5eed"))
    zoo.record_facts(settings={"keep": 0.5}, preprocessing=SEEN)
    zoo.save_shared(START, *small[0], {"keep": 0.5, "classes": [0], "result": {"cost": {"steps": 3}}})
    for number, name in enumerate(NAMES):
        means = {"class_means": torch.randn(2, 8), "temperature": torch.tensor(0.7)}
        task = {"name": name, "classes": ["x", "y"], "seed": number}
        card = ModelCard(SEEN, ("x", "y", "z"), name)
        cost = {"steps": 7, "seconds": 0.5}
        new = NewEntry(name, *small[number % 2], task, 0.25 * number, 7, cost, card, means)
        zoo.add_model(new)
    return path


@pytest.fixture
def path(template, tmp_path):
    """A copy of it, beside a file and a folder that are dear to somebody."""
    shutil.copytree(template, tmp_path / "zoo")
    (tmp_path / "victim.txt").write_text("dear to somebody")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.safetensors").write_text("dear to somebody, too")
    return tmp_path / "zoo"


def outside(path: Path) -> dict[str, bytes]:
    found = [p for p in sorted(path.parent.rglob("*")) if path not in p.parents and p.is_file()]
    return {str(p): p.read_bytes() for p in found}


def sql(path: Path, statement: str, *values: object) -> None:
    connection = sqlite3.connect(path / "index.sqlite")
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute(statement, values)
    connection.commit()
    connection.close()


def content(zoo: Zoo) -> dict[str, tuple[object, ...]]:
    """All that the zoo says of its usable entries."""
    means = {known.name: known for known in zoo.class_means()}
    return {
        e.name: (
            *(e.mask, e.task, e.accuracy, e.keep, e.steps, e.cost, e.architecture, e.structure_fingerprint),
            *(means[e.name].means.tolist(), means[e.name].temperature),
        )
        for e in zoo.entries()
        if e.name in means
    }


def use(zoo: Zoo) -> None:
    """Everything that a reader or voter asks; only errors of our own may come of it."""
    for question in (
        zoo.entries,
        zoo.class_means,
        zoo.masks,
        zoo.facts,
        lambda: zoo.preprocessing,
        lambda: zoo.backbone,
        lambda: zoo.shared(START),
        lambda: [entry.read() for entry in zoo.entries()],
        lambda: [zoo[name] for name in NAMES],
        lambda: zoo.is_sound("a"),
    ):
        with contextlib.suppress(ZooError):
            question()


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def no_waiting(seconds: float = 20) -> Iterator[None]:
    """Ends the process where a pipe is waited for: a test cannot be stopped otherwise."""
    timer = threading.Timer(seconds, os._exit, (3,))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# ---- out of the zoo


@pytest.mark.parametrize("table", ["entries", "models"])
@pytest.mark.parametrize(
    "file",
    [
        *("../../victim.txt", "/etc/passwd", "..", "", "shared/../../victim.txt", "../index.sqlite"),
        *("index.sqlite", b"\xff\xfe", 5, "no\0name", "x" * 5000),
    ],
    ids=ascii,
)
def test_a_row_names_a_file_of_the_zoo_or_none(path, small, table, file):
    before = outside(path)
    name = {"entries": "a", "models": START}[table]
    sql(path, f"UPDATE {table} SET file = CAST(? AS TEXT), bytes = 16 WHERE name = ?", file, name)
    with quietly(), no_waiting():
        zoo = Zoo(path)
        use(zoo)
        whose = [(p.kind in ("missing", "damaged"), p.entry, p.model) for p in zoo.verify()]
        assert (True, *((name, None) if table == "entries" else (None, name))) in whose
        if "victim" in str(file):
            copy = path.with_name("copy")
            shutil.copytree(path, copy)
            if table == "entries":
                again = Zoo(copy)
                again.add_model(NewEntry(name, *small[0], {"name": name}), replace=True)
                again.remove(name)
            else:
                Zoo(copy).save_shared(name, *small[0])
            shutil.rmtree(copy)
        zoo.verify(repair=True)
    assert zoo.verify() == []
    # Its file was there all the time.
    assert set(content(zoo)) == set(NAMES)
    assert zoo.shared(START).is_sound()
    assert outside(path) == before


def pipe(place: Path, _: Path) -> None:
    os.mkfifo(place)


def link(place: Path, victim: Path) -> None:
    place.symlink_to(victim)


def link_to_its_like(place: Path, victim: Path) -> None:
    """Out of the zoo, to the very bytes that are expected."""
    shutil.copy(place.with_name("kept"), victim.with_name("like"))
    place.symlink_to(victim.with_name("like"))


def device(place: Path, _: Path) -> None:
    place.symlink_to("/dev/zero")


def nowhere(place: Path, victim: Path) -> None:
    place.symlink_to(victim.with_name("nowhere"))


def folder(place: Path, _: Path) -> None:
    place.mkdir()


SPECIAL = [pipe, link, link_to_its_like, device, nowhere, folder]


@pytest.mark.parametrize("make", SPECIAL)
@pytest.mark.parametrize("which", ["entry", "model"])
def test_what_is_no_regular_file_is_not_opened(path, make, which):
    zoo = Zoo(path)
    place = zoo["a"].path if which == "entry" else zoo.shared(START).path
    place.rename(place.with_name("kept"))
    make(place, path.parent / "victim.txt")
    (place.with_name("kept")).unlink()
    # Of the size that the row says.
    size = place.stat().st_size if place.exists() else 0
    sql(
        path,
        f"UPDATE {'entries' if which == 'entry' else 'models'} SET bytes = ? WHERE name IN ('a', 'start')",
        size,
    )
    before = outside(path)
    with quietly(), no_waiting():
        use(Zoo(path, create=False))
        problems = zoo.verify()
        zoo.verify(repair=True)
        use(zoo)
    assert [p for p in problems if (p.entry, p.model) == (("a", None) if which == "entry" else (None, START))]
    assert outside(path) == before
    assert "a" not in content(zoo) if which == "entry" else zoo.shared(START) is None


@pytest.mark.parametrize(
    "part", ["entries", "shared", "index.sqlite", "index.sqlite-wal", "index.sqlite-journal", ".lock"]
)
@pytest.mark.parametrize("make", [link, nowhere, pipe])
def test_parts_of_a_zoo_are_its_own(path, part, make):
    place = path / part
    if place.is_dir():
        shutil.rmtree(place)
        victim = path.parent / "other"
    else:
        place.unlink(missing_ok=True)
        victim = path.parent / "victim.txt"
    make(place, victim)
    before = outside(path)
    for create in (True, False):
        with pytest.raises(ZooError, match=rf"{part}: expected a .* of its own, and no link"), no_waiting():
            Zoo(path, create=create)
    assert outside(path) == before


def test_a_link_to_a_zoo_is_a_zoo(path):
    path.with_name("link").symlink_to(path)
    zoo = Zoo(path.with_name("link"))
    assert set(content(zoo)) == set(NAMES)
    assert zoo.verify() == []


def test_an_index_with_statements_of_its_own_is_made_again(path):
    sql(path, "CREATE TRIGGER x AFTER DELETE ON entries BEGIN DELETE FROM entries; END")
    with pytest.warns(UserWarning, match=r"its index is damaged .*tables are not those of a zoo"):
        zoo = Zoo(path)
    zoo.remove("a")
    assert set(content(zoo)) == {"b", "c"}


# ---- zoos that may only be read


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Without the rights of root, where tests have them."""
    if os.geteuid():
        yield
        return
    nobody = 65534
    os.setresgid(nobody, nobody, 0)
    os.setresuid(nobody, nobody, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)


@pytest.fixture
def shared_path(template):
    """A zoo of somebody else, in a place that everybody may read."""
    place = Path(tempfile.mkdtemp(prefix="mvp_ext-zoo-"))
    place.chmod(0o755)
    shutil.copytree(template, place / "zoo")
    yield place / "zoo"
    chmod(place / "zoo", 0o700, 0o600)
    shutil.rmtree(place)


def chmod(path: Path, folders: int, files: int) -> None:
    for each in [path, *path.rglob("*")]:
        if not each.is_symlink():
            each.chmod(folders if each.is_dir() else files)


def leave_a_log(path: Path) -> None:
    """A writer was killed: its last transaction is in the log alone."""
    connection = sqlite3.connect(path / "index.sqlite")
    connection.execute("""UPDATE facts SET value = '{"keep": 0.25}' WHERE key = 'settings'""")
    connection.commit()
    kept = {name: (path / name).read_bytes() for name in ("index.sqlite", "index.sqlite-wal")}
    connection.close()
    for name, data in kept.items():
        (path / name).write_bytes(data)


@pytest.mark.parametrize(
    "kind", ["folders and files", "folders alone", "log", "no lock", "no index", "empty"]
)
def test_a_zoo_that_may_only_be_read(shared_path, kind):
    path, lost = shared_path, kind in ("no index", "empty")
    expected = content(Zoo(path))
    if kind == "log":
        leave_a_log(path)
    if kind in ("no lock", "no index"):
        (path / {"no lock": ".lock", "no index": "index.sqlite"}[kind]).unlink()
    if kind == "empty":
        (path / "index.sqlite").write_bytes(b"")
    chmod(path, 0o555, 0o666 if kind == "folders alone" else 0o444)
    before = {str(p): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    with as_nobody(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for create in (True, False):
            zoo = Zoo(path, create=create)
            found = content(zoo)
            assert [p.kind for p in zoo.verify()] == (["index"] if lost else [])
            assert zoo.masks().shape[0] == len(NAMES)
            assert zoo["a"].read().state
            assert zoo.shared(START).read().state
            assert zoo.preprocessing == SEEN
            assert zoo.backbone.weights_sha256 == "5eed"
            for write, options in (
                (zoo.record_facts, {"x": 1}),
                (zoo.remove, {"name": "a"}),
                (zoo.verify, {"repair": True}),
            ):
                with pytest.raises(ZooError, match=r"readonly|may not be written|cannot be written"):
                    write(**options)
            assert zoo.facts()["settings"] == {"keep": 0.25 if kind == "log" else 0.5}
            assert found == expected
    assert [str(w.message).count("for this process") for w in caught] == [1, 1] * lost
    assert {str(p): p.read_bytes() for p in path.rglob("*") if p.is_file()} == before


# ---- the index


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at % len(data)] ^= 0xFF
    file.write_bytes(data)


INDEX_DAMAGE: dict[str, Callable[[Path], object]] = {
    "gone": Path.unlink,
    "empty": lambda index: index.write_bytes(b""),
    "other bytes": lambda index: index.write_bytes(b"garbage" * 1000),
    "short": lambda index: index.write_bytes(index.read_bytes()[:5000]),
    "magic": lambda index: flip(index, 3),
    "schema": lambda index: flip(index, 101),
    "zeros": lambda index: index.write_bytes(bytes(index.stat().st_size)),
    "no table": lambda index: sql(index.parent, "DROP TABLE entries"),
    "no facts": lambda index: sql(index.parent, "DROP TABLE facts"),
}


@pytest.mark.parametrize("damage", INDEX_DAMAGE)
@pytest.mark.parametrize("create", [True, False])
def test_an_index_is_made_again_from_the_entries(path, damage, create):
    expected, files = content(Zoo(path)), sorted(p.name for p in path.glob("*/*"))
    INDEX_DAMAGE[damage](path / "index.sqlite")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        zoo = Zoo(path, create=create)
        # What only shows when it is asked for is mended when that is asked for.
        if not caught:
            assert [p.kind for p in zoo.verify()] == ["index"]
            assert "index" in {p.kind for p in zoo.verify(repair=True)}
    if caught:
        assert f"zoo {path}: its index is " in str(caught[0].message)
        assert "made again from the files of 3 entries" in str(caught[0].message)
    assert content(zoo) == expected
    assert zoo.facts() == {
        "settings": {"keep": 0.5},
        "preprocessing": SEEN.to_dict() | {"mean": [0.5] * 3, "std": [0.25] * 3},
    }
    assert zoo.backbone.weights_sha256 == "5eed"
    assert zoo.shared(START).extra["classes"] == [0]
    assert zoo.verify() == []
    assert zoo.verify(repair=True) == []
    assert sorted(p.name for p in path.glob("*/*")) == files
    with quietly():
        assert content(Zoo(path)) == expected


def test_what_replaced_an_entry_is_what_comes_back(path, small):
    zoo = Zoo(path)
    old = zoo["a"].path.read_bytes()
    zoo.add_model(NewEntry("a", *small[1], {"name": "a"}, accuracy=1.0), replace=True)
    # As a kill between the row and the removal of the old file leaves it.
    left = path / "entries" / "a-0.safetensors"
    left.write_bytes(old)
    os.utime(left, (1, 1))
    (path / "index.sqlite").unlink()
    with quietly():
        zoo = Zoo(path)
    assert zoo["a"].accuracy == 1.0
    assert [p.path for p in zoo.verify(repair=True)] == [left]
    assert zoo.verify() == []


def test_a_folder_of_something_else_is_not_made_a_zoo(tmp_path):
    (tmp_path / "index.sqlite").write_bytes(b"some other program's")
    with pytest.raises(ZooError, match="not a database"):
        Zoo(tmp_path)
    (tmp_path / "index.sqlite").unlink()
    (tmp_path / "entries").mkdir()
    (tmp_path / "entries" / "x.safetensors").write_bytes(b"no model")
    with pytest.raises(ZooError, match="no zoo at"):
        Zoo(tmp_path, create=False)
    assert [p.name for p in tmp_path.iterdir()] == ["entries"]


# ---- rows

DEEP = "[" * 100_000
BAD_VALUES = [
    *[("task", value) for value in ("[]", "{", DEEP, '{"classes": 3}', b"\xff", '{"a": "\xff"}')],
    *[("cost", value) for value in ("[]", '{"train_flops": "many"}', "{}")],
    *[("keep", value) for value in ("half", 0.75)],
    *[("accuracy", value) for value in ("good", 2, float("inf"), 0.125)],
    *[("steps", value) for value in ("few", -1, b"x", 9)],
    *[("mask", value) for value in (b"", "text")],
    *[("class_means", value) for value in (b"abc", "text", b"\0" * 64)],
    *[("class_count", value) for value in (3, "two", 2**62)],
    *[("temperature", value) for value in (None, "warm", -1.0)],
    *[("sha256", value) for value in (b"\xff", "0" * 64)],
    *[("bytes", value) for value in (0, "many")],
    *[("created", b"\x1b[2J"), ("architecture", "vit"), ("structure_fingerprint", "0" * 16)],
    *[("name", value) for value in ("z", b"\xff\xfe")],
]


@pytest.mark.parametrize(("column", "value"), BAD_VALUES, ids=lambda v: ascii(v)[:30])
def test_a_bad_row_costs_one_row_until_it_is_mended(path, column, value):
    expected = content(Zoo(path))
    if isinstance(value, bytes) and column not in ("mask", "class_means"):
        # Text that is none.
        sql(path, f"UPDATE entries SET {column} = CAST(? AS TEXT) WHERE name = 'b'", value)
    else:
        sql(path, f"UPDATE entries SET {column} = ? WHERE name = 'b'", value)
    with quietly():
        zoo = Zoo(path)
        use(zoo)
        found = content(zoo)
        assert {name: found.get(name) for name in "ac"} == {name: expected[name] for name in "ac"}
        assert [p.entry is not None for p in zoo.verify()] == [True]
        assert len(zoo.verify(repair=True)) == 1
    assert zoo.verify() == []
    assert content(zoo) == expected


@pytest.mark.parametrize(
    ("statement", "value"),
    [
        *(("UPDATE facts SET value = ? WHERE key = 'preprocessing'", value) for value in ("{", DEEP, "[1]")),
        ("UPDATE facts SET value = ? WHERE key = 'settings'", "{"),
        *(("UPDATE meta SET value = ? WHERE key = 'structure_fingerprint'", value) for value in ("0", "")),
        ("UPDATE meta SET value = ? WHERE key = 'weights_sha256'", "bad"),
    ],
    ids=lambda v: ascii(v)[:60],
)
def test_what_the_index_says_of_the_zoo_is_mended(path, statement, value):
    expected, facts, backbone = content(Zoo(path)), Zoo(path).facts(), Zoo(path).backbone
    sql(path, statement, value)
    with quietly():
        zoo = Zoo(path)
        use(zoo)
        assert "index" in {p.kind for p in zoo.verify()}
        zoo.verify(repair=True)
    assert zoo.verify() == []
    assert (content(zoo), zoo.facts(), zoo.backbone) == (expected, facts, backbone)


@pytest.mark.parametrize(
    "extra", ["{", DEEP, "[]", "5", '{"result": 5}', '{"result": {"cost": {"steps": "x"}}}', '{"keep": 1}']
)
def test_a_bad_row_of_a_shared_model_is_mended(path, extra):
    sql(path, "UPDATE models SET extra = ?", extra)
    zoo = Zoo(path)
    use(zoo)
    assert [(p.kind, p.model) for p in zoo.verify()] == [("damaged", START)]
    zoo.verify(repair=True)
    assert zoo.verify() == []
    assert zoo.shared(START).extra["keep"] == 0.5


def test_weights_that_are_not_finite_are_named(path):
    """As an older version, or another program, wrote them."""
    from mvp_ext import storage

    zoo = Zoo(path)
    file = zoo["b"].path
    tensors, spec = storage.read(file, kind="mvp_ext.pruned_model", version=3)
    next(t for name, t in tensors.items() if "weight" in name).view(-1)[0] = float("nan")
    file.write_bytes(storage.to_bytes(tensors, spec, kind="mvp_ext.pruned_model", version=3))
    (path / "index.sqlite").unlink()
    with pytest.warns(UserWarning, match="files of 2 entries"):
        zoo = Zoo(path)
    assert set(content(zoo)) == {"a", "c"}
    assert [p.path for p in zoo.verify(repair=True)] == [file]


# ---- anything


@pytest.mark.parametrize("seed", range(16))
def test_random_damage_costs_what_it_hit(path, seed):
    """A byte, a tail, or a whole file of the zoo; then everything is asked, mended, and asked again."""
    draw = random.Random(seed)
    expected, before = content(Zoo(path)), outside(path)
    files = [p for p in sorted(path.rglob("*")) if p.is_file() and p.stat().st_size]
    hit = draw.choice([path / "index.sqlite", draw.choice(files)])
    how = draw.choice(["byte", "bytes", "tail", "gone"])
    if how == "gone":
        hit.unlink()
    elif how == "tail":
        hit.write_bytes(hit.read_bytes()[: draw.randrange(hit.stat().st_size)])
    else:
        for _ in range(1 if how == "byte" else 20):
            # Text and headers more often than the empty parts of pages.
            used = [at for at, byte in enumerate(hit.read_bytes()) if byte]
            flip(hit, draw.choice(used))
    with quietly(), no_waiting():
        try:
            zoo = Zoo(path, create=False)
        except ZooError:
            # As far as anybody can tell.
            with pytest.raises(ZooError, match=r"newer mvp_ext|not of a zoo"):
                Zoo(path)
            return
        use(zoo)
        zoo.verify(repair=True)
        assert zoo.verify() == []
        found = content(zoo)
    lost = {name for name in NAMES if hit.name.startswith(f"{name}-")}
    assert {name: expected[name] for name in set(NAMES) - lost} == {
        name: found.get(name) for name in set(NAMES) - lost
    }
    assert outside(path) == before


# ---- what writers leave


def test_half_files_of_killed_writers_go_and_those_of_living_ones_stay(path):
    import fcntl

    zoo = Zoo(path)
    dead, alive = path / ".start.partial.x1.part", path / ".start.partial.x2.part"
    dead.write_bytes(b"half")
    with open(alive, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert [p.path for p in zoo.verify()] == [dead]
        assert [p.kind for p in zoo.verify(repair=True)] == ["stray"]
        assert alive.exists()
        assert not dead.exists()
    assert [p.path for p in zoo.verify(repair=True)] == [alive]
    assert zoo.verify() == []


def test_an_entry_says_what_its_row_does_and_its_user_does_not_see_it(path):
    zoo = Zoo(path)
    assert set(zoo["a"].read().extra) == {"class_means", "temperature"}
    assert set(zoo["a"].load().extra) == {"class_means", "temperature"}
    assert stat.S_IMODE(zoo["a"].path.stat().st_mode) & 0o200
    assert json.loads(json.dumps(zoo.shared(START).load().extra)) == zoo.shared(START).extra
