"""The same small shapes made by Torch-Pruning, if installed: is what our surgery leaves as fast as a peer's?"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import nn

from mvp_ext.model.mask import Mask
from mvp_ext.model.structure import Structure, UnitLayer
from mvp_ext.timm_compat import import_timm


def prune_with_torch_pruning(
    model: nn.Module, structure: Structure, mask: Mask, input_shape: Sequence[int]
) -> nn.Module:
    """A copy of ``model`` from which Torch-Pruning removed the units that ``mask`` does not keep.

    Each layer is cut through Torch-Pruning's dependency graph, which finds by itself what else has to shrink; for heads
    it is told how many are left, as its documentation asks.

    Args:
        model: dense, on the CPU.
        structure: of the model.
        mask: of its units.
        input_shape: of one image, (C, H, W).

    Raises:
        ImportError: Torch-Pruning is not installed.
        ValueError: the structure's scope has no counterpart there.
    """
    if structure.scope == "all":
        raise ValueError(
            "torch-pruning: scope 'all' has no counterpart there, where the residual stream is coupled"
        )
    tp = import_torch_pruning()
    small = copy.deepcopy(model).eval()
    example = torch.zeros(1, *input_shape)
    with warnings.catch_warnings():
        # None of those is cut.
        warnings.filterwarnings("ignore", message="Unwrapped parameters", category=UserWarning)
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


def different_shapes(a: nn.Module, b: nn.Module) -> list[str]:
    """Names of the tensors of two models whose shapes differ (or that only one has); empty where they agree."""
    shapes = [{(name, tuple(t.shape)) for name, t in model.state_dict().items()} for model in (a, b)]
    return sorted({name for name, _ in shapes[0] ^ shapes[1]})


def _producer(model: nn.Module, layer: UnitLayer) -> nn.Module:
    """The module whose output channels are the layer's units."""
    return model.get_submodule(layer.slices[0].tensor.rpartition(".")[0])


def import_torch_pruning() -> ModuleType:
    """``torch_pruning``; ImportError says how to install it."""
    # Torch-Pruning imports torchvision: the same remedy for its CUDA build beside a CPU torch.
    import_timm()
    try:
        return importlib.import_module("torch_pruning")
    except ImportError as error:
        raise ImportError("comparing with Torch-Pruning needs it: pip install torch-pruning") from error
