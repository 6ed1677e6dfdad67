"""What an exported file says of itself: one JSON text, under one key of the format's own metadata."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from torch.export import ExportedProgram as Program

from mvp_ext.model.card import ModelCard

__all__ = ["KEY", "PRECISIONS", "Metadata", "Precision", "Program", "precision_of"]

# The key in ONNX's metadata_props, OpenVINO's rt_info and a torch program's extra files.
KEY = "mvp_ext"
_VERSION = 1

Precision = Literal["float32", "bfloat16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "int8")


@dataclass(frozen=True)
class Metadata:
    """Of an exported file.

    Attributes:
        card: of the model.
        precision: that it computes in.
        preprocess: whether the preprocessing is in the graph: the input is uint8 [B, H, W, 3] of any size.
        softmax: whether the outputs are probabilities, not logits.
        kept: layer → indices of the dense model's units that stayed.
        versions: of what wrote the file.
    """

    card: ModelCard
    precision: Precision
    preprocess: bool
    softmax: bool
    kept: dict[str, list[int]]
    versions: dict[str, str]

    @property
    def output(self) -> str:
        """The output's name in the graph."""
        return "probabilities" if self.softmax else "logits"

    def to_text(self) -> str:
        """JSON in ASCII; ``from_text`` reads it back."""
        values: dict[str, Any] = {**vars(self), "version": _VERSION, "card": self.card.to_dict()}
        return json.dumps(values, allow_nan=False)

    @classmethod
    def from_text(cls, text: str | None, source: str) -> Metadata:
        """The inverse of ``to_text``; ValueError, naming ``source``, where it is none or of a newer version."""
        if text is None:
            raise ValueError(f"{source}: not a file that mvp_ext exported (it has no metadata {KEY!r})")
        try:
            values = dict(json.loads(text))
            version, card = values.pop("version"), ModelCard.from_dict(values.pop("card"))
            if version > _VERSION:
                raise ValueError(
                    f"version {version} is newer than this mvp_ext reads ({_VERSION}); update it"
                )
            found = cls(card, **values)
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"{source}: its metadata cannot be read ({error})") from error
        precision_of(f"{source}: its metadata cannot be read", found.precision)
        return found


def precision_of(what: str, text: str) -> Precision:
    """The precision of this name; ValueError, beginning with ``what``, where there is none."""
    for precision in PRECISIONS:
        if precision == text:
            return precision
    raise ValueError(f"{what}: precision: expected one of {', '.join(PRECISIONS)}, got {text!r}")
