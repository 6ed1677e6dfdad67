"""What the tests of the pruned ops share: seeded draws, and the rule that says how exact a kernel has to be."""

import torch

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
BY_NAME = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "f64": torch.float64}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw_index(units, kept, seed=0, dtype=torch.int32):
    """``kept`` of ``units``, ascending."""
    return torch.randperm(units, generator=generator(seed))[:kept].sort().values.to(dtype)


def to(dtype, tensors):
    """Floating tensors in ``dtype``, everything else as it is."""
    return [t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in tensors]


def assert_as_exact_as_torch(ours, op, reference, arguments, options):
    """Error against float64 at most twice that of the same expression in the same dtype, plus
    a rounding of the largest value."""
    exact = reference(
        *to(torch.float64, arguments), **dict(zip(options, to(torch.float64, options.values()), strict=True))
    )
    theirs = reference(*arguments, **options)
    assert ours.dtype == theirs.dtype, op
    assert ours.shape == theirs.shape, op
    if exact.numel() == 0:
        return
    # Where few values are compared, torch's largest error is luck; in float64 `exact` is its own expression.
    units = {torch.float64: 16, torch.float32: 4}.get(ours.dtype, 0.5)
    slack = units * torch.finfo(ours.dtype).eps * max(1.0, exact.abs().max().item())
    error, allowed = ((y.double() - exact).abs().max().item() for y in (ours, theirs))
    assert error <= 2 * allowed + slack, f"{op}: error {error:.3g}, torch's {allowed:.3g}"
