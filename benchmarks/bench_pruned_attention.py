"""pruned_attention on deit_small's attention (6 heads of 64, 197 tokens), 3 heads kept; bfloat16 on a GPU.

Peers: the same with index_select, F.linear and SDPA on each call; with weights cut once; and the dense layer.
"""

from __future__ import annotations

import torch
from harness import Bench, check_error
from torch import Tensor
from torch.nn import functional as F

from mvp_ext.ops import pruned_attention

HEADS, HEAD_DIM, CHANNELS, TOKENS = 6, 64, 384, 197


def attention(
    x: Tensor, qkv_weight: Tensor, qkv_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor
) -> Tensor:
    """All heads of the given weights."""
    qkv = F.linear(x, qkv_weight, qkv_bias)
    q, k, v = qkv.view(*x.shape[:2], 3, -1, HEAD_DIM).permute(2, 0, 3, 1, 4).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v)
    return F.linear(y.transpose(1, 2).flatten(2), proj_weight, proj_bias)


def main() -> None:
    bench = Bench("pruned_attention")
    for batch in (1, 32, 256) if bench.gpu else (1, 8, 32):
        add_case(bench, batch)
    bench.finish()


def add_case(bench: Bench, batch: int) -> None:
    name = f"deit_small, 3 of 6 heads, batch {batch}"
    if not bench.wants(name):
        return
    dtype = torch.bfloat16 if bench.gpu else torch.float32

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=bench.device).to(dtype)

    heads = torch.tensor([0, 2, 5], dtype=torch.int32, device=bench.device)
    cols = (heads[:, None] * HEAD_DIM + torch.arange(HEAD_DIM, device=bench.device)).flatten()
    rows = torch.cat([cols, cols + CHANNELS, cols + 2 * CHANNELS])
    qkv_weight, qkv_bias = draw(3 * CHANNELS, CHANNELS) / CHANNELS**0.5, draw(3 * CHANNELS)
    proj_weight, proj_bias = draw(CHANNELS, CHANNELS) / CHANNELS**0.5, draw(CHANNELS)
    weights = (qkv_weight, qkv_bias, proj_weight, proj_bias)
    x = draw(bench.size(batch), TOKENS, CHANNELS)

    def cut() -> tuple[Tensor, ...]:
        small_qkv = qkv_weight.index_select(0, rows), qkv_bias.index_select(0, rows)
        return *small_qkv, proj_weight.index_select(1, cols), proj_bias

    small = cut()

    def ours() -> Tensor:
        return pruned_attention(x, *weights, heads, num_heads=HEADS)

    def check() -> None:
        exact = attention(x.double(), *(t.double() for t in small))
        check_error(ours(), attention(x, *small), exact, slack=1e-3 if bench.gpu else 1e-5)

    each_call = "index_select + linear + SDPA"
    bench.case(
        name,
        ours,
        {
            each_call: lambda: attention(x, *cut()),
            "cut once + linear + SDPA": lambda: attention(x, *small),
            "dense": lambda: attention(x, *weights),
            "ours, CUDA graph": bench.graphed(ours),
        },
        floors={} if bench.gpu else {each_call: 1.0},
        check=check,
    )


if __name__ == "__main__":
    main()
