"""How an image becomes a model's input: the one description of it, and what does it.

The same for training, for measuring, for a file's ``predict`` and, in the graph, for exported models.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mvp_ext.model.ends import built_for


@dataclass(frozen=True)
class Preprocessing:
    """How images become the model's input: bilinear resize to ``size`` × ``size``, then (image/255 − mean) / std.

    An image that is not square is cropped to its centre first.

    Attributes:
        size: side of the input in pixels.
        mean: per channel, of images in 0..1.
        std: likewise, above 0.

    Raises:
        ValueError: a size below 1, or no three finite numbers.
    """

    size: int
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        numbers = (*self.mean, *self.std)
        sound = len(self.mean) == len(self.std) == 3 and all(map(math.isfinite, numbers))
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1 or not sound:
            raise ValueError(
                f"Preprocessing: expected size ≥ 1, 3 means, 3 std, got {self.size}, {self.mean}, {self.std}"
            )
        if min(self.std) <= 0:
            raise ValueError(f"Preprocessing: std: expected numbers above 0, got {self.std}")

    @classmethod
    def of(cls, model: nn.Module) -> Preprocessing:
        """As timm declares it in ``pretrained_cfg``, for the size that the model was built for, if it was for one."""
        config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
        size, _ = built_for(model) or tuple(config.get("input_size", (3, 224, 224)))[-2:]
        return cls(int(size), tuple(config.get("mean", cls.mean)), tuple(config.get("std", cls.std)))

    def declare(self, model: nn.Module, class_names: Sequence[str] = ()) -> None:
        """Write this into ``model.pretrained_cfg``, so that ``timm.data.resolve_data_config`` gives it.

        Args:
            model: a timm model; only the dictionary that describes it is replaced.
            class_names: of its outputs, in order.
        """
        config = dict(getattr(model, "pretrained_cfg", None) or {})
        config |= {
            "input_size": (3, self.size, self.size),
            "mean": tuple(self.mean),
            "std": tuple(self.std),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "center",
        }
        # Of the weights that it came from, at other sizes.
        for name in ("test_input_size", "test_crop_pct", "min_input_size"):
            config.pop(name, None)
        if class_names:
            config |= {"num_classes": len(class_names), "label_names": tuple(class_names)}
        model.pretrained_cfg = model.default_cfg = config  # type: ignore[assignment]

    def batch(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] → float32 [B, 3, size, size]: what ``to_batch`` does."""
        return to_batch(images, self.size, self.mean, self.std)

    def bytes_of(self, image: Any) -> Tensor:
        """One image as a path, a Pillow image or an array → uint8 [size, size, 3].

        Args:
            image: anything that Pillow reads (turned as its EXIF says, transparency over white), or uint8 [H, W(, 3)].

        Raises:
            ValueError: an array of another kind. OSError: no image.
        """
        from PIL import Image

        if isinstance(image, (str, os.PathLike)):
            with Image.open(image) as opened:
                return torch.from_numpy(square_rgb(opened, self.size).copy())
        if isinstance(image, (Tensor, np.ndarray)):
            array = image.cpu().numpy() if isinstance(image, Tensor) else image
            if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (1,), (3,)):
                raise ValueError(
                    f"image: expected a path, a Pillow image or uint8 [H, W, 3], got {array.dtype} {list(array.shape)}"
                )
            image = Image.fromarray(array.squeeze(2) if array.shape[2:] == (1,) else array)
        return torch.from_numpy(square_rgb(image, self.size).copy())

    def __call__(self, image: Any) -> Tensor:
        """One image → float32 [3, size, size]: a transform for a data set. ``image`` as of ``bytes_of``."""
        return self.batch(self.bytes_of(image)[None])[0]

    def to_dict(self) -> dict[str, Any]:
        """JSON values; ``from_dict`` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Preprocessing:
        """The inverse of ``to_dict``; ValueError where something is missing or of another kind."""
        try:
            return cls(data["size"], tuple(map(float, data["mean"])), tuple(map(float, data["std"])))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"Preprocessing.from_dict: not a description of preprocessing ({error!r})"
            ) from error


def square_rgb(image: Any, size: int) -> np.ndarray:
    """A Pillow image, turned as its EXIF says, its centre as uint8 [size, size, 3], RGB."""
    from PIL import Image, ImageOps

    rgb = _to_rgb(ImageOps.exif_transpose(image))
    if rgb.size != (size, size):
        rgb = ImageOps.fit(rgb, (size, size), Image.Resampling.BILINEAR)
    return np.asarray(rgb)


def _to_rgb(image: Any) -> Any:
    from PIL import Image

    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save the image with 8 or 16 bits")
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16-bit grey at 255, which turns most of such an image white.
        grey = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray(np.rint(grey).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        # Dropping alpha would show whatever colour hides under it, usually black on black for drawings.
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def resize(images: Tensor, size: int) -> Tensor:
    """Resize to squares: bilinear, with antialiasing where it shrinks, rounded to bytes as image libraries do.

    Args:
        images: uint8 [B, H, W, C].
        size: side of the result in pixels.

    Returns:
        uint8 [B, size, size, C], contiguous; ``images`` itself where the size is right already.
    """
    if tuple(images.shape[1:3]) == (size, size):
        return images.contiguous()
    # A view of NHWC memory: to torch, this is channels_last.
    pixels = images.permute(0, 3, 1, 2)
    shrinks = size < min(pixels.shape[2:])
    # On the CPU torch interpolates bytes by integer arithmetic, ten times as fast as floats; elsewhere it cannot.
    source = pixels if images.device.type == "cpu" else pixels.float()
    resized = functional.interpolate(source, (size, size), mode="bilinear", antialias=shrinks)
    if resized.is_floating_point():
        resized = resized.round_().clamp_(0, 255).to(torch.uint8)
    return resized.permute(0, 2, 3, 1).contiguous()


def to_batch(
    images: Tensor,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    channels_last: bool = True,
) -> Tensor:
    """uint8 images → normalised float batch: (resize(images) / 255 − mean) / std.

    Args:
        images: uint8 [B, H, W, 3], on any device.
        size: side of the square the model takes.
        mean: per channel, of images in 0..1.
        std: likewise.
        channels_last: memory format of the result (the layout that convolutions are fastest in).

    Returns:
        float32 [B, 3, size, size] on the images' device.

    Raises:
        ValueError: ``images`` are not uint8 [B, H, W, 3], ``size`` < 1, or ``mean`` and ``std`` are not three numbers
            (``std`` above 0).
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(
            f"to_batch: images must be uint8 [B, H, W, 3], got {images.dtype} {list(images.shape)}"
        )
    if size < 1 or len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"to_batch: expected size ≥ 1, 3 means, 3 std > 0, got {size}, {mean}, {std}")
    factors = [[1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]]
    # Rows of pixels, not pixels, are broadcast over: an inner dimension of 3 would be several times slower.
    scale, shift = torch.tensor(factors, device=images.device).repeat(1, size)
    rows = resize(images, size).view(-1, size * 3).float().mul_(scale).add_(shift)
    batch = rows.view(-1, size, size, 3).permute(0, 3, 1, 2)
    return batch if channels_last else batch.contiguous()
