"""Which backbones can be cut, exactly and all the way: one row a model, with Torch-Pruning beside it.

    python benchmarks/coverage.py                  # benchmarks/results/cpu/coverage.json, about half an hour
    python benchmarks/coverage.py --only swin      # models with that in their name, printed

Every model has random weights; gains, biases, tables and statistics are drawn, too, as those of a fresh model hide
mistakes. Big transformers are built with fewer blocks. A row is `whole` where the model is cut exactly in eval and in
train mode, saved and read again bit for bit, pruned for a task of scikit-learn's digits, and exported to ONNX. Each
row is measured in a process of its own, which may take so long and no longer; what is finished is kept, and the same
command goes on from there.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import multiprocessing
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mvp_ext import export
from mvp_ext.app.environment import command, commit, environment
from mvp_ext.app.peers import import_torch_pruning
from mvp_ext.data.images import ImageData, load_data
from mvp_ext.data.tasks import Task, few_of_each
from mvp_ext.model.checkpoint import load_pruned
from mvp_ext.model.ends import built_for
from mvp_ext.model.families import SCOPES, find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.measure import count_flops, count_parameters, time_in_turn, torch_threads
from mvp_ext.model.preprocessing import Preprocessing
from mvp_ext.model.structure import Structure, UnsupportedModelError
from mvp_ext.model.surgery import masked_model, prune_model
from mvp_ext.pruning.prune import prune
from mvp_ext.pruning.settings import Settings
from mvp_ext.storage import write_atomic
from mvp_ext.timm_compat import import_timm
from mvp_ext.train.backbone import Backbone
from mvp_ext.train.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
KEEP, CLASSES, SECONDS = 0.5, 5, 240
# The first that a model has is measured.
WIDEST = (
    *("inner+heads+mlp", "heads+mlp", "inner+mlp"),
    *("stream", "all", "inner", "mlp", "heads"),
)
# What each of them proves, in this order.
PROOFS = ("exact in eval", "exact in train", "read again", "pruned for a task", "ONNX")
# Of the largest output, in float64.
EXACT = 1e-6

TIMM = (ROOT / "benchmarks" / "coverage_models.txt").read_text().split()
# With their number of blocks, the time and memory of the list are those of the largest few.
BLOCKS = {
    "vit_": 3,
    "eva": 3,
    "beit": 3,
    "deit": 3,
    "samvit": 3,
    "flexivit": 3,
    "naflexvit": 3,
    "cait": 3,
    "xcit": 3,
}
TORCHVISION = ("resnet18", "resnet50", "vit_b_16", "swin_t", "convnext_tiny", "mobilenet_v3_small")
# Small configurations: class, its configuration's class, and what is set there.
_VIT = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6, "intermediate_size": 384}
_STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [32, 64, 96, 128], "num_stages": 4}
HUGGING_FACE: dict[str, tuple[str, dict[str, Any]]] = {
    "ViTModel": ("ViTConfig", {**_VIT, "image_size": 64}),
    "Dinov2Model": ("Dinov2Config", {**_VIT, "image_size": 56, "patch_size": 14}),
    "Dinov2WithRegistersModel": ("Dinov2WithRegistersConfig", {**_VIT, "image_size": 56, "patch_size": 14}),
    "CLIPVisionModel": ("CLIPVisionConfig", {**_VIT, "image_size": 64, "patch_size": 16}),
    "SiglipVisionModel": ("SiglipVisionConfig", {**_VIT, "image_size": 64}),
    "ResNetModel": ("ResNetConfig", {**_STAGES, "embedding_size": 32}),
    "SwinModel": (
        "SwinConfig",
        {"image_size": 64, "window_size": 4, "embed_dim": 32, "depths": [1, 1, 1], "num_heads": [2, 4, 8]},
    ),
    "ConvNextModel": ("ConvNextConfig", {**_STAGES, "image_size": 64}),
}
MODELS = (
    *TIMM,
    *(f"torchvision:{name}" for name in TORCHVISION),
    *(f"transformers:{name}" for name in HUGGING_FACE),
)


def create(name: str) -> nn.Module:
    """A model with drawn weights, in eval mode, with ``CLASSES`` outputs where it has a head."""
    package, _, leaf = name.rpartition(":")
    torch.manual_seed(0)
    timm = import_timm()
    if package == "torchvision":
        import torchvision

        model = torchvision.models.get_model(leaf, num_classes=CLASSES)
    elif package == "transformers":
        import transformers

        config, settings = HUGGING_FACE[leaf]
        model = getattr(transformers, leaf)(getattr(transformers, config)(**settings))
    else:
        depth = next((n for start, n in BLOCKS.items() if name.startswith(start)), None)
        options = {} if depth is None else {"depth": depth}
        try:
            model = timm.create_model(name, num_classes=CLASSES, **options)
        except TypeError:
            # A hybrid whose depth is that of its convolutions.
            model = timm.create_model(name, num_classes=CLASSES)
    return _drawn(model).eval()


def _drawn(model: nn.Module) -> nn.Module:
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=draw) + 0.5)
            elif name.endswith("running_mean") or (isinstance(tensor, nn.Parameter) and tensor.ndim < 2):
                tensor.add_(torch.randn(tensor.shape, generator=draw) * 0.1)
            elif isinstance(tensor, nn.Parameter) and tensor.numel() > 1 and tensor.std() < 1e-3:
                tensor.add_(torch.randn(tensor.shape, generator=draw) * 0.02)
    return model


def measure_row(name: str, with_peer: bool = True) -> dict[str, Any]:
    """What became of one model."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    model = create(name)
    row: dict[str, Any] = {"scopes": _scopes(model), "reasons": {}}
    try:
        backbone = Backbone.wrap(model)
    except (TypeError, ValueError) as error:
        backbone = None
        row["reasons"]["wrapped"] = _words(error)
    if backbone is not None:
        model = backbone.model
        row["scopes"] = _scopes(model)
    side = _side(model)
    small = None
    if not row["scopes"]:
        with _recorded(row, "found"):
            find_structure(model)
    else:
        scope = next(each for each in WIDEST if each in row["scopes"])
        structure = find_structure(model, scope)
        mask = Mask.random(structure, KEEP, seed=0)
        row |= {"scope": scope, "left_whole": [left.module for left in structure.left_whole], "side": side}
        differences: dict[str, float] = {}
        for proof, training in (("exact in eval", False), ("exact in train", True)):
            with _recorded(row, proof):
                differences[proof] = _difference(model, structure, mask, side, training)
                if not differences[proof] <= EXACT:
                    raise ArithmeticError(f"differs by {differences[proof]:.1e}")
        row["differences"] = differences
        small = prune_model(copy.deepcopy(model), mask, structure=structure)
        if backbone is not None:
            _all_the_way(backbone, structure, row, side)
    row["whole"] = all(row.get(proof) for proof in PROOFS)
    peer = _by_torch_pruning(name, side, row) if with_peer else None
    row |= _sizes({"dense": model, "ours": small, "Torch-Pruning": peer}, side)
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def _scopes(model: nn.Module) -> list[str]:
    found = []
    for scope in SCOPES:
        with contextlib.suppress(UnsupportedModelError):
            found.append(find_structure(model, scope).scope)
    return found


