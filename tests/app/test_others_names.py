"""Names of others on the terminal and in files: what would steer or end a command is spelled out."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from command_line import run

from mvp_ext.app import demo
from mvp_ext.model.create import create_model
from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.surgery import prune_model
from mvp_ext.zoo.zoo import NewEntry, Zoo

NAMES = ["\x1b[2J\x1b]0;title\x07", "[/]", "[red]x", "a\nb", "\u202eevil", "$x_{$", "..", "\x9b31m"]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("names") / "zoo"
    torch.manual_seed(0)
    dense = create_model("test_resnet", num_classes=3)
    structure = find_structure(dense)
    mask = Mask.random(structure, 0.5, 0, align=1)
    small = prune_model(dense, mask, structure=structure).eval()
    for name in NAMES:
        Zoo(path).add_model(NewEntry(name, small, mask, structure, {"name": name, "classes": [name, "y"]}))
    return path


def harmless(text: str) -> bool:
    return all(c.isprintable() or c == "\n" for c in text)


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_are_shown_spelled_out(zoo: Path, name: str) -> None:
    quoted = "'" + name.replace("'", "'\\''") + "'"
    said = run(f"zoo show {quoted} --zoo {zoo}")
    assert harmless(said.output)
    assert harmless(said.stderr)
    assert harmless(run(f"zoo show {quoted}x --zoo {zoo}", code=2).stderr)


def test_lists_and_problems_are_spelled_out(zoo: Path, tmp_path: Path) -> None:
    said = run(f"zoo list --zoo {zoo}")
    assert harmless(said.output)
    assert "[/]" in said.output
    shutil.copytree(zoo, tmp_path / "zoo")
    for entry in Zoo(tmp_path / "zoo"):
        entry.path.unlink()
    (tmp_path / "zoo" / "entries" / NAMES[0].replace("/", "")).write_bytes(b"stray")
    for command, code in (("list", 0), ("verify", 1), ("verify --repair", 0)):
        said = run(f"zoo {command} --zoo {tmp_path}/zoo", code=code)
        assert harmless(said.output)
        assert harmless(said.stderr)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null"], ids=lambda c: ascii(c)[:9]
)
def test_a_damaged_demo_json_blocks_no_demo(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "demo.json").write_bytes(content)
    demo._check_folder(demo.QUICK, tmp_path)
    demo._check_folder(demo.QUICK, tmp_path)
    with pytest.raises(ValueError, match="another size or seed"):
        demo._check_folder(demo.FULL, tmp_path)
