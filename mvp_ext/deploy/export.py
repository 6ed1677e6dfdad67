"""From a small model to a file of another runtime, checked against PyTorch before it is put in place."""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from mvp_ext._version import __version__
from mvp_ext.data.tasks import TaskData, few_of_each
from mvp_ext.deploy.exported import ExportedModel, load_exported
from mvp_ext.deploy.extra import need
from mvp_ext.deploy.formats import Format, format_of
from mvp_ext.deploy.graph import Deployable, deployable
from mvp_ext.deploy.metadata import Metadata, Precision, Program, precision_of
from mvp_ext.deploy.quantize import CALIBRATION_IMAGES
from mvp_ext.model.borrowed import unwrapped
from mvp_ext.model.checkpoint import PrunedCheckpoint
from mvp_ext.model.ends import in_channels
from mvp_ext.model.preprocessing import Preprocessing, resize
from mvp_ext.pruning.result import Result
from mvp_ext.storage import write_together
from mvp_ext.timm_compat import import_timm
from mvp_ext.train.evaluate import accuracy_of

# Per precision: the largest difference of a logit, as a share of the largest logit, and the share of images whose label
# must be the same. What few bits do to logits says little of what they do to labels.
TOLERANCES: dict[Precision, tuple[float, float]] = {
    "float32": (1e-3, 0.99),
    "bfloat16": (0.5, 0.9),
    "int8": (float("inf"), 0.8),
}
# Test images that a file is checked on, images of noise where there are none, images a pass.
CHECKED_ON, NOISE, BATCH = 256, 64, 32
# Of int8 the accuracy is in question: 256 images would not tell a point.
ACCURACY_ON = 1000


@dataclass(frozen=True)
class ExportReport:
    """A file that was exported and how it compares with the model in PyTorch.

    Attributes:
        path: of the file.
        bytes: its size, all parts together.
        precision: that it computes in.
        images: how many it was compared on; of noise where no data was given.
        max_difference: largest |difference| of an output.
        relative: that, as a share of the largest |output|.
        agreement: share of the images with the same label, in [0, 1].
        accuracy_before: of the PyTorch model on these images, in [0, 1]; None without data.
        accuracy: of the file.
    """

    path: Path
    bytes: int
    precision: Precision
    images: int
    max_difference: float
    relative: float
    agreement: float
    accuracy_before: float | None = None
    accuracy: float | None = None


def export(
    small: PrunedCheckpoint | Result,
    path: str | os.PathLike[str],
    *,
    to: str | None = None,
    precision: Precision = "float32",
    preprocess: bool = False,
    softmax: bool = False,
    data: TaskData | None = None,
) -> ExportReport:
    """Write a small model as a file of another runtime; ``load_exported`` opens it.

    Any number of images is a batch. The input is called "images", the output "logits" (or "probabilities"). The file
    says by itself what the model's card says. It is compared with the model in PyTorch first, and is not put in place
    where it differs by more than ``TOLERANCES`` say.

    Args:
        small: of ``load_pruned`` or ``prune``; it is not changed.
        path: of the file, which is replaced: ``.onnx``, ``.xml`` (the ``.bin`` comes beside it) or ``.pt2``; its folder
            must exist.
        to: "onnx", "openvino" or "pt2". Default: as the path ends.
        precision: "float32"; "bfloat16" (openvino, pt2; where the processor has none it computes in float32); "int8"
            (onnx, openvino), calibrated on ``data``'s training images.
        preprocess: put the preprocessing into the graph: the input is then uint8 [B, H, W, 3], RGB, of any size.
            Products with matrices do the resizing: on one core 10 ms for 640 × 480, half a second for 12 megapixels,
            which are better made smaller before.
        softmax: put a softmax behind the logits.
        data: the task's images, classes in any order: the check is on its test images, and both accuracies are
            measured. Default: the task's own of a ``Result``; of a checkpoint none, and the check is on noise.

    Raises:
        ValueError: the format does not have the precision, the model does not say how it sees images, int8 without
            data, or the file computes something else than the model. Nothing is written then.
        ImportError: the format's library is not installed. OSError: the file could not be written.
    """
    path = Path(path)
    form = format_of("export", path, to)
    if isinstance(small, Result):
        if data is None:
            data = small.task if isinstance(small.task, TaskData) else small.task.split()
        small = small.checkpoint()
    _check_arguments(small, form, precision, data)
    metadata = Metadata(
        small.card,
        precision,
        preprocess,
        softmax,
        {name: units.tolist() for name, units in small.mask.indices.items()},
        versions_of(form.libraries),
    )
    images = _Images.of(small, data, ACCURACY_ON if precision == "int8" else CHECKED_ON)
    graph = deployable(small.model, small.card, preprocess=preprocess, softmax=softmax)
    # In the same folder, so that there is room for the file when it is put in place.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder, quiet():
        draft = Path(folder) / path.name
        in_graph: Precision = precision if form.name == "pt2" else "float32"
        calibration = _calibration(images, data, preprocess) if data and precision == "int8" else None
        form.write(_traced(copy.deepcopy(graph), in_graph, images.shape), draft, metadata, calibration)
        report = _compare(small.model, graph, load_exported(draft), images)
        check_report(report, path, form.runtime)
        return replace(report, path=path, bytes=_put_in_place(form, draft, path))


def _check_arguments(
    small: PrunedCheckpoint, form: Format, precision: Precision, data: TaskData | None
) -> None:
    precision_of("export", precision)
    if precision in form.refused:
        raise ValueError(f"export: precision: {form.name} has no {precision}: {form.refused[precision]}")
    if precision == "int8" and data is None:
        raise ValueError("export: data: int8 is calibrated on the task's training images, got none")
    names = small.card.class_names
    if data is not None and names and sorted(data.class_names) != sorted(names):
        raise ValueError(
            f"export: data: expected the classes of the model's outputs ({', '.join(names)}), got "
            f"{', '.join(data.class_names)}"
        )
    if data is not None:
        small.card.need_preprocessing("export: data")