def _side(model: nn.Module) -> int:
    """Pixels of the model's images; where it takes any, 128."""
    if (said := built_for(model)) is not None:
        return said[0]
    config = getattr(model, "pretrained_cfg", None) or {}
    return config["input_size"][-1] if config.get("fixed_input_size") else 128


@contextlib.contextmanager
def _recorded(row: dict[str, Any], proof: str) -> Iterator[None]:
    """Whether what is done inside succeeds, and why not."""
    row[proof] = False
    try:
        yield
        row[proof] = True
    except Exception as error:
        row["reasons"][proof] = _words(error)


def _words(error: BaseException) -> str:
    text = re.sub(rf"{re.escape(tempfile.gettempdir())}\S*/", "", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text}"[:300]


def _difference(model: nn.Module, structure: Structure, mask: Mask, side: int, training: bool) -> float:
    """Of the outputs of cut and masked model, relative to the largest, in float64."""
    dense = copy.deepcopy(model).double().train(training)
    for module in dense.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or name == "p"):
                setattr(module, name, 0.0)
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0)).double()
    masked = masked_model(dense, mask, structure=structure)
    cut = prune_model(dense, mask, structure=structure)
    with torch.no_grad():
        ours, expected = (_output(each(images)) for each in (cut, masked))
    return float((ours - expected).abs().max() / expected.abs().max())


