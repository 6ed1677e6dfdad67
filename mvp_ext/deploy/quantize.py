"""int8: an ONNX graph's heavy layers in bytes, with ranges measured on images before (static quantisation)."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from mvp_ext.deploy.extra import need

# Images that the ranges of activations are taken from, and images a pass: all passes must be of one size.
CALIBRATION_IMAGES, CALIBRATION_BATCH = 300, 10
_HEAVY = ("Conv", "MatMul", "Gemm")


def quantized(model: Any, images: Tensor) -> Any:
    """A graph with quantise–dequantise pairs around the layers that hold nearly all of its work.

    The classifier stays float (a ridge regression's weights lose most, and it is a thousandth of the work), as do a
    ViT's patch embedding, products of attention, norms and sums. Weights are quantised per filter, in 7 bits:
    processors without VNNI add up products of bytes in 16 bits, which 8 would overflow.

    Args:
        model: ``onnx.ModelProto`` with input "images".
        images: of the task, as the graph takes them, n ≥ 1.

    Returns:
        ``onnx.ModelProto``.
    """
    onnx, quantization = need("onnx"), need("onnxruntime.quantization")
    with tempfile.TemporaryDirectory() as folder, _silent():
        given, folded, done = (
            str(Path(folder) / name) for name in ("given.onnx", "folded.onnx", "int8.onnx")
        )
        onnx.save(model, given)
        # Puts norms into convolutions. Its symbolic shapes are for operators that are not quantised here.
        shapes = need("onnxruntime.quantization.shape_inference")
        shapes.quant_pre_process(given, folded, skip_symbolic_shape=True)
        quantization.quantize_static(
            folded,
            done,
            _Reader(images),
            quant_format=quantization.QuantFormat.QDQ,
            nodes_to_quantize=_heavy_layers(onnx.load(folded).graph),
            per_channel=True,
            reduce_range=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            # A few activations far out would take the bits from all others.
            calibrate_method=quantization.CalibrationMethod.Percentile,
        )
        return onnx.load(done)


def _heavy_layers(graph: Any) -> list[str]:
    """Names of the layers with weights, but for the classifier and a patch embedding."""
    weights = {tensor.name for tensor in graph.initializer}
    layers = [node for node in graph.node if node.op_type in _HEAVY and weights.intersection(node.input)]
    convolutions = [node for node in layers if node.op_type == "Conv"]
    # A ViT's only one; where there are more, the first is a good part of the work.
    left_out = convolutions if len(convolutions) == 1 else []
    return [node.name for node in layers[:-1] if node not in left_out]


class _Reader:
    """Hands out batches of images, as onnxruntime.quantization asks for them."""

    def __init__(self, images: Tensor) -> None:
        batch = min(CALIBRATION_BATCH, len(images))
        self._batches = iter(images[: len(images) // batch * batch].split(batch))

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"images": batch.numpy()}


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The quantiser prints and logs its progress."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
