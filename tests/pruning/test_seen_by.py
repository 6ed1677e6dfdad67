"""A zoo brings its preprocessing to whoever uses it; another is an error, and so are weights that are no numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from digits import digits_task
from tiny import tiny_model

from mvp_ext.model import checkpoint
from mvp_ext.model.preprocessing import Preprocessing
from mvp_ext.pruning.build import build_zoo
from mvp_ext.pruning.prune import prune
from mvp_ext.pruning.result import Result
from mvp_ext.train.backbone import Backbone
from mvp_ext.zoo.zoo import Zoo, ZooError

pytestmark = pytest.mark.usefixtures("one_thread")


def small_result(seen: Preprocessing, name: str) -> Result:
    backbone = Backbone(tiny_model("test_resnet").eval(), seen)
    return prune(backbone, digits_task(name=name), method="random", steps=0)


def test_a_zoo_says_how_images_are_seen(tmp_path: Path) -> None:
    seen, other = Preprocessing(32, (0.3,) * 3, (0.35,) * 3), Preprocessing(40, (0.3,) * 3, (0.35,) * 3)
    zoo = Zoo(tmp_path / "zoo")
    assert zoo.preprocessing is None
    zoo.add(small_result(seen, "a"))
    assert Zoo(tmp_path / "zoo").preprocessing == seen
    with pytest.raises(
        ZooError, match=r"its models see images as Preprocessing\(size=32.*the given one as .*size=40"
    ):
        zoo.add(small_result(other, "b"))
    assert [entry.name for entry in zoo] == ["a"]
    # Who says nothing sees as the zoo does; who says something else is told.
    dense = tiny_model("test_resnet").eval()
    result = prune(dense, digits_task(name="c"), zoo, steps=0)
    assert result.preprocessing == seen
    with pytest.raises(ZooError, match="see images"):
        prune(Backbone(dense, other), digits_task(name="c"), zoo, steps=0)
    with pytest.raises(ZooError, match="see images"):
        build_zoo(Backbone(dense, other), [digits_task(name="c")], zoo)
    card = zoo["a"].load().card
    assert (card.preprocessing, card.class_names, card.task) == (seen, ("0", "1", "2"), "a")


def test_weights_that_are_not_finite_stay_out_and_are_found(tmp_path: Path, monkeypatch: Any) -> None:
    zoo = Zoo(tmp_path / "zoo")
    result = small_result(Preprocessing(32), "a")
    result.model.layer1[0].conv1.weight.data[0] = float("inf")  # type: ignore[index, union-attr]
    with pytest.raises(ValueError, match="expected finite numbers"):
        zoo.add(result)
    assert len(zoo) == 0
    assert zoo.verify() == []
    # Older versions took such an entry.
    monkeypatch.setattr(checkpoint, "_check_rebuildable", lambda *a: None)
    zoo.add(result)
    problems = zoo.verify()
    assert [problem.kind for problem in problems] == ["damaged"]
    assert "layer1.0.conv1.weight are not finite" in str(problems[0])
