"""OpenVINO files (``.xml`` with ``.bin`` beside it), run by OpenVINO on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvp_ext.deploy.extra import need
from mvp_ext.deploy.metadata import KEY, Metadata
from mvp_ext.deploy.onnx_file import to_onnx

# What the runtime computes in: left to itself it takes bfloat16 wherever the processor has it.
_HINTS = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}


def write(program: torch.export.ExportedProgram, path: Path, metadata: Metadata) -> None:
    """Write two files. For bfloat16 the weights are stored as float16, which has its bits, and more of them."""
    # Through ONNX: OpenVINO's own converters of torch programs report home.
    save(
        need("openvino").Core().read_model(to_onnx(program, metadata.output).SerializeToString()),
        path,
        metadata,
    )


def save(model: Any, path: Path, metadata: Metadata) -> None:
    """Write an ``openvino.Model`` with this metadata."""
    model.set_rt_info(metadata.to_text(), [KEY])
    need("openvino").save_model(model, path, compress_to_fp16=metadata.precision == "bfloat16")


def open_file(path: Path, threads: int | None) -> tuple[Metadata, Callable[[Tensor], Tensor]]:
    """The metadata, and what computes the outputs of a batch.

    Raises:
        ValueError: not an OpenVINO file that this package wrote, or its ``.bin`` is not beside it.
    """
    core = need("openvino").Core()
    try:
        model = core.read_model(path)
    except RuntimeError as error:
        raise ValueError(f"{path}: not an OpenVINO file with its .bin beside it ({error})") from error
    text = model.get_rt_info([KEY]).astype(str) if model.has_rt_info([KEY]) else None
    metadata = Metadata.from_text(text, os.fspath(path))
    options: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": _HINTS[metadata.precision],
        "PERFORMANCE_HINT": "LATENCY",
    }
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    request = core.compile_model(model, "CPU", options).create_infer_request()

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(request.infer([images.contiguous().numpy()])[0].copy())

    return metadata, run
