"""The one module that a pruned model may hold beside timm's own: a residual block whose last convolution is narrower
than the stream it adds to (scope `all`)."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from mvp_ext.ops import residual_add

# What a block runs on its way, one after the other.
BASIC = ("conv1", "bn1", "drop_block", "act1", "aa", "conv2")
BOTTLENECK = ("conv1", "bn1", "act1", "conv2", "bn2", "drop_block", "act2", "aa", "conv3")


class ScatterBlock(nn.Module):
    """A timm BasicBlock or Bottleneck whose last convolution keeps only some channels of the residual stream.

        act(shortcut + scatter(bn(conv(…)), kept))

    It takes over the block's modules under their own names, so the names in the state dict stay as they are; added is
    the buffer ``kept``, int64 [K]: the channels of the stream that the last convolution's K filters are added to. In
    eval mode the norm, the scatter, the addition and a ReLU are one pass over the stream. What records the block
    (torch.jit, torch.fx, torch.export) sees torch's own ops alone.

    Args:
        block: the block to take over; its last convolution and norm have K channels already, or get them after.
        kept: int64 [K], ascending channels of the residual stream.
    """

    kept: Tensor

    def __init__(self, block: nn.Module, kept: Tensor) -> None:
        super().__init__()
        for name, child in block._modules.items():
            self.add_module(name, child)
        # What the block does not have stays as None; a BasicBlock has no third convolution.
        for name in ("se", "drop_path", "downsample", "conv3"):
            if name not in self._modules:
                self.add_module(name, None)
        basic = self._modules["conv3"] is None
        self._branch = BASIC if basic else BOTTLENECK
        self._norm, self._act = ("bn2", "act2") if basic else ("bn3", "act3")
        self.register_buffer("kept", kept)
        # Not train(): the parts keep the modes they are in.
        self.training = block.training

    def forward(self, x: Tensor) -> Tensor:
        """x: float [B, C_in, h, w] → float [B, C, h', w']."""
        if torch.jit.is_scripting():
            return self._by_torch(x)
        else:
            # TorchScript leaves out an else, and nothing after it.
            return self._by_torch(x) if _is_recorded(x) else self._fused(x)

    def _fused(self, x: Tensor) -> Tensor:
        """In few passes; a part is looked up in the dictionary, for a look at an attribute takes ten times as long."""
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

    # TorchScript compiles this: no loop over names, and Any, as it knows no annotation of a part.
    def _by_torch(self: Any, x: Tensor) -> Tensor:
        """The same with torch's ops: each channel of the stream selects its own of y, or one of zeros in front."""
        y = self.bn1(self.conv1(x))
        if self.conv3 is None:
            y = self.bn2(self.conv2(self.aa(self.act1(self.drop_block(y)))))
        else:
            y = self.bn2(self.conv2(self.act1(y)))
            y = self.bn3(self.conv3(self.aa(self.act2(self.drop_block(y)))))
        if self.drop_path is not None:
            y = self.drop_path(y)
        shortcut = x
        if self.downsample is not None:
            shortcut = self.downsample(x)
        is_kept = self.kept.new_zeros((shortcut.shape[1],)).index_fill(0, self.kept, 1)
        source = is_kept * is_kept.cumsum(0)
        y = nn.functional.pad(y.to(shortcut.dtype), (0, 0, 0, 0, 1, 0))
        y = shortcut + y.index_select(1, source)
        if self.conv3 is None:
            return self.act2(y)
        else:
            return self.act3(y)

    def extra_repr(self) -> str:
        return f"kept={self.kept.numel()}"


def _is_recorded(x: Tensor) -> bool:
    """Whether a graph is made of the calls that may run without this package (torch.compile's runs here)."""
    # torch < 2.7 does not tell an export from a compilation.
    exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
    return isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing() or exporting()


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
