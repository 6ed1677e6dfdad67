"""A bundle as one ONNX file: one backbone, and an output for each task, named like it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from mvp_ext.deploy.bundle import Bundle
from mvp_ext.deploy.export import BATCH, NOISE, ExportReport, check_report, quiet, versions_of
from mvp_ext.deploy.exported import card_before
from mvp_ext.deploy.extra import need
from mvp_ext.deploy.graph import See, standard_blocks
from mvp_ext.deploy.metadata import BUNDLE_KEY
from mvp_ext.deploy.onnx_file import open_session, to_onnx
from mvp_ext.model.card import ModelCard
from mvp_ext.model.ends import Features
from mvp_ext.model.prediction import PREDICT_BATCH, Predictions, predict, predict_tasks
from mvp_ext.storage import write_atomic

_VERSION = 1


class _Groups(nn.Module):
    """Images → for each set of statistics the logits of its tasks, float32 [B, ΣK], side by side."""

    def __init__(self, bundle: Bundle, see: See | None) -> None:
        super().__init__()
        self.see = see
        self.features, self.heads = nn.ModuleList(), nn.ModuleList()
        weight, bias = bundle.linear
        for tasks in bundle.groups.values():
            self.features.append(Features(standard_blocks(bundle.model_of(tasks[0]).cpu().float())))
            rows = bundle.rows_of(tasks)
            head = nn.Linear(weight.shape[1], rows.stop - rows.start, bias is not None, device="meta")
            state = {"weight": weight[rows]} | ({} if bias is None else {"bias": bias[rows]})
            head.load_state_dict({name: each.cpu().float() for name, each in state.items()}, assign=True)
            self.heads.append(head)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        x = images if self.see is None else self.see(images)
        return tuple(head(features(x)) for features, head in zip(self.features, self.heads, strict=True))


def export_bundle(bundle: Bundle, path: str | os.PathLike[str], *, preprocess: bool = False) -> ExportReport:
    """Write a bundle as one ONNX file; ``load_exported_bundle`` opens it.

    Any number of images is a batch. The input is called "images"; each task has an output of its name, its logits,
    float32 [B, k]. The file is compared with the bundle in PyTorch, on noise, before it is put in place.

    Each different set of statistics has a backbone of its own in the file: the exporter folds batch norms into the
    weights of convolutions, which then differ. A bundle of many such tasks is better left as it is.

    Args:
        bundle: of ``load_bundle``; it is not changed.
        path: of the file, which is replaced; it ends in ``.onnx``, and its folder must exist.
        preprocess: put the preprocessing into the graph: the input is then uint8 [B, H, W, 3], RGB, of any size.

    Raises:
        ValueError: another suffix, a task with the input's name, nobody said how the models see images, or the file
            computes something else than the bundle. Nothing is written then.
        ImportError: a library of ONNX is not installed. OSError: the file could not be written.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise ValueError(f"export_bundle: path: expected a name that ends in .onnx, got {str(path)!r}")
    if "images" in bundle.cards:
        raise ValueError("export_bundle: expected tasks of other names than 'images', which the input has")
    see = bundle.shared.card.need_preprocessing("export_bundle")
    versions = versions_of(("onnx", "onnxscript", "onnxruntime"))
    graph = _Groups(bundle, See(see) if preprocess else None).eval().requires_grad_(False)
    batch = torch.export.Dim("batch")
    # With preprocessing no two sizes are equal: what holds of the example's alone shall not be taken for a rule.
    example = torch.zeros(2, 3, see.size, see.size)
    dynamic: dict[int, Any] = {0: batch}
    if preprocess:
        example = torch.zeros(2, see.size + 5, see.size + 9, 3, dtype=torch.uint8)
        dynamic |= {1: torch.export.Dim("height"), 2: torch.export.Dim("width")}
    with quiet(), torch.no_grad():
        program = torch.export.export(graph, (example,), dynamic_shapes=(dynamic,))
        model = to_onnx(program, *(f"logits of group {group}" for group in bundle.groups))
    _split(model, bundle)
    values = {
        "version": _VERSION,
        "cards": {task: card.to_dict() for task, card in bundle.cards.items()},
        "preprocess": preprocess,
        "kept": {name: units.tolist() for name, units in bundle.mask.indices.items()},
        "versions": versions,
    }
    need("onnx").helper.set_model_props(model, {BUNDLE_KEY: json.dumps(values, allow_nan=False)})
    data = model.SerializeToString()
    report = _compared(bundle, graph, data, path)
    check_report(report, path, "onnxruntime")
    write_atomic(path, data)
    return report


def _split(model: Any, bundle: Bundle) -> None:
    """Put an output for each task in the place of one for each set of statistics."""
    onnx = need("onnx")
    graph = model.graph
    # A task may be called like something in the graph.
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [_apart(name, bundle.cards) for name in names]
    for value in (*graph.initializer, *graph.value_info, *graph.output):
        value.name = _apart(value.name, bundle.cards)
    groups = list(graph.output)
    del graph.output[:]
    outputs = {}
    for tasks, logits in zip(bundle.groups.values(), groups, strict=True):
        counts = [bundle.classes(task) for task in tasks]
        sizes = _apart(f"{logits.name}, sizes", bundle.cards)
        graph.initializer.append(
            onnx.helper.make_tensor(sizes, onnx.TensorProto.INT64, [len(counts)], counts)
        )
        graph.node.append(onnx.helper.make_node("Split", [logits.name, sizes], tasks, axis=1))
        rows = logits.type.tensor_type.shape.dim[0].dim_param
        for task, count in zip(tasks, counts, strict=True):
            outputs[task] = onnx.helper.make_tensor_value_info(task, onnx.TensorProto.FLOAT, [rows, count])
    graph.output.extend(outputs[task] for task in bundle.tasks)
    onnx.checker.check_model(model, full_check=True)


