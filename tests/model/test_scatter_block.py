"""ScatterBlock against the timm block that it replaces, with its last convolution's other filters zeroed."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.scatter_block import ScatterBlock
from mvp_ext.model.surgery import masked_model, prune_model

pytestmark = pytest.mark.usefixtures("one_thread")


def pair(path: str, **kwargs: Any) -> tuple[ScatterBlock, nn.Module, Tensor]:
    """One pruned block of test_resnet, the masked dense block, and an input for both."""
    model = tiny_model("test_resnet", **kwargs)
    mask = Mask.random(find_structure(model, "all"), 0.4, seed=0, align=1)
    masked = masked_model(model, mask)
    block: Any = prune_model(model, mask).get_submodule(path)
    return block, masked.get_submodule(path), torch.randn(4, block.conv1.in_channels, 9, 9)


@pytest.mark.parametrize("kwargs", [{}, {"act_layer": nn.SiLU}, {"drop_path_rate": 0.5}])
@pytest.mark.parametrize("path", ["layer1.0", "layer2.0", "layer3.0"])  # plain, with a shortcut, Bottleneck
def test_equals_the_masked_block(path: str, kwargs: dict[str, Any]) -> None:
    block, masked, x = pair(path, **kwargs)
    assert isinstance(block, ScatterBlock)
    for training in (False, True):
        results = []
        for each in (copy.deepcopy(block).train(training), copy.deepcopy(masked).train(training)):
            torch.manual_seed(3)  # stochastic depth draws the same examples for both
            images = x.clone().requires_grad_()
            y = each(images)
            y.square().sum().backward()
            assert all(p.grad is not None for p in each.parameters())
            results.append((y.detach(), images.grad))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            torch.manual_seed(3)
            got = copy.deepcopy(block).train(training)(x)
        torch.testing.assert_close(got, results[0][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("path", ["layer1.0", "layer3.0"])
def test_transforms_and_tensors_without_memory(path: str, training: bool) -> None:
    """Forward-mode AD equals the masked block's; meta and fake tensors get the result's shape and strides."""
    block, masked, x = pair(path)
    if not training:  # statistics are not updated in a transform
        tangents = [torch.func.jvp(each.eval(), (x,), (x.cos(),)) for each in (block, masked)]
        torch.testing.assert_close(*tangents, rtol=1e-4, atol=1e-4)
    block.train(training)
    y = copy.deepcopy(block)(x)
    state = block.state_dict()
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(tensor) for name, tensor in state.items()}
        faked = torch.func.functional_call(block, fakes, (mode.from_tensor(x),))
    for got in (block.to("meta")(x.to("meta")), faked):
        assert (got.shape, got.dtype, got.stride()) == (y.shape, y.dtype, y.stride())


def test_running_statistics_follow_in_train_mode() -> None:
    block, masked, x = pair("layer2.0")
    block.train()(x)
    masked.train()(x)
    last: Any = masked.bn2
    torch.testing.assert_close(block.bn2.running_mean, last.running_mean[block.kept])  # type: ignore[union-attr]
    torch.testing.assert_close(block.bn2.running_var, last.running_var[block.kept])  # type: ignore[union-attr]


def test_a_frozen_norm_in_a_training_block_stays_frozen() -> None:
    block, _, x = pair("layer2.0")
    block.train()
    block.bn2.eval()
    before = block.bn2.running_mean.clone()  # type: ignore[union-attr, operator]
    block(x)
    assert torch.equal(block.bn2.running_mean, before)  # type: ignore[arg-type]


def test_a_hook_on_the_norm_sees_its_output_and_changes_nothing() -> None:
    """Scores of scope `all` are read there, also in eval mode, where the norm is otherwise folded into the addition."""
    block, _, x = pair("layer2.0")
    block.eval()
    seen: list[Tensor] = []
    with torch.no_grad():
        expected = block(x)
        block.bn2.register_forward_hook(lambda _, inputs, output: seen.append(output))
        torch.testing.assert_close(block(x), expected)
    assert seen[0].shape[1] == block.kept.numel()


def test_layout_autocast_and_names() -> None:
    block, masked, x = pair("layer3.0")
    assert block.state_dict().keys() == masked.state_dict().keys() | {"kept"}
    assert "kept=" in repr(block)
    for training in (False, True):
        block.train(training).to(memory_format=torch.channels_last)
        y = block(x.contiguous(memory_format=torch.channels_last))
        assert y.is_contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = block(x)
        torch.testing.assert_close(half.float(), y, rtol=0.1, atol=0.1 * float(y.detach().abs().max()))


def test_compiles() -> None:
    block, _, x = pair("layer1.0")
    block.eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), block(x), rtol=1e-4, atol=1e-4)


def test_importing_needs_no_timm() -> None:
    code = "import sys, mvp_ext.model.checkpoint; print({'timm', 'torchvision'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
