"""The same small shapes made by Torch-Pruning, if installed: is what our surgery leaves as fast as a peer's?"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import nn

from mvp_ext.model.mask import Mask
from mvp_ext.model.structure import Structure, UnitLayer


def prune_with_torch_pruning(
    model: nn.Module, structure: Structure, mask: Mask, input_shape: Sequence[int]
) -> nn.Module:
    """A copy of ``model`` from which Torch-Pruning removed the units that ``mask`` does not keep.

    Each layer is cut through Torch-Pruning's dependency graph, which finds by itself what else has to shrink; for heads
    it is told how many are left, as its documentation asks.

    Raises:
        ImportError: Torch-Pruning is not installed. ValueError: its scope is one that it has no counterpart of.
    """
    if structure.scope == "all":
        raise ValueError(
            "torch-pruning: scope 'all' has no counterpart there, where the residual stream is coupled"
        )
    tp = _torch_pruning()
    small = copy.deepcopy(model).eval()
    example = torch.zeros(1, *input_shape)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Unwrapped parameters", category=UserWarning
        )  # none of those is cut
        graph = tp.DependencyGraph().build_dependency(small, example_inputs=example)
    for layer in structure:
        removed = (~mask.layers[layer.name]).nonzero().flatten()
        if not len(removed):
            continue
        module = _producer(small, layer)
        rows = layer.slices[0].places(removed, layer.units).tolist()
        prune = tp.prune_conv_out_channels if isinstance(module, nn.Conv2d) else tp.prune_linear_out_channels
        graph.get_pruning_group(module, prune, idxs=rows).prune()
        if layer.kind == "head":
            attention: Any = small.get_submodule(layer.slices[0].tensor.rsplit(".", 2)[0])
            attention.num_heads = layer.units - len(removed)
            if hasattr(attention, "attn_dim"):
                attention.attn_dim = attention.num_heads * attention.head_dim
    for parameter in small.parameters():
        parameter.grad = None
    return small


def same_shapes(a: nn.Module, b: nn.Module) -> list[str]:
    """Names of the tensors of two models whose shapes differ (or that only one has); empty where they agree."""
    shapes = [{name: tuple(t.shape) for name, t in model.state_dict().items()} for model in (a, b)]
    return sorted(set(_different(*shapes)))


def _different(a: dict[str, tuple[int, ...]], b: dict[str, tuple[int, ...]]) -> Iterator[str]:
    for name in a.keys() | b.keys():
        if a.get(name) != b.get(name):
            yield name


def _producer(model: nn.Module, layer: UnitLayer) -> nn.Module:
    """The module whose output channels are the layer's units."""
    return model.get_submodule(layer.slices[0].tensor.rpartition(".")[0])


def _torch_pruning() -> ModuleType:
    from mvp_ext.timm_compat import import_timm

    import_timm()  # Torch-Pruning imports torchvision: the same remedy for its CUDA build beside a CPU torch
    try:
        return importlib.import_module("torch_pruning")
    except ImportError as error:
        raise ImportError("comparing with Torch-Pruning needs it: pip install torch-pruning") from error
