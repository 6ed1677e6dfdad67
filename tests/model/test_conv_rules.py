"""Blocks of convolutional networks: the cut block is the masked one, whatever lies between its convolutions."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tiny import tiny_images
from torch import Tensor, nn

from mvp_ext.model.families import find_structure
from mvp_ext.model.families.chain import layers_along
from mvp_ext.model.mask import Mask
from mvp_ext.model.structure import Attribute, Slice, Structure, UnsupportedModelError
from mvp_ext.model.surgery import expand_state, masked_model, prune_model
from mvp_ext.pruning.scores import ON_ACTIVATIONS, score_units
from mvp_ext.timm_compat import import_timm

pytestmark = pytest.mark.usefixtures("one_thread", "no_trial")

timm = import_timm()
import torchvision  # noqa: E402  after timm: see timm_compat

models, layers = timm.models, timm.layers
blocks = models._efficientnet_blocks
SE = partial(blocks.SqueezeExcite, rd_ratio=0.25, gate_layer="hard_sigmoid")
GROUP_NORM = partial(layers.GroupNormAct, num_groups=8)


# Each takes [B, 16, 8, 8].
INNER: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: models.resnet.BasicBlock(16, 16, attn_layer=layers.SEModule),
    "basic blurred": lambda: models.resnet.BasicBlock(16, 16, 2, _pool(16), aa_layer=layers.BlurPool2d),
    "bottleneck": lambda: models.resnet.Bottleneck(16, 4),
    "bottleneck of groups": lambda: models.resnet.Bottleneck(16, 4, cardinality=4, base_width=32),
    "bottleneck of groups, blurred": lambda: models.resnet.Bottleneck(
        16, 4, 2, _pool(16), cardinality=4, base_width=32, aa_layer=layers.BlurPool2d
    ),
    "pre-activation": lambda: models.resnetv2.PreActBottleneck(
        16, 16, 0.5, conv_layer=layers.create_conv2d, norm_layer=layers.BatchNormAct2d
    ),
    "pre-activation with group norms": lambda: models.resnetv2.PreActBottleneck(
        16,
        32,
        1.0,
        conv_layer=layers.create_conv2d,
        norm_layer=GROUP_NORM,
        proj_layer=models.resnetv2.DownsampleConv,
    ),
    "dla": lambda: models.dla.DlaBottleneck(16, 16, cardinality=2, base_width=32),
    "regnet": lambda: models.regnet.Bottleneck(16, 16, group_size=4, drop_block=nn.Identity),
    "regnet pre-activation": lambda: models.regnet.PreBottleneck(16, 16, group_size=2),
    "byobnet": lambda: models.byobnet.BottleneckBlock(
        16, 16, group_size=2, extra_conv=True, layers=models.byobnet.LayerFn(attn=layers.EffectiveSEModule)
    ),
    "inverted": lambda: blocks.InvertedResidual(16, 16, exp_ratio=3, se_layer=SE, act_layer=nn.Hardswish),
    "inverted, padded like TensorFlow": lambda: blocks.InvertedResidual(
        16, 24, stride=2, exp_ratio=2, pad_type="same", aa_layer=layers.BlurPool2d
    ),
    "inverted, groups of two": lambda: blocks.InvertedResidual(
        16, 16, exp_ratio=2, group_size=2, se_layer=SE
    ),
    "inverted with group norms": lambda: blocks.InvertedResidual(16, 16, exp_ratio=2, norm_layer=GROUP_NORM),
    "inverted with sigmoids": lambda: blocks.InvertedResidual(
        16, 16, exp_ratio=2, se_layer=SE, act_layer=nn.Sigmoid
    ),
    "separable behind space to depth": lambda: blocks.DepthwiseSeparableConv(16, 24, s2d=1),
    "universal inverted": lambda: blocks.UniversalInvertedResidual(16, 16, 3, 3, exp_ratio=2),
    "edge": lambda: blocks.EdgeResidual(16, 24, exp_ratio=2, se_layer=SE),
    "rexnet": lambda: models.rexnet.LinearBottleneck(16, 24, 1, exp_ratio=2, se_ratio=0.25),
    "coatnet": lambda: models.maxxvit.MbConvBlock(16, 16),
    "tiny_vit": lambda: models.tiny_vit.MBConv(16, 16, 2.0, nn.GELU, 0.0),
    "efficientvit": lambda: models.efficientvit_mit.MBConv(
        16, 16, use_bias=(True, True, False), norm_layer=(None, None, nn.BatchNorm2d)
    ),
    "metaformer": lambda: models.metaformer.SepConv(16, bias=True),
    "xception": lambda: models.xception_aligned.XceptionModule(16, 16, norm_layer=nn.BatchNorm2d),
    "res2net": lambda: models.res2net.Bottle2neck(16, 4, base_width=64, norm_layer=nn.BatchNorm2d),
    "res2net at the start of a stage": lambda: models.res2net.Bottle2neck(
        16, 4, 2, _pool(16), base_width=64, norm_layer=nn.BatchNorm2d
    ),
    "selective kernels": lambda: models.sknet.SelectiveKernelBasic(16, 16),
    "selective kernels in a bottleneck": lambda: models.sknet.SelectiveKernelBottleneck(
        16, 4, base_width=128, sk_kwargs={"split_input": True}
    ),
    "split attention": lambda: models.resnest.ResNestBottleneck(
        16, 4, radix=2, base_width=128, avd=True, is_first=True
    ),
    "ghost": lambda: models.ghostnet.GhostBottleneck(16, 32, 24, stride=2, se_ratio=0.25),
    "torchvision bottleneck": lambda: torchvision.models.resnet.Bottleneck(16, 4, groups=4, base_width=128),
    "torchvision mobilenet_v2": lambda: torchvision.models.mobilenetv2.InvertedResidual(16, 16, 1, 3),
    "torchvision mobilenet_v3": lambda: torchvision.models.mobilenetv3.InvertedResidual(
        torchvision.models.mobilenetv3.InvertedResidualConfig(16, 3, 32, 16, True, "HS", 1, 1, 1.0),
        nn.BatchNorm2d,
    ),
    "torchvision regnet": lambda: torchvision.models.regnet.ResBottleneckBlock(
        16, 16, 1, nn.BatchNorm2d, nn.ReLU, group_width=4, se_ratio=0.25
    ),
}
MLPS: dict[str, Callable[[], nn.Module]] = {
    "convnext": lambda: models.convnext.ConvNeXtBlock(16, mlp_ratio=2, conv_mlp=True),
    "convnextv2": lambda: models.convnext.ConvNeXtBlock(16, mlp_ratio=2, use_grn=True, ls_init_value=None),
    "convnextv2 of convolutions": lambda: models.convnext.ConvNeXtBlock(
        16, mlp_ratio=2, conv_mlp=True, use_grn=True
    ),
    "poolformer": lambda: models.metaformer.MetaFormerBlock(
        16, mlp_act=models.metaformer.StarReLU, norm_layer=layers.GroupNorm1
    ),
    "inception_next": lambda: models.inception_next.MetaNeXtBlock(16),
    "efficientformer": lambda: models.efficientformer.ConvMlpWithNorm(16, 32, 16),
    "efficientformerv2": lambda: models.efficientformer_v2.ConvMlpWithNorm(16, 32, 16, mid_conv=True),
    "fastvit": lambda: models.fastvit.ConvMlp(16, 32, 16),
    "repvit": lambda: models.repvit.RepVitMlp(16, 32, nn.GELU),
    "levit": lambda: nn.Sequential(nn.Flatten(2), models.levit.LevitMlp(64, 32, 64)),
    "levit of convolutions": lambda: models.levit.LevitMlp(16, 32, 16, use_conv=True),
    "visformer": lambda: models.visformer.SpatialMlp(16, spatial_conv=True),
    "starnet": lambda: models.starnet.Block(16),
    "torchvision convnext": lambda: torchvision.models.convnext.CNBlock(16, 1.0, 0.0),
}
# The same ideas under other names.
OTHER_INNER: dict[str, Callable[[], nn.Module]] = {
    "resnetv2": lambda: models.resnetv2.Bottleneck(
        16, 16, conv_layer=layers.create_conv2d, norm_layer=layers.BatchNormAct2d, act_layer=nn.ReLU
    ),
    "resnetv2 basic": lambda: models.resnetv2.PreActBasic(
        16, 16, 1.0, conv_layer=layers.create_conv2d, norm_layer=layers.BatchNormAct2d
    ),
    "senet": lambda: models.senet.SEBottleneck(16, 8, 1, 4, downsample=nn.Conv2d(16, 32, 1)),
    "senet basic": lambda: models.senet.SEResNetBlock(16, 16, 1, 4),
    "tresnet": lambda: models.tresnet.Bottleneck(16, 4),
    "dla basic": lambda: models.dla.DlaBasic(16, 16),
    "byobnet basic": lambda: models.byobnet.BasicBlock(16, 16, group_size=None),
    "byobnet dark": lambda: models.byobnet.DarkBlock(16, 16),
    "byobnet edge": lambda: models.byobnet.EdgeBlock(16, 16, bottle_ratio=2.0),
    "byobnet attention": lambda: models.byobnet.SelfAttnBlock(
        16,
        16,
        extra_conv=True,
        layers=models.byobnet.LayerFn(self_attn=partial(layers.lambda_layer.LambdaLayer, r=3)),
    ),
    "repghost": lambda: models.repghost.RepGhostBottleneck(16, 32, 24, stride=2, se_ratio=0.25),
    "efficientvit conv": lambda: models.efficientvit_mit.ConvBlock(16, 16),
    "efficientvit fused": lambda: models.efficientvit_mit.FusedMBConv(16, 16),
    "efficientvit merging": lambda: models.efficientvit_msra.PatchMerging(16, 16),
    "shvit": lambda: models.shvit.PatchMerging(16, 16),
    "tiny_vit merging": lambda: models.tiny_vit.PatchMerging(16, 16, nn.GELU),
    "vitamin": lambda: models.vitamin.MbConvLNBlock(16, 16),
    "torchvision basic": lambda: torchvision.models.resnet.BasicBlock(16, 16),
    "torchvision mnasnet": lambda: torchvision.models.mnasnet._InvertedResidual(16, 16, 3, 1, 3),
    "torchvision efficientnet": lambda: torchvision.models.efficientnet.MBConv(
        torchvision.models.efficientnet.MBConvConfig(3, 3, 1, 16, 16, 1, 1.0, 1.0), 0.0, nn.BatchNorm2d
    ),
    "torchvision efficientnet_v2": lambda: torchvision.models.efficientnet.FusedMBConv(
        torchvision.models.efficientnet.FusedMBConvConfig(3, 3, 1, 16, 16, 1), 0.0, nn.BatchNorm2d
    ),
    "torchvision maxvit": lambda: torchvision.models.maxvit.MBConv(
        16, 16, 4, 0.25, 1, nn.GELU, nn.BatchNorm2d, 0.0
    ),
}
OTHER_MLPS: dict[str, Callable[[], nn.Module]] = {
    "timm": lambda: layers.ConvMlp(16, 32, 16, norm_layer=nn.BatchNorm2d),
    "efficientvit neurons": lambda: models.efficientvit_msra.ConvMlp(16, 32),
    "shvit neurons": lambda: models.shvit.FFN(16, 32),
    "swiftformer": lambda: models.swiftformer.Mlp(16, 32),
    "swiftformer encoder": lambda: models.swiftformer.ConvEncoder(16, 32),
    "swiftformer local": lambda: models.swiftformer.LocalRepresentation(16),
    "fasternet": lambda: models.fasternet.MLPBlock(16, 4, 2.0, 0.0, 0.1),
    "tiny_vit neurons": lambda: nn.Sequential(nn.Flatten(2), models.tiny_vit.NormMlp(64, 32)),
}
BLOCKS = {**INNER, **MLPS}
OTHERS = {**OTHER_INNER, **OTHER_MLPS}


def _pool(channels: int) -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(channels, channels, 1))


def randomised(module: nn.Module) -> nn.Module:
    """In double precision, with values that hide nothing: fresh norms have shift 0, and some gains are 0 or 1e-6."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if not tensor.is_floating_point():
                continue
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif tensor.numel() == max(tensor.shape, default=1):
                tensor.normal_(0.7, 0.5)
            else:
                tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5)
    return module.double()


