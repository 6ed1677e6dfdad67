"""``mvp-ext predict``: files and folders in; names, probabilities, and how good they are, out."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from digits import digits_task, few_digits, tiny_backbone
from PIL import Image
from typer.testing import CliRunner, Result

import mvp_ext
from mvp_ext.app import cli
from mvp_ext.app.plots import LIGHT, confusion, to_png
from mvp_ext.app.predict import Judgement, class_of_folder, judgement_tables
from mvp_ext.data.sources import FoundImage
from mvp_ext.model.checkpoint import PrunedCheckpoint, save_pruned
from mvp_ext.model.prediction import Predictions

CLASSES = ("0", "1", "2")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of three digits, and ``photos/<class>/<number>.png`` with a fourth folder that is no class."""
    home = tmp_path_factory.mktemp("predict")
    torch.manual_seed(0)
    mvp_ext.prune(tiny_backbone(), digits_task(), method="random", steps=3).save(home / "small.safetensors")
    data = few_digits()
    for label in range(4):
        folder = home / "photos" / (str(label) if label < 3 else "others")
        folder.mkdir(parents=True)
        for number, image in enumerate(data.test_images[data.test_labels == label][:5]):
            Image.fromarray(image.numpy()).save(folder / f"{number}.png")
    return home


@pytest.fixture(scope="module")
def small(home: Path) -> PrunedCheckpoint:
    return mvp_ext.load_pruned(home / "small.safetensors")


def predict(home: Path, arguments: str, code: int = 0) -> Result:
    command = f"predict {home}/small.safetensors {arguments}"
    result = CliRunner().invoke(cli.app, shlex.split(command))
    assert result.exit_code == code, f"{command}\n{result.output}\n{result.exception!r}"
    return result


def test_json_and_csv_say_what_the_model_says(home: Path, small: PrunedCheckpoint, tmp_path: Path) -> None:
    # 20 images, 6 a pass
    said = predict(
        home, f"{home}/photos --batch 6 --top 2 --json {tmp_path}/new/p.json --csv {tmp_path}/p.csv"
    )
    files = sorted((home / "photos").rglob("*.png"))
    expected = small.predict(files)
    told = json.loads((tmp_path / "new" / "p.json").read_text())
    assert told["model"] == {"file": "small.safetensors", "tasks": {"digits": list(CLASSES)}}
    assert told["versions"]["mvp_ext"] == mvp_ext.__version__
    assert [image["file"] for image in told["images"]] == list(map(str, files))
    for image, ranked in zip(told["images"], expected.top(2), strict=True):
        assert [one["name"] for one in image["classes"]] == [name for name, _ in ranked]
        chances = [one["probability"] for one in image["classes"]]
        assert chances == pytest.approx([chance for _, chance in ranked], abs=1e-5)
        assert f"{ranked[0][0]} {100 * ranked[0][1]:.1f} %" in said.output
    assert [image.get("label") for image in told["images"]] == [c for c in (*CLASSES, None) for _ in range(5)]
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    assert [row["file"] for row in rows] == list(map(str, files))
    every = torch.tensor([[float(row[name]) for name in CLASSES] for row in rows])
    torch.testing.assert_close(every, expected.probabilities, atol=1e-5, rtol=0)
    assert [row["class 1"] for row in rows] == expected.labels
    assert {"class 2", "probability 2"} < rows[0].keys()
    assert "class 3" not in rows[0]


def test_labelled_folders(home: Path, small: PrunedCheckpoint, tmp_path: Path) -> None:
    said = predict(home, f"{home}/photos --json {tmp_path}/p.json --confusion {tmp_path}/matrix.png")
    answers = {name: small.predict(sorted((home / "photos" / name).iterdir())).labels for name in CLASSES}
    right = sum(label == name for name, labels in answers.items() for label in labels)
    told = json.loads((tmp_path / "p.json").read_text())["quality"]["digits"]
    assert told["images"] == 15
    assert told["accuracy"] == pytest.approx(right / 15)
    assert told["in_no_class_folder"] == 5
    assert told["confusion"] == [[answers[name].count(other) for other in CLASSES] for name in CLASSES]
    assert told["classes"]["1"]["right"] == answers["1"].count("1")
    assert f"accuracy {100 * right / 15:.1f} % on 15 images" in said.output
    assert "5 more are in no folder of a class" in said.output
    with Image.open(tmp_path / "matrix.png") as drawn:
        assert min(drawn.size) > 100
    # One of its subfolders alone says nothing of classes.
    assert "accuracy" not in predict(home, f"{home}/photos/1").output
    line = predict(home, f"{home}/photos/1 --confusion {tmp_path}/none.png", code=2).stderr
    assert "--confusion: expected one task" in line
    assert not (tmp_path / "none.png").exists()


