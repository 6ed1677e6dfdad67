"""importance against the eager expression and against the bandwidth over the same bytes.

On a CPU: resnet18's and deit_small's activations at batch 32, against torch.dot. On a GPU: resnet50's and deit_small's
at batch 256 in bfloat16, kind taylor, against a copy.
"""

from __future__ import annotations

import torch
from harness import Bench
from torch import Tensor

from mvp_ext.ops import importance, reference

# channels and side of a square image
RESNET18 = {
    "stem": (64, 112),
    "layer1": (64, 56),
    "layer2": (128, 28),
    "layer3": (256, 14),
    "layer4": (512, 7),
}
# width and heads
DEIT_SMALL = {"heads": (384, 6), "MLP": (1536, None)}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


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
    (gpu_cases if bench.gpu else cpu_cases)(bench)
    bench.finish()


def cpu_cases(bench: Bench) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for layer, (channels, size) in RESNET18.items():
            for layout in LAYOUTS:
                shape = (32, channels, size, size)
                add_case(bench, f"resnet18 {layer}, {layout}, {name}", shape, dtype, layout=layout)
        for layer, (width, heads) in DEIT_SMALL.items():
            add_case(bench, f"deit_small {layer}, {name}", (32, 197, width), dtype, dim=2, heads=heads)
    layer1 = (32, 64, 56, 56)
    for kind in ("taylor2", "activation"):
        add_case(bench, f"resnet18 layer1, NCHW, float32, {kind}", layer1, torch.float32, kind=kind)
    for name, shape, dtype, step in (
        ("resnet18 layer1, batch 1, NCHW, float32", (1, 64, 56, 56), torch.float32, 1),
        ("resnet18 layer4, batch 1, NCHW, float32", (1, 512, 7, 7), torch.float32, 1),
        ("resnet18 layer1, NCHW, float16", layer1, torch.float16, 1),
        ("resnet18 layer1, every second column, float32", layer1, torch.float32, 2),
    ):
        add_case(bench, name, shape, dtype, step=step, promised=False)


def gpu_cases(bench: Bench) -> None:
    bf16 = torch.bfloat16
    for channels, side in RESNET18.values():
        for layout in LAYOUTS:
            shape = (256, channels, side, side)
            add_case(bench, f"{layout} {shape}", shape, bf16, layout=layout)
    for layer, (width, heads) in DEIT_SMALL.items():
        shape = (256, 197, width)
        add_case(bench, f"deit_small {layer} {shape}", shape, bf16, dim=2, heads=heads)
    add_case(bench, "NCHW (256, 128, 28, 28), float32", (256, 128, 28, 28), torch.float32)
    add_case(bench, "batch 1: NCHW (1, 64, 56, 56)", (1, 64, 56, 56), bf16, promised=False)
    add_case(bench, "batch 32: NCHW (32, 512, 7, 7)", (32, 512, 7, 7), bf16, promised=False)


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
    promised: bool = True,
) -> None:
    if not bench.wants(name):
        return
    shape = tuple(n if d == dim else bench.size(n) for d, n in enumerate(shape))
    a, grad = (torch.randn(shape, device=bench.device).to(dtype)[..., ::step] for _ in range(2))
    if layout == "channels_last":
        a, grad = (x.contiguous(memory_format=LAYOUTS[layout]) for x in (a, grad))

    def ours() -> Tensor:
        return importance(a, grad, kind=kind, dim=dim, heads=heads)

    def check() -> None:
        exact = reference.importance(a.double(), grad.double(), kind=kind, dim=dim, heads=heads)
        # A GPU's cases add up more terms.
        rtol, atol = (1e-4, 1e-3) if bench.gpu else (1e-5, 1e-5)
        torch.testing.assert_close(ours().double(), exact, rtol=rtol, atol=atol)

    if bench.gpu:
        floors = {"eager": 3.0, "torch.compile": 1.2} if promised else {}
        limit, limit_floor = "copy", 0.85
    else:
        floors = {"eager": 1.5 if promised else 1.0}
        limit, limit_floor = "read", 0.8
    arrays = 1 if kind == "activation" else 2
    bench.case(
        name,
        ours,
        {
            "eager": lambda: eager(a, grad, kind, dim, heads),
            "torch.compile": bench.compiled(eager, a, grad, kind, dim, heads),
            "ours, CUDA graph": bench.graphed(ours),
        },
        floors=floors,
        check=check,
        moved=arrays * a.numel() * a.element_size(),
        limit=limit,
        limit_floor=limit_floor if promised else None,
    )


if __name__ == "__main__":
    main()
