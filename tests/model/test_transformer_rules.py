"""Heads and MLP neurons of transformers: what is cut computes what the masked model computes, whatever is kept."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.narrow import in_their_place
from mvp_ext.model.structure import UnsupportedModelError
from mvp_ext.model.surgery import masked_model, prune_model
from mvp_ext.timm_compat import import_timm

pytestmark = pytest.mark.usefixtures("one_thread", "no_trial")

SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 4, "img_size": 32, "patch_size": 16}
WINDOWS = {"depths": (2, 1), "embed_dim": 16, "num_heads": (2, 4), "img_size": 32, "window_size": 2}
PYRAMID = {
    "depths": (1, 1),
    "embed_dims": (16, 32),
    "num_heads": (2, 4),
    "mlp_ratios": (2, 2),
    "sr_ratios": (2, 1),
}
# name → (arguments, what its scopes are).
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "vit_small_patch16_dinov3": (SMALL, "heads+mlp"),
    "vit_small_patch16_dinov3_qkvb": (SMALL, "heads+mlp"),
    "eva02_tiny_patch14_224": ({**SMALL, "dynamic_img_size": True}, "heads+mlp"),
    "vit_small_patch16_rope_224": (SMALL, "heads+mlp"),
    "vit_pe_core_tiny_patch16_384": (SMALL, "heads+mlp"),
    "beit_base_patch16_224": (SMALL, "heads+mlp"),
    "vit_relpos_small_patch16_224": (SMALL, "heads+mlp"),
    "vit_relpos_medium_patch16_cls_224": ({**SMALL, "rel_pos_type": "bias"}, "heads+mlp"),
    "vit_base_patch16_siglip_224": (SMALL, "heads+mlp"),
    "vit_giant_patch14_dinov2": (SMALL, "heads+mlp"),
    "vit_small_patch16_18x2_224": (SMALL, "heads+mlp"),
    "samvit_base_patch16_224": ({**SMALL, "neck_chans": 16}, "heads+mlp"),
    "swin_tiny_patch4_window7_224": (WINDOWS, "heads+mlp"),
    "swinv2_tiny_window8_256": (WINDOWS, "heads+mlp"),
    "swinv2_cr_tiny_ns_224": (WINDOWS, "heads+mlp"),
    "convit_tiny": (
        {"depth": 2, "embed_dim": 8, "num_heads": 4, "img_size": 32, "local_up_to_layer": 1},
        "heads+mlp",
    ),
    "cait_xxs24_224": ({**SMALL, "depth_token_only": 1}, "heads+mlp"),
    "xcit_nano_12_p16_224": ({**SMALL, "cls_attn_layers": 1}, "heads+mlp"),
    "pvt_v2_b0": (PYRAMID, "heads+mlp"),
    "pvt_v2_b2_li": ({**PYRAMID, "linear": True}, "heads+mlp"),
    "twins_svt_small": ({**PYRAMID, "depths": (2, 2), "wss": (3, 2), "img_size": 32}, "heads+mlp"),
}


def tiny(name: str) -> nn.Module:
    """float64, every tensor drawn: fresh tables, biases and norms hide mistakes. No dropout."""
    torch.manual_seed(1)
    timm = import_timm()
    kind = timm.models._registry._model_entrypoints.get(name)
    assert kind is not None, name
    if name.startswith("pvt"):
        model = timm.models.pvt_v2.PyramidVisionTransformerV2(num_classes=5, **MODELS[name][0])
    else:
        model = timm.create_model(name, num_classes=5, **MODELS[name][0])
    return drawn(model)


def drawn(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if hasattr(module, "drop_prob"):
                module.drop_prob = 0.0
            for parameter in module.parameters(recurse=False):
                if isinstance(module, (nn.Linear, nn.Conv2d)) and parameter.ndim > 1:
                    parameter.normal_(0, parameter[0].numel() ** -0.5)
                else:
                    parameter.normal_(0.5, 0.5)
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model.double()


def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def assert_same(a: nn.Module, b: nn.Module, *inputs: Any) -> None:
    for training in (False, True):
        expected, got = (copy.deepcopy(m).train(training)(*inputs) for m in (a, b))
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_masked_dense_model(name: str) -> None:
    dense, scope, x = tiny(name), MODELS[name][1], images()
    structure = find_structure(dense, scope)
    for seed, keep in enumerate((0.6, 0.01)):
        mask = Mask.random(structure, keep, seed, align=1)
        model = copy.deepcopy(dense)
        masked = masked_model(model, mask, structure=structure)
        prune_model(model, mask, structure=structure)
        assert list(model.state_dict()) == list(dense.state_dict())
        assert find_structure(model, scope).units_per_layer == tuple(mask.kept.values())
        assert_same(masked, model, x)
        with torch.no_grad():
            assert not torch.allclose(model.eval()(x), copy.deepcopy(dense).eval()(x))


@pytest.mark.parametrize("name", MODELS)
def test_what_was_cut_is_cut_again_copied_and_stored(name: str) -> None:
    model, scope = tiny(name), MODELS[name][1]
    for seed in range(2):
        structure = find_structure(model, scope)
        mask = Mask.random(structure, 0.6, seed, align=1)
        masked = masked_model(model, mask)
        prune_model(model, mask)
        assert_same(masked, model, images())
        model = pickle.loads(pickle.dumps(model))
        assert_same(masked, model, images())


@pytest.mark.parametrize("name", MODELS)
def test_probes_read_the_units(name: str) -> None:
    """What a probe reads is zero at just the units that masked_model removed."""
    model = tiny(name).eval()
    structure = find_structure(model, MODELS[name][1])
    mask = Mask.random(structure, 0.5, seed=0, align=1)
    assert_probes_read_the_units(masked_model(model, mask), structure, mask, images())


def assert_probes_read_the_units(masked: nn.Module, structure: Any, mask: Mask, x: Tensor) -> None:
    seen: dict[str, list[Tensor]] = {layer.name: [] for layer in structure}
    for layer in structure:
        assert layer.probe.side == "input"
        masked.get_submodule(layer.probe.module).register_forward_pre_hook(
            lambda _, inputs, name=layer.name: seen[name].append(inputs[0])
        )
    with torch.no_grad(), in_their_place(masked, structure):
        masked(x)
    for layer in structure:
        (activation,) = seen[layer.name]
        a = activation.movedim(layer.probe.dim, 0)
        a = a.reshape(layer.probe.heads or a.shape[0], -1)
        # A ReLU leaves few of many neurons dark.
        alive = a.abs().amax(1) > 0
        assert len(alive) == layer.units
        assert not (alive & ~mask.layers[layer.name]).any(), layer.name
        assert alive[mask.layers[layer.name]].float().mean() > 0.5, layer.name


def test_a_group_of_queries_goes_with_its_keys() -> None:
    layers = import_timm().layers
    attn = drawn(
        layers.AttentionRope(
            32,
            num_heads=8,
            num_kv_heads=4,
            qkv_fused=False,
            gated=True,
            qk_norm=True,
            norm_layer=nn.LayerNorm,
        )
    )
    model = nn.Sequential(attn)
    structure = find_structure(model, "heads")
    assert structure.units_per_layer == (4,)
    mask = Mask.random(structure, 0.5, 3)
    masked = masked_model(model, mask)
    prune_model(model, mask)
    assert (attn.num_heads, attn.num_kv_heads, attn.attn_dim, attn.kv_dim) == (4, 2, 16, 8)
    assert_same(masked, model, torch.randn(2, 5, 32, dtype=torch.float64))


@pytest.mark.parametrize("head_first", [True, False])
@pytest.mark.parametrize("kind", ["Attention2d", "AttentionCl"])
def test_heads_of_maxvit(kind: str, head_first: bool) -> None:
    layers, maxxvit = import_timm().layers, import_timm().models.maxxvit
    for table in (layers.RelPosBias, layers.RelPosBiasTf, layers.RelPosMlp):
        make = lambda table=table, **kwargs: table(window_size=(2, 2), **kwargs)  # noqa: E731
        model = drawn(
            nn.Sequential(getattr(maxxvit, kind)(32, dim_head=8, head_first=head_first, rel_pos_cls=make))
        )
        mask = Mask.random(find_structure(model), 0.5, 1)
        masked = masked_model(model, mask)
        x = torch.randn(2, 32, 2, 2, dtype=torch.float64)
        x = x if kind == "Attention2d" else x.permute(0, 2, 3, 1)
        prune_model(model, mask)
        assert_same(masked, model, x)


@pytest.mark.parametrize(
    ("name", "kwargs", "scope", "message"),
    [
        ("vit_small_patch16_rope_mixed_224", {}, "heads", "rotary embeddings are those of each head"),
        ("vit_srelpos_small_patch16_224", {}, "heads", "they are shared"),
        (
            "vit_small_patch16_dinov3",
            {"scale_attn_inner": True},
            "heads",
            r"attn\.norm \(LayerNorm\): it normalises across heads",
        ),
        ("eva02_large_patch14_224", {}, "mlp", r"mlp\.norm \(LayerNorm\)"),
        ("gmlp_s16_224", {}, "mlp", r"mlp_channels\.gate \(SpatialGatingUnit\)"),
    ],
)
def test_refuses_what_is_not_exact(name: str, kwargs: dict[str, Any], scope: str, message: str) -> None:
    with torch.device("meta"):
        model = import_timm().create_model(name, **kwargs)
    # They are alike, and where no rule finds anything the model is traced.
    model.blocks = model.blocks[:2]
    with pytest.raises(UnsupportedModelError, match=message):
        find_structure(model, scope)


@pytest.mark.parametrize("kind", ["Mlp", "GluMlp"])
@pytest.mark.parametrize("use_conv", [True, False])
def test_mlps_of_linears_and_convolutions(kind: str, use_conv: bool) -> None:
    model = drawn(nn.Sequential(getattr(import_timm().layers, kind)(8, 24, use_conv=use_conv)))
    structure = find_structure(model, "mlp")
    mask = Mask.random(structure, 0.5, 0, align=1)
    masked = masked_model(model, mask)
    prune_model(model, mask)
    x = torch.randn(2, 8, 3, 8, dtype=torch.float64)
    assert_same(masked, model, x)
    assert_probes_read_the_units(masked, structure, mask, x)


def test_keys_with_a_bias_that_no_file_holds_stay_whole() -> None:
    model: Any = tiny("beit_base_patch16_224")
    model.blocks[0].attn.k_bias.normal_()
    assert find_structure(model, "heads").names == ("blocks.1.attn",)


def test_the_mlps_of_positions_stay_whole() -> None:
    structure = find_structure(tiny("vit_relpos_small_patch16_224"), "mlp")
    assert structure.names == ("blocks.0.mlp", "blocks.1.mlp")
