"""What is exported: torch's own ops alone, the same function, images resized as Pillow does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import small_model
from tiny import tiny_images

from mvp_ext.deploy.graph import See, deployable
from mvp_ext.model.card import ModelCard
from mvp_ext.model.preprocessing import Preprocessing
from mvp_ext.model.scatter_block import ScatterBlock

pytestmark = pytest.mark.usefixtures("one_thread")


def photo(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """uint8 [height, width, 3]: large shapes with sharp edges, and some noise."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (5, 7, 3)).astype(np.uint8)
    large = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST))
    return torch.from_numpy(
        (large.astype(int) + random.integers(-9, 10, large.shape)).clip(0, 255).astype(np.uint8)
    )


@pytest.mark.parametrize(
    ("height", "width"),
    [(32, 32), (64, 64), (33, 32), (20, 21), (7, 50), (200, 131), (131, 200), (1, 1), (32, 96)],
)
def test_resizes_as_pillow_does(height: int, width: int) -> None:
    """One level of 255 at most, a third of one on average: Pillow rounds, twice."""
    levels = Preprocessing(32, (0, 0, 0), (1 / 255, 1 / 255, 1 / 255))
    image = photo(height, width)
    difference = (See(levels)(image[None])[0] - levels(image)).abs()
    assert float(difference.max()) <= 1.001
    assert float(difference.mean()) <= 0.34


def test_normalises_as_preprocessing_does() -> None:
    see = Preprocessing(32, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    images = torch.stack([photo(32, 32, seed) for seed in range(3)])
    torch.testing.assert_close(See(see)(images), see.batch(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kwargs", [{}, {"act_layer": torch.nn.SiLU}, {"drop_path_rate": 0.5}])
def test_scatter_blocks_become_standard_ops(kwargs: dict[str, object]) -> None:
    small = small_model("test_resnet", "all", **kwargs)
    assert any(isinstance(m, ScatterBlock) for m in small.model.modules())
    graph = deployable(small.model, small.card)
    # The model that was given is as it was.
    assert any(isinstance(m, ScatterBlock) for m in small.model.modules())
    x = tiny_images(small.model)
    with torch.no_grad():
        torch.testing.assert_close(graph(x), small.model(x), rtol=1e-4, atol=1e-4)
        program = torch.export.export(graph, (x,))
    used = {n.target.namespace for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)}
    assert used == {"aten"}


def test_softmax_is_behind() -> None:
    small = small_model("test_resnet", "inner")
    x = tiny_images(small.model)
    with torch.no_grad():
        expected = small.model(x).softmax(1)
        torch.testing.assert_close(deployable(small.model, small.card, softmax=True)(x), expected)


def test_preprocessing_must_be_known() -> None:
    small = small_model("test_resnet", "inner")
    with pytest.raises(ValueError, match="does not say how it sees images"):
        deployable(small.model, ModelCard(), preprocess=True)
