"""Masks: how scores become masks, and what may be done with them."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.structure import Probe, Structure, UnitLayer
from mvp_ext.storage import FileFormatError


def structure_of(*units: int, kind: str = "filter") -> Structure:
    """Layers a, b, c… with these numbers of units and no tensors."""
    probe = Probe("x", "input", 1)
    layers = (UnitLayer(name, kind, n, (), probe) for name, n in zip("abcdef", units, strict=False))  # type: ignore[arg-type]
    return Structure("resnet", "inner", None, tuple(layers))


def mask_of(**layers: str) -> Mask:
    """mask_of(a="101") keeps units 0 and 2 of layer a."""
    return Mask({name: torch.tensor([c == "1" for c in bits]) for name, bits in layers.items()})


def test_from_scores_keeps_the_highest_and_breaks_ties_by_index() -> None:
    structure = structure_of(6, 4)
    scores = {"b": torch.tensor([1.0, 1.0, 1.0, 1.0]), "a": torch.tensor([0.0, 5.0, -1.0, 5.0, 5.0, 9.0])}
    assert Mask.from_scores(structure, scores, 0.5, align=1) == mask_of(a="010101", b="1100")
    assert Mask.from_scores(structure, scores, [0.2, 1.0], align=1) == mask_of(a="000001", b="1111")
    assert Mask.from_scores(structure, scores, [4, 1], align=8) == mask_of(a="010111", b="1000")


@pytest.mark.parametrize("keep", [0.01, 0.3, 0.5, 0.77, 1.0, np.float32(0.5)])
def test_never_an_empty_layer_and_aligned(keep: float) -> None:
    units = (1, 2, 7, 8, 64, 100)
    for global_, seed in itertools.product((False, True), range(3)):
        structure = structure_of(*units)
        generator = torch.Generator().manual_seed(seed)
        scores = {layer.name: torch.rand(layer.units, generator=generator) for layer in structure}
        kept = list(Mask.from_scores(structure, scores, keep, align=8, global_=global_).kept.values())
        assert all(k == n or (k % 8 == 0 and 0 < k < n) for k, n in zip(kept, units, strict=True)), kept
        kept = list(Mask.from_scores(structure, scores, keep, align=1, global_=global_).kept.values())
        assert all(1 <= k <= n for k, n in zip(kept, units, strict=True))
        if global_:
            assert sum(kept) == max(len(units), int(keep * sum(units) + 0.5))


def test_heads_are_never_aligned() -> None:
    structure = structure_of(6, 12, kind="head")
    assert list(Mask.random(structure, 0.5, seed=0, align=8).kept.values()) == [3, 6]


def test_global_ranking_divides_by_each_layers_norm() -> None:
    structure = structure_of(4, 4)
    scores = {"a": torch.tensor([3e6, 1e6, 0.0, 0.0]), "b": torch.tensor([1.0, 1.0, 1.0, 1.0])}
    # a/‖a‖ = (.95, .32, 0, 0), b/‖b‖ = .5 each: without the norm layer a would take two places
    assert Mask.from_scores(structure, scores, 0.5, align=1, global_=True) == mask_of(a="1000", b="1110")
    scores["a"] = torch.zeros(4)  # a layer without any score still keeps its first unit
    assert Mask.from_scores(structure, scores, 0.25, align=1, global_=True) == mask_of(a="1000", b="1000")


def test_infinite_scores_rank_within_a_layer() -> None:
    scores = {"a": torch.tensor([-torch.inf, 0.0, torch.inf])}
    assert Mask.from_scores(structure_of(3), scores, [2], align=1) == mask_of(a="011")
    with pytest.raises(ValueError, match="'a': an infinite score cannot be compared across layers"):
        Mask.from_scores(structure_of(3), scores, 0.5, global_=True)


def test_random_is_seeded() -> None:
    structure = structure_of(64, 128)
    assert Mask.random(structure, 0.5, seed=1) == Mask.random(structure, 0.5, seed=1)
    assert Mask.random(structure, 0.5, seed=1) != Mask.random(structure, 0.5, seed=2)
    assert list(Mask.random(structure, 0.5, seed=1).kept.values()) == [32, 64]


NAN = torch.tensor([1.0, torch.nan, 2.0])


@pytest.mark.parametrize(
    ("scores", "keep", "error", "message"),
    [
        ({"a": NAN}, 0.5, ValueError, "layer 'a': 1 of its 3 scores are NaN"),
        ({}, 0.5, ValueError, "expected scores for layer 'a', got none"),
        ({"a": torch.ones(4)}, 0.5, ValueError, r"layer 'a': expected shape \[units\] = \(3,\), got \(4,\)"),
        ({"a": torch.ones(3)}, 0.0, ValueError, r"in \(0, 1\], got 0.0"),
        ({"a": torch.ones(3)}, 1.5, ValueError, r"in \(0, 1\], got 1.5"),
        ({"a": torch.ones(3)}, float("nan"), ValueError, r"in \(0, 1\], got nan"),
        ({"a": torch.ones(3)}, [4], ValueError, r"a count in \[1, 3\], got 4"),
        ({"a": torch.ones(3)}, [0.5, 0.5], ValueError, r"expected 1 values \(one a layer\), got 2"),
        ({"a": torch.ones(3)}, 1, TypeError, "expected a float, or a sequence of floats or ints, got 1"),
    ],
)
def test_from_scores_refuses(
    scores: dict[str, Tensor], keep: float, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Mask.from_scores(structure_of(3), scores, keep)
    if isinstance(keep, float):
        with pytest.raises(error, match=message):
            Mask.from_scores(structure_of(3), scores, keep, global_=True)


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (
            {"a": torch.zeros(3, dtype=torch.bool)},
            ValueError,
            "layer 'a': expected at least one unit of 3 to stay",
        ),
        ({"a": torch.zeros(0, dtype=torch.bool)}, ValueError, "at least one unit of 0"),
        ({"a": torch.ones(3)}, TypeError, "layer 'a': expected a bool tensor, got torch.float32"),
        ({"a": [True]}, TypeError, "expected a bool tensor, got list"),
        ({"a": torch.ones(1, 3, dtype=torch.bool)}, ValueError, r"expected shape \[units\], got \(1, 3\)"),
        ({}, ValueError, "at least one layer"),
    ],
)
def test_construction_refuses(layers: dict[str, Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Mask(layers)


def test_is_immune_to_later_writes() -> None:
    bits = torch.tensor([True, False])
    mask = Mask({"a": bits})
    bits[:] = True
    assert mask == mask_of(a="10")
    with pytest.raises(TypeError):
        mask.layers["a"] = bits  # type: ignore[index]


def test_what_a_mask_says() -> None:
    mask = mask_of(a="0110", b="1")
    assert mask.kept == {"a": 2, "b": 1}
    assert mask.keep == 3 / 5
    assert mask.indices["a"].tolist() == [1, 2]
    assert mask.to_vector().tolist() == [False, True, True, False, True]
    assert repr(mask) == "Mask(a 2/4, b 1/1)"


def test_vector_is_in_the_structures_order() -> None:
    structure = structure_of(2, 3)
    mask = Mask.from_vector(structure, torch.tensor([True, False, False, True, True]))
    assert mask == mask_of(b="011", a="10")
    assert mask.to_vector().tolist() == [True, False, False, True, True]
    with pytest.raises(ValueError, match=r"\[U\] = \(5,\), got \(4,\)"):
        Mask.from_vector(structure, torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="layer 'b': expected at least one unit"):
        Mask.from_vector(structure, torch.tensor([True, False, False, False, False]))


def test_set_operations() -> None:
    a, b = mask_of(x="1100", y="110"), mask_of(x="0110", y="011")
    assert a & b == mask_of(x="0100", y="010")
    assert a | b == mask_of(x="1110", y="111")
    assert ~a == mask_of(x="0011", y="001")
    assert a != b
    assert a == mask_of(y="110", x="1100")
    assert hash(a) == hash(mask_of(y="110", x="1100"))
    with pytest.raises(ValueError, match="'y'"):
        ~(a | b)
    with pytest.raises(ValueError, match="'x'"):
        a & ~a


def test_iou() -> None:
    a, b = mask_of(x="1100", y="110"), mask_of(x="0110", y="110")
    assert a.iou(b) == 3 / 5
    assert a.iou(b, per_layer=True) == {"x": 1 / 3, "y": 1.0}
    assert a.iou(a) == 1.0
    assert a.iou(~a) == 0.0


def test_operations_refuse_masks_of_another_structure() -> None:
    a = mask_of(x="11", y="1")
    with pytest.raises(ValueError, match="different layers \\('y' is only in the first\\)"):
        a & mask_of(x="11")
    with pytest.raises(ValueError, match="layer 'x': 2 units against 3"):
        a.iou(mask_of(x="111", y="1"))
    with pytest.raises(TypeError, match="expected a Mask, got int"):
        a | 3  # type: ignore[operator]
    with pytest.raises(ValueError, match="mask: layer 'a': expected 3 units, got 2"):
        mask_of(a="11").check(structure_of(3))
    with pytest.raises(ValueError, match="mask: expected layer 'a'"):
        mask_of(x="11").check(structure_of(3))
    with pytest.raises(ValueError, match="mask: layer 'x' is not in the structure"):
        mask_of(a="11", x="1").check(structure_of(2))


def test_compose() -> None:
    assert Mask.compose(mask_of(a="10110"), mask_of(a="101")) == mask_of(a="10010")
    with pytest.raises(ValueError, match="layer 'a': outer keeps 3 units, inner is a mask of 2"):
        Mask.compose(mask_of(a="10110"), mask_of(a="11"))
    with pytest.raises(ValueError, match="different layers"):
        Mask.compose(mask_of(a="1"), mask_of(b="1"))


def test_index_in_meets_in_the_tensor_between_two_layers(tiny_resnet: nn.Module) -> None:
    structure = find_structure(tiny_resnet)
    mask = Mask.random(structure, 0.5, seed=3)
    index = mask.index_in(structure)
    rows, cols = index["layer3.0.conv2.weight"]
    assert rows is not None
    assert cols is not None
    assert torch.equal(rows, mask.indices["layer3.0.conv2"])
    assert torch.equal(cols, mask.indices["layer3.0.conv1"])
    assert index["layer3.0.bn2.weight"][1] is None
    assert index["layer3.0.conv3.weight"][0] is None
    assert Mask.full(structure).index_in(structure) == {}


def test_file_round_trip(tmp_path: Path) -> None:
    structure = structure_of(1, 7, 8, 9, 1000)
    mask = Mask.random(structure, 0.4, seed=5, align=1)
    mask.save(tmp_path / "m.mask")
    loaded = Mask.load(tmp_path / "m.mask")
    assert loaded == mask
    assert list(loaded.layers) == list(mask.layers)
    assert loaded.to_bytes() == mask.to_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["m.mask"]


def test_every_damage_is_noticed(tmp_path: Path) -> None:
    """No changed byte and no cut gives a mask that is not the one that was saved."""
    mask = Mask.random(structure_of(9, 100), 0.4, seed=5, align=1)
    data = mask.to_bytes()
    for i in range(len(data)):
        broken = data[:i] + bytes([data[i] ^ 0x10]) + data[i + 1 :]
        try:
            assert Mask.from_bytes(broken) == mask  # a byte of padding, at most
        except FileFormatError:
            continue
    for length in (0, 5, 8, 100, len(data) - 1):
        with pytest.raises(FileFormatError, match="damaged"):
            Mask.from_bytes(data[:length])
    (tmp_path / "x").write_bytes(b"no such format")
    with pytest.raises(FileFormatError, match=r"x: damaged"):
        Mask.load(tmp_path / "x")
    with pytest.raises(FileNotFoundError):
        Mask.load(tmp_path / "none")


def test_a_newer_format_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as newer:
        newer.setattr("mvp_ext.model.mask._VERSION", 2)
        data = mask_of(a="1").to_bytes()
    with pytest.raises(FileFormatError, match=r"format version 2 is newer than this mvp_ext reads \(1\)"):
        Mask.from_bytes(data)
    with monkeypatch.context() as other:
        other.setattr("mvp_ext.model.mask._FORMAT", "mvp_ext.other")
        data = mask_of(a="1").to_bytes()
    with pytest.raises(
        FileFormatError, match=r"expected a file of format 'mvp_ext.mask', got 'mvp_ext.other'"
    ):
        Mask.from_bytes(data)
