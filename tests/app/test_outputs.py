"""Files that a command is to write: what is wrong with them is found before any work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from command_line import run

from mvp_ext.app.outputs import check_folder, check_output

# Commands that write a file, each so far from working that only its output can be what is complained of first.
WRITERS = (
    "prune --classes a,b --zoo no-such-zoo --model no-such.safetensors --out {}",
    "pretrain --data no-such-data --out {}",
    "bundle no-such.safetensors --out {}",
    "export no-such.safetensors --to onnx --out {}",
)


@pytest.mark.parametrize("command", WRITERS)
def test_a_file_that_is_there_is_kept(command: str, tmp_path: Path) -> None:
    out = tmp_path / "mine.safetensors"
    out.write_text("mine")
    said = run(command.format(out), code=2)
    assert f"{out} is there already; give --force" in said.stderr
    assert out.read_text() == "mine"
    assert "is there already" not in run(f"{command.format(out)} --force", code=2).stderr


@pytest.mark.parametrize(
    "command",
    [
        *WRITERS,
        "predict no-such.onnx x.png --json {}",
        "predict no-such.onnx x.png --confusion {}",
        "bench --out {}",
    ],
)
def test_what_cannot_be_written_is_found_first(command: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = run(command.format(tmp_path / "file" / "out.safetensors"), code=2)
    assert "expected a folder, got the file" in said.stderr or "nothing can be written" in said.stderr
    assert "expected a file, got the folder" in run(command.format(tmp_path), code=2).stderr


@pytest.mark.parametrize("command", ["compare --zoo no-such-zoo --out {}", "demo --out {}"])
def test_folders_of_results_likewise(command: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "expected a folder, got the file" in run(command.format(tmp_path / "file"), code=2).stderr


def test_folders_are_made_and_nothing_is_left_in_them(tmp_path: Path) -> None:
    check_output("--out", tmp_path / "new" / "deep" / "a.onnx")
    check_folder("--out", tmp_path / "other")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["deep", "new", "other"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="--out: nothing can be written into"):
        check_output("--out", tmp_path / "a.onnx")
