"""pruned_conv2d on resnet18's 3 × 3 convolutions (224², batch 32), half of the filters or channels kept, float32.

The convolution itself is the library's: what can differ is the cutting of the weight. Peers: index_select and F.conv2d
on each call; with the weight cut once; and the dense convolution.
"""

from __future__ import annotations

import torch
from harness import Bench
from torch.nn import functional as F

from mvp_ext.ops import pruned_conv2d

STAGES = {64: 56, 128: 28, 256: 14, 512: 7}  # channels: size of the image


def main() -> None:
    torch.manual_seed(0)
    bench = Bench("pruned_conv2d")
    for batch in (1, 32):
        for channels, size in STAGES.items():
            weight = torch.randn(channels, channels, 3, 3) / channels
            index = torch.randperm(channels)[: channels // 2].sort().values
            for side in ("filters", "channels"):
                rows, cols = (index, None) if side == "filters" else (None, index)
                x = torch.randn(batch, channels if cols is None else channels // 2, size, size)

                def cut(weight=weight, rows=rows, cols=cols):
                    return weight.index_select(0, rows) if cols is None else weight.index_select(1, cols)

                compact = cut()

                def ours(x=x, weight=weight, rows=rows, cols=cols):
                    return pruned_conv2d(x, weight, None, rows, cols, padding=1)

                peers = {
                    "index_select + conv2d": lambda x=x, cut=cut: F.conv2d(x, cut(), padding=1),
                    "cut once + conv2d": lambda x=x, w=compact: F.conv2d(x, w, padding=1),
                }
                if cols is None:
                    peers["dense"] = lambda x=x, w=weight: F.conv2d(x, w, padding=1)
                bench.case(
                    f"{channels} {side} at {size}², batch {batch}",
                    ours,
                    peers,
                    floors={"index_select + conv2d": 0.95, "cut once + conv2d": 0.8},
                    check=lambda ours=ours, peers=peers: torch.testing.assert_close(
                        ours(), peers["cut once + conv2d"]()
                    ),
                )
    bench.finish()


if __name__ == "__main__":
    main()
