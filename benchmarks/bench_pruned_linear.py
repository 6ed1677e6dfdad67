"""pruned_linear on deit_small's layers, keep 0.5, from full weights.

Peers: `index_select + F.linear` on each call, which is what a mask that changes would cost, and `F.linear` with
the weight cut once beforehand, which is the ceiling of a library's user. Rows of x: one token to a batch of 32 images.
"""

from __future__ import annotations

import torch
from harness import Bench
from torch.nn import functional as F

from mvp_ext.ops import pruned_linear

# name, O, I, units kept of the rows / of the columns (None: all), their block, transposed (input-major) weight
LAYERS = [
    ("fc1", 1536, 384, 768, None, 1, False),
    ("fc2, input-major", 384, 1536, None, 768, 1, True),
    ("fc2, row-major", 384, 1536, None, 768, 1, False),
    ("qkv", 1152, 384, 9, None, 64, False),
    ("proj", 384, 384, None, 3, 64, False),
    ("proj, input-major", 384, 384, None, 3, 64, True),
]
ROWS = {
    torch.float32: (1, 4, 16, 64, 197, 6304),
    torch.bfloat16: (1, 16, 64, 197, 6304),
    torch.float16: (1, 16, 197),
}


def draw(units: int, kept: int | None, block: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Numbers of the kept blocks, and the positions that they cover."""
    if kept is None:
        return None, None
    index = torch.randperm(units // block)[:kept].sort().values.to(torch.int32)
    return index, (index[:, None] * block + torch.arange(block, dtype=torch.int32)).flatten()


def main() -> None:
    torch.manual_seed(0)
    bench = Bench("pruned_linear")
    for dtype, many_rows in ROWS.items():
        for name, outputs, inputs, kept_rows, kept_cols, block, transposed in LAYERS:
            weight = torch.randn(inputs, outputs).t() if transposed else torch.randn(outputs, inputs)
            weight, bias = weight.to(dtype), torch.randn(outputs).to(dtype)
            out_index, rows = draw(outputs, kept_rows, block)
            in_index, cols = draw(inputs, kept_cols, block)
            blocks = {"out_block": 1 if rows is None else block, "in_block": 1 if cols is None else block}

            def cut(weight=weight, rows=rows, cols=cols):
                weight = weight if rows is None else weight.index_select(0, rows)
                return weight if cols is None else weight.index_select(1, cols)

            compact, compact_bias = cut(), bias if rows is None else bias.index_select(0, rows)
            for m in many_rows:
                x = torch.randn(m, compact.shape[1]).to(dtype)

                def ours(x=x, weight=weight, bias=bias, outs=out_index, ins=in_index, blocks=blocks):
                    return pruned_linear(x, weight, bias, outs, ins, **blocks)

                def each_call(x=x, bias=bias, rows=rows, cut=cut):
                    return F.linear(x, cut(), bias if rows is None else bias.index_select(0, rows))

                def cut_once(x=x, weight=compact, bias=compact_bias):
                    return F.linear(x, weight, bias)

                def check(x=x, weight=compact, bias=compact_bias, ours=ours, cut_once=cut_once):
                    exact = F.linear(x.double(), weight.double(), bias.double())
                    errors = [(y.double() - exact).abs().max() for y in (ours(), cut_once())]
                    assert errors[0] <= 2 * errors[1] + 1e-5, errors

                promised = dtype is torch.float32
                floors = {"index_select + linear": 1.3 if m in (1, 16) else 1.0} if promised else {}
                if promised and m >= 16:
                    floors["cut once + linear"] = 0.85
                short = str(dtype).removeprefix("torch.")
                peers = {"index_select + linear": each_call, "cut once + linear": cut_once}
                bench.case(f"{name}, M = {m}, {short}", ours, peers, floors=floors, check=check)
    bench.finish()


if __name__ == "__main__":
    main()
