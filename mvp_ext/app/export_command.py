"""``mvp-ext export``: a file for another runtime, and how it compares."""

from __future__ import annotations

from pathlib import Path

from mvp_ext.app.console import say
from mvp_ext.app.deploy_options import ExportOptions
from mvp_ext.deploy.bundle import BUNDLE, load_bundle
from mvp_ext.deploy.export import ExportReport, export
from mvp_ext.deploy.export_bundle import export_bundle
from mvp_ext.deploy.metadata import precision_of
from mvp_ext.model.checkpoint import load_pruned
from mvp_ext.storage import kind_of

# A loss of accuracy that is worth a line, in [0, 1].
A_POINT = 0.01


def export_file(file: Path, options: ExportOptions) -> None:
    """Export a file of ``prune`` or ``bundle``; say what came out."""
    path = options.path(file)
    if kind_of(file) == BUNDLE:
        _export_tasks(file, path, options)
        return
    small = load_pruned(file)
    report = export(
        small,
        path,
        to=options.to,
        precision=precision_of("export", options.precision),
        preprocess=options.preprocess,
        softmax=options.softmax,
        data=options.task(small.card),
    )
    for line in described(report):
        say(line)


def _export_tasks(file: Path, path: Path, options: ExportOptions) -> None:
    if options.precision != "float32" or options.softmax or options.data or options.to not in (None, "onnx"):
        raise ValueError(
            f"export: {file} is a bundle: its tasks become outputs of one .onnx file, float32 logits"
        )
    bundle = load_bundle(file)
    for line in described(export_bundle(bundle, path, preprocess=options.preprocess)):
        say(line)


def described(report: ExportReport) -> list[str]:
    """What a user wants to know of an export; the last line says where it cost more than a point of accuracy."""
    images = f"{report.images} images" + (" of noise" if report.accuracy is None else "")
    lines = [
        f"{report.path}: {report.bytes / 1e6:.2f} MB, {report.precision}; against PyTorch on {images}: largest "
        f"difference {report.max_difference:.2g} ({report.relative:.2g} of the largest output), "
        f"{100 * report.agreement:.1f} % of labels agree"
    ]
    if report.accuracy is not None and report.accuracy_before is not None:
        lines.append(f"accuracy {100 * report.accuracy_before:.1f} % → {100 * report.accuracy:.1f} %")
        lost = report.accuracy_before - report.accuracy
        if lost > A_POINT:
            lines.append(f"{report.precision} cost {100 * lost:.1f} points of accuracy")
    return lines
