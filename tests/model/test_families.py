"""Which units are found where, and what is refused, and by which words."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from tiny import tiny_images, tiny_model
from torch import nn
from torch.nn.utils import parametrizations, prune

from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.structure import Slice, UnsupportedModelError
from mvp_ext.model.surgery import masked_model
from mvp_ext.timm_compat import import_timm

pytestmark = pytest.mark.usefixtures("one_thread")


def on_meta(name: str, **kwargs: Any) -> nn.Module:
    """A timm model without memory or initialisation; unsupported ones too."""
    with torch.device("meta"):
        return import_timm().create_model(name, **kwargs)


RESNET18 = [64, 64, 128, 128, 256, 256, 512, 512]
RESNET50 = [n for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)) for n in [width] * (2 * blocks)]


@pytest.mark.parametrize(
    ("name", "scope", "units"),
    [
        ("resnet18", None, RESNET18),
        ("resnet18", "all", [n for n in RESNET18 for _ in range(2)]),
        ("resnet50", "inner", RESNET50),
        ("resnext50_32x4d", None, [32] * 16),
        (
            "convnextv2_atto",
            None,
            [4 * n for n, blocks in ((40, 2), (80, 2), (160, 6), (320, 2)) for _ in range(blocks)],
        ),
        ("mobilenetv2_100", None, [6 * n for n in (16, 24, 24, *[32] * 3, *[64] * 4, *[96] * 3, *[160] * 3)]),
        ("resnet50", "all", [m for n in RESNET50[::2] for m in (n, n, 4 * n)]),
        ("test_resnet", "inner", [32, 48, 48, 48, 96]),
        ("test_resnet", "all", [32, 32, 48, 48, 48, 48, 192, 96, 96]),
        ("vit_tiny_patch16_224", None, [3] * 12),
        ("deit_small_patch16_224", "heads+mlp", [6, 1536] * 12),
        ("deit_tiny_distilled_patch16_224", "mlp", [768] * 12),
        ("test_vit", "mlp", [192] * 6),
    ],
)
def test_finds_every_layer(name: str, scope: str | None, units: list[int]) -> None:
    structure = find_structure(on_meta(name), scope)
    assert list(structure.units_per_layer) == units
    assert structure.total_units == sum(units)
    assert structure.architecture == name
    assert len(set(structure.names)) == len(structure) == len(units)


def test_slices_of_a_basic_block_and_a_bottleneck() -> None:
    structure = find_structure(on_meta("test_resnet"), "all")
    norm = ("weight", "bias", "running_mean", "running_var")
    assert structure["layer2.0.conv1"].slices == (
        Slice("layer2.0.conv1.weight", 0),
        *(Slice(f"layer2.0.bn1.{n}", 0) for n in norm),
        Slice("layer2.0.conv2.weight", 1),
    )
    assert structure["layer3.0.conv2"].slices[-1] == Slice("layer3.0.conv3.weight", 1)
    last = structure["layer3.0.conv3"]
    assert last.slices == (Slice("layer3.0.conv3.weight", 0), *(Slice(f"layer3.0.bn3.{n}", 0) for n in norm))
    assert last.scatter == "layer3.0"


def test_slices_of_attention_and_mlp(tiny_vit: nn.Module) -> None:
    structure = find_structure(tiny_vit, "heads+mlp")
    assert structure["blocks.0.attn"].slices == (
        Slice("blocks.0.attn.qkv.weight", 0, 16, 3),
        Slice("blocks.0.attn.qkv.bias", 0, 16, 3),
        Slice("blocks.0.attn.proj.weight", 1, 16),
    )
    assert structure["blocks.0.mlp"].slices == (
        Slice("blocks.0.mlp.fc1.weight", 0),
        Slice("blocks.0.mlp.fc1.bias", 0),
        Slice("blocks.0.mlp.fc2.weight", 1),
    )


@pytest.mark.parametrize(("name", "scope"), [("test_resnet", "all"), ("test_vit", "heads+mlp")])
def test_probes_read_the_units(name: str, scope: str) -> None:
    """What a probe reads has one place a unit, and is zero at the units that masked_model removed."""
    model = tiny_model(name)
    structure = find_structure(model, scope)
    mask = Mask.random(structure, 0.5, seed=0, align=1)
    masked = masked_model(model, mask)
    seen: dict[str, torch.Tensor] = {}
    for layer in structure:
        probed = masked.get_submodule(layer.probe.module)
        if layer.probe.side == "input":
            probed.register_forward_pre_hook(
                lambda _, x, name=layer.name: seen.__setitem__(name, x[0].clone())
            )
        else:
            probed.register_forward_hook(lambda _, x, y, name=layer.name: seen.__setitem__(name, y.clone()))
    with torch.no_grad():
        masked(tiny_images(masked))
    for layer in structure:
        a = seen[layer.name].movedim(layer.probe.dim, 0)
        a = a.reshape(layer.probe.heads or a.shape[0], -1)
        assert a.shape[0] == layer.units
        alive, kept = a.abs().amax(1) > 0, mask.layers[layer.name]
        assert not alive[~kept].any(), layer.name
        # A ReLU leaves some channels of random weights dark.
        assert alive[kept].float().mean() > 0.5, layer.name


@pytest.mark.parametrize(
    ("name", "kwargs", "scope", "message"),
    [
        ("nf_resnet26", {}, None, r"stages\.0\.0\.conv2: expected a plain Conv2d, got ScaledStdConv2d"),
        ("mambaout_femto", {}, None, r"expected blocks of .* got stem \(Stem\)"),
        ("seresnet18", {}, "all", r"layer1\.0\.se \(SEModule\).*; use scope 'inner'$"),
        ("resnet18", {}, "heads", r"expected a part with heads units, got none; use scope 'inner'$"),
        ("test_vit", {}, "all", r"expected a part with inner or last units, got none; use scope 'heads'$"),
        ("test_vit", {"scale_attn_norm": True}, "heads", r"blocks\.0\.attn\.norm \(LayerNorm\)"),
        ("test_vit", {"scale_mlp_norm": True}, "mlp", r"blocks\.0\.mlp\.norm \(LayerNorm\)"),
    ],
)
def test_refuses_by_the_name_of_the_part(
    name: str, kwargs: dict[str, Any], scope: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Torch-Pruning, which may find more, is not installed."""
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ValueError, match=message):
        find_structure(on_meta(name, **kwargs), scope)


