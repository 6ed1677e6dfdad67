"""The formats that a small model can be exported to, by name and by suffix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mvp_ext.deploy import onnx_file, openvino_file, pt2_file
from mvp_ext.deploy.metadata import Metadata, Program


@dataclass(frozen=True)
class Format:
    """One kind of file.

    Attributes:
        name: as the command line has it.
        runtime: what runs its files.
        suffixes: of its parts, in the order they are put in place; the last is the file's own.
        write: writes all parts of a file at the path; int8 where it is given images to calibrate on.
        open_file: of a file, with so many threads (None: the runtime's own choice): metadata, and images → outputs.
        libraries: that write and run its files, beside torch.
        refused: precision → why the format does not have it.
    """

    name: str
    runtime: str
    suffixes: tuple[str, ...]
    write: Callable[[Program, Path, Metadata, Tensor | None], None]
    open_file: Callable[[Path, int | None], tuple[Metadata, Callable[[Tensor], Tensor]]]
    libraries: tuple[str, ...]
    refused: dict[str, str]

    @property
    def suffix(self) -> str:
        return self.suffixes[-1]

    def parts(self, path: Path) -> list[Path]:
        """All files of an exported model at ``path``, itself last."""
        return [path.with_suffix(suffix) for suffix in self.suffixes]


FORMATS = {
    each.name: each
    for each in (
        Format(
            "onnx",
            "onnxruntime",
            (".onnx",),
            onnx_file.write,
            onnx_file.open_file,
            ("onnx", "onnxscript", "onnxruntime"),
            {"bfloat16": "ONNX Runtime has no convolutions in bfloat16 on a CPU; openvino and pt2 have"},
        ),
        Format(
            "openvino",
            "openvino",
            (".bin", ".xml"),
            openvino_file.write,
            openvino_file.open_file,
            ("onnx", "onnxscript", "openvino"),
            {},
        ),
        Format(
            "pt2",
            "torch",
            (".pt2",),
            pt2_file.write,
            pt2_file.open_file,
            (),
            {"int8": "torch alone quantises no convolutions statically; onnx and openvino have int8"},
        ),
    )
}


def format_of(what: str, path: Path, name: str | None = None) -> Format:
    """The format of this name, or by the path's suffix; ValueError, beginning with ``what``, where they say none."""
    if name is not None and name not in FORMATS:
        raise ValueError(f"{what}: to: expected one of {', '.join(FORMATS)}, got {name!r}")
    for found in FORMATS.values() if name is None else [FORMATS[name]]:
        if path.suffix == found.suffix:
            return found
    expected = [found.suffix for found in FORMATS.values() if name in (None, found.name)]
    raise ValueError(f"{what}: path: expected a name that ends in {' or '.join(expected)}, got {str(path)!r}")
