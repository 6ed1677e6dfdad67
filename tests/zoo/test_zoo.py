"""The zoo: adding is whole or not at all, whoever writes and whatever stops; nothing damaged is ever used."""

from __future__ import annotations

import contextlib
import os
import resource
import sqlite3
import subprocess
import sys
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mvp_ext import storage
from mvp_ext.data.images import load_data
from mvp_ext.data.tasks import Task
from mvp_ext.model.create import create_model
from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.surgery import prune_model
from mvp_ext.train.backbone import BackboneIdentity
from mvp_ext.zoo.index import SCHEMA_VERSION, Index
from mvp_ext.zoo.zoo import NewEntry, Zoo, ZooError


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    return create_model("test_resnet", num_classes=3)


@pytest.fixture(scope="module")
def structure(dense):
    return find_structure(dense)


@pytest.fixture(scope="module")
def pruned(dense, structure):
    """Two pruned models with their masks."""
    made = []
    for seed in range(2):
        torch.manual_seed(0)
        mask = Mask.random(structure, 0.5, seed, align=1)
        made.append(
            (prune_model(create_model("test_resnet", num_classes=3), mask, structure=structure), mask)
        )
    return made


@pytest.fixture
def zoo(tmp_path):
    return Zoo(tmp_path / "zoo")


@pytest.fixture
def add(pruned, structure):
    """``add(zoo, name, which=0, **options)``: add one of the two models under a name."""

    def add_to(zoo, name, which=0, **options):
        model, mask = pruned[which]
        how = {key: options.pop(key) for key in ("replace", "if_absent") if key in options}
        options = {"task": {"name": name, "classes": ["a", "b"]}, **options}
        return zoo.add_model(NewEntry(name, model, mask, structure, **options), **how)

    return add_to


def files(zoo: Zoo) -> list[str]:
    return sorted(path.name for path in (zoo.path / "entries").iterdir())


def content(zoo: Zoo) -> list[tuple[str, str]]:
    return [(entry.name, entry.sha256) for entry in zoo.entries()]


# ---- what goes in comes out


def test_add_and_load(zoo, pruned, structure):
    model, mask = pruned[0]
    task = Task("digits-1", load_data("digits"), (1, 4, 6))
    means = torch.randn(3, 8)
    made = zoo.add_model(
        NewEntry(
            *("one", model, mask, structure, task),
            accuracy=0.75,
            steps=12,
            cost={"train_flops": 10**15, "seconds": 1.5, "unmeasured": float("nan")},
            tensors={"class_means": means},
        )
    )
    (entry,) = Zoo(zoo.path, create=False).entries()
    assert entry.name == made.name == "one"
    assert entry.mask == mask
    assert (entry.accuracy, entry.steps, entry.keep) == (0.75, 12, mask.keep)
    assert entry.cost == {"train_flops": 10**15, "seconds": 1.5, "unmeasured": None}
    assert Task.from_dict(entry.task, task.data).classes == (1, 4, 6)
    assert entry.architecture == "test_resnet"
    assert entry.structure_fingerprint == structure.fingerprint
    x = torch.randn(2, 3, 32, 32)
    loaded = entry.load()
    with torch.no_grad():
        assert torch.equal(loaded.model(x), model.eval()(x))
    assert torch.equal(loaded.extra["class_means"], means)
    stored = entry.read()
    assert torch.equal(stored.extra["class_means"], means)
    assert all(torch.equal(stored.state[name], value) for name, value in model.state_dict().items())


@dataclass
class Result:
    """The fields that pruning returns, as `zoo.add(result)` takes them."""

    model: torch.nn.Module
    mask: Mask
    structure: object
    task: object
    accuracy: float
    cost: object


@dataclass
class Cost:
    train_flops: int = 5
    steps: int = 7


def test_add_a_result(zoo, pruned, structure):
    model, mask = pruned[0]
    entry = zoo.add(Result(model, mask, structure, {"name": "from-result"}, 0.5, Cost()))
    assert (entry.name, entry.accuracy, entry.steps) == ("from-result", 0.5, 7)
    assert entry.cost == {"train_flops": 5, "steps": 7}
    with pytest.raises(ZooError, match="already is an entry 'from-result'"):
        zoo.add(Result(model, mask, structure, SimpleNamespace(name="from-result"), 0.5, {}))