def test_judgement_is_counted_by_hand() -> None:
    chances = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.0, 1.0], [1.0, 0.0]])
    images = [FoundImage(Path("x"), group) for group in ("a", "b", "b", "b", None)]
    judged = Judgement.of(Predictions(chances, ("a", "b")), images)
    assert judged is not None
    assert judged.confusion == [[1, 0], [1, 2]]
    assert judged.per_class() == {"a": (1, 1), "b": (3, 2)}
    assert judged.strangers == 1
    assert judged.quality.accuracy == 0.75
    assert judged.quality.mean_confidence == pytest.approx((0.9 + 0.6 + 0.8 + 1.0) / 4)
    assert judged.quality.expected_calibration_error == pytest.approx((0.1 + 0.6 + 0.2 + 0.0) / 4)
    assert Judgement.of(Predictions(chances, ("c", "d")), images) is None


def test_folders_of_joined_data_sets() -> None:
    """Their classes have the data set's name before theirs; folders need not, where it is clear which is meant."""
    names = ("a/cat", "a/dog", "b/cat", "b/x/y", "b/plain", "plain")
    expected = {"dog": "a/dog", "x/y": "b/x/y", **{name: name for name in names}}
    assert class_of_folder(names) == expected
    images = [FoundImage(Path("x"), group) for group in ("dog", "cat", "plain")]
    judged = Judgement.of(Predictions(torch.eye(6)[[1, 0, 5]], names), images)
    assert judged is not None
    assert judged.per_class() == {"a/dog": (1, 1), "plain": (1, 1)}


def test_many_classes_are_told_by_the_pairs_that_are_confused() -> None:
    names = tuple(f"class {i}" for i in range(30))
    images = [FoundImage(Path("x"), name) for name in names for _ in range(2)]
    labels = torch.arange(30).repeat_interleave(2)
    answers = labels.clone()
    answers[14:16] = 3
    answers[0] = 4
    judged = Judgement.of(Predictions(torch.eye(30)[answers], names), images)
    assert judged is not None
    table = judgement_tables(judged, "")[1]
    assert [list(row) for row in table.rows] == [["class 7", "class 3", "2"], ["class 0", "class 4", "1"]]
    drawn = to_png(lambda theme: confusion(judged.confusion, names, theme), LIGHT)
    assert drawn.startswith(b"\x89PNG")


def test_damaged_images_are_named_and_passed_over(
    home: Path, small: PrunedCheckpoint, tmp_path: Path
) -> None:
    whole = (home / "photos" / "1" / "0.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole)
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.jpg").write_text("no image")
    (tmp_path / "d.png").write_bytes(whole)
    said = predict(home, f"{tmp_path} --json {tmp_path}/p.json --batch 1", code=1)
    lines = said.stderr.splitlines()
    assert lines[0].startswith(f"{tmp_path}/b.png: passed over: ")
    assert lines[1].startswith(f"{tmp_path}/c.jpg: passed over: cannot identify")
    assert lines[2] == "error: 2 of 4 images could not be read"
    told = json.loads((tmp_path / "p.json").read_text())
    assert [Path(one["file"]).name for one in told["images"]] == ["a.png", "d.png"]
    assert [Path(one["file"]).name for one in told["damaged"]] == ["b.png", "c.jpg"]
    assert told["images"][0]["classes"][0]["name"] == small.predict(tmp_path / "a.png").labels[0]
    # None can be read: said, no crash.
    predict(home, f"{tmp_path}/c.jpg --csv {tmp_path}/p.csv", code=1)


def test_names_are_text(home: Path, tmp_path: Path) -> None:
    """Brackets in a file's name are no markup, and no escape in it reaches the terminal."""
    image = home / "photos" / "0" / "0.png"
    for name in ("[red]x.png", "[bold].png", "\x1b[31mred.png", "b\x1b]0;title\x07.png"):
        (tmp_path / name).write_bytes(image.read_bytes())
    (tmp_path / "\x1b[31mbad.png").write_bytes(b"")
    said = predict(home, str(tmp_path), code=1)
    for stream in (said.stdout, said.stderr):
        assert "\x1b" not in stream
        assert "\x07" not in stream
    text = said.stdout.replace("\n", "")
    assert "[red]x.png" in text
    assert r"\x1b[31mred.png" in text
    assert r"\x1b[31mbad.png" in said.stderr


def test_exported_files_predict_too(home: Path, small: PrunedCheckpoint, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from mvp_ext.deploy.export import export

    export(small, tmp_path / "model.onnx", preprocess=True)
    photo = home / "photos" / "2" / "1.png"
    command = f"predict {tmp_path}/model.onnx {photo} --json {tmp_path}/p.json --top 9"
    result = CliRunner().invoke(cli.app, shlex.split(command))
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "p.json").read_text())
    found = {one["name"]: one["probability"] for one in told["images"][0]["classes"]}
    expected = small.predict(photo).probabilities[0].tolist()
    assert [found[name] for name in CLASSES] == pytest.approx(expected, abs=1e-4)
    refused = CliRunner().invoke(cli.app, shlex.split(f"{command} --device cuda"))
    assert refused.exit_code == 2


