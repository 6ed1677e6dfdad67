"""Global response normalisation (ConvNeXt V2) with fewer channels than it was made for."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mvp_ext.model.narrow.taken import Taken


class NarrowGlobalResponseNorm(Taken):
    """timm's GlobalResponseNorm as if the channels that were removed were still there, and zero.

    Each channel's norm over all positions is divided by the mean of these norms over the channels. A removed channel
    has norm zero, so the sum stays, and it is divided by the first number of channels.
    """

    def __init__(self, grn: Any) -> None:
        super().__init__(grn)
        self.channels: int = grn.weight.numel()

    def forward(self: Any, x: Tensor) -> Tensor:
        """x: float, channels in ``channel_dim`` → the same shape."""
        norms = x.norm(p=2, dim=self.spatial_dim, keepdim=True)
        mean = norms.sum(dim=self.channel_dim, keepdim=True) / self.channels
        scaled = x * (norms / (mean + self.eps))
        return x + (self.bias.view(self.wb_shape) + self.weight.view(self.wb_shape) * scaled)

    def extra_repr(self: Any) -> str:
        return f"{Taken.extra_repr(self)}, {self.weight.numel()} of {self.channels} channels"
