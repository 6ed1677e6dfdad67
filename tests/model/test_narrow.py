"""Ours in the place of modules that cannot be narrower: the same numbers, names and parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_transformer_rules import MODELS, assert_probes_read_the_units, assert_same, drawn, images, tiny
from torch import Tensor, nn

from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.narrow import narrow
from mvp_ext.model.structure import UnsupportedModelError
from mvp_ext.model.surgery import masked_model, prune_model
from mvp_ext.pruning.scores import score_units
from mvp_ext.timm_compat import import_timm

pytestmark = pytest.mark.usefixtures("one_thread", "no_trial")


def timms() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Attentions that no tiny model above has, and the shape of what they read."""
    models = import_timm().models
    return {
        "gcvit": (models.gcvit.WindowAttentionGlobal(32, 4, (2, 2), use_global=False), (2, 4, 32)),
        "metaformer": (models.metaformer.Attention(32, head_dim=8), (2, 4, 32)),
        "davit": (models.davit.WindowAttention(32, (2, 2), 4), (2, 4, 32)),
        "volo": (models.volo.Attention(32, 4), (2, 2, 2, 32)),
        "volo class": (models.volo.ClassAttention(32, 4), (2, 5, 32)),
        "crossvit": (models.crossvit.CrossAttention(32, 4), (2, 5, 32)),
        "edgenext": (models.edgenext.CrossCovarianceAttn(32, 4), (2, 5, 32)),
        "tiny_vit": (
            models.tiny_vit.Attention(32, 8, num_heads=4, attn_ratio=2, resolution=(2, 2)),
            (2, 4, 32),
        ),
        "efficientformer": (models.efficientformer.Attention(32, 8, 4, 2, 2), (2, 4, 32)),
        "tnt": (models.tnt.Attention(32, 16, 4), (2, 5, 32)),
        "hiera": (models.hiera.MaskUnitAttention(32, 32, 4, q_stride=2, window_size=2), (2, 8, 32)),
    }


@pytest.mark.parametrize("name", timms())
@torch.no_grad()
def test_an_attention_alone_equals_the_masked_one_in_eval_and_again(name: str) -> None:
    attn, shape = timms()[name]
    # In eval mode and having run: some keep what they looked up.
    model = drawn(nn.Sequential(attn)).eval()
    x = torch.randn(shape, dtype=torch.float64)
    model(x)
    for keep in (0.75, 0.3):
        structure = find_structure(model, "heads")
        mask = Mask.random(structure, keep, 2)
        masked = masked_model(model, mask)
        prune_model(model, mask)
        torch.testing.assert_close(model(x), masked(x))
        masked = masked.train()
        model.train()
        torch.testing.assert_close(model(x), masked(x))
        model.eval()
        model(x)


def test_ours_has_the_same_parts_and_tensors_and_says_whose() -> None:
    model: Any = tiny("swinv2_tiny_window8_256")
    attn = model.layers[0].blocks[0].attn
    ours = narrow(attn)
    assert narrow(ours) is ours
    assert isinstance(ours, type(attn))
    before, after = attn.state_dict(keep_vars=True), ours.state_dict(keep_vars=True)
    assert before.keys() == after.keys()
    assert all(after[name] is tensor for name, tensor in before.items())
    assert "heads=2, in the place of WindowAttention" in repr(ours)
    # What is done to ours does not reach the other.
    ours._parameters["logit_scale"] = None
    assert attn.logit_scale is not None


def test_there_is_none_of_ours() -> None:
    with pytest.raises(UnsupportedModelError, match="Linear: expected a module that can be narrower"):
        narrow(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "name", ["vit_small_patch16_dinov3", "beit_base_patch16_224", "swinv2_tiny_window8_256"]
)
def test_ours_can_be_exported_and_traced(name: str) -> None:
    model = tiny(name).eval()
    prune_model(model, Mask.random(find_structure(model, MODELS[name][1]), 0.5, 1, align=1))
    x = images()
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.jit.trace(model, x)(x), expected)
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)


