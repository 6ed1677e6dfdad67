"""Heads and neurons of transformers of every kind: what is cut computes what the masked dense model does."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvp_ext.model.checkpoint import load_pruned, save_pruned
from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.narrow.attention import NarrowEvaAttention, NarrowMultiheadAttention
from mvp_ext.model.structure import UnsupportedModelError
from mvp_ext.model.surgery import masked_model, prune_model
from mvp_ext.pruning.scores import score_units
from mvp_ext.timm_compat import import_timm

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 4, "img_size": 32, "patch_size": 16}
STAGES = {"depths": (1, 1, 1, 1), "embed_dim": 24, "num_heads": (2, 4, 8, 16)}
# name, arguments, side of the images, layers of heads, layers of neurons.
MODELS: list[tuple[str, dict[str, Any], int, int, int]] = [
    ("vit_small_patch16_dinov3", SMALL, 32, 2, 2),
    ("vit_small_patch16_dinov3_qkvb", SMALL, 32, 2, 2),
    ("vit_small_plus_patch16_dinov3", SMALL, 32, 2, 2),
    ("eva02_tiny_patch14_224", SMALL, 32, 2, 2),
    ("eva_giant_patch14_224", SMALL, 32, 2, 2),
    ("vit_small_patch16_rope_224", SMALL, 32, 2, 2),
    ("beit_base_patch16_224", SMALL, 32, 2, 2),
    ("vit_giant_patch14_dinov2", SMALL, 32, 2, 2),
    ("vit_base_patch16_siglip_224", SMALL, 32, 2, 3),
    ("vit_small_patch16_18x2_224", SMALL, 32, 4, 4),
    ("samvit_base_patch16_224", {**SMALL, "global_attn_indexes": (1,), "window_size": 2}, 32, 2, 2),
    ("swin_tiny_patch4_window7_224", {**STAGES, "img_size": 64, "window_size": 4}, 64, 4, 4),
    ("swinv2_tiny_window8_256", {**STAGES, "img_size": 64, "window_size": 4}, 64, 0, 4),
    ("hiera_tiny_224", {"stages": (1, 1, 1, 1), "embed_dim": 16, "img_size": 64}, 64, 4, 4),
    ("pvt_v2_b0", {"depths": (1, 1, 1, 1)}, 64, 0, 4),
    ("tiny_vit_5m_224", {"depths": (1, 1, 1, 1)}, 64, 0, 3),
    ("levit_128s", {}, 224, 0, 11),
]
CASES = [
    pytest.param(name, kwargs, side, scope, layers, id=f"{name}-{scope}")
    for name, kwargs, side, heads, neurons in MODELS
    for scope, layers in (("heads", heads), ("mlp", neurons))
    if layers
]


def with_random_values(model: nn.Module) -> nn.Module:
    """No gain, bias, table or statistic of a fresh model may hide that it was forgotten."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=draw) + 0.5)
            elif name.endswith("running_mean") or (isinstance(tensor, nn.Parameter) and tensor.ndim < 2):
                tensor.add_(torch.randn(tensor.shape, generator=draw) * 0.3)
            elif isinstance(tensor, nn.Parameter) and tensor.std() < 1e-2:
                tensor.add_(torch.randn(tensor.shape, generator=draw) * 0.1)
    return model


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize(("name", "kwargs", "side", "scope", "layers"), CASES)
def test_cut_is_masked(name: str, kwargs: dict[str, Any], side: int, scope: str, layers: int) -> None:
    model = with_random_values(import_timm().create_model(name, num_classes=7, **kwargs)).double()
    structure = find_structure(model, scope)
    assert len(structure) == layers
    images = torch.randn(3, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for keep, training in ((0.5, True), (0.01, False)):
        mask = Mask.random(structure, keep, seed=0, align=1)
        for part in model.modules():
            part.training = training
            if hasattr(part, "drop_prob"):
                part.drop_prob = 0.0
        cut = prune_model(copy.deepcopy(model), mask, structure=structure)
        with torch.no_grad():
            close(cut(images), masked_model(model, mask, structure=structure)(images))
    assert cut.state_dict().keys() == model.state_dict().keys()
    # What is cut is found, cut, copied and pickled again.
    small = find_structure(cut, scope)
    assert small.names == structure.names
    assert dict(zip(small.names, small.units_per_layer, strict=True)) == mask.kept
    again = pickle.loads(pickle.dumps(copy.deepcopy(cut)))
    with torch.no_grad():
        close(again(images), cut(images))


def test_heads_are_scored_where_they_are_read() -> None:
    model: Any = import_timm().create_model("vit_small_patch16_dinov3_qkvb", num_classes=3, **SMALL).eval()
    structure = find_structure(model, "heads")
    # The second block's head 2 puts out nothing.
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight[2 * 48 + 24 : 2 * 48 + 36] = 0
        model.blocks[1].attn.v_bias[24:36] = 0
    batch = (torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
    scores = score_units(model, structure, "activation", [batch])["blocks.1.attn"]
    assert scores[2] == 0
    assert (scores[[0, 1, 3]] > 0).all()


def test_what_was_taken_over_is_saved_and_says_so(tmp_path: Any) -> None:
    model: Any = import_timm().create_model("vit_small_patch16_dinov3", num_classes=3, **SMALL).eval()
    structure = find_structure(model, "heads")
    mask = Mask.random(structure, 0.5, seed=0)
    prune_model(model, mask, structure=structure)
    assert isinstance(model.blocks[0].attn, NarrowEvaAttention)
    assert "in the place of EvaAttention" in repr(model)
    save_pruned(model, tmp_path / "m", mask=mask, structure=structure)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_pruned(tmp_path / "m").model(images), model(images))
    program = torch.export.export(model, (images,))
    close(program.module()(images), model(images))


class Encoder(nn.Module):
    """torch's own attention, as its users call it."""

    def __init__(self, batch_first: bool, bias: bool, **call: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(24, 4, bias=bias, batch_first=batch_first)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, **self.call)[0]


MASK = torch.ones(5, 5, dtype=torch.bool).triu(1)
PADDING = torch.zeros(5, 5, dtype=torch.bool)
PADDING[1, 3:] = True


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"need_weights": False},
        {"attn_mask": MASK},
        {"key_padding_mask": PADDING, "need_weights": False},
        {"attn_mask": MASK.double() * -3, "key_padding_mask": PADDING.double() * -2},
    ],
    ids=["weights", "fused", "mask", "padding", "both"],
)
@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention(call: dict[str, Any], batch_first: bool) -> None:
    model = Encoder(batch_first, bias=batch_first, **call).double().eval()
    structure = find_structure(model, "heads")
    mask = Mask({"attention": torch.tensor([True, False, True, True])})
    x = torch.randn(5, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    structure.verify(model, images=x)
    expected = masked_model(model, mask, structure=structure)(x)
    cut: Any = prune_model(copy.deepcopy(model), mask, structure=structure)
    assert isinstance(cut.attention, NarrowMultiheadAttention)
    close(cut(x), expected)
    full = prune_model(copy.deepcopy(model), Mask.full(structure), structure=structure)
    assert type(full.attention) is nn.MultiheadAttention


def test_multihead_attention_in_torchs_own_encoder() -> None:
    """Its layers have a way of their own in eval mode, which knows one width only."""
    layer = nn.TransformerEncoderLayer(24, 4, 32, batch_first=True, dropout=0).double().eval()
    structure = find_structure(layer, "heads")
    mask = Mask({"self_attn": torch.tensor([True, False, False, True])})
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    structure.verify(layer, images=x)
    with torch.no_grad():
        close(
            prune_model(copy.deepcopy(layer), mask, structure=structure)(x),
            masked_model(layer, mask, structure=structure)(x),
        )


def test_what_cannot_be_told_from_the_module_is_refused() -> None:
    one = nn.Sequential(nn.MultiheadAttention(24, 4, add_bias_kv=True))
    with pytest.raises(UnsupportedModelError, match="expected one packed projection"):
        find_structure(one)
    model = Encoder(True, True).eval()
    find_structure(model).verify(model, images=torch.randn(5, 5, 24))
    prune_model(model, Mask({"attention": torch.tensor([True, False, True, True])}))
    model.call["attn_mask"] = torch.zeros(20, 5, 5)
    with pytest.raises(ValueError, match=r"attn_mask: expected \[L, S\], as some heads were cut"):
        model(torch.randn(5, 5, 24))
    shared: Any = import_timm().create_model(
        "beit_base_patch16_224", num_classes=3, use_rel_pos_bias=False, **SMALL
    )
    with pytest.raises(UnsupportedModelError, match="one may be shared by all blocks"):
        find_structure(shared, "heads")