def test_collection(zoo, add, pruned):
    for name, which in (("b", 0), ("a", 1), ("c", 0)):
        add(zoo, name, which)
    assert [entry.name for entry in zoo] == ["a", "b", "c"]  # by name, not by who was first
    assert len(zoo) == 3
    assert "a" in zoo
    assert "d" not in zoo
    assert 1 not in zoo
    assert zoo["b"].mask == pruned[0][1]
    masks = zoo.masks()
    assert masks.dtype == torch.bool
    assert torch.equal(masks, torch.stack([pruned[i][1].to_vector() for i in (1, 0, 0)]))
    assert torch.equal(zoo.masks([zoo["c"]]), masks[2:])
    zoo.remove("b")
    assert [entry.name for entry in zoo] == ["a", "c"]
    assert len(files(zoo)) == 2
    assert zoo.verify() == []
    with pytest.raises(ZooError, match="no entry 'b'"):
        zoo.remove("b")
    with pytest.raises(ZooError, match=r"no entry 'aa'; did you mean 'a'\?"):
        zoo["aa"]
    with pytest.raises(ZooError, match="no entries"):
        zoo.masks([])


def test_names_are_unique(zoo, add):
    first = add(zoo, "x", 0)
    with pytest.raises(ZooError, match="already is an entry 'x'; replace=True"):
        add(zoo, "x", 1)
    assert add(zoo, "x", 1, if_absent=True).sha256 == first.sha256
    second = add(zoo, "x", 1, replace=True)
    assert second.sha256 != first.sha256
    assert files(zoo) == [second.path.name]
    assert zoo.verify() == []


def test_any_name_is_a_safe_file_name(zoo, add):
    for name in ("../../up", "a/b", "ünï 日本", ".hidden", "x" * 200):
        assert add(zoo, name).path.parent == zoo.path / "entries"
        assert name in zoo
    assert zoo.verify() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": ""}, "1 to 200 characters"),
        ({"name": "x" * 201}, "1 to 200 characters"),
        ({"accuracy": 1.5}, r"accuracy must be in \[0, 1\], got 1.5"),
        ({"accuracy": float("nan")}, "accuracy"),
        ({"cost": {"x": object()}}, "cost must be JSON"),
        ({"task": None}, r"expected a task or its to_dict\(\), got None"),
    ],
)
def test_bad_arguments_change_nothing(zoo, add, arguments, message):
    with pytest.raises(ValueError, match=message):
        add(zoo, **{"name": "x", **arguments})
    assert files(zoo) == []
    assert len(zoo) == 0


def test_mask_of_another_model_changes_nothing(zoo, pruned, structure):
    wrong = Mask({"conv": torch.ones(3, dtype=torch.bool)})
    with pytest.raises(ValueError, match="mask"):
        zoo.add_model(NewEntry("x", pruned[0][0], wrong, structure, {"name": "x"}))
    with pytest.raises(ValueError, match="the mask leaves shape"):  # found when the file is written
        zoo.add_model(NewEntry("x", pruned[0][0], Mask.full(structure), structure, {"name": "x"}))
    assert files(zoo) == []
    assert zoo.backbone is None  # what failed does not decide whose zoo it is


# ---- no zoo, something else, another backbone


