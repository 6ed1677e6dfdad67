"""Whole models: dense against pruned, beside Torch-Pruning's shapes; on a GPU in bfloat16, and also as a CUDA graph.

The library chooses its convolutions by trying them, for all contenders. What is promised against dense, at batch 256
on a GPU, is 0.8 of the FLOP ratio: that so much of the saved work becomes saved time.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from harness import Bench
from models import small_model
from torch import nn

from mvp_ext.app.peers import prune_with_torch_pruning
from mvp_ext.model.create import create_model
from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.measure import count_flops
from mvp_ext.model.surgery import prune_model

# name: scope
MODELS = {
    "resnet18": "inner",
    "resnet50": "inner",
    "deit_small_patch16_224": "heads+mlp",
    "deit_base_patch16_224": "heads+mlp",
}
KEEP, ALIGN, IMAGE = 0.5, 8, (3, 224, 224)


def main() -> None:
    bench = Bench("models")
    torch.backends.cudnn.benchmark = True
    for name, scope in MODELS.items():
        add_model(bench, name, scope)
    bench.finish()


def add_model(bench: Bench, name: str, scope: str) -> None:
    batches = (1, 32, 256) if bench.gpu else (1, 32)
    cases = {batch: f"{name} ({scope}) keep {KEEP}, batch {batch}" for batch in batches}
    if not bench.wants(*cases.values()):
        return
    dense = create_model(small_model(name) if bench.dry else name).eval()
    image = dense.pretrained_cfg["input_size"] if bench.dry else IMAGE
    structure = find_structure(dense, scope)
    mask = Mask.random(structure, KEEP, 0, ALIGN)
    pruned = prune_model(copy.deepcopy(dense), mask, structure=structure)
    ratio = count_flops(dense, image) / count_flops(pruned, image)
    try:
        peer: nn.Module | None = prune_with_torch_pruning(dense, structure, mask, image)
    except ImportError:
        peer = None
    dtype, layout = torch.bfloat16 if bench.gpu else torch.float32, torch.channels_last
    models = [
        None if m is None else m.to(bench.device, dtype, memory_format=layout).eval()
        for m in (pruned, dense, peer)
    ]
    for batch, case in cases.items():
        if not bench.wants(case):
            continue
        x = torch.randn(2 if bench.dry else batch, *image).to(bench.device, dtype, memory_format=layout)
        ours, by_dense, by_peer = (None if m is None else partial(m, x) for m in models)
        with torch.inference_mode():
            peers = {
                "dense": by_dense,
                "Torch-Pruning": by_peer,
                "ours, CUDA graph": bench.graphed(ours),
                "dense, CUDA graph": bench.graphed(by_dense),
            }
            floors = {"Torch-Pruning": 0.97} | ({"dense": round(0.8 * ratio, 3)} if batch == 256 else {})
            bench.case(f"{case}, {ratio:.2f}x fewer FLOPs", ours, peers, floors=floors if bench.gpu else {})


if __name__ == "__main__":
    main()