class Sees(nn.Module):
    """torch's attention as vit_b_16 and CLIP use it, on images of 32 px."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.attn = nn.MultiheadAttention(32, 4, **kwargs)
        self.head = nn.Linear(32, 5)
        self.how: dict[str, Any] = {"need_weights": False}

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        y = x if self.attn.batch_first else x.transpose(0, 1)
        y = self.attn(y, y, y, **self.how)[0]
        return self.head((x + (y if self.attn.batch_first else y.transpose(0, 1))).mean(1))


@pytest.mark.parametrize("kwargs", [{}, {"batch_first": True}, {"batch_first": True, "bias": False}])
@pytest.mark.parametrize(
    "how",
    [
        {"need_weights": False},
        {"need_weights": True},
        {"attn_mask": torch.ones(16, 16).triu(1).bool(), "need_weights": False},
        {
            "attn_mask": torch.randn(16, 16).double(),
            "key_padding_mask": torch.arange(48).view(3, 16) % 5 == 1,
        },
    ],
)
def test_torchs_attention(kwargs: dict[str, Any], how: dict[str, Any]) -> None:
    model: Any = drawn(Sees(**kwargs))
    model.how = how
    for keep in (0.75, 0.3):
        mask = Mask.random(find_structure(model), keep, 1)
        masked = masked_model(model, mask)
        names = list(model.state_dict())
        prune_model(model, mask)
        assert list(model.state_dict()) == names
        assert_same(masked, model, images())
    assert model.attn.num_heads == 1


def test_torchs_attention_of_other_keys_and_its_weights() -> None:
    attn = drawn(nn.MultiheadAttention(32, 4, batch_first=True))
    ours = narrow(attn)
    query, key, value = (torch.randn(2, n, 32, dtype=torch.float64) for n in (3, 5, 5))
    for average in (True, False):
        for expected, got in zip(
            attn(query, key, value, average_attn_weights=average),
            ours(query, key, value, average_attn_weights=average),
            strict=True,
        ):
            torch.testing.assert_close(got, expected)
        for expected, got in zip(
            attn(query[0], key[0], value[0]), ours(query[0], key[0], value[0]), strict=True
        ):
            torch.testing.assert_close(got, expected)
    with pytest.raises(ValueError, match=r"attn_mask: expected shape \[L, S\], got \(8, 3, 5\)"):
        ours(query, key, value, attn_mask=torch.zeros(8, 3, 5))


@torch.no_grad()
def test_torchs_encoder_layer_calls_ours() -> None:
    """In eval mode it computes all by itself, from numbers of the attention, unless these say that it cannot."""
    model = drawn(nn.Sequential(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True))).eval()
    mask = Mask.random(find_structure(model, "heads"), 0.5, 1)
    masked = masked_model(model, mask).eval()
    prune_model(model, mask)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    torch.testing.assert_close(model.eval()(x), masked(x))


def test_torchs_attention_is_scored_and_is_itself_again() -> None:
    model: Any = drawn(Sees(batch_first=True)).float()
    structure = find_structure(model)
    before = model.attn
    batches = [(images().float(), torch.tensor([0, 1, 2]))]
    for criterion in ("taylor", "activation", "l1"):
        (scores,) = score_units(model, structure, criterion, batches).values()
        assert scores.shape == (4,)
        assert (scores > 0).all()
    assert model.attn is before
    mask = Mask.random(structure, 0.5, 0)
    assert_probes_read_the_units(masked_model(model, mask).eval(), structure, mask, images().float())


@pytest.mark.parametrize("kwargs", [{"kdim": 8}, {"add_bias_kv": True}, {"add_zero_attn": True}])
def test_torchs_attention_of_another_kind_stays_whole(kwargs: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="expected one projection of q, k and v"):
        find_structure(nn.Sequential(nn.MultiheadAttention(32, 4, **kwargs)))