def test_no_zoo(tmp_path):
    with pytest.raises(ZooError, match=r"no zoo at .*nowhere; build one"):
        Zoo(tmp_path / "nowhere", create=False)
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"x")
    with pytest.raises(ZooError, match=r"photos is not a zoo and not empty \(it has 'cat.png'\)"):
        Zoo(tmp_path / "photos")
    assert sorted(p.name for p in (tmp_path / "photos").iterdir()) == ["cat.png"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(ZooError, match="no zoo can be made here"):
        Zoo(tmp_path / "file" / "zoo")


def test_index_of_something_else_or_newer_or_damaged(tmp_path, zoo, add):
    add(zoo, "x")
    for name, statement, message in (
        ("newer", "PRAGMA user_version = 99", "written by a newer mvp_ext"),
        ("other", "CREATE TABLE songs (title TEXT)", "a database, but not of a zoo"),
    ):
        (tmp_path / name).mkdir()
        connection = sqlite3.connect(tmp_path / name / "index.sqlite")
        connection.execute(statement)
        connection.commit()
        connection.close()
        with pytest.raises(ZooError, match=message):
            Zoo(tmp_path / name)
    index = zoo.path / "index.sqlite"
    index.write_bytes(b"garbage" * 1000)
    with pytest.warns(
        UserWarning, match=r"index\.sqlite: .*not a database.* made again from the files of 1 entries"
    ):
        assert [entry.name for entry in Zoo(zoo.path)] == ["x"]
    # Nothing was made over it.
    assert index.with_name("index.sqlite.damaged").read_bytes() == b"garbage" * 1000


def test_creation_that_was_killed_is_finished(tmp_path):
    """A kill between the empty database file and its tables."""
    path = tmp_path / "zoo"
    (path / "entries").mkdir(parents=True)
    connection = sqlite3.connect(path / "index.sqlite")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.close()
    with pytest.raises(ZooError, match="no zoo at"):
        Zoo(path, create=False)
    assert len(Zoo(path)) == 0


def test_backbone_is_recorded_and_compared(tmp_path, dense, structure, pruned):
    backbone = BackboneIdentity.of(dense)
    assert backbone == BackboneIdentity.of(dense, structure)
    zoo = Zoo(tmp_path / "zoo", backbone=backbone)
    assert Zoo(zoo.path).backbone == backbone
    Zoo(zoo.path, backbone=backbone)
    torch.manual_seed(20)  # a fixture may have seeded as this test does: other weights must really be others
    other = create_model("test_resnet", num_classes=3)
    with pytest.raises(ZooError, match=f"expected weights sha256 {backbone.weights_sha256}, got "):
        Zoo(zoo.path, backbone=BackboneIdentity.of(other))
    vit = create_model("test_vit", num_classes=3)
    with pytest.raises(ZooError, match="another backbone: expected architecture test_resnet, got test_vit"):
        zoo.bind(BackboneIdentity.of(vit))
    assert zoo.backbone == backbone
    # The head is the task's own: with another one it still is the same backbone.
    other.load_state_dict(dense.state_dict())
    other.reset_classifier(5)
    assert BackboneIdentity.of(other) == backbone


def test_entries_of_another_backbone_are_refused(zoo, add, structure):
    add(zoo, "x")
    vit = create_model("test_vit", num_classes=3)
    heads = find_structure(vit)
    mask = Mask.random(heads, 0.5, seed=0)
    model = prune_model(create_model("test_vit", num_classes=3), mask, structure=heads)
    with pytest.raises(ZooError, match="expected architecture test_resnet, got test_vit"):
        zoo.add_model(NewEntry("vit", model, mask, heads, {"name": "vit"}))
    assert [entry.name for entry in zoo.entries(structure.fingerprint)] == ["x"]
    with pytest.raises(ZooError, match=f"expected structure fingerprint 0123, got {structure.fingerprint}"):
        zoo.entries("0123")


# ---- damage


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damage_while_nothing_else_changes(path: Path) -> None:
    """Another byte, but size and time as before: what failing hardware does."""
    before = path.stat()
    flip_a_bit(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (Path.unlink, "missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-7]), "damaged"),
        (lambda path: path.write_bytes(b""), "damaged"),
    ],
)
def test_missing_and_cut_entries_are_named_skipped_and_replaced(zoo, add, damage, kind):
    entries = {name: add(zoo, name, which) for which, name in enumerate("ab")}
    damage(entries["a"].path)
    with pytest.warns(UserWarning, match=f"skipped {kind}: entry 'a': .*{entries['a'].path.name}"):
        assert [entry.name for entry in zoo.entries()] == ["b"]
    for use in (entries["a"].load, entries["a"].read, lambda: zoo["a"]):
        with pytest.raises(ZooError, match="entry 'a'"):
            use()
    assert "a" not in zoo
    assert not zoo.is_sound("a")
    assert len(zoo) == 1
    (problem,) = zoo.verify()
    assert (problem.kind, problem.entry, problem.path) == (kind, "a", entries["a"].path)
    add(zoo, "a")  # no replace=True needed: nothing usable is lost
    assert zoo.verify() == []
    assert len(zoo) == 2


@pytest.mark.parametrize("damage", [flip_a_bit, damage_while_nothing_else_changes])
def test_another_byte_is_found_when_the_file_is_read(zoo, add, damage):
    """The index answers without reading files; nothing that is read is used unless it is what was added."""
    entries = {name: add(zoo, name, which) for which, name in enumerate("ab")}
    damage(entries["a"].path)
    for use in (entries["a"].load, entries["a"].read, zoo["a"].read):
        with pytest.raises(ZooError, match=r"entry 'a': .*the file is damaged: expected SHA-256"):
            use()
    assert not zoo.is_sound("a")
    assert zoo.is_sound("b")
    (problem,) = zoo.verify()
    assert (problem.kind, problem.entry, problem.path) == ("damaged", "a", entries["a"].path)
    add(zoo, "a")  # no replace=True needed: nothing usable is lost
    assert zoo.is_sound("a")
    assert zoo.verify() == []
    damage(zoo["a"].path)
    assert zoo.verify(repair=True)[0].entry == "a"
    assert "a" not in zoo


def test_verify_does_not_trust_size_and_time(zoo, add):
    entry = add(zoo, "a")
    assert len(zoo) == 1  # its content is known to be right now
    damage_while_nothing_else_changes(entry.path)
    with pytest.raises(ZooError, match="damaged: expected SHA-256"):
        entry.read()
    assert [problem.kind for problem in zoo.verify()] == ["damaged"]


def test_damaged_row(zoo, add):
    add(zoo, "a")
    add(zoo, "b")
    connection = sqlite3.connect(zoo.path / "index.sqlite")
    connection.execute("UPDATE entries SET mask = x'00' WHERE name = 'a'")
    connection.execute("UPDATE entries SET task = '{' WHERE name = 'b'")
    connection.commit()
    connection.close()
    with pytest.warns(UserWarning, match="its row cannot be read"):
        assert zoo.entries() == []
    assert [(problem.kind, problem.entry) for problem in zoo.verify()] == [("damaged", "a"), ("damaged", "b")]


def test_verify_names_and_repairs(zoo, add):
    for name in "abc":
        add(zoo, name)
    flip_a_bit(zoo["a"].path)
    stray = zoo.path / "entries" / ".x.safetensors.123.part"
    stray.write_bytes(b"half")
    assert [(problem.kind, problem.entry) for problem in zoo.verify()] == [("damaged", "a"), ("stray", None)]
    assert str(stray) in str(zoo.verify()[1])
    assert len(zoo.verify(repair=True)) == 2
    assert zoo.verify() == []
    assert len(files(zoo)) == 2
    assert [entry.name for entry in zoo] == ["b", "c"]


def test_a_working_writers_file_is_no_stray(zoo, add):
    add(zoo, "a")
    (zoo.path / "entries" / "b-1.safetensors").write_bytes(b"not yet in the index")
    with zoo._layout.lock(exclusive=False):
        assert zoo.verify() == []
    assert [problem.kind for problem in zoo.verify()] == ["stray"]


# ---- full disk


@pytest.mark.parametrize("moment", ["write", "fsync", "replace", "insert"])
def test_full_disk_loses_nothing(zoo, add, monkeypatch, moment):
    add(zoo, "kept")
    before = content(zoo), files(zoo)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def full_index(*args, **kwargs):
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        if moment == "insert":
            patch.setattr(zoo._index, "_record", full_index)
        elif moment == "write":
            patch.setattr(storage, "write_together", full)
        else:
            patch.setattr(os, moment, full)
        for options in ({"name": "new"}, {"name": "kept", "which": 1, "replace": True}):
            with pytest.raises(ZooError, match=r"No space left|disk is full"):
                add(zoo, **options)
            assert (content(zoo), files(zoo)) == before
    assert zoo.verify() == []
    add(zoo, "new")
    assert len(zoo) == 2


PREAMBLE = """
import os, random, signal, sys, time
import torch
from mvp_ext.model.mask import Mask
from mvp_ext.model.families import find_structure
from mvp_ext.model.surgery import prune_model
from mvp_ext.model.create import create_model
from mvp_ext.zoo.zoo import NewEntry, Zoo, ZooError

torch.set_num_threads(1)  # no OpenMP pool: it would not survive the forks
path = sys.argv[1]
model = create_model("test_resnet", num_classes=3)
structure = find_structure(model)
mask = Mask.random(structure, 0.5, 0, align=1)
model = prune_model(model, mask, structure=structure)

def add(name, **options):
    return Zoo(path).add_model(NewEntry(name, model, mask, structure, {"name": name}), **options)
"""


def run(script: str, *arguments: object, limit: int | None = None) -> str:
    """Run Python that starts with PREAMBLE; with ``limit``, no file of its may grow beyond that many bytes."""

    def limit_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=limit_files if limit else None,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_really_no_room(zoo, add):
    """The kernel refuses to let files grow: the error is ours and the zoo is as before."""
    add(zoo, "kept")
    before = content(zoo), files(zoo)
    size = zoo["kept"].path.stat().st_size
    printed = run(
        """
        try:
            add("new")
        except ZooError as error:
            print("ZooError", error)
        print([entry.name for entry in Zoo(path)])
        """,
        zoo.path,
        limit=size - 1,
    )
    assert "ZooError" in printed
    assert "the zoo is unchanged" in printed
    assert "['kept']" in printed
    assert (content(zoo), files(zoo)) == before
    assert zoo.verify() == []


# ---- kill -9 and several writers


def test_kill_at_any_moment(tmp_path):
    """A writer is killed again and again: what was reported as added is there, and the rest is only stray files."""
    path = tmp_path / "zoo"
    printed = run(
        """
        generator = random.Random(0)
        for life in range(30):
            read, write = os.pipe()
            child = os.fork()
            if child == 0:
                for number in range(10_000):
                    add(f"{life}-{number}")
                    os.write(write, f"{life}-{number}\\n".encode())
            os.close(write)
            # Every second life is let come to its first entry, on a machine however slow; the others may be killed
            # while they make the zoo itself.
            first = os.read(read, 100).decode() if life % 2 else ""
            time.sleep(generator.uniform(0.0, 0.1))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            with os.fdopen(read) as pipe:
                print(first + pipe.read(), end="")
        """,
        path,
    )
    reported = set(printed.split())
    zoo = Zoo(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = {entry.name for entry in zoo.entries()}
    assert reported <= names
    assert len(names - reported) <= 30  # at most the one each life was just going to report
    assert len(reported) >= 15
    strays = zoo.verify()
    assert {problem.kind for problem in strays} <= {"stray"}
    zoo.verify(repair=True)
    assert zoo.verify() == []
    assert {entry.name for entry in zoo.entries()} == names
    zoo.entries()[0].load()


def test_four_writers_at_once(tmp_path):
    """Four processes make one zoo, race for the same names, and all their own entries are there."""
    path = tmp_path / "zoo"
    printed = run(
        """
        children = []
        for writer in range(4):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    lost = 0
                    for number in range(5):
                        add(f"own-{writer}-{number}")
                        try:
                            add(f"shared-{number}")
                        except ZooError as error:
                            assert "entry 'shared" in str(error), error
                            lost += 1
                        assert add(f"common-{number}", if_absent=True).name == f"common-{number}"
                    print("lost", lost, flush=True)
                    status = 0
                finally:
                    os._exit(status)
            children.append(child)
        assert all(os.waitpid(child, 0)[1] == 0 for child in children)
        """,
        path,
    )
    zoo = Zoo(path, create=False)
    own = {f"own-{writer}-{number}" for writer in range(4) for number in range(5)}
    both = {f"{kind}-{number}" for kind in ("shared", "common") for number in range(5)}
    assert {entry.name for entry in zoo} == own | both
    assert sum(map(int, printed.replace("lost", "").split())) == 15  # five names, three losers each
    assert zoo.verify() == []
    assert len(files(zoo)) == 30


def test_readers_go_on_while_a_writer_holds_the_index(zoo, add):
    add(zoo, "a")
    with zoo._index._write():
        assert [entry.name for entry in Zoo(zoo.path)] == ["a"]


def test_an_index_can_be_opened_while_another_process_makes_it(tmp_path, monkeypatch):
    """At each statement of who opens it, in turn, the other one makes the tables."""
    connect = sqlite3.connect
    for moment in range(1, 100):
        path = tmp_path / str(moment)
        with contextlib.closing(connect(path)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
        left = moment

        def other(_, path=path):
            nonlocal left
            left -= 1
            if left == 0:
                monkeypatch.setattr(sqlite3, "connect", connect)
                Index(path).create()

        def watched(*args, other=other, **kwargs):
            connection = connect(*args, **kwargs)
            connection.set_trace_callback(other)
            return connection

        monkeypatch.setattr(sqlite3, "connect", watched)
        found = Index(path).version()
        assert found in (0, SCHEMA_VERSION)
        if left > 0:
            return
    pytest.fail("it never came to its end")
