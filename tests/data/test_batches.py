"""From bytes to batches, against plain torch and NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mvp_ext.data.batches import augment, shuffled_indices
from mvp_ext.model.preprocessing import resize, to_batch

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def random_images(count: int, size: int = 6) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [1, 4, 9, 20, 31])
def test_to_batch_against_plain_torch(size):
    x = random_images(5, size=9)
    exact = torch.nn.functional.interpolate(
        x.permute(0, 3, 1, 2).double(), (size, size), mode="bilinear", antialias=size < 9
    )
    resized = resize(x, size)
    assert resized.dtype == torch.uint8
    assert resized.is_contiguous()
    # Half a byte of rounding, and fixed-point weights.
    assert (resized.permute(0, 3, 1, 2) - exact).abs().max() <= 1
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
    expected = (resized.permute(0, 3, 1, 2).double() / 255 - mean) / std
    for channels_last in (True, False):
        got = to_batch(x, size, MEAN, STD, channels_last=channels_last)
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-6)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert got.is_contiguous(memory_format=layout)


def test_to_batch_takes_slices_and_nothing():
    x = random_images(8, size=9)
    part = x[1::2, 2:8, 1:7]
    assert torch.equal(to_batch(part, 6, MEAN, STD), to_batch(part.contiguous(), 6, MEAN, STD))
    assert torch.equal(to_batch(part, 4, MEAN, STD), to_batch(part.contiguous(), 4, MEAN, STD))
    assert to_batch(x[:0], 9, MEAN, STD).shape == (0, 3, 9, 9)


@pytest.mark.parametrize(
    ("x", "size"), [(torch.zeros(2, 4, 4, 3), 4), (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), 4), (None, 0)]
)
def test_to_batch_errors(x, size):
    x = torch.zeros(2, 4, 4, 3, dtype=torch.uint8) if x is None else x
    with pytest.raises(ValueError, match="to_batch"):
        to_batch(x, size, MEAN, STD)


def test_augment_is_a_crop_of_the_padded_image_maybe_mirrored():
    x = random_images(40, size=7)
    got = augment(x, torch.Generator().manual_seed(0), pad=2, flip=True)
    padded = np.pad(x.numpy(), ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    mirrored = set()
    for image, source in zip(got.numpy(), padded, strict=True):
        found = [
            (row, column, mirror)
            for row in range(5)
            for column in range(5)
            for mirror in (False, True)
            if np.array_equal(image[:, ::-1] if mirror else image, source[row : row + 7, column : column + 7])
        ]
        assert len(found) == 1
        mirrored.add(found[0])
    assert {mirror for *_, mirror in mirrored} == {False, True}
    assert {row for row, *_ in mirrored} == {column for _, column, _ in mirrored} == set(range(5))


def test_augment_is_seeded_and_can_be_off():
    x = random_images(8)
    first, second = (augment(x, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, augment(x, torch.Generator().manual_seed(2)))
    assert torch.equal(augment(x, torch.Generator().manual_seed(1), pad=0, flip=False), x)
    with pytest.raises(ValueError, match=r"pad must be in \[0, 6\)"):
        augment(x, torch.Generator(), pad=6)


def test_shuffled_indices_are_whole_epochs():
    batches = list(shuffled_indices(count=7, batch_size=3, steps=7, seed=0))
    assert all(len(batch) == 3 for batch in batches)
    stream = torch.cat(batches)
    for epoch in range(3):
        assert sorted(stream[7 * epoch : 7 * epoch + 7].tolist()) == list(range(7))
    assert len(next(shuffled_indices(count=2, batch_size=5, steps=1, seed=0))) == 5
    with pytest.raises(ValueError, match="got 0, 3"):
        next(shuffled_indices(0, 3, 1, 0))
