"""Files that people keep: whole or as they were, with their mode, where their links point; and what is refused."""

from __future__ import annotations

import os
import resource
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from mvp_ext import storage

KIND = {"kind": "test", "version": 1}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("bits", [0o600, 0o640, 0o444, 0o755])
def test_a_replaced_file_keeps_its_mode(tmp_path: Path, bits: int) -> None:
    path = tmp_path / "kept"
    path.write_bytes(b"old")
    path.chmod(bits)
    storage.write_atomic(path, b"new")
    assert (path.read_bytes(), mode(path)) == (b"new", bits)
    assert names(tmp_path) == ["kept"]


def test_a_new_file_has_the_mode_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    storage.write_atomic(tmp_path / "new", b"")
    assert mode(tmp_path / "new") == mode(tmp_path / "plain")


@pytest.mark.parametrize("there", [True, False], ids=["target", "dangling"])
@pytest.mark.parametrize("relative", [True, False])
def test_a_link_stays_and_its_target_is_written(tmp_path: Path, there: bool, relative: bool) -> None:
    (tmp_path / "far").mkdir()
    target, link, second = tmp_path / "far" / "target", tmp_path / "link", tmp_path / "second"
    if there:
        target.write_bytes(b"old")
        target.chmod(0o640)
    link.symlink_to("far/target" if relative else target)
    second.symlink_to("link")
    storage.write_atomic(second, b"new")
    assert link.is_symlink()
    assert second.is_symlink()
    assert target.read_bytes() == b"new"
    assert not there or mode(target) == 0o640
    assert names(tmp_path / "far") == ["target"]


