"""Counter-based Gumbel noise in plain torch: the twin of ``csrc/include/mvp/philox.h``, bit for bit, on any device.

Unit u of target t takes word u % 4 of Philox4x32-10 with counter (u // 4, t, 0, 0) and the seed as its key; so a draw
depends on nothing but (seed, t, u): not on threads, on the device, or on what else is drawn with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_SQRT_HALF_BITS = 0x3F3504F3
_LN2_HIGH, _LN2_LOW = 0.693359375, -0.00021219444170128554
# log(1 + f) = f - f²/2 + f³·P(f); the coefficients of P, highest power first (float32 values, written exactly).
_LOG_COEFFICIENTS = (
    -0.08101558685302734,
    0.12712307274341583,
    -0.12972238659858704,
    0.14202174544334412,
    -0.16642247140407562,
    0.20001468062400818,
    -0.25000298023223877,
    0.333333283662796,
)


def gumbel_noise(
    units: int, *, seed: int, targets: int | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Standard Gumbel noise, float32 [U], or [T, U] where ``targets`` is given; between −2.9 and 16.7."""
    blocks = torch.arange((units + 3) // 4, dtype=torch.int64, device=device)
    streams = torch.arange(1 if targets is None else targets, dtype=torch.int64, device=device)[:, None]
    words = torch.stack(philox4x32(blocks, streams, seed), dim=-1).flatten(-2)[:, :units]  # [T, U]
    uniform = ((words >> 9).to(torch.float32) + 0.5) * 2.0**-23
    noise = -portable_log(-portable_log(uniform))
    return noise[0] if targets is None else noise


def philox4x32(block: Tensor, stream: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words of Philox4x32-10 (Salmon et al., SC 2011) as int64 tensors; block and stream broadcast."""
    block, stream = torch.broadcast_tensors(block, stream)
    c0, c1, c2, c3 = block, stream, torch.zeros_like(block), torch.zeros_like(block)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def portable_log(x: Tensor) -> Tensor:
    """Natural logarithm of positive normal float32 within 1.1 ulp, one rounded multiplication or addition at a time."""
    bits = x.view(torch.int32)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    e = exponent.to(torch.float32)
    p = torch.full_like(f, _LOG_COEFFICIENTS[0])
    for coefficient in _LOG_COEFFICIENTS[1:]:
        p = p * f + coefficient
    square = f * f
    return (((f * square) * p + e * _LN2_LOW) + square * -0.5 + f) + e * _LN2_HIGH


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low half of the 64-bit product of 32-bit numbers (int64 wraps modulo 2⁶⁴, which keeps all its bits)."""
    product = a * b
    return (product >> 32) & _LOW, product & _LOW
