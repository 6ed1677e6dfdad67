"""The tensors that the benchmarks of whole models work on: real models with random masks, and their index lists."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mvp_ext.model.create import create_model
from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask


def small_model(name: str) -> str:
    """timm's test model of the same family: what dry runs take instead."""
    return "test_resnet" if "resnet" in name else "test_vit"


@dataclass
class Cut:
    """P tensors and where each is cut."""

    tensors: list[Tensor]
    rows: list[Tensor | None]
    cols: list[Tensor | None]

    def to(self, device: torch.device) -> Cut:
        """A copy on a device; lists of indices that tensors share stay shared."""
        moved: dict[int, Tensor] = {}

        def move(index: Tensor | None) -> Tensor | None:
            return None if index is None else moved.setdefault(id(index), index.to(device))

        tensors = [t.to(device) for t in self.tensors]
        return Cut(tensors, [move(r) for r in self.rows], [move(c) for c in self.cols])

    @property
    def packed_bytes(self) -> int:
        total = 0
        for tensor, rows, cols in zip(self.tensors, self.rows, self.cols, strict=True):
            shape = list(tensor.shape)
            for dim, index in enumerate((rows, cols)):
                if index is not None:
                    shape[dim] = len(index)
            total += torch.Size(shape).numel() * tensor.element_size()
        return total


def cut_model(
    name: str, scope: str, keep: float, *, optimizer_states: int = 0, only_cut: bool = False, seed: int = 0
) -> Cut:
    """Parameters and buffers of a timm model, ``optimizer_states`` more copies of each parameter, and a random mask.

    With ``only_cut``: just the tensors that change shape.
    """
    model = create_model(name)
    structure = find_structure(model, scope)
    index = Mask.random(structure, keep, seed=seed, align=8 if scope == "inner" else 1).index_in(structure)
    parameters = {n for n, _ in model.named_parameters()}
    cut = Cut([], [], [])
    for key, value in model.state_dict().items():
        if value.ndim == 0 or (only_cut and key not in index):
            continue
        rows, cols = index.get(key, (None, None))
        for _ in range(1 + optimizer_states * (key in parameters)):
            cut.tensors.append(value.detach().clone())
            cut.rows.append(rows)
            cut.cols.append(cols)
    return cut
