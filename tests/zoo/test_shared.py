"""What a zoo keeps beside its entries: models of all tasks, and facts; as whole and as sound as entries are."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import textwrap

import pytest
import torch

from mvp_ext.model.create import create_model
from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.zoo.shared import START, is_refined
from mvp_ext.zoo.zoo import NewEntry, Zoo, ZooError


@pytest.fixture
def zoo(tmp_path):
    return Zoo(tmp_path / "zoo")


def files(zoo):
    return sorted(path.name for path in (zoo.path / "shared").glob("*"))


def test_save_and_load(zoo, small):
    model, mask, structure = small[0]
    extra = {"keep": 0.5, "classes": [1, 2], "result": {"cost": {"seconds": 1.5}}}
    made = zoo.save_shared("start", model, mask, structure, extra)
    known = Zoo(zoo.path, create=False).shared("start")
    assert known.name == made.name == "start"
    assert known.extra == made.extra == extra
    assert known.path == made.path
    assert known.path.parent == zoo.path / "shared"
    assert known.structure_fingerprint == structure.fingerprint
    loaded = known.load()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.model(x), model(x))
    assert loaded.mask == mask
    assert loaded.extra == extra
    assert zoo.shared("universal") is None
    assert zoo.backbone.structure_fingerprint == structure.fingerprint
    assert len(zoo) == 0
    assert zoo.verify() == []


def test_is_refined(zoo, small):
    assert not is_refined(zoo)
    zoo.save_shared(START, *small[0])
    assert not is_refined(zoo)  # build_zoo was given a model to start from
    zoo.save_shared(START, *small[0], {"keep": 0.5})
    assert is_refined(zoo)


def test_a_model_is_replaced_by_the_next_of_its_name(zoo, small):
    first = zoo.save_shared("universal", *small[0], {"keep": 0.5})
    other = zoo.save_shared("start", *small[0])
    second = zoo.save_shared("universal", *small[1], {"keep": 0.25})
    assert files(zoo) == sorted([second.path.name, other.path.name])
    assert zoo.shared("universal").extra == {"keep": 0.25}
    assert zoo.shared("universal").load().mask == small[1][1]
    with pytest.raises(ZooError, match=r"zoo model 'universal': .*the file is gone"):
        first.read()


def test_bad_arguments_change_nothing(zoo, small):
    model, mask, structure = small[0]
    with pytest.raises(ValueError, match="shared model 'start': extra must be JSON"):
        zoo.save_shared("start", model, mask, structure, {"x": object()})
    with pytest.raises(ValueError, match="the mask leaves shape"):
        zoo.save_shared("start", model, Mask.full(structure), structure)
    assert files(zoo) == []
    assert zoo.backbone is None
    zoo.save_shared("start", model, mask, structure)
    vit = create_model("test_vit", num_classes=3)
    heads = find_structure(vit)
    with pytest.raises(ZooError, match="expected architecture test_resnet, got test_vit"):
        zoo.save_shared("start", vit, Mask.full(heads), heads)
    assert zoo.shared("start").load().mask == mask
    assert zoo.verify() == []


@pytest.mark.parametrize("moment", ["fsync", "replace", "put_model"])
def test_full_disk_loses_nothing(zoo, small, monkeypatch, moment):
    before = zoo.save_shared("start", *small[0])

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(zoo._index if moment == "put_model" else os, moment, full)
        with pytest.raises(ZooError, match=r"model 'start' could not be written.*No space left"):
            zoo.save_shared("start", *small[1])
    assert files(zoo) == [before.path.name]
    assert zoo.shared("start").sha256 == before.sha256
    assert zoo.verify() == []


def spoil(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-7]), "damaged"),
        (spoil, "damaged"),
    ],
)
def test_damage_is_named_and_repaired(zoo, small, damage, kind):
    kept = zoo.save_shared("universal", *small[0])
    model = zoo.save_shared("start", *small[0], {"keep": 0.5})
    damage(model.path)
    assert zoo.shared("start").extra == {"keep": 0.5}  # what is said of it is known without its file
    assert not zoo.shared("start").is_sound()
    for use in (model.read, model.load):
        with pytest.raises(ZooError, match=f"zoo model 'start': .*{model.path.name}"):
            use()
    (problem,) = zoo.verify()
    assert (problem.kind, problem.model, problem.entry, problem.path) == (kind, "start", None, model.path)
    assert "model 'start'" in str(problem)
    stray = zoo.path / "shared" / ".start-1.safetensors.part"
    stray.write_bytes(b"half")
    assert [p.kind for p in zoo.verify(repair=True)] == [kind, "stray"]
    assert zoo.verify() == []
    assert zoo.shared("start") is None
    assert files(zoo) == [kept.path.name]


def test_a_damaged_row(zoo, small):
    zoo.save_shared("start", *small[0])
    connection = sqlite3.connect(zoo.path / "index.sqlite")
    connection.execute("UPDATE models SET extra = '{'")
    connection.commit()
    connection.close()
    with pytest.raises(ZooError, match="model 'start': its row cannot be read"):
        zoo.shared("start")
    assert [(p.kind, p.model) for p in zoo.verify()] == [("damaged", "start")]


@pytest.mark.parametrize("table", ["entries", "models"])
def test_a_row_never_leads_out_of_the_zoo(zoo, small, table):
    victim = zoo.path.parent / "victim.txt"
    victim.write_text("dear to somebody")
    for name, path in (("relative", "../../victim.txt"), ("absolute", str(victim))):
        zoo.add_model(NewEntry(name, *small[0], {"name": name}))
        zoo.save_shared(name, *small[0])
        connection = sqlite3.connect(zoo.path / "index.sqlite")
        connection.execute(f"UPDATE {table} SET file = ?, bytes = 16 WHERE name = ?", (path, name))
        connection.commit()
        connection.close()
        assert "missing" in {problem.kind for problem in zoo.verify()}
        if table == "entries":
            zoo.add_model(NewEntry(name, *small[0], {"name": name}), replace=True)
            zoo.remove(name)
        else:
            zoo.save_shared(name, *small[0])
        zoo.verify(repair=True)
    assert victim.read_text() == "dear to somebody"


def test_rows_that_are_not_their_files_are_named(zoo, small):
    tensors = {"class_means": torch.randn(3, 8), "temperature": torch.tensor(1.0)}
    for name in "ab":
        zoo.add_model(NewEntry(name, *small[0], {"name": name}, tensors=tensors))
    connection = sqlite3.connect(zoo.path / "index.sqlite")
    other = small[1][1].to_bytes()
    connection.execute("UPDATE entries SET mask = ? WHERE name = 'a'", (other,))
    connection.execute("UPDATE entries SET temperature = 2.0 WHERE name = 'b'")
    connection.commit()
    connection.close()
    assert [(p.kind, p.entry) for p in zoo.verify()] == [("damaged", "a"), ("damaged", "b")]
    for problem, what in zip(
        zoo.verify(), ("the mask is another", "the class means are others"), strict=True
    ):
        assert what in str(problem)


def test_facts(zoo):
    assert zoo.facts() == {}
    zoo.record_facts(settings={"keep": 0.3, "scope": None}, note="ünï")
    zoo.record_facts(note=2)
    assert Zoo(zoo.path).facts() == {"settings": {"keep": 0.3, "scope": None}, "note": 2}
    with pytest.raises(ValueError, match="fact 'x' must be JSON"):
        zoo.record_facts(note=3, x=object())
    assert zoo.facts()["note"] == 2


def test_kill_at_any_moment(tmp_path):
    """A writer that replaces a model is killed again and again: there always is a whole one, and only strays beside."""
    path = tmp_path / "zoo"
    script = """
        import os, random, signal, sys, time
        import torch
        from mvp_ext.model.create import create_model
        from mvp_ext.model.families import find_structure
        from mvp_ext.model.mask import Mask
        from mvp_ext.model.surgery import prune_model
        from mvp_ext.zoo.zoo import Zoo

        torch.set_num_threads(1)
        model = create_model("test_resnet", num_classes=3)
        structure = find_structure(model)
        mask = Mask.random(structure, 0.5, 0, align=1)
        model = prune_model(model, mask, structure=structure)
        Zoo(sys.argv[1]).save_shared("start", model, mask, structure, {"number": -1})
        generator = random.Random(0)
        for life in range(20):
            child = os.fork()
            if child == 0:
                for number in range(10_000):
                    Zoo(sys.argv[1]).save_shared("start", model, mask, structure, {"number": number})
            time.sleep(generator.uniform(0.0, 0.15))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            zoo = Zoo(sys.argv[1], create=False)
            zoo.shared("start").read()
            assert {problem.kind for problem in zoo.verify()} <= {"stray"}
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    zoo = Zoo(path)
    zoo.verify(repair=True)
    assert zoo.verify() == []
    assert files(zoo) == [zoo.shared("start").path.name]
