"""pruned_conv2d on resnet18's 3 × 3 convolutions (224²), half of the filters or channels kept; bfloat16 on a GPU.

On a CPU small images have a kernel, which reads the full weight. Elsewhere the convolution itself is the library's:
what can differ is the cutting of the weight. Peers: index_select and F.conv2d on each call; with the weight cut once;
and the dense convolution.
"""

from __future__ import annotations

import torch
from harness import Bench
from timers import Run
from torch import Tensor
from torch.nn import functional as F

from mvp_ext.ops import pruned_conv2d

# channels: side of the image
STAGES = {64: 56, 128: 28, 256: 14, 512: 7}
EACH_CALL, ONCE = "index_select + conv2d", "cut once + conv2d"


def main() -> None:
    bench = Bench("pruned_conv2d")
    for batch in (1, 256) if bench.gpu else (1, 32):
        for channels, side in STAGES.items():
            for kept in ("filters", "channels"):
                add_case(bench, channels, side, kept, batch)
    bench.finish()


def add_case(bench: Bench, channels: int, side: int, kept: str, batch: int) -> None:
    name = f"{channels} {kept} at {side}², batch {batch}"
    if not bench.wants(name):
        return
    channels, side, batch = (bench.size(n) for n in (channels, side, batch))
    dtype = torch.bfloat16 if bench.gpu else torch.float32
    weight = (torch.randn(channels, channels, 3, 3, device=bench.device) / channels).to(dtype)
    index = torch.randperm(channels)[: channels // 2].sort().values.to(bench.device)
    dim, rows, cols = (0, index, None) if kept == "filters" else (1, None, index)
    inputs = channels if cols is None else channels // 2
    x = torch.randn(batch, inputs, side, side, device=bench.device).to(dtype)
    small = weight.index_select(dim, index)

    def ours() -> Tensor:
        return pruned_conv2d(x, weight, None, rows, cols, padding=1)

    def cut_once() -> Tensor:
        return F.conv2d(x, small, padding=1)

    peers: dict[str, Run | None] = {
        EACH_CALL: lambda: F.conv2d(x, weight.index_select(dim, index), padding=1),
        ONCE: cut_once,
        "dense": (lambda: F.conv2d(x, weight, padding=1)) if cols is None else None,
        "ours, CUDA graph": bench.graphed(ours),
    }
    floors = {} if bench.gpu else {EACH_CALL: 0.95, ONCE: 0.8}
    bench.case(name, ours, peers, floors=floors, check=lambda: torch.testing.assert_close(ours(), cut_once()))


if __name__ == "__main__":
    main()