def _apart(name: str, tasks: Mapping[str, object]) -> str:
    """The name, or one like it that is not a task's."""
    while name in tasks:
        name += "'"
    return name


def _compared(bundle: Bundle, graph: _Groups, data: bytes, path: Path) -> ExportReport:
    """The file's outputs beside the bundle's, of all tasks, on images of noise."""
    see = bundle.shared.card.need_preprocessing("export_bundle")
    exported = _opened(data, path, None)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (NOISE, see.size, see.size, 3), generator=generator, dtype=torch.uint8)
    expected, found = [], []
    with torch.inference_mode():
        for images in noise.split(BATCH):
            seen = see.batch(images)
            expected.append(bundle.logits(seen))
            found.append(exported(images if exported.preprocess else seen))
        if exported.preprocess:
            # Wider than high, and larger than the models' input.
            large = noise[:BATCH].repeat_interleave(2, 1).repeat_interleave(3, 2)
            expected.append(bundle.by_task(graph(large)))
            found.append(exported(large))
    difference, largest, same = 0.0, 1e-12, []
    for ours, theirs in zip(expected, found, strict=True):
        for task in bundle.tasks:
            difference = max(difference, float((ours[task].cpu() - theirs[task]).abs().max()))
            largest = max(largest, float(ours[task].abs().max()))
            same.append((ours[task].cpu().argmax(1) == theirs[task].argmax(1)).double().mean())
    agreement = float(torch.stack(same).mean())
    return ExportReport(path, len(data), "float32", NOISE, difference, difference / largest, agreement)


@dataclass(frozen=True, eq=False)
class ExportedBundle:
    """A file of ``export_bundle``, opened on the CPU.

    Attributes:
        cards: task → what is said of its model, in the order of the bundle.
        preprocess: whether it takes uint8 [B, H, W, 3] of any size, not what ``card.preprocessing`` makes of images.
        kept: layer → indices of the dense model's units that stayed.
        versions: of what wrote the file.
    """

    cards: Mapping[str, ModelCard]
    preprocess: bool
    kept: Mapping[str, list[int]]
    versions: Mapping[str, str]
    run: Callable[[Sequence[str], Tensor], list[Tensor]] = field(repr=False)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Their names, which are those of the outputs."""
        return tuple(self.cards)

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Task → logits float32 [B, k], of a batch as ``ExportedModel`` takes it."""
        return dict(zip(self.tasks, self.run(self.tasks, images), strict=True))

    @overload
    def predict(self, images: Any, task: str, *, batch: int = ...) -> Predictions: ...

    @overload
    def predict(self, images: Any, task: None = None, *, batch: int = ...) -> dict[str, Predictions]: ...

    def predict(
        self, images: Any, task: str | None = None, *, batch: int = PREDICT_BATCH
    ) -> Predictions | dict[str, Predictions]:
        """What ``Bundle.predict`` gives of the same images, up to rounding; arguments and errors as there."""
        cards = {name: card_before(card, self.preprocess) for name, card in self.cards.items()}
        if task is None:
            return predict_tasks(self, images, cards, batch=batch)
        if task not in cards:
            raise ValueError(f"ExportedBundle: task: expected one of {', '.join(cards)}, got {task!r}")
        return predict(lambda x: self.run([task], x)[0], images, cards[task], batch=batch)


def load_exported_bundle(path: str | os.PathLike[str], *, threads: int | None = None) -> ExportedBundle:
    """Open a file of ``export_bundle`` with ONNX Runtime.

    Args:
        path: of the file.
        threads: CPU threads of the runtime, ≥ 1; None: its own choice.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is damaged, or no exported bundle.
        ImportError: ONNX Runtime is not installed.
    """
    path = Path(path)
    return _opened(path.read_bytes(), path, threads)


def is_exported_bundle(path: Path) -> bool:
    """Whether ``load_exported_bundle``, not ``load_exported``, opens this ``.onnx`` file."""
    return BUNDLE_KEY in open_session(path.read_bytes(), path, None)[1]


def _opened(data: bytes, path: Path, threads: int | None) -> ExportedBundle:
    session, metadata = open_session(data, path, threads)
    try:
        values = json.loads(metadata[BUNDLE_KEY])
        if values["version"] > _VERSION:
            raise ValueError(f"version {values['version']} is newer than this mvp_ext reads; update it")
        cards = {task: ModelCard.from_dict(card) for task, card in values["cards"].items()}
        told = (bool(values["preprocess"]), dict(values["kept"]), dict(values["versions"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a bundle that mvp_ext exported ({error})") from error

    def run(tasks: Sequence[str], images: Tensor) -> list[Tensor]:
        outputs = session.run(list(tasks), {"images": images.cpu().contiguous().numpy()})
        return [torch.from_numpy(output) for output in outputs]

    return ExportedBundle(cards, *told, run)