def test_the_default_is_the_first_scope_that_the_model_has() -> None:
    for name, scope in (("resnet18", "inner"), ("vit_tiny_patch16_224", "heads")):
        assert find_structure(on_meta(name)).scope == scope
    assert find_structure(on_meta("test_vit", scale_attn_norm=True)).scope == "mlp"


@pytest.mark.parametrize(
    ("name", "kwargs", "scope"),
    [
        ("seresnet18", {}, "inner"),  # squeeze-excitation sees the full stream only
        ("resnetaa50", {}, "all"),  # an average pool keeps channels apart
        ("resnetblur18", {}, "all"),
        ("resnext50_32x4d", {}, "all"),
        ("resnet18", {"drop_path_rate": 0.1, "drop_block_rate": 0.1}, "all"),
        ("test_vit", {"qk_norm": True}, "heads"),  # inside one head, shared by all
        ("test_vit", {"scale_mlp_norm": True}, "heads"),
        ("test_vit", {"qkv_bias": False, "proj_bias": False}, "heads+mlp"),
    ],
)
def test_accepts_variants_that_do_not_matter(name: str, kwargs: dict[str, Any], scope: str) -> None:
    assert find_structure(on_meta(name, **kwargs), scope).scope == scope


def test_what_cannot_be_cut_stays_whole_and_says_why(tiny_resnet: Any, tiny_vit: Any) -> None:
    whole = find_structure(tiny_resnet)
    tiny_resnet.layer1[0].forward = lambda x: x
    tiny_vit.blocks[1].mlp.fc1.weight = tiny_vit.blocks[0].mlp.fc1.weight
    parametrizations.weight_norm(tiny_vit.blocks[0].attn.qkv)
    prune.l1_unstructured(tiny_vit.blocks[2].mlp.fc2, "weight", 0.5)

    left = find_structure(tiny_resnet)
    assert left.names == tuple(name for name in whole.names if not name.startswith("layer1.0"))
    assert dict(left.left_whole)["layer1.0"] == "no rule knows BasicBlock"

    left = find_structure(tiny_vit, "heads+mlp")
    assert left.names == (
        "blocks.1.attn",
        "blocks.2.attn",
        *(f"blocks.{i}.{n}" for i in range(3, 6) for n in ("attn", "mlp")),
    )
    reasons = dict(left.left_whole)
    assert "shared weights cannot be cut" in reasons["blocks.0.mlp"]
    assert "shared weights cannot be cut" in reasons["blocks.1.mlp"]
    assert reasons["blocks.0.attn"].startswith("blocks.0.attn.qkv: expected a plain Linear")
    assert reasons["blocks.2.mlp"].startswith("blocks.2.mlp.fc2.weight: expected a plain tensor")


def test_a_block_that_is_left_whole_is_named() -> None:
    structure = find_structure(on_meta("mobilenetv2_035"))
    assert "blocks.1.0.conv_pw" in structure.names
    assert "expected two convolutions" in dict(structure.left_whole)["blocks.0.0"]


def test_refuses_a_model_of_lookalikes(tiny_vit: Any) -> None:
    for block in tiny_vit.blocks:
        block.attn.forward = block.mlp.forward = lambda x: x
    with pytest.raises(UnsupportedModelError, match="expected blocks of convolutions, attentions or MLPs"):
        find_structure(tiny_vit)


def test_scope_errors(tiny_resnet: nn.Module) -> None:
    with pytest.raises(ValueError, match="expected one of heads, mlp"):
        find_structure(tiny_resnet, "outer")
