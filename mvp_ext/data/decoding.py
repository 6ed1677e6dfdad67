"""From image files to pixels: the one place where files are decoded, each once, straight to where its pixels stay."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mvp_ext.data.errors import DataError
from mvp_ext.model.preprocessing import square_rgb

# Beyond this, stored squares cost memory (150 kB an image) that the models' usual input size cannot use.
LARGEST_DEFAULT_SIZE = 224


def default_size(files: Sequence[Path]) -> int:
    """The median of the shorter sides, at most ``LARGEST_DEFAULT_SIZE``, in pixels; of their headers alone."""
    from PIL import Image

    def shorter_side(path: Path) -> int:
        try:
            with Image.open(path) as image:
                return min(image.size)
        # Pillow's decoders raise almost anything on damaged bytes; decode_images names them.
        except Exception:
            return 0

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        sides = [side for side in pool.map(shorter_side, files) if side > 0]
    return min(int(np.median(sides)) if sides else 1, LARGEST_DEFAULT_SIZE)


def decode_images(
    files: Sequence[Path], pixels: np.ndarray, rows: np.ndarray, decoded: Callable[[int], None] | None = None
) -> dict[Path, str]:
    """Decode each file once, as ``square_rgb``: file i to ``pixels[rows[i]]``.

    Args:
        files: n images.
        pixels: uint8 [N, S, S, 3], written to.
        rows: int64 [n], all different.
        decoded: called with the number of files that are done, after each.

    Returns:
        The files that do not decode, with the reasons: for ``check_decoded``.
    """
    from PIL import Image

    size = pixels.shape[1]
    bad: dict[Path, str] = {}

    def decode(number: int) -> None:
        try:
            with Image.open(files[number]) as image:
                pixels[rows[number]] = square_rgb(image, size)
        # As above.
        except Exception as error:
            bad[files[number]] = " ".join(str(error).split()) or type(error).__name__

    # Pillow decodes and resizes without Python's lock.
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for done, _ in enumerate(pool.map(decode, range(len(files))), 1):
            if decoded is not None:
                decoded(done)
    return bad


def check_decoded(bad: Mapping[Path, str], count: int) -> None:
    """DataError where some of ``count`` files do not decode; it counts them and names the first ten."""
    if bad:
        listed = "; ".join(f"{path}: {reason}" for path, reason in sorted(bad.items())[:10])
        more = f"; and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise DataError(f"{len(bad)} of {count} image(s) do not decode, nothing was loaded: {listed}{more}")