def _output(value: Any) -> torch.Tensor:
    while not isinstance(value, torch.Tensor):
        value = next(iter(value.values())) if isinstance(value, dict) else value[0]
    return value


def _all_the_way(backbone: Backbone, structure: Structure, row: dict[str, Any], side: int) -> None:
    """prune → file → model again → ONNX."""
    backbone = replace(backbone, preprocessing=Preprocessing(side, (0.5,) * 3, (0.5,) * 3))
    task = Task("digits", _few_digits(), (0, 1), seed=0)
    settings = Settings(keep=KEEP, scope=structure.scope, recipe=Recipe(batch_size=6))
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "small.safetensors"
        with _recorded(row, "pruned for a task"):
            result = prune(backbone, task, settings=settings, method="random", steps=2)
            row["accuracy"] = result.accuracy
        if not row["pruned for a task"]:
            return
        with _recorded(row, "read again"):
            result.save(path)
            images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                if not torch.equal(load_pruned(path).model(images), result.model.eval()(images)):
                    raise ArithmeticError("the model computes something else")
        if row["read again"]:
            with _recorded(row, "ONNX"):
                # On noise a network of drawn weights may answer to rounding itself.
                export(load_pruned(path), path.with_suffix(".onnx"), data=task.split())


def _few_digits() -> ImageData:
    """Three of scikit-learn's of each class: models are pruned for them to see that it works."""
    data = load_data("digits")
    for which in ("train", "test"):
        images, labels = data.split(which)
        few = few_of_each(labels, 30, seed=0)
        data = replace(data, **{f"{which}_images": images[few], f"{which}_labels": labels[few]})
    return data


def _by_torch_pruning(name: str, side: int, row: dict[str, Any]) -> nn.Module | None:
    """The model as Torch-Pruning cuts it, used as in its examples: all channels and heads but the classifier's."""
    row["Torch-Pruning"] = False
    with _recorded(row, "Torch-Pruning"), _quiet():
        tp = import_torch_pruning()
        model = create(name)
        example = torch.randn(1, 3, side, side)
        shape = _output(model(example)).shape
        last = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == CLASSES]
        heads = {
            linear: module.num_heads
            for module in model.modules()
            if isinstance(getattr(module, "num_heads", None), int)
            for linear in [getattr(module, "qkv", None)]
            if linear is not None
        }
        pruner = tp.pruner.MagnitudePruner(
            model,
            example,
            importance=tp.importance.MagnitudeImportance(p=2),
            pruning_ratio=1 - KEEP,
            ignored_layers=last,
            num_heads=heads,
            prune_num_heads=True,
            head_pruning_ratio=1 - KEEP,
        )
        pruner.step()
        for module in model.modules():
            if (
                isinstance(getattr(module, "num_heads", None), int)
                and getattr(module, "qkv", None) in pruner.num_heads
            ):
                module.num_heads = pruner.num_heads[module.qkv]
                if hasattr(module, "head_dim"):
                    module.head_dim = module.qkv.out_features // (3 * module.num_heads)
        with torch.no_grad():
            if _output(model(example)).shape != shape and last:
                raise ArithmeticError(f"expected outputs {tuple(shape)}")
        return model.eval()
    return None


def _sizes(models: dict[str, nn.Module | None], side: int) -> dict[str, Any]:
    """FLOPs, parameters and the latency of one image, in turn."""
    there = {name: model.eval() for name, model in models.items() if model is not None}
    with _quiet():
        return {
            "flops": {n: count_flops(m, (3, side, side)) for n, m in there.items()},
            "parameters": {n: count_parameters(m) for n, m in there.items()},
            "latency_ms": _latencies(there, side),
        }