def test_mistakes_are_one_line(home: Path, tmp_path: Path) -> None:
    for arguments, message in {
        "no.png": "no such file or folder, nor a match of a pattern: 'no.png'",
        f"'{home}/*/x*.png'": "x*.png",
        str(tmp_path): f"no image in '{tmp_path}'",
        f"{home}/photos/1 --top 0": "--top",
    }.items():
        assert message in predict(home, arguments, code=2).stderr
    (tmp_path / "model.txt").write_text("x")
    result = CliRunner().invoke(cli.app, ["predict", str(tmp_path / "model.txt"), str(home / "photos")])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)


def test_bundles(home: Path, small: PrunedCheckpoint, tmp_path: Path) -> None:
    """Three tasks of one backbone: told side by side, or one alone, as each task's own file is."""
    other = copy.deepcopy(small.model)
    with torch.no_grad():
        other.get_classifier().weight.mul_(-1)  # type: ignore[operator]
    card = dataclasses.replace(small.card, class_names=("x", "y", "1"), task="other")
    save_pruned(other, tmp_path / "b.safetensors", mask=small.mask, structure=small.structure, card=card)
    command = f"bundle {home}/small.safetensors {tmp_path}/b.safetensors third={tmp_path}/b.safetensors"
    result = CliRunner().invoke(cli.app, shlex.split(f"{command} --out {tmp_path}/new/tasks.safetensors"))
    assert result.exit_code == 0, result.output
    assert "3 tasks" in result.output
    tasks = f"{tmp_path}/new/tasks.safetensors"
    out = f"--json {tmp_path}/p.json --csv {tmp_path}/p.csv --top 1"
    asked = CliRunner().invoke(cli.app, shlex.split(f"predict {tasks} {home}/photos {out}"))
    assert asked.exit_code == 0, asked.output
    told = json.loads((tmp_path / "p.json").read_text())
    assert list(told["model"]["tasks"]) == ["digits", "other", "third"]
    assert len(told["images"]) == 3 * 20
    alone = mvp_ext.load_pruned(tmp_path / "b.safetensors")
    files = [one["file"] for one in told["images"] if one["task"] == "third"]
    found = [one["classes"][0]["name"] for one in told["images"] if one["task"] == "third"]
    assert found == alone.predict(files).labels
    # Of the folders 0, 1 and 2 only 1 is a class of the other tasks.
    assert {task: judged["images"] for task, judged in told["quality"].items()} == {
        "digits": 15,
        "other": 5,
        "third": 5,
    }
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    assert {(row["task"], row["x"] == "") for row in rows} == {
        ("digits", True),
        ("other", False),
        ("third", False),
    }
    one = CliRunner().invoke(cli.app, shlex.split(f"predict {tasks} {home}/photos/1 --task other {out}"))
    assert one.exit_code == 0, one.output
    assert list(json.loads((tmp_path / "p.json").read_text())["model"]["tasks"]) == ["other"]
    for mistake, message in {
        f"predict {tasks} {home}/photos --task none": "digits, other, third, got 'none'",
        f"predict {home}/small.safetensors {home}/photos --task none": "small.safetensors, digits, got 'none'",
        f"bundle {home}/small.safetensors {home}/small.safetensors --out {tmp_path}/x": "got 'digits' again",
        f"bundle {home}/no.safetensors --out {tmp_path}/x": "no.safetensors",
    }.items():
        refused = CliRunner().invoke(cli.app, shlex.split(mistake))
        assert refused.exit_code == 2
        assert message in refused.stderr
        assert not (tmp_path / "x").exists()


def test_exported_bundles(home: Path, small: PrunedCheckpoint, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    bundle = f"bundle {home}/small.safetensors b={home}/small.safetensors --out {tmp_path}/tasks.safetensors"
    photo, out = f"{home}/photos/2/1.png", f"--top 3 --json {tmp_path}/p.json"
    for command in (
        bundle,
        f"export {tmp_path}/tasks.safetensors --to onnx",
        f"predict {tmp_path}/tasks.onnx {photo} {out}",
    ):
        result = CliRunner().invoke(cli.app, shlex.split(command))
        assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "p.json").read_text())["images"]
    assert [one["task"] for one in told] == ["digits", "b"]
    expected = small.predict(photo).top(3)[0]
    for one in told:
        found = [(each["name"], pytest.approx(each["probability"], abs=1e-4)) for each in one["classes"]]
        assert found == expected
    one = CliRunner().invoke(cli.app, shlex.split(f"predict {tmp_path}/tasks.onnx {photo} --task b {out}"))
    assert one.exit_code == 0, one.output
    assert [image["task"] for image in json.loads((tmp_path / "p.json").read_text())["images"]] == ["b"]
    refused = CliRunner().invoke(cli.app, shlex.split(f"export {tmp_path}/tasks.safetensors --to openvino"))
    assert refused.exit_code == 2
    assert "is a bundle" in refused.stderr
