"""From images of any kind to names and probabilities."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mvp_ext.model.card import ModelCard
from mvp_ext.model.prediction import predict
from mvp_ext.model.preprocessing import Preprocessing

SEEN = Preprocessing(8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
CARD = ModelCard(SEEN, ("dark", "grey", "bright"))


def by_brightness(batch: torch.Tensor) -> torch.Tensor:
    """Logits [B, 3]: nearest of three levels."""
    return -20 * (batch.mean((1, 2, 3))[:, None] - torch.tensor([0.0, 0.5, 1.0])).square()


def flat(level: int, side: int = 8) -> np.ndarray:
    return np.full((side, side, 3), level, np.uint8)


def test_kinds_and_batches_agree(tmp_path: Path) -> None:
    levels = [0, 255, 128, 10, 240]
    arrays = [flat(level) for level in levels]
    whole = predict(by_brightness, torch.from_numpy(np.stack(arrays)), CARD)
    assert whole.labels == ["dark", "bright", "grey", "dark", "bright"]
    assert whole.probabilities.shape == (5, 3)
    torch.testing.assert_close(whole.probabilities.sum(1), torch.ones(5))
    paths = []
    for number, array in enumerate(arrays):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(array).save(paths[-1])
    for images in (arrays, paths, map(str, paths), [Image.fromarray(a) for a in arrays]):
        assert torch.equal(predict(by_brightness, images, CARD, batch=2).probabilities, whole.probabilities)
    for one in (arrays[1], paths[1], str(paths[1]), Image.fromarray(arrays[1]), torch.from_numpy(arrays[1])):
        assert predict(by_brightness, one, CARD).labels == ["bright"]


def test_top_is_sorted_and_bounded() -> None:
    top = predict(by_brightness, flat(200), CARD).top(2)
    assert [name for name, _ in top[0]] == ["bright", "grey"]
    assert top[0][0][1] > top[0][1][1]
    assert len(predict(by_brightness, flat(200), CARD).top(9)[0]) == 3


def test_nothing_and_nobody_said() -> None:
    assert predict(by_brightness, [], CARD).probabilities.shape == (0, 3)
    assert predict(by_brightness, flat(0), ModelCard(SEEN)).labels == ["0"]
    with pytest.raises(ValueError, match="does not say how it sees images"):
        predict(by_brightness, flat(0), ModelCard())
    with pytest.raises(ValueError, match="batch: expected at least 1"):
        predict(by_brightness, flat(0), CARD, batch=0)


def test_a_card_is_json_and_back() -> None:
    card = ModelCard(
        SEEN, ("a", "ü"), "pets", {"accuracy": 0.5}, {"method": "mvp", "neighbours": [["a", 0.1]]}
    )
    assert ModelCard.from_dict(card.to_dict()) == card
    assert ModelCard.from_dict(ModelCard().to_dict()) == ModelCard()
    good = card.to_dict()
    for change in (
        {"class_names": "ab"},
        {"class_names": [1]},
        {"task": 5},
        {"metrics": {"accuracy": "x"}},
        {"metrics": {"accuracy": float("inf")}},
        {"preprocessing": {"size": -1, "mean": [0, 0, 0], "std": [1, 1, 1]}},
    ):
        with pytest.raises(ValueError, match=r"ModelCard|Preprocessing"):
            ModelCard.from_dict({**good, **change})
    for missing in good:
        with pytest.raises(ValueError, match="ModelCard"):
            ModelCard.from_dict({key: value for key, value in good.items() if key != missing})
