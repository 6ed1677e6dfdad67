"""What is exported: a copy of the model made of torch's own ops alone, with the preprocessing in front if wanted."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from mvp_ext.model.borrowed import unwrapped
from mvp_ext.model.card import ModelCard
from mvp_ext.model.preprocessing import Preprocessing
from mvp_ext.model.scatter_block import ScatterBlock


class Deployable(nn.Module):
    """Images to logits (or probabilities), in eval mode; what a file of any format computes.

    Args:
        model: float [B, C, S, S] → float [B, k].
        see: makes the model's input of what comes in; None: it comes as the model takes it.
        softmax: put one after the model.
    """

    def __init__(self, model: nn.Module, see: nn.Module | None, softmax: bool) -> None:
        super().__init__()
        self.see, self.model, self.softmax = see, model, softmax

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] where the preprocessing is in front, else float32 [B, C, S, S] → float32 [B, k]."""
        x = images if self.see is None else self.see(images)
        dtype = next(self.model.parameters()).dtype
        y = self.model(x.to(dtype)).float()
        return y.softmax(1) if self.softmax else y


class See(nn.Module):
    """``Preprocessing`` as a part of the graph: uint8 [B, H, W, 3] of any H and W → float32 [B, 3, S, S].

    The centre square is resized as Pillow does it (bilinear, antialiased where it shrinks), but not rounded to bytes: a
    pixel differs by one of 255 at most, and where the size is right already by nothing. The two passes are products
    with matrices of a triangle's weights: of torch's antialiased resize, formats have none for any size.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.size = preprocessing.size
        mean, std = (torch.tensor(x).reshape(1, 3, 1, 1) for x in (preprocessing.mean, preprocessing.std))
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[1:3]
        side = torch.minimum(_number(height), _number(width))
        # NHWC as it lies in memory: [S, H] @ [B, H, 3 W].
        rows = self._weights(height, side) @ images.float().flatten(2)
        squares = rows.unflatten(2, (width, 3)).permute(0, 3, 1, 2) @ self._weights(width, side).T
        return squares * self.scale + self.shift

    def _weights(self, length: int, side: Tensor) -> Tensor:
        """float32 [S, length], rows sum to 1: how much of each pixel of a row (or column) goes into each of S."""
        step = side / self.size
        first = (_number(length) - side) / 2
        centres = first + (torch.arange(self.size, dtype=torch.float32) + 0.5) * step
        pixels = torch.arange(length, dtype=torch.float32) + 0.5
        distances = (pixels[None] - centres[:, None]).abs()
        weights = (1 - distances / step.clamp(min=1.0)).clamp(min=0.0)
        return weights / weights.sum(1, keepdim=True)


def _number(size: int) -> Tensor:
    """A size, which is a symbol while exporting, as a tensor."""
    return torch.full((), size, dtype=torch.float32)


def deployable(
    model: nn.Module, card: ModelCard, *, preprocess: bool = False, softmax: bool = False
) -> Deployable:
    """A copy of ``model`` for export: eval mode, float32, on the CPU, torch's own ops alone.

    Args:
        model: a small model; it is not changed.
        card: the model's.
        preprocess: put the card's preprocessing in front; the input is then uint8 [B, H, W, 3].
        softmax: put a softmax behind.

    Raises:
        ValueError: ``preprocess`` where the card does not say how the model sees images.
    """
    see = See(card.need_preprocessing("export: preprocess")) if preprocess else None
    network = standard_blocks(copy.deepcopy(unwrapped(model)).cpu().float())
    return Deployable(network, see, softmax).eval().requires_grad_(False)


def standard_blocks(model: nn.Module) -> nn.Module:
    """``model`` with a module of standard ops in place of each ScatterBlock, whose op is this package's own.

    The modules compute the same in eval mode; ``model`` itself is changed. What a block records of itself would compute
    its selection in the graph, by a handful of operators; here it is a constant.
    """
    if isinstance(model, ScatterBlock):
        return _StandardBlock(model)
    for name, child in model.named_children():
        setattr(model, name, standard_blocks(child))
    return model


class _StandardBlock(nn.Module):
    """act(shortcut + y scattered into the stream), the scatter as a selection out of y and one channel of zeros."""

    source: Tensor

    def __init__(self, block: ScatterBlock) -> None:
        super().__init__()
        parts = dict(block.named_children())
        last = 3 if "conv3" in parts else 2
        names = list(parts)
        self.branch = nn.Sequential(*(parts[name] for name in names[: names.index(f"bn{last}") + 1]))
        self.shortcut = parts.get("downsample", nn.Identity())
        self.act = parts[f"act{last}"]
        # Of each of the stream's channels; the channel of zeros comes after the kept ones.
        kept = block.kept.numel()
        source = torch.full((_stream_channels(parts),), kept, dtype=torch.int64)
        source[block.kept] = torch.arange(kept)
        self.register_buffer("source", source)

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        # Not a pad: OpenVINO 2026.4 crashes where one follows a quantised convolution.
        y = torch.cat([y, torch.zeros_like(y[:, :1])], 1)
        return self.act(self.shortcut(x) + y.index_select(1, self.source))


def _stream_channels(parts: dict[str, nn.Module]) -> int:
    """Of the residual stream, at the end of a block of these parts."""
    if "downsample" not in parts:
        return int(parts["conv1"].in_channels)  # type: ignore[arg-type]
    convolutions = [m for m in parts["downsample"].modules() if isinstance(m, nn.Conv2d)]
    return convolutions[-1].out_channels
