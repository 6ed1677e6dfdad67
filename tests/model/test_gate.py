"""The gate finds structures that are wrong where every shape fits, passes those that are right, and is asked once."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_images, tiny_model
from torch import Tensor, nn

from mvp_ext.model import gate
from mvp_ext.model.families import RULES, find_structure, register_rule
from mvp_ext.model.families.parts import Rule, computes_as, reader, writer
from mvp_ext.model.mask import Mask
from mvp_ext.model.structure import Attribute, Probe, Slice, Structure, UnitLayer, UnsupportedModelError
from mvp_ext.model.surgery import prune_model

pytestmark = pytest.mark.usefixtures("one_thread")


class Hidden(nn.Module):
    """Hidden units between two linear layers, and what a test puts between them."""

    def __init__(self, *between: nn.Module, width: int = 12) -> None:
        super().__init__()
        self.first, self.between, self.second = (
            nn.Linear(8, width),
            nn.Sequential(*between),
            nn.Linear(width, 8),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.between(self.first(x)))


class Gated(Hidden):
    """The first half of what ``first`` puts out is multiplied by the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).chunk(2, dim=-1)
        return x + self.second(a * b)


class Heads(nn.Module):
    """Attention with heads; ``mixed``: their maps are mixed with each other, by fixed shares."""

    def __init__(self, mixed: bool = False) -> None:
        super().__init__()
        self.heads, self.mixed = 4, mixed
        self.first, self.second = nn.Linear(8, 3 * 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.first(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        maps = (q @ k.mT).softmax(-1)
        if self.mixed:
            maps = (maps + maps.roll(1, 1)) / 2
        return x + self.second((maps @ v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Two blocks on the pixels of small images, and 5 classes."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = (
            nn.Conv2d(3, 8, 4, stride=4),
            nn.Sequential(*blocks),
            nn.Linear(8, 5),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images).flatten(2).mT).mean(1))


def layer_of(path: str, units: int, *slices: Slice, **more: Any) -> UnitLayer:
    return UnitLayer(path, "neuron", units, slices, Probe(f"{path}.second", "input", dim=-1), **more)


def plain(path: str, units: int = 12) -> UnitLayer:
    slices = (Slice(f"{path}.first.weight", 0), Slice(f"{path}.first.bias", 0), reader(f"{path}.second"))
    return layer_of(path, units, *slices)


def of_heads(path: str, units: int = 4, *, repeat: int = 3, follows: bool = True) -> UnitLayer:
    first = [Slice(f"{path}.first.{n}", 0, 48 // (units * repeat), repeat) for n in ("weight", "bias")]
    attributes = (Attribute(path, "heads"),) if follows else ()
    return layer_of(path, units, *first, reader(f"{path}.second", 16 // units), attributes=attributes)


def structure(*layers: UnitLayer) -> Structure:
    return Structure("mine", "mlp", None, layers)


def norm(path: str) -> UnitLayer:
    """A layer norm over the units is cut with them, as if it looked at each alone."""
    found = plain(path)
    return replace(
        found, slices=(*found.slices, *(Slice(f"{path}.between.0.{n}", 0) for n in ("weight", "bias")))
    )


def halves(path: str) -> UnitLayer:
    """A unit is a place in each half of what ``first`` puts out."""
    first = [Slice(f"{path}.first.{n}", 0, repeat=2) for n in ("weight", "bias")]
    return layer_of(path, 12, *first, reader(f"{path}.second"))


def pairs(path: str) -> UnitLayer:
    """Two places beside each other, which is wrong."""
    found = halves(path)
    first = [replace(each, block=2, repeat=1) for each in found.slices[:2]]
    return replace(found, slices=(*first, found.slices[2]))


def without(layer: UnitLayer, tensor: str) -> UnitLayer:
    return replace(layer, slices=tuple(each for each in layer.slices if not each.tensor.endswith(tensor)))


class Centred(nn.Module):
    """Takes the mean over the units away, and has no tensor that could be missing; maybe in train mode only."""

    def __init__(self, always: bool = True) -> None:
        super().__init__()
        self.always = always

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.always or self.training else x


class Norm(nn.Module):
    """A layer norm that asks for no number of units."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(12)), nn.Parameter(torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], self.weight, self.bias)


class Scaled(Hidden):
    """What it adds is scaled by a gain that begins at zero, and would hide everything."""

    def __init__(self, *between: nn.Module) -> None:
        super().__init__(*between)
        self.gain = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * (super().forward(x) - x)


class Rough(Hidden):
    """Drops units by a share that no attribute says."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(nn.functional.dropout(self.first(x), 0.3, self.training))


class Single(Hidden):
    """Computes in float32 alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x) @ torch.eye(self.first.out_features, dtype=torch.float32))


class Logarithm(Hidden):
    """NaN in eval mode for any image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else super().forward(x).abs().neg().log()


class Labelled(Hidden):
    """Cannot be trained without what nobody gives it."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise ValueError("expected labels, got none")
        return super().forward(x)


RIGHT: dict[str, tuple[nn.Module, UnitLayer]] = {
    "neurons": (Hidden(nn.GELU()), plain("blocks.1")),
    "not zero at zero": (Hidden(nn.Sigmoid()), plain("blocks.1")),
    "dropout": (Hidden(nn.Dropout(0.5)), plain("blocks.1")),
    "dropout of its own": (Rough(), plain("blocks.1")),
    "float32 alone": (Single(), plain("blocks.1")),
    "no train mode": (Labelled(), plain("blocks.1")),
    "halves": (Gated(), halves("blocks.1")),
    "heads": (Heads(), of_heads("blocks.1")),
}
MESSAGE = r"^blocks\.1: in train mode expected the cut model to compute what the masked one does, got a difference of "
# Each in the second block. Every one but the first three fits in all its shapes.
WRONG: dict[str, tuple[nn.Module, UnitLayer, str]] = {
    "a bias is forgotten": (
        Hidden(),
        without(plain("blocks.1"), "first.bias"),
        r"^blocks\.1: .* does not run",
    ),
    "a reader is forgotten": (
        Hidden(),
        without(plain("blocks.1"), "second.weight"),
        r"^blocks\.1: .* does not run",
    ),
    "heads that nobody counts": (Heads(), of_heads("blocks.1", follows=False), r"^blocks\.1: "),
    "a norm across units": (Hidden(Norm()), norm("blocks.1"), MESSAGE),
    "a mean across units": (Hidden(Centred()), plain("blocks.1"), MESSAGE),
    "a mean across units in train mode": (Hidden(Centred(always=False)), plain("blocks.1"), MESSAGE),
    "behind a dropout": (Hidden(nn.Dropout(0.5), Centred(always=False)), plain("blocks.1"), MESSAGE),
    "softmax across units": (Hidden(nn.Softmax(-1)), plain("blocks.1"), MESSAGE),
    "hidden by a gain of zero": (Scaled(Centred()), plain("blocks.1"), MESSAGE),
    "halves taken for pairs": (Gated(), pairs("blocks.1"), MESSAGE),
    "half heads": (Heads(), of_heads("blocks.1", 8, follows=False), MESSAGE),
    "q, k and v taken for one": (Heads(), of_heads("blocks.1", repeat=1), MESSAGE),
    "heads that are mixed": (Heads(mixed=True), of_heads("blocks.1"), MESSAGE),
}


def state_of(model: nn.Module) -> list[Any]:
    """All that a trial may not change, in a form that can be compared."""
    values = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    modes = [(module.training, len(module._forward_pre_hooks)) for module in model.modules()]
    return [values, modes, torch.get_rng_state().tolist()]


def with_first(block: nn.Module, layer: UnitLayer) -> tuple[nn.Module, Structure]:
    """A model whose first block is right, and the structure of both."""
    torch.manual_seed(1)
    return Model(Hidden(nn.GELU()), block), structure(plain("blocks.0"), layer)


@pytest.fixture
def fresh(monkeypatch: Any, tmp_path: Path) -> list[Structure]:
    """Nothing is known yet; the structures that are tried from now on."""
    tried: list[Structure] = []
    verify = gate.verify
    monkeypatch.setattr(gate, "_known", set())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(gate, "verify", lambda s, *args: (tried.append(s), verify(s, *args)))
    return tried


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_passes(name: str) -> None:
    model, right = with_first(*RIGHT[name])
    right.verify(model)


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_found_and_named(name: str, fresh: list[Structure]) -> None:
    block, layer, message = WRONG[name]
    model, wrong = with_first(block, layer)
    wrong.check(model)
    with pytest.raises(UnsupportedModelError, match=message):
        wrong.verify(model)
    before = state_of(model)
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match=message):
            prune_model(model, Mask.random(wrong, 0.5, seed=3, align=1), structure=wrong)
    assert state_of(model) == before
    assert len(fresh) == 3


def test_what_is_wrong_in_eval_mode_alone_is_said_so() -> None:
    model, wrong = with_first(Labelled(Centred()), plain("blocks.1"))
    with pytest.raises(
        UnsupportedModelError, match=r"^blocks\.1: in eval mode expected the cut model to compute"
    ):
        wrong.verify(model)


def test_nothing_is_proved_by_numbers_that_are_not_finite() -> None:
    model, right = with_first(Logarithm(), plain("blocks.1"))
    with pytest.raises(UnsupportedModelError, match=r"^Model: expected .* outputs are not finite numbers"):
        right.verify(model)


@pytest.mark.parametrize(
    ("name", "scope", "kwargs"),
    [
        ("test_resnet", "inner", {"drop_path_rate": 0.2, "drop_block_rate": 0.1}),
        ("test_resnet", "all", {}),
        (
            "test_vit",
            "heads+mlp",
            {"init_values": 1e-6, "qk_norm": True, "drop_path_rate": 0.2, "proj_drop_rate": 0.1},
        ),
    ],
)
def test_timm_models_pass_dense_and_pruned(name: str, scope: str, kwargs: dict[str, Any]) -> None:
    model = tiny_model(name, **kwargs)
    found = find_structure(model, scope)
    found.verify(model)
    prune_model(model, Mask.random(found, 0.5, seed=0), structure=found)
    find_structure(model, scope).verify(model)


def test_synchronised_norms_are_tried_in_eval_mode() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(tiny_model("test_resnet"))
    find_structure(model).verify(model)


# ---- when it is asked


def test_once_a_class_whatever_its_sizes(fresh: list[Structure]) -> None:
    def cut(**kwargs: Any) -> int:
        model = tiny_model("test_vit", **kwargs)
        prune_model(model, Mask.random(find_structure(model), 0.5, seed=0))
        return len(fresh)

    assert cut() == 1
    assert cut() == 1
    assert cut(depth=2, num_heads=8, num_classes=7) == 1
    assert cut(qk_norm=True) == 2
    assert len(list(gate._folder().iterdir())) == 2


def test_a_file_says_it_to_other_processes(fresh: list[Structure]) -> None:
    code = """
import shutil, mvp_ext
from mvp_ext.model import gate
gate.verify = lambda *_: print("tried", end=" ")
for _ in range(2):
    model = mvp_ext.create_model("test_vit", img_size=32, depth=1)
    mvp_ext.prune_model(model, mvp_ext.Mask.random(mvp_ext.find_structure(model), 0.5, seed=0))
    print("cut", end=" ")
    shutil.rmtree(gate._folder(), ignore_errors=True)
"""
    model = tiny_model("test_vit")
    find_structure(model).verify(model)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["cut", "tried", "cut"]


def test_modules_of_no_package_are_known_to_the_process_alone(fresh: list[Structure]) -> None:
    for seed in range(2):
        model, right = with_first(Hidden(nn.GELU()), plain("blocks.1"))
        prune_model(model, Mask.random(right, 0.5, seed, align=1), structure=right)
    assert len(fresh) == 1
    assert not gate._folder().exists()


def test_a_cache_that_cannot_be_written_is_no_error(
    fresh: list[Structure], monkeypatch: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        model = tiny_model("test_vit", depth=1)
        prune_model(model, Mask.random(find_structure(model), 0.5, seed=0))
    assert len(fresh) == 1


def test_a_model_without_memory_is_not_tried(fresh: list[Structure]) -> None:
    model = tiny_model("test_vit").to("meta")
    with pytest.raises(
        ValueError, match=r"^Structure\.verify: model: expected one that can run, got one on meta$"
    ):
        find_structure(model).verify(model)
    fresh.clear()
    prune_model(model, Mask.random(find_structure(model), 0.5, seed=0))
    assert fresh == []


def test_a_model_that_takes_other_images_needs_some(fresh: list[Structure]) -> None:
    model, right = with_first(Hidden(), plain("blocks.1"))
    model.head = nn.Sequential(nn.Linear(8, 5), nn.Unflatten(0, (4, 1)), nn.Flatten(1))
    mask = Mask.random(right, 0.5, seed=0, align=1)
    with pytest.raises(
        UnsupportedModelError, match=r"^Model: expected a model that takes images \[2, 3, 64, 64\]"
    ):
        prune_model(model, mask, structure=right)
    right.verify(model, images=torch.randn(4, 3, 16, 16))
    assert prune_model(model, mask, structure=right).blocks[1].first.out_features == 6  # type: ignore[index, union-attr]


def test_a_copy_that_runs_the_model_itself_is_no_copy() -> None:
    """It would be compared with itself; in train mode it would move the caller's statistics."""
    model = tiny_model("test_resnet")
    plain_forward = model.layer1.forward
    model.layer1.forward = lambda x: plain_forward(x)
    before = state_of(model)
    with pytest.raises(UnsupportedModelError, match="runs the model itself, not the copy"):
        find_structure(model).verify(model)
    assert state_of(model) == before


# ---- a rule from outside


def test_a_rule_of_ones_own(fresh: list[Structure], monkeypatch: Any) -> None:
    monkeypatch.setattr("mvp_ext.model.families.RULES", list(RULES))

    def layers(path: str, block: Hidden) -> list[UnitLayer]:
        slices = (*writer(f"{path}.first", block.first), reader(f"{path}.second"))
        return [
            UnitLayer(
                path, "neuron", block.first.out_features, slices, Probe(f"{path}.second", "input", dim=-1)
            )
        ]

    register_rule(Rule("mine", "mlp", lambda module: type(module) is Hidden, layers))
    model = Model(Hidden(nn.GELU()), Hidden(nn.ReLU(), width=7)).eval()
    found = find_structure(model, "mlp")
    assert found.units_per_layer == (12, 7)
    found.verify(model)
    prune_model(model, Mask.random(found, 0.5, seed=0, align=1))
    assert model(tiny_images(model)).shape == (4, 5)
    assert len(fresh) == 1


@pytest.mark.parametrize("by_class", [False, True])
def test_a_rule_that_looks_at_the_class_alone_is_asked_once_for_it(by_class: bool, monkeypatch: Any) -> None:
    """And once more for those with a forward of their own."""
    monkeypatch.setattr("mvp_ext.model.families.RULES", [])
    asked: list[nn.Module] = []

    def knows(module: nn.Module) -> bool:
        asked.append(module)
        return computes_as(module, Hidden)

    refused: list[str] = []

    def layers(path: str, block: Hidden) -> list[UnitLayer]:
        refused.append(path)
        raise UnsupportedModelError(path)

    register_rule(Rule("mine", "mlp", knows, layers, by_class=by_class))
    model = Model(*(Hidden(nn.GELU()) for _ in range(4)))
    model.blocks[1].forward = lambda x: x  # type: ignore[union-attr]
    with pytest.raises(UnsupportedModelError):
        find_structure(model, "mlp")
    assert refused == ["blocks.0", "blocks.2", "blocks.3"]
    assert sum(type(module) is Hidden for module in asked) == (2 if by_class else 4)