def _latencies(models: dict[str, nn.Module], side: int) -> dict[str, float]:
    """Medians over rounds, each of all models."""
    images = torch.randn(1, 3, side, side)
    calls: dict[str, Callable[[], Any]] = {name: partial(model, images) for name, model in models.items()}
    with torch.no_grad(), torch_threads(1):
        times = time_in_turn(calls, rounds=7)
    return {name: round(each.median_ms, 3) for name, each in times.items()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def main() -> None:
    options = _parse()
    rows = json.loads(options.out.read_text())["models"] if options.out.exists() and not options.only else {}
    names = [name for name in MODELS if name not in rows and (options.only or "") in name]
    with ThreadPoolExecutor(options.jobs) as pool:
        for number, (name, row) in enumerate(pool.map(lambda each: (each, _alone(each)), names), 1):
            rows[name] = row
            print(f"{number}/{len(names)} {name}: {_said(row)}", flush=True)
            if not options.only:
                _write(options.out, rows)
    print(summary(rows))


def _alone(name: str) -> dict[str, Any]:
    """The row, from a process of its own: a model that takes all memory, or forever, ends with it."""
    found = _in_time(name, True)
    if isinstance(found, multiprocessing.TimeoutError):
        # Torch-Pruning's search may have no end: the row without it says so, or it was ours.
        found = _in_time(name, False)
        if isinstance(found, dict):
            found |= {"Torch-Pruning": False}
            found["reasons"]["Torch-Pruning"] = f"not done in {SECONDS} seconds"
    if isinstance(found, Exception):
        return {"scopes": [], "whole": False, "reasons": {"row": _words(found)}}
    return found


def _in_time(name: str, with_peer: bool) -> dict[str, Any] | Exception:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        try:
            row: dict[str, Any] = pool.apply_async(measure_row, (name, with_peer)).get(SECONDS)
            return row
        except Exception as error:
            return error


def _said(row: dict[str, Any]) -> str:
    ratio = ""
    if "ours" in (times := row.get("latency_ms", {})):
        ratio = f", {times['ours'] / times['dense']:.2f} of dense's time"
    reasons = "; ".join(f"{proof}: {reason}" for proof, reason in row["reasons"].items())
    return f"{'whole' if row['whole'] else 'not whole'}, {row.get('scope')}{ratio} {reasons}"


def summary(rows: dict[str, dict[str, Any]]) -> str:
    """How many, in one line each."""
    inside = [row for name, row in rows.items() if ":" not in name]
    outside = [row for name, row in rows.items() if ":" in name]
    wrong = [
        n for n, row in rows.items() if row["scopes"] and not (row.get(PROOFS[0]) and row.get(PROOFS[1]))
    ]
    return "\n".join(
        (
            f"whole: {sum(row['whole'] for row in inside)} of {len(inside)} of timm, "
            f"{sum(row['whole'] for row in outside)} of {len(outside)} from elsewhere",
            f"Torch-Pruning runs: {sum(bool(row.get('Torch-Pruning')) for row in inside)} of {len(inside)}",
            f"accepted, and not exact: {', '.join(wrong) or 'none'}",
        )
    )


def _write(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    setting = {
        "keep": KEEP,
        "threads": 1,
        "command": command(ROOT),
        "commit": commit(ROOT, "csrc", "mvp_ext", "benchmarks/*.py"),
    }
    result = {"setting": setting, "environment": environment(), "models": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, f"{json.dumps(result, indent=1)}\n".encode())


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Which backbones can be cut, exactly and all the way")
    parser.add_argument(
        "--only", metavar="TEXT", help="models with this in their name; prints, and writes nothing"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/cpu/coverage.json")
    parser.add_argument("--jobs", type=int, default=1, help="models at once, a core each")
    return parser.parse_args()


if __name__ == "__main__":
    main()
