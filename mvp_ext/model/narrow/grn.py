"""Global response normalisation (ConvNeXt V2) with fewer channels than it was made for."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class GlobalResponseNorm(nn.Module):
    """timm's GlobalResponseNorm as if the channels that were removed were still there, and zero.

    Each channel's norm over all positions is divided by the mean of these norms over the channels. A removed channel
    has norm zero, so the sum stays, and it is divided by the first number of channels.

    Args:
        grn: of timm, or one of these: the number of channels is then the first one's.
    """

    def __init__(self, grn: Any) -> None:
        super().__init__()
        self.weight, self.bias = grn.weight, grn.bias
        self.eps, self.spatial_dim, self.channel_dim = grn.eps, grn.spatial_dim, grn.channel_dim
        self.wb_shape = grn.wb_shape
        self.channels: int = getattr(grn, "channels", grn.weight.numel())
        self.training = grn.training

    def forward(self, x: Tensor) -> Tensor:
        """x: float, channels in ``channel_dim`` → the same shape."""
        norms = x.norm(p=2, dim=self.spatial_dim, keepdim=True)
        mean = norms.sum(dim=self.channel_dim, keepdim=True) / self.channels
        scaled = x * (norms / (mean + self.eps))
        return x + (self.bias.view(self.wb_shape) + self.weight.view(self.wb_shape) * scaled)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()} of {self.channels} channels"
