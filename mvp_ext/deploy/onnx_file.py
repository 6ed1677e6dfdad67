"""ONNX files, run by ONNX Runtime on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvp_ext.deploy.extra import need
from mvp_ext.deploy.metadata import KEY, Metadata, Program
from mvp_ext.deploy.quantize import quantized

# With Gelu as one op; the oldest ONNX Runtime of the extra reads it.
OPSET = 20


def to_onnx(program: Program, output: str) -> Any:
    """The program as an ``onnx.ModelProto`` with input "images" and this output, checked."""
    onnx = need("onnx")
    need("onnxscript")
    exported: Any = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        output_names=[output],
        verbose=False,
    )
    model = exported.model_proto
    # The exporter notes where in whose source files each node was made.
    for node in model.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    onnx.checker.check_model(model, full_check=True)
    return model


def write(program: Program, path: Path, metadata: Metadata, calibration: Tensor | None) -> None:
    """Write one file; int8 where there are images to calibrate it on, as the graph takes them."""
    onnx = need("onnx")
    model = to_onnx(program, metadata.output)
    if calibration is not None:
        model = quantized(model, calibration)
    onnx.helper.set_model_props(model, {KEY: metadata.to_text()})
    path.write_bytes(model.SerializeToString())


def open_file(path: Path, threads: int | None) -> tuple[Metadata, Callable[[Tensor], Tensor]]:
    """The metadata, and what computes the outputs of a batch.

    Raises:
        ValueError: not an ONNX file that this package wrote.
    """
    runtime = need("onnxruntime")
    options = runtime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    # Errors are raised; its warnings would go to the terminal.
    options.log_severity_level = 3
    try:
        session = runtime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ValueError(f"{path}: not an ONNX file that ONNX Runtime reads ({error})") from error
    metadata = Metadata.from_text(session.get_modelmeta().custom_metadata_map.get(KEY), os.fspath(path))

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.contiguous().numpy()})[0])

    return metadata, run
