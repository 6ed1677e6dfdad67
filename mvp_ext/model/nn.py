"""The one module that a pruned model may hold beside timm's own: a residual block whose last convolution is
narrower than the stream it adds to (scope `all`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

_BASIC = ("conv1", "bn1", "drop_block", "act1", "aa", "conv2")
_BOTTLENECK = ("conv1", "bn1", "act1", "conv2", "bn2", "drop_block", "act2", "aa", "conv3")


class ScatterBlock(nn.Module):
    """A timm BasicBlock or Bottleneck whose last convolution keeps only some channels of the residual stream.

        act(shortcut + scatter(bn(conv(…)), kept))

    It takes over the block's modules under their own names, so the names in the state dict stay as they are;
    added is the buffer ``kept``, int64 [K]: the channels of the stream that the last convolution's K filters
    are added to.

    Args:
        block: the block to take over; its last convolution and norm have K channels already, or get them
            after.
        kept: int64 [K], ascending channels of the residual stream.
    """

    kept: Tensor

    def __init__(self, block: nn.Module, kept: Tensor) -> None:
        super().__init__()
        for name, child in block._modules.items():  # absent parts (downsample, se, drop_path) stay as None
            self.add_module(name, child)
        for name in ("se", "drop_path", "downsample"):
            if name not in self._modules:
                self.add_module(name, None)
        last = 3 if "conv3" in self._modules else 2
        self._branch = tuple(name for name in (_BOTTLENECK if last == 3 else _BASIC) if name in self._modules)
        self._norm, self._act = f"bn{last}", f"act{last}"
        self.register_buffer("kept", kept)
        self.train(block.training)

    def forward(self, x: Tensor) -> Tensor:
        """x: float [B, C_in, h, w] → float [B, C, h', w']."""
        y = x
        for name in self._branch:
            y = self._modules[name](y)  # type: ignore[misc]
        downsample, drop_path = self._modules["downsample"], self._modules["drop_path"]
        norm: Any = self._modules[self._norm]
        act: Any = self._modules[self._act]
        shortcut = x if downsample is None else downsample(x)
        y = norm(y)
        if drop_path is not None:
            y = drop_path(y)
        return act(shortcut.index_add(1, self.kept, y.to(shortcut.dtype)))

    def extra_repr(self) -> str:
        return f"kept={self.kept.numel()}"
