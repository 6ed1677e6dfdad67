"""OpenVINO files (``.xml`` with ``.bin`` beside it), run by OpenVINO on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvp_ext.deploy.extra import need
from mvp_ext.deploy.metadata import KEY, Metadata, Program
from mvp_ext.deploy.onnx_file import to_onnx
from mvp_ext.deploy.quantize import quantized

# What the runtime computes in: left to itself it takes bfloat16 wherever the processor has it.
_HINTS = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}


def write(program: Program, path: Path, metadata: Metadata, calibration: Tensor | None) -> None:
    """Write two files; int8 where there are images to calibrate it on, as the graph takes them.

    For bfloat16 the weights are stored as float16, which is as small and has more bits.
    """
    openvino = need("openvino")
    # Through ONNX: OpenVINO's converter of torch programs, and its quantiser, send usage data home unasked.
    graph = to_onnx(program, metadata.output)
    if calibration is not None:
        graph = quantized(graph, calibration)
    model = openvino.Core().read_model(graph.SerializeToString())
    model.set_rt_info(metadata.to_text(), [KEY])
    openvino.save_model(model, path, compress_to_fp16=metadata.precision == "bfloat16")


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
