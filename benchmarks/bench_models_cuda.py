"""Whole models on a GPU in bfloat16: dense against pruned, eager and as a CUDA graph, beside Torch-Pruning's shapes.

The library chooses its convolutions by trying them, for all contenders. "share of saving" is the speed-up divided by
the FLOP ratio: 1 where all of the saved work became saved time.
"""

from __future__ import annotations

import copy

import torch
from cuda_bench import CudaBench, graphed
from torch import nn

from mvp_ext.app.peers import prune_with_torch_pruning
from mvp_ext.model.create import create_model
from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.measure import count_flops
from mvp_ext.model.surgery import prune_model

MODELS = {
    "resnet18": ("test_resnet", "inner"),
    "resnet50": ("test_resnet", "inner"),
    "deit_small_patch16_224": ("test_vit", "heads+mlp"),
    "deit_base_patch16_224": ("test_vit", "heads+mlp"),
}
KEEP, ALIGN, SIDE = 0.5, 8, 224


def main() -> None:
    bench = CudaBench("models")
    torch.backends.cudnn.benchmark = True
    for name, (small, scope) in MODELS.items():
        add_model(bench, name, small if bench.dry else name, scope)
    bench.finish()


def add_model(bench: CudaBench, name: str, architecture: str, scope: str) -> None:
    image = (3, bench.size(SIDE), bench.size(SIDE))
    dense = create_model(architecture).eval()
    if bench.dry:
        image = dense.pretrained_cfg["input_size"]
    structure = find_structure(dense, scope)
    mask = Mask.random(structure, KEEP, 0, ALIGN)
    pruned = prune_model(copy.deepcopy(dense), mask, structure=structure)
    ratio = count_flops(dense, image) / count_flops(pruned, image)
    try:
        peer: nn.Module | None = prune_with_torch_pruning(dense, structure, mask, image)
    except ImportError:
        peer = None
    models = [m if m is None else on_device(m, bench) for m in (pruned, dense, peer)]
    for batch in (1, 32, 256):
        case = f"{name} ({scope}) keep {KEEP}, batch {batch}, {ratio:.2f}x fewer FLOPs"
        if not bench.wants(case):
            continue
        x = torch.randn(bench.size(batch) if not bench.dry else 2, *image, device=bench.device)
        x = x.to(torch.bfloat16, memory_format=torch.channels_last)
        runs = [None if m is None else (lambda m=m, x=x: m(x)) for m in models]
        with torch.inference_mode():
            peers = {"dense": runs[1], "Torch-Pruning": runs[2]}
            for key, run in (("ours", runs[0]), ("dense", runs[1])):
                peers[f"{key}, CUDA graph"] = None if run is None else graphed(bench, run)
            goals = {"dense": 0.8 * ratio} if batch == 256 else {}
            bench.case(case, runs[0], peers, goals={**goals, "Torch-Pruning": 0.97})


def on_device(model: nn.Module, bench: CudaBench) -> nn.Module:
    return model.to(bench.device, torch.bfloat16, memory_format=torch.channels_last).eval()


if __name__ == "__main__":
    main()
