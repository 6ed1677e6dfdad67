"""The one module that a pruned model may hold beside timm's own: a residual block whose last convolution is narrower
than the stream it adds to (scope `all`)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from mvp_ext.ops import residual_add

_BASIC = ("conv1", "bn1", "drop_block", "act1", "aa", "conv2")
_BOTTLENECK = ("conv1", "bn1", "act1", "conv2", "bn2", "drop_block", "act2", "aa", "conv3")


class ScatterBlock(nn.Module):
    """A timm BasicBlock or Bottleneck whose last convolution keeps only some channels of the residual stream.

        act(shortcut + scatter(bn(conv(…)), kept))

    It takes over the block's modules under their own names, so the names in the state dict stay as they are; added is
    the buffer ``kept``, int64 [K]: the channels of the stream that the last convolution's K filters are added to. In
    eval mode the norm, the scatter, the addition and a ReLU are one pass over the stream.

    Args:
        block: the block to take over; its last convolution and norm have K channels already, or get them after.
        kept: int64 [K], ascending channels of the residual stream.
    """

    kept: Tensor

    def __init__(self, block: nn.Module, kept: Tensor) -> None:
        super().__init__()
        for name, child in block._modules.items():
            self.add_module(name, child)
        # What the block does not have stays as None.
        for name in ("se", "drop_path", "downsample"):
            if name not in self._modules:
                self.add_module(name, None)
        last = 3 if "conv3" in self._modules else 2
        self._branch = tuple(name for name in (_BOTTLENECK if last == 3 else _BASIC) if name in self._modules)
        self._norm, self._act = f"bn{last}", f"act{last}"
        self.register_buffer("kept", kept)
        # Not train(): the parts keep the modes they are in.
        self.training = block.training

    def forward(self, x: Tensor) -> Tensor:
        """x: float [B, C_in, h, w] → float [B, C, h', w']."""
        y = x
        for name in self._branch:
            y = self._modules[name](y)  # type: ignore[misc]
        downsample, drop_path = self._modules["downsample"], self._modules["drop_path"]
        norm: Any = self._modules[self._norm]
        act: Any = self._modules[self._act]
        shortcut = x if downsample is None else downsample(x)
        scale = shift = None
        if _is_affine_now(norm) and (drop_path is None or not drop_path.training):
            scale, shift = _affine(norm)
        else:
            y = norm(y)
            if drop_path is not None:
                y = drop_path(y)
        relu = type(act) is nn.ReLU
        activation: Literal["relu"] | None = "relu" if relu else None
        y = residual_add(
            shortcut, y.to(shortcut.dtype), self.kept, scale=scale, shift=shift, activation=activation
        )
        return y if relu else act(y)

    def extra_repr(self) -> str:
        return f"kept={self.kept.numel()}"


def _is_affine_now(norm: nn.Module) -> bool:
    """Whether the norm is y · scale + shift with constants, and no hook reads what comes out of it."""
    has_constants = type(norm) is nn.BatchNorm2d and norm.running_var is not None and not norm.training
    return has_constants and not norm._forward_hooks and not norm._forward_pre_hooks


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """scale and shift, float [K] each, of a batch norm in eval mode."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias
