"""Programs of ``torch.export``: a ``.pt2`` file that needs torch alone."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mvp_ext.deploy.metadata import KEY, Metadata, Program


def write(program: Program, path: Path, metadata: Metadata, calibration: Tensor | None) -> None:
    """Write one file, of the precision that the program has."""
    assert calibration is None
    for node in program.graph.nodes:
        # Where in whose source files it was made.
        node.meta.pop("stack_trace", None)
    torch.export.save(program, path, extra_files={KEY: metadata.to_text()})


def open_file(path: Path, threads: int | None) -> tuple[Metadata, Callable[[Tensor], Tensor]]:
    """The metadata, and what computes the outputs of a batch.

    Raises:
        ValueError: not a program that this package wrote.
    """
    extra: dict[str, str] = {KEY: ""}
    try:
        # Without this a damaged file is reported to the terminal, too.
        with zipfile.ZipFile(path) as archive:
            ours = any(name.endswith(f"/{KEY}") for name in archive.namelist())
        program = torch.export.load(path, extra_files=extra) if ours else None
    except (zipfile.BadZipFile, RuntimeError, KeyError) as error:
        raise ValueError(f"{path}: not a program that torch.export.load reads ({error})") from error
    metadata = Metadata.from_text(extra[KEY] or None, os.fspath(path))
    assert program is not None
    model = program.module()

    def run(images: Tensor) -> Tensor:
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(threads or before)
            with torch.inference_mode():
                return model(images)
        finally:
            torch.set_num_threads(before)

    return metadata, run