def block_of(kind: str) -> tuple[nn.Module, Structure]:
    """A network of one block, and its structure."""
    network = randomised(nn.Sequential({**BLOCKS, **OTHERS}[kind]()))
    return network, find_structure(network, "inner" if kind in {**INNER, **OTHER_INNER} else "mlp")


def one_left(structure: Structure) -> Mask:
    return Mask({layer.name: torch.arange(layer.units) == layer.units // 2 for layer in structure})


def assert_equal(one: nn.Module, other: nn.Module, x: Tensor, rtol: float = 1e-9) -> None:
    """In eval and train mode, and in the gradient of x. Changes neither."""
    for training in (False, True):
        results = []
        for network in (copy.deepcopy(one).train(training), copy.deepcopy(other).train(training)):
            images = x.clone().requires_grad_()
            y = network(images)
            y.square().sum().backward()
            assert images.grad is not None
            results.append((y.detach(), images.grad))
        for a, b in zip(*results, strict=True):
            assert float((a - b).abs().max()) <= rtol * float(a.abs().max())


@pytest.mark.parametrize("kind", BLOCKS)
def test_the_cut_block_is_the_masked_one(kind: str) -> None:
    dense, structure = block_of(kind)
    x = torch.randn(3, 16, 8, 8, dtype=torch.double)
    masks = [Mask.random(structure, keep, seed, align=1) for seed, keep in enumerate((0.7, 0.3))]
    for mask in (*masks, one_left(structure)):
        masked = masked_model(dense, mask)
        cut = prune_model(copy.deepcopy(dense), mask)
        assert list(cut.state_dict()) == list(dense.state_dict())
        assert_equal(cut, masked, x)
        if mask.keep < 1:
            assert not torch.allclose(masked.eval()(x), dense.eval()(x), rtol=1e-3)
        # Again: the layers are the same ones, also where one group is left of many.
        again = find_structure(cut, structure.scope)
        assert again.names == structure.names
        assert again.units_per_layer == tuple(mask.kept.values())
        second = Mask.random(again, 0.5, seed=7, align=1)
        masked = masked_model(cut, second)
        assert_equal(prune_model(cut, second), masked, x)
        at_once = prune_model(copy.deepcopy(dense), Mask.compose(mask, second)).state_dict()
        assert all(torch.equal(at_once[name], tensor) for name, tensor in cut.state_dict().items())


@pytest.mark.parametrize("kind", OTHERS)
def test_others_like_them(kind: str) -> None:
    dense, structure = block_of(kind)
    mask = Mask.random(structure, 0.5, seed=0, align=1)
    masked = masked_model(dense, mask)
    cut = prune_model(copy.deepcopy(dense), mask)
    assert list(cut.state_dict()) == list(dense.state_dict())
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in dense.parameters())
    assert_equal(cut, masked, torch.randn(3, 16, 8, 8, dtype=torch.double))


@pytest.mark.parametrize("kind", BLOCKS)
def test_sizes_say_what_the_tensors_are(kind: str) -> None:
    network, structure = block_of(kind)
    mask = Mask.random(structure, 0.5, seed=0, align=1)
    dense = network.state_dict()
    prune_model(network, mask)
    small = network.state_dict()
    assert {n for n in dense if dense[n].shape != small[n].shape} == set(mask.index_in(structure))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
        elif isinstance(module, nn.BatchNorm2d):
            assert module.weight.shape == module.running_mean.shape == (module.num_features,)
        elif isinstance(module, nn.GroupNorm):
            assert module.weight.shape == (module.num_channels,)
            assert module.num_channels % module.num_groups == 0
    full = expand_state(small, structure, mask)
    assert {n: t.shape for n, t in full.items()} == {n: t.shape for n, t in dense.items()}


@pytest.mark.parametrize("kind", BLOCKS)
def test_probes_read_the_units(kind: str) -> None:
    """One place, or one block of channels, a unit; zero at removed ones, but for activations that are not 0 at 0."""
    network, structure = block_of(kind)
    mask = Mask.random(structure, 0.5, seed=0, align=1)
    masked, seen = masked_model(network, mask), {}
    for layer in structure:
        assert layer.probe.side == "input"
        masked.get_submodule(layer.probe.module).register_forward_pre_hook(
            lambda _, x, name=layer.name: seen.__setitem__(name, x[0].clone())
        )
    with torch.no_grad():
        masked.eval()(torch.randn(2, 16, 8, 8, dtype=torch.double))
    for layer in structure:
        a = seen[layer.name].movedim(layer.probe.dim, 0).reshape(layer.units, -1)
        assert layer.probe.heads == (None if layer.slices[0].block == 1 else layer.units)
        kept = mask.layers[layer.name]
        alive = a.std(1) > 1e-12
        assert not alive[~kept].any()
        assert alive[kept].any()


def test_units_are_whole_groups() -> None:
    structure = block_of("regnet")[1]
    assert structure.names == ("0.conv1.conv",)
    layer = structure["0.conv1.conv"]
    assert layer.units == 4
    assert layer.attributes == (Attribute("0.conv2.conv", "groups"),)
    assert Slice("0.conv1.conv.weight", 0, 4) in layer.slices
    assert Slice("0.conv2.conv.weight", 0, 4) in layer.slices
    assert Slice("0.se.fc1.weight", 1, 4) in layer.slices
    assert Slice("0.se.fc2.bias", 0, 4) in layer.slices
    assert layer.slices[-1] == Slice("0.conv3.conv.weight", 1, 4)
    # Kept channels, not kept groups, are multiples of 8.
    assert Mask.random(structure, 0.5, seed=0).kept["0.conv1.conv"] == 2
    assert layer.multiple(8) == 2
    assert layer.multiple(1) == 1


@pytest.mark.parametrize("convert", [layers.convert_sync_batchnorm, layers.freeze_batch_norm_2d])
@pytest.mark.parametrize(
    "kind", ["basic", "bottleneck of groups", "inverted", "regnet", "torchvision bottleneck"]
)
def test_frozen_and_synchronised_batch_norms(kind: str, convert: Callable[[nn.Module], nn.Module]) -> None:
    dense = convert(block_of(kind)[0]).double().eval()
    assert not any(type(module) in (nn.BatchNorm2d, layers.BatchNormAct2d) for module in dense.modules())
    structure = find_structure(dense, "inner")
    mask = Mask.random(structure, 0.5, seed=0, align=1)
    masked = masked_model(dense, mask)
    cut = prune_model(copy.deepcopy(dense), mask)
    x = torch.randn(2, 16, 8, 8, dtype=torch.double)
    torch.testing.assert_close(cut(x), masked(x), rtol=1e-9, atol=1e-9)
    for module in cut.modules():
        if hasattr(module, "running_mean"):
            assert module.num_features == module.weight.numel()


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("kind", ["basic blurred", "bottleneck of groups, blurred"])
def test_scope_all_of_blocks_with_groups_and_blurs(kind: str, freeze: bool) -> None:
    dense = block_of(kind)[0]
    dense = layers.freeze_batch_norm_2d(dense).double() if freeze else dense
    structure = find_structure(dense, "all")
    x = torch.randn(3, 16, 8, 8, dtype=torch.double)
    for mask in (Mask.random(structure, 0.5, seed=0, align=1), one_left(structure)):
        masked = masked_model(dense, mask)
        assert_equal(prune_model(copy.deepcopy(dense), mask), masked, x)


class Chain(nn.Module):
    """Parts one after the other, as a rule of ours sees them."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.parts(x)


def refusal(*parts: nn.Module) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        layers_along("inner", ("parts",), "0", Chain(*parts))
    return str(caught.value)


def conv(**kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(16, 16, 1, **kwargs)


@pytest.mark.parametrize(
    "between",
    [
        layers.EcaModule(16),
        layers.LayerNorm2d(16),
        layers.EvoNorm2dS0(16),
        nn.PReLU(16),
        nn.PixelShuffle(1),
        nn.Softmax2d(),
        layers.MixedConv2d(16, 16, [3, 5], depthwise=True),
        layers.CondConv2d(16, 16, 3, groups=16),
    ],
    ids=lambda part: type(part).__name__,
)
def test_what_mixes_channels_is_in_the_way(between: nn.Module) -> None:
    message = refusal(conv(), between, conv())
    assert message.startswith("0.parts.1: expected a part that keeps channels apart")
    assert type(between).__name__ in message


def test_what_else_is_in_the_way() -> None:
    std = layers.StdConv2d(16, 16, 1)
    assert "0.parts.1: expected a plain Conv2d, got StdConv2d" in refusal(conv(), std)
    assert "0.parts.1: expected a plain Conv2d, got ScaledStdConv2d" in refusal(
        std, layers.ScaledStdConv2d(16, 16, 1)
    )
    mine = conv()
    mine.forward = lambda x: x
    assert "0.parts.0: expected a plain Conv2d" in refusal(mine, conv())
    assert "one group of 16" in refusal(conv(), layers.GroupNorm1(16), conv())
    assert "one group of 16" in refusal(conv(), nn.GroupNorm(1, 16), conv())
    assert "0.parts.1.act: expected an activation" in refusal(
        conv(), layers.BatchNormAct2d(16, act_layer=nn.Softmax2d, act_kwargs={}), conv()
    )
    squeeze = layers.SEModule(16, gate_layer=nn.Softmax2d)
    assert "0.parts.1.gate: expected an activation" in refusal(conv(), squeeze, conv())
    assert "expected two convolutions without groups, one after the other, got 1" in refusal(
        conv(groups=16), conv()
    )
    grn = layers.grn.GlobalResponseNorm(16, channels_last=False)
    assert "expected units that are zero once removed" in refusal(conv(), nn.Sigmoid(), grn, conv())
    assert "along dimension -1" in refusal(conv(), layers.grn.GlobalResponseNorm(16), conv())
    assert "0.parts.1: expected an activation between linear layers, got BatchNorm1d" in refusal(
        nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 16)
    )


def test_standardised_filters_can_be_units() -> None:
    """Of convolutions that are standardised over their inputs, whole filters go; those that read are plain."""
    for std in (layers.StdConv2d, layers.ScaledStdConv2d):
        parts = std(16, 16, 1), nn.ReLU(), std(16, 16, 3, padding=1, groups=16), conv()
        dense = randomised(nn.Sequential(Chain(*parts)))
        found = Structure("mine", "inner", None, tuple(layers_along("inner", ("parts",), "0", dense[0])))
        mask = Mask.random(found, 0.5, seed=0, align=1)
        masked = masked_model(dense, mask, structure=found)
        cut = prune_model(copy.deepcopy(dense), mask, structure=found)
        assert_equal(cut, masked, torch.randn(2, 16, 8, 8, dtype=torch.double))


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("resnetv2_50x1_bit", r"stages\.0\.blocks\.0\.conv2: expected a plain Conv2d, got StdConv2d"),
        ("nf_resnet50", r"stages\.0\.0\.conv2: expected a plain Conv2d, got ScaledStdConv2d"),
        ("test_efficientnet_evos", r"bn1: .* got EvoNorm2dS0"),
        ("lcnet_050", r"blocks\.0\.0: expected two convolutions"),
    ],
)
def test_refuses_by_the_name_of_the_part(name: str, left: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Torch-Pruning, which may find more, is not installed."""
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(UnsupportedModelError, match=left):
        find_structure(model)


WHOLE = [
    ("test_efficientnet", "inner"),
    ("test_efficientnet_gn", "inner"),
    ("test_convnext3", "mlp"),
    ("test_coatnet", "inner+mlp"),
]


@pytest.mark.parametrize(("name", "scope"), WHOLE)
def test_whole_networks(name: str, scope: str) -> None:
    kwargs = {"img_size": 64} if name == "test_coatnet" else {}
    dense = randomised(timm.create_model(name, num_classes=5, **kwargs))
    structure = find_structure(dense, scope)
    x = tiny_images(dense, batch=2).double()
    for mask in (Mask.random(structure, 0.5, seed=0, align=1), one_left(structure)):
        masked = masked_model(dense, mask)
        cut = prune_model(copy.deepcopy(dense), mask)
        assert list(cut.state_dict()) == list(dense.state_dict())
        assert_equal(cut, masked, x)


@pytest.mark.parametrize("criterion", [*ON_ACTIVATIONS, "weight_taylor", "l1", "fpgm", "synflow"])
@pytest.mark.parametrize("kind", ["regnet", "inverted with group norms", "convnextv2 of convolutions"])
def test_scores(kind: str, criterion: str) -> None:
    """A unit that was zeroed has no importance; the others have. Units are groups, filters, neurons."""
    parts = nn.Conv2d(3, 16, 3), BLOCKS[kind](), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)
    dense = randomised(nn.Sequential(*parts)).float()
    structure = find_structure(dense)
    mask = Mask.random(structure, 0.5, seed=0, align=1)
    batch = torch.randn(2, 3, 16, 16), torch.tensor([0, 3])
    scores = score_units(masked_model(dense, mask), structure, criterion, [batch], image_shape=(3, 16, 16))
    for layer in structure:
        kept = mask.layers[layer.name]
        assert scores[layer.name].shape == (layer.units,)
        assert scores[layer.name][kept].max() > 0
        if criterion != "fpgm":
            assert scores[layer.name][~kept].abs().max() == 0
