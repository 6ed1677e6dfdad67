"""The whole way: photos, zoo, prune, save; a process that has no mvp_ext gives the same predictions, by every road."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from tiny import tiny_model

import mvp_ext

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

CLASSES = ("ant", "bat", "bee", "cat", "cow")

# What a user's own program would be: it knows the formats' libraries, Pillow, torch, timm and safetensors.
PROGRAM = r"""
import json, sys
sys.modules["mvp_ext"] = None  # importing it fails
from pathlib import Path
import numpy as np, torch
from PIL import Image

folder = Path(sys.argv[1])
roads = {}

program = torch.export.load(folder / "small.pt2").module()
roads["pt2"] = lambda batch: program(torch.from_numpy(batch)).detach().numpy()

import onnxruntime
session = onnxruntime.InferenceSession(folder / "small.onnx", providers=["CPUExecutionProvider"])
roads["onnxruntime"] = lambda batch: session.run(None, {"images": batch})[0]
onnx_names = json.loads(session.get_modelmeta().custom_metadata_map["mvp_ext"])["card"]["class_names"]

import openvino
compiled = openvino.Core().compile_model(folder / "small.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
roads["openvino"] = lambda batch: compiled(batch)[0]

try:
    import torchvision
except RuntimeError:
    # This machine's: a torchvision for CUDA beside a torch for CPUs.
    for name in [n for n in sys.modules if n.startswith("torchvision")]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import timm
from safetensors import safe_open

with safe_open(folder / "small.safetensors", "pt") as file:
    spec = json.loads(json.loads(file.metadata()["mvp_ext"])["spec"])
    weights = {n[6:]: file.get_tensor(n) for n in file.keys() if n.startswith("model/")}
recipe = spec["recipe"]
model = timm.create_model(recipe.pop("name"), **recipe).eval()
for name, tensor in weights.items():
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    setattr(owner, leaf, torch.nn.Parameter(tensor) if leaf in owner._parameters else tensor)
for name, kept in spec["kept"].items():
    part = model.get_submodule(name)
    if hasattr(part, "num_heads"):
        part.num_heads, part.attn_dim = len(kept), len(kept) * part.head_dim
see = spec["card"]["preprocessing"]
transform = timm.data.create_transform(
    input_size=(3, see["size"], see["size"]), mean=see["mean"], std=see["std"], interpolation="bilinear", crop_pct=1.0
)
roads["timm"] = lambda batch: model(torch.stack([transform(Image.fromarray(p)) for p in batch])).detach().numpy()
logits = {}
for photos in ("photos", "of_the_models_size"):
    batch = np.stack([np.asarray(Image.open(p).convert("RGB")) for p in sorted(folder.glob(f"{photos}/*/*.png"))])
    logits[photos] = {road: run(batch).tolist() for road, run in roads.items()}
names = {"card": spec["card"]["class_names"], "onnx": onnx_names}
print(json.dumps({"logits": logits, "names": names}))
"""


@pytest.mark.parametrize(("name", "scope"), [("test_resnet", "inner"), ("test_vit", "heads+mlp")])
def test_the_same_predictions_by_every_road(name: str, scope: str, tmp_path: Path) -> None:
    digits = load_digits()
    for label, folder in enumerate(CLASSES):
        (tmp_path / "photos" / folder).mkdir(parents=True)
        for number, pixels in enumerate(digits.images[digits.target == label][:12]):
            # Other sizes than the model's: something has to be resized.
            image = Image.fromarray((pixels * 15).astype("uint8")).resize((40, 40))
            image.save(tmp_path / "photos" / folder / f"{number}.png")
    seen = mvp_ext.Preprocessing(32, (0.3,) * 3, (0.35,) * 3)
    backbone = mvp_ext.Backbone(tiny_model(name, img_size=32).eval(), seen)
    data = mvp_ext.load_data(tmp_path / "photos")
    zoo = mvp_ext.Zoo(tmp_path / "zoo")
    schedule = mvp_ext.Schedule(share=0.5, steps_per_round=1, final_steps=2)
    settings = mvp_ext.Settings(keep=0.5, scope=scope, schedule=schedule)
    mvp_ext.build_refined_zoo(backbone, mvp_ext.sample_tasks(data, 2, 3, seed=0), zoo, settings)
    task = mvp_ext.Task.of("pets", data, ["cow", "ant", "cat"])
    result = mvp_ext.prune(backbone, task, zoo, steps=3)
    result.save(tmp_path / "small.safetensors")
    small = mvp_ext.load_pruned(tmp_path / "small.safetensors")
    for suffix in ("pt2", "onnx", "xml"):
        mvp_ext.export(small, tmp_path / f"small.{suffix}", preprocess=True)

    for photo in (tmp_path / "photos").glob("*/*.png"):
        copy = tmp_path / "of_the_models_size" / photo.relative_to(tmp_path / "photos")
        copy.parent.mkdir(parents=True, exist_ok=True)
        Image.open(photo).resize((32, 32)).save(copy)
    outside = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert outside.returncode == 0, outside.stderr
    said = json.loads(outside.stdout.splitlines()[-1])
    assert said["names"] == {"card": ["ant", "cat", "cow"], "onnx": ["ant", "cat", "cow"]}
    for photos, by_road in said["logits"].items():
        expected = small.predict(sorted((tmp_path / photos).glob("*/*.png"))).probabilities
        allowed = 1e-4 if photos == "of_the_models_size" else 1e-4 + moved_by_a_byte(small, tmp_path / photos)
        assert set(by_road) == {"pt2", "onnxruntime", "openvino", "timm"}
        for road, logits in by_road.items():
            probabilities = torch.tensor(logits).softmax(1)
            assert float((probabilities - expected).abs().max()) < allowed, (photos, road)
            same = probabilities.argmax(1) == expected.argmax(1)
            assert float(same.double().mean()) > 0.98, (photos, road)
    assert len(said["logits"]) == 2


def moved_by_a_byte(small: Any, folder: Path) -> float:
    """The largest change of a probability when all pixels are off by one.

    What is resized is rounded to the next byte on one road and not on another; how much that is depends on the weights.
    """
    images = torch.stack([small.transform()(photo) for photo in sorted(folder.glob("*/*.png"))])
    signs = torch.randint(0, 2, (8, *images.shape), generator=torch.Generator().manual_seed(0)) * 2 - 1
    step = 1 / 255 / torch.tensor(small.card.preprocessing.std).view(3, 1, 1)
    with torch.no_grad():
        given, *moved = (small.model(each).softmax(1) for each in (images, *(images + step * signs)))
    return float((torch.stack(moved) - given).abs().max())
