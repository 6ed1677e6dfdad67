"""pruned_attention on deit_small's attention (6 heads of 64, 197 tokens), 3 heads kept, float32.

Peers: the same with index_select, F.linear and SDPA on each call; with weights cut once; and the dense layer.
"""

from __future__ import annotations

import torch
from harness import Bench
from torch.nn import functional as F

from mvp_ext.ops import pruned_attention

HEADS, HEAD_DIM, CHANNELS, TOKENS = 6, 64, 384, 197


def attention(x, qkv_weight, qkv_bias, proj_weight, proj_bias):
    """All heads of the given weights."""
    qkv = F.linear(x, qkv_weight, qkv_bias)
    q, k, v = qkv.view(*x.shape[:2], 3, -1, HEAD_DIM).permute(2, 0, 3, 1, 4).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v)
    return F.linear(y.transpose(1, 2).flatten(2), proj_weight, proj_bias)


def main() -> None:
    torch.manual_seed(0)
    bench = Bench("pruned_attention")
    heads = torch.tensor([0, 2, 5], dtype=torch.int32)
    cols = (heads[:, None] * HEAD_DIM + torch.arange(HEAD_DIM)).flatten()
    rows = torch.cat([cols, cols + CHANNELS, cols + 2 * CHANNELS])
    weights = [
        torch.randn(3 * CHANNELS, CHANNELS) / CHANNELS**0.5,
        torch.randn(3 * CHANNELS),
        torch.randn(CHANNELS, CHANNELS) / CHANNELS**0.5,
        torch.randn(CHANNELS),
    ]

    def cut():
        return (
            weights[0].index_select(0, rows),
            weights[1].index_select(0, rows),
            weights[2].index_select(1, cols),
            weights[3],
        )

    compact = cut()
    for batch in (1, 8, 32):
        x = torch.randn(batch, TOKENS, CHANNELS)

        def ours(x=x):
            return pruned_attention(x, *weights, heads, num_heads=HEADS)

        peers = {
            "index_select + linear + SDPA": lambda x=x: attention(x, *cut()),
            "cut once + linear + SDPA": lambda x=x: attention(x, *compact),
            "dense": lambda x=x: attention(x, *weights),
        }
        bench.case(
            f"deit_small, 3 of 6 heads, batch {batch}",
            ours,
            peers,
            floors={"index_select + linear + SDPA": 1.0},
            check=lambda x=x, ours=ours: torch.testing.assert_close(
                ours(), attention(x, *compact), rtol=1e-3, atol=1e-4
            ),
        )
    bench.finish()


if __name__ == "__main__":
    main()