def versions_of(libraries: Sequence[str]) -> dict[str, str]:
    """Of what writes a file; ImportError where something is not installed."""
    ours = {"mvp_ext": __version__, "torch": torch.__version__, "timm": import_timm().__version__}
    return ours | {name: need(name).__version__ for name in libraries}


@dataclass(frozen=True)
class _Images:
    """What a file is compared on."""

    # uint8 [n, S, S, 3], or where nobody says how the model sees images: float32 [n, C, S, S].
    images: Tensor
    preprocessing: Preprocessing | None
    labels: Tensor | None

    @classmethod
    def of(cls, small: PrunedCheckpoint, data: TaskData | None, count: int) -> _Images:
        """``count`` of the data's test images, evenly of all classes; without data, noise."""
        see = small.card.preprocessing
        if data is not None and see is not None:
            chosen = few_of_each(data.test_labels, count, seed=0).to(data.test_labels.device)
            # Data loaded from elsewhere may have the classes in another order than the model's outputs.
            names = small.card.class_names or data.class_names
            place = {name: number for number, name in enumerate(names)}
            output = torch.tensor([place[name] for name in data.class_names])
            labels = output[data.test_labels[chosen].cpu()]
            return cls(resize(data.test_images[chosen].cpu(), see.size), see, labels)
        generator = torch.Generator().manual_seed(0)
        if see is not None:
            shape = (NOISE, see.size, see.size, 3)
            return cls(torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8), see, None)
        size = Preprocessing.of(small.model).size
        return cls(
            torch.randn(NOISE, in_channels(small.model) or 3, size, size, generator=generator), None, None
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the model's input, (C, S, S)."""
        first = self.seen(self.images[:1])
        return first.shape[1], first.shape[2], first.shape[3]

    def seen(self, images: Tensor) -> Tensor:
        """As the model takes them: float32 [B, C, S, S]."""
        return images if self.preprocessing is None else self.preprocessing.batch(images)


def _calibration(images: _Images, data: TaskData, preprocess: bool) -> Tensor:
    """Some of the task's training images, as the graph takes them."""
    order = torch.randperm(len(data.train_images), generator=torch.Generator().manual_seed(0))
    chosen = data.train_images[order[:CALIBRATION_IMAGES].to(data.train_images.device)].cpu()
    return chosen if preprocess else images.seen(chosen)


def _traced(graph: Deployable, precision: Precision, shape: tuple[int, int, int]) -> Program:
    """The program, for any number of images, and of any size where the graph resizes them."""
    if precision == "bfloat16":
        graph.model.bfloat16()
    batch = torch.export.Dim("batch")
    if graph.see is None:
        example, dynamic = torch.zeros(2, *shape), {0: batch}
    else:
        # No two equal sizes: what holds of the example's alone shall not be taken for a rule.
        example = torch.zeros(2, shape[1] + 5, shape[1] + 9, 3, dtype=torch.uint8)
        dynamic = {0: batch, 1: torch.export.Dim("height"), 2: torch.export.Dim("width")}
    with torch.no_grad():
        return torch.export.export(graph, (example,), dynamic_shapes=(dynamic,))


def _compare(model: nn.Module, graph: Deployable, exported: ExportedModel, data: _Images) -> ExportReport:
    """Run the file and the model on the same images; nothing is said of the file itself yet."""
    model = copy.deepcopy(unwrapped(model)).cpu().float().eval()
    ours, theirs = [], []
    with torch.inference_mode():
        for images in data.images.split(BATCH):
            seen = data.seen(images)
            outputs = model(seen)
            ours.append(outputs.softmax(1) if graph.softmax else outputs)
            theirs.append(exported(images if graph.see else seen))
        count = len(data.images)
        if graph.see:
            # Wider than high, and larger than the model's input.
            large = data.images[:BATCH].repeat_interleave(2, 1).repeat_interleave(3, 2)
            ours.append(graph(large))
            theirs.append(exported(large))
    expected, found = torch.cat(ours), torch.cat(theirs)
    difference = float((found - expected).abs().max())
    same = (found.argmax(1) == expected.argmax(1)).double()
    return ExportReport(
        Path(),
        0,
        exported.precision,
        count,
        difference,
        difference / max(float(expected.abs().max()), 1e-12),
        float(same.mean()),
        None if data.labels is None else accuracy_of(expected[:count], data.labels),
        None if data.labels is None else accuracy_of(found[:count], data.labels),
    )


def check_report(report: ExportReport, path: Path, runtime: str) -> None:
    """ValueError beyond the precision's tolerances (or where a number is NaN)."""
    allowed, wanted = TOLERANCES[report.precision]
    if not (report.relative <= allowed and report.agreement >= wanted):
        raise ValueError(
            f"export: {path}: not written: as {report.precision} in {runtime} it computes something else than the "
            f"model: of {report.images} images {report.agreement:.1%} have the same label (expected at least "
            f"{wanted:.0%}), the largest difference is {report.relative:.2g} of the largest output (at most "
            f"{allowed:g})"
        )


def _put_in_place(form: Format, draft: Path, path: Path) -> int:
    """All parts of a file, or none; returns the bytes of all."""
    parts = zip(form.parts(path), form.parts(draft), strict=True)
    files = {target: source.read_bytes() for target, source in parts}
    write_together(files)
    return sum(map(len, files.values()))


@contextmanager
def quiet() -> Iterator[None]:
    """Libraries warn of what they will change in their own next versions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
