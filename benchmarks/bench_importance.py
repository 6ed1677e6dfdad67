"""importance against the eager expression and against the read bandwidth (torch.dot over the same bytes)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import Bench
from torch import Tensor

from mvp_ext.ops import importance, reference

RESNET18 = {
    "stem": (64, 112),
    "layer1": (64, 56),
    "layer2": (128, 28),
    "layer3": (256, 14),
    "layer4": (512, 7),
}
DEIT_SMALL = {"heads": (384, 6), "MLP": (1536, None)}
BATCH = 32


def eager(a: Tensor, grad: Tensor, kind: str, dim: int, heads: int | None) -> Tensor:
    """What a user would write, with a sum over whatever is neither batch nor unit."""
    terms = a.abs() if kind == "activation" else a * grad
    if heads is not None:
        terms = terms.unflatten(dim, (heads, -1))
    others = [d for d in range(1, terms.ndim) if d != dim]
    if kind == "activation":
        return terms.mean([0, *others])
    example = terms.sum(others)
    return (example.abs() if kind == "taylor" else example.square()).sum(0)


def main() -> None:
    bench = Bench("importance")
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for layer, (channels, size) in RESNET18.items():
            for layout in ("NCHW", "channels_last"):
                shape = (BATCH, channels, size, size)
                add_case(bench, f"resnet18 {layer}, {layout}, {name}", shape, dtype, layout=layout)
        for layer, (width, heads) in DEIT_SMALL.items():
            add_case(bench, f"deit_small {layer}, {name}", (BATCH, 197, width), dtype, dim=2, heads=heads)
    for kind in ("taylor2", "activation"):
        add_case(
            bench, f"resnet18 layer1, NCHW, float32, {kind}", (BATCH, 64, 56, 56), torch.float32, kind=kind
        )
    add_case(bench, "resnet18 layer1, batch 1, NCHW, float32", (1, 64, 56, 56), torch.float32)
    add_case(bench, "resnet18 layer4, batch 1, NCHW, float32", (1, 512, 7, 7), torch.float32)
    add_case(bench, "resnet18 layer1, NCHW, float16", (BATCH, 64, 56, 56), torch.float16)
    add_case(
        bench, "resnet18 layer1, every second column, float32", (BATCH, 64, 56, 56), torch.float32, step=2
    )
    bench.finish()


def add_case(
    bench: Bench,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    kind: str = "taylor",
    dim: int = 1,
    heads: int | None = None,
    layout: str = "NCHW",
    step: int = 1,
) -> None:
    if bench.options.only not in name:
        return
    generator = torch.Generator().manual_seed(0)
    a, grad = (torch.randn(shape, generator=generator).to(dtype)[..., ::step] for _ in range(2))
    if layout == "channels_last":
        a, grad = (x.contiguous(memory_format=torch.channels_last) for x in (a, grad))

    def check() -> None:
        wanted = reference.importance(a.double(), grad.double(), kind=kind, dim=dim, heads=heads)
        torch.testing.assert_close(ours().double(), wanted, rtol=1e-5, atol=1e-5)

    ours: Callable[[], Tensor] = lambda: importance(a, grad, kind=kind, dim=dim, heads=heads)  # noqa: E731
    arrays = 1 if kind == "activation" else 2
    promised = step == 1 and shape[0] == BATCH and dtype in (torch.float32, torch.bfloat16)
    bench.case(
        name,
        ours,
        {"eager": lambda: eager(a, grad, kind, dim, heads)},
        floors={"eager": 1.5 if promised else 1.0},
        check=check,
        moved=arrays * a.numel() * a.element_size(),
        limit="read",
        limit_floor=0.8 if promised else None,
    )


if __name__ == "__main__":
    main()