def test_what_is_no_file_is_written_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=subprocess.PIPE)
    storage.write_atomic(tmp_path / "pipe", b"through")
    assert reader.communicate(timeout=20)[0] == b"through"
    assert names(tmp_path) == ["pipe"]
    storage.write_atomic("/dev/null", b"away")
    assert not Path("/dev/null").is_file()
    with pytest.raises(IsADirectoryError):
        storage.write_atomic(tmp_path, b"")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        storage.write_atomic(tmp_path / "loop", b"")


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("moment", range(5))
def test_files_that_go_together_are_all_new_or_all_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool, call: str, moment: int
) -> None:
    paths = [tmp_path / name for name in ("m.bin", "m.xml")]
    for path in paths if there else []:
        path.write_bytes(b"old")
    plain, calls = getattr(os, call), 0

    def failing(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == moment + 1:
            raise OSError(28, "No space left on device")
        return plain(*args)

    monkeypatch.setattr(os, call, failing)
    try:
        storage.write_together(dict.fromkeys(paths, b"new"))
    except OSError:
        # The names are synced last: then all are new.
        state = {b"new"} if call == "fsync" and moment == 2 else {b"old"} if there else {None}
    else:
        state = {b"new"}
    assert {path.read_bytes() if path.exists() else None for path in paths} == state
    assert set(names(tmp_path)) <= {"m.bin", "m.xml"}


def test_a_kill_leaves_no_old_file_beside_a_new_one(tmp_path: Path) -> None:
    script = """
        import os, signal, sys
        from pathlib import Path
        from mvp_ext import storage
        for moment in range(1, 12):
            paths = [Path(sys.argv[1]) / f"{moment}{end}" for end in (".bin", ".xml")]
            for path in paths:
                path.write_bytes(b"old")
            if os.fork() == 0:
                left = moment
                def counted(function):
                    def run(*args):
                        global left
                        left -= 1
                        if left == 0:
                            os.kill(os.getpid(), signal.SIGKILL)
                        return function(*args)
                    return run
                for name in ("fsync", "replace", "unlink"):
                    setattr(os, name, counted(getattr(os, name)))
                storage.write_together(dict.fromkeys(paths, b"new"))
                os._exit(0)
            os.wait()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], check=True, timeout=120)
    seen = set()
    for moment in range(1, 12):
        paths = [tmp_path / f"{moment}{end}" for end in (".bin", ".xml")]
        found = {path.read_bytes() for path in paths if path.exists()}
        assert len(found) <= 1
        seen |= found
    assert seen == {b"old", b"new"}
    # What they left is told from what is being written.
    left = [path for path in tmp_path.iterdir() if path.suffix == storage.PART]
    assert left
    assert all(storage.is_abandoned(path, remove=True) for path in left)
    assert not [path for path in tmp_path.iterdir() if path.suffix == storage.PART]


def test_tensors_that_share_memory_are_each_written_whole() -> None:
    base = torch.arange(12.0)
    given = {
        "all": base,
        "again": base,
        "part": base[2:5],
        "transposed": base.view(3, 4).T,
        "expanded": base[:1].expand(5),
        "negative": torch.randn(3, dtype=torch.complex64).conj().imag,
        "none": base[:0],
    }
    found, spec = storage.from_bytes(storage.to_bytes(given, {"x": 1}, **KIND), **KIND)
    assert spec == {"x": 1}
    assert found.keys() == given.keys()
    assert all(torch.equal(value, found[name]) for name, value in given.items())


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [(torch.eye(3).to_sparse(), "sparse"), (torch.ones(2, device="meta"), "meta")],
    ids=["sparse", "meta"],
)
def test_tensors_without_plain_memory_are_named(tensor: torch.Tensor, kind: str) -> None:
    with pytest.raises(TypeError, match=rf"tensor 'x': expected one with plain memory, got .*{kind}"):
        storage.to_bytes({"x": tensor}, {}, **KIND)


@pytest.mark.parametrize(
    "entry",
    [
        {"version": "1"},
        {"version": None},
        {"spec": "[1]"},
        {"spec": "[" * 100_000},
        {"spec": '"\\ud800"'},
        {"spec": 5},
        {"crc32": None},
        {"format": []},
    ],
    ids=lambda e: str(e)[:30],
)
def test_descriptions_of_other_kinds_are_damaged_files(entry: dict[str, object]) -> None:
    import json

    from safetensors.torch import save

    whole = {"crc32": "crc32:00000000", "format": "test", "version": 1, "spec": "{}", **entry}
    data = save({"x": torch.ones(1)}, {"mvp_ext": json.dumps(whole)})
    with pytest.raises(storage.FileFormatError, match="these bytes"):
        storage.from_bytes(data, **KIND)


def test_a_header_nested_too_deep_is_a_damaged_file(tmp_path: Path) -> None:
    header = b'{"a":' * 50_000
    data = len(header).to_bytes(8, "little") + header
    with pytest.raises(storage.FileFormatError, match="damaged"):
        storage.from_bytes(data, **KIND)
    (tmp_path / "deep").write_bytes(data)
    assert storage.kind_of(tmp_path / "deep") is None


TENSORS = {
    "weight": torch.arange(600_000.0).reshape(1000, 600),
    "turned": torch.arange(6).reshape(2, 3).t(),
    "half": torch.ones(7, dtype=torch.bfloat16),
    "none": torch.zeros(0),
}


def test_a_file_has_the_bytes_of_to_bytes(tmp_path: Path) -> None:
    storage.write(tmp_path / "file", TENSORS, {"a": 1}, kind="k", version=1)
    assert (tmp_path / "file").read_bytes() == storage.to_bytes(TENSORS, {"a": 1}, kind="k", version=1)
    assert os.listdir(tmp_path) == ["file"]
    tensors, spec = storage.read(tmp_path / "file", kind="k", version=1)
    assert spec == {"a": 1}
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    storage.write(path, {}, {"a": "old"}, kind="k", version=1)
    with (
        file_size_limit(100_000),
        pytest.raises(OSError, match=r"file: could not be written .*File too large"),
    ):
        storage.write(path, TENSORS, {"a": "new"}, kind="k", version=1)
    assert os.listdir(tmp_path) == ["file"]
    assert storage.read(path, kind="k", version=1) == ({}, {"a": "old"})


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """As if the disk had no more room: a write beyond fails instead of killing the process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_large_file_is_written_without_a_copy_in_memory(tmp_path: Path) -> None:
    program = """
        import resource, sys, torch
        from mvp_ext import storage
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        storage.write(sys.argv[1], {"a": torch.ones(9)}, {}, kind="k", version=1)
        tensors = {str(i): torch.ones(16 << 20) for i in range(4)}
        before = peak()
        storage.write(sys.argv[1], tensors, {}, kind="k", version=1)
        print(peak() - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "file")],
        capture_output=True,
        text=True,
        check=True,
    )
    # MB; the tensors are 256.
    assert int(done.stdout) < 32
