"""``mvp-ext predict``: what it says of files, folders and patterns, and what it does with those it cannot read."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from tiny import tiny_model
from typer.testing import CliRunner, Result

from mvp_ext.app import cli
from mvp_ext.data.images import load_data
from mvp_ext.data.sources import DataError, find_images
from mvp_ext.data.tasks import Task
from mvp_ext.model.checkpoint import load_pruned
from mvp_ext.model.preprocessing import Preprocessing
from mvp_ext.pruning.prune import prune
from mvp_ext.train.backbone import Backbone

pytestmark = pytest.mark.usefixtures("one_thread")

# Markup and a terminal's escape: names are shown, never obeyed.
NAMES = ("[red]bee", "ant", "c\x1b[31mow")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``photos/<class>/<n>.png`` and ``small.safetensors``, made for them."""
    home = tmp_path_factory.mktemp("home")
    digits = load_digits()
    for label, name in enumerate(NAMES):
        folder = home / "photos" / name
        folder.mkdir(parents=True)
        for number, pixels in enumerate(digits.images[digits.target == label][:20]):
            Image.fromarray((pixels * 15).astype("uint8")).save(folder / f"{number}.png")
    backbone = Backbone(tiny_model("test_resnet").eval(), Preprocessing(32, (0.3,) * 3, (0.35,) * 3))
    task = Task("three", load_data(home / "photos"), (0, 1, 2))
    prune(backbone, task, method="random", steps=6).save(home / "small.safetensors")
    return home


def run(*words: object, code: int = 0) -> Result:
    result = CliRunner().invoke(cli.app, ["predict", *map(str, words)])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def test_files_folders_and_patterns_are_the_same_images(home: Path, tmp_path: Path) -> None:
    folder = home / "photos" / "ant"
    files = sorted(folder.iterdir())
    saved = []
    for number, given in enumerate(([folder], files, [folder / "*.png"], [folder, *files])):
        run(home / "small.safetensors", *given, "--json", tmp_path / f"{number}.json")
        saved.append(json.loads((tmp_path / f"{number}.json").read_text()))
    assert len(saved[0]["images"]) == 20
    assert all(said["images"] == saved[0]["images"] for said in saved)
    expected = load_pruned(home / "small.safetensors").predict(files).top(3)
    for said, row in zip(saved[0]["images"], expected, strict=True):
        assert [c["name"] for c in said["classes"]] == [name for name, _ in row]
        assert [c["probability"] for c in said["classes"]] == pytest.approx([p for _, p in row], abs=1e-5)
    assert saved[0]["class_names"] == list(NAMES)
    assert saved[0]["task"] == "three"


def test_folders_named_as_classes_are_judged(home: Path, tmp_path: Path) -> None:
    out = [tmp_path / name for name in ("p.json", "p.csv", "p.png")]
    photos = home / "photos"
    said = run(
        home / "small.safetensors",
        photos,
        "--json",
        out[0],
        "--csv",
        out[1],
        "--confusion",
        out[2],
        "--top",
        1,
    )
    saved = json.loads(out[0].read_text())
    confusion, shown = torch.zeros(3, 3, dtype=torch.int64), 0
    for image in saved["images"]:
        shows = NAMES.index(Path(image["file"]).parent.name)
        confusion[shows, NAMES.index(image["classes"][0]["name"])] += 1
        shown += 1
    assert shown == 60
    assert saved["confusion"] == confusion.tolist()
    accuracy = float(confusion.diagonal().sum() / 60)
    assert saved["quality"]["accuracy"] == pytest.approx(accuracy)
    assert f"accuracy {100 * accuracy:.1f} % of 60 images" in said.output
    for name, row in zip(NAMES, confusion.tolist(), strict=True):
        assert str(max(row)) in said.output, name
    rows = list(csv.DictReader(out[1].open(newline="")))
    assert len(rows) == 60
    assert sum(float(rows[0][name]) for name in NAMES) == pytest.approx(1, abs=1e-4)
    with Image.open(out[2]) as picture:
        assert min(picture.size) > 200


def test_names_are_shown_and_not_obeyed(home: Path) -> None:
    said = run(home / "small.safetensors", home / "photos")
    assert "[red]bee" in said.output
    assert "\x1b[31mow" not in said.output
    assert r"c\x1b[31mow" in said.output


def test_what_cannot_be_read_is_named_and_passed_over(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    good = home / "photos" / "ant" / "0.png"
    (folder / "a.png").write_bytes(good.read_bytes())
    (folder / "b.png").write_bytes(good.read_bytes()[:60])
    (folder / "c.jpg").write_text("no image")
    (folder / "notes.txt").write_text("left alone in a folder")
    (folder / ".hidden.png").write_text("so is this")
    result = run(home / "small.safetensors", folder, "--json", tmp_path / "p.json", code=1)
    for name in ("b.png", "c.jpg"):
        assert f"{folder / name}: passed over: " in result.stderr
    assert "2 of 3 images could not be read" in result.output
    saved = json.loads((tmp_path / "p.json").read_text())
    assert [Path(image["file"]).name for image in saved["images"]] == ["a.png"]
    assert sorted(Path(image["file"]).name for image in saved["damaged"]) == ["b.png", "c.jpg"]
    run(home / "small.safetensors", folder / "c.jpg", code=2)


def test_what_is_not_there_is_named(home: Path, tmp_path: Path) -> None:
    assert (
        "no such image, folder or pattern: 'nowhere*.png'"
        in run(home / "small.safetensors", "nowhere*.png", code=2).stderr
    )
    (tmp_path / "empty").mkdir()
    assert "no images in this folder" in run(home / "small.safetensors", tmp_path / "empty", code=2).stderr
    assert (
        "no image lies in a folder named as a class"
        in run(
            home / "small.safetensors",
            home / "photos" / "ant" / "0.png",
            "--confusion",
            tmp_path / "p.png",
            code=2,
        ).stderr
    )


def test_the_innermost_folder_of_a_known_name_says_what_an_image_shows(tmp_path: Path) -> None:
    for name in ("train/cat/1.png", "train/cat/dog/2.png", "other/3.png", "train/__MACOSX/4.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    found = find_images([tmp_path], ("cat", "dog"))
    assert {image.path.name: image.folder for image in found} == {
        "1.png": "cat",
        "2.png": "dog",
        "3.png": None,
    }
    assert [image.folder for image in find_images([tmp_path / "train" / "cat"], ("cat",))] == ["cat", "cat"]
    assert find_images([tmp_path / "other" / "3.png"])[0].folder is None
    with pytest.raises(DataError, match="no such image"):
        find_images([tmp_path / "none"])
