"""Networks of convolutions that no rule knows: what tracing finds is exact, and what is not exact stays whole."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvp_ext.model.checkpoint import load_pruned, save_pruned
from mvp_ext.model.create import create_model
from mvp_ext.model.families import find_structure
from mvp_ext.model.families.graph import graph_layers
from mvp_ext.model.mask import Mask
from mvp_ext.model.structure import Structure, UnsupportedModelError
from mvp_ext.model.surgery import masked_model, prune_model
from mvp_ext.timm_compat import import_timm

pytest.importorskip("torch_pruning")
pytestmark = pytest.mark.usefixtures("one_thread")


def conv(inputs: int, outputs: int, size: int = 3, **kwargs: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, padding=size // 2, **kwargs), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Small(nn.Module):
    """A stem, something between, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8, stride=2)
        self.make()

    def make(self) -> None: ...

    def between(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self.stem(x)).mean((2, 3)))


class Dense(Small):
    """Every layer reads what all before it put out."""

    def make(self) -> None:
        self.layers = nn.ModuleList(conv(8 + 6 * i, 6) for i in range(3))
        self.head = nn.Linear(26, 5)

    def between(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


class Chunked(Small):
    """One half goes around."""

    def make(self) -> None:
        self.expand, self.inside, self.head = conv(8, 12), conv(6, 6), nn.Linear(12, 5)

    def between(self, x: Tensor) -> Tensor:
        a, b = self.expand(x).chunk(2, 1)
        return torch.cat([self.inside(a), b], 1)


class SplitByWidth(Chunked):
    """The same, by a number that the module keeps."""

    def make(self) -> None:
        super().make()
        self.width = 6

    def between(self, x: Tensor) -> Tensor:
        a, b = self.expand(x).split(self.width, 1)
        return torch.cat([self.inside(a), b], 1)


class Flattened(Small):
    """A linear layer reads every place of the last channels."""

    def make(self) -> None:
        self.second, self.hidden, self.head = conv(8, 6, stride=2), nn.Linear(6 * 16, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.second(self.stem(x)), 4)
        return self.head(F.relu(self.hidden(x.flatten(1))))


class Residual(Small):
    """A stream that is added to, gated (squeeze and excitation)."""

    def make(self) -> None:
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"a": conv(8, 10), "b": nn.Conv2d(10, 8, 1), "gate": nn.Conv2d(8, 8, 1)})
            for _ in range(2)
        )
        self.head = nn.Linear(8, 5)

    def between(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            y = block["b"](block["a"](x))
            x = x + y * block["gate"](y.mean((2, 3), keepdim=True)).sigmoid()
        return x


class Depthwise(Small):
    """Depthwise and grouped convolutions: channels go with those of their group."""

    def make(self) -> None:
        self.up, self.depthwise = conv(8, 12), conv(12, 12, groups=12)
        self.grouped, self.head = conv(12, 24, groups=4), nn.Linear(24, 5)

    def between(self, x: Tensor) -> Tensor:
        return self.grouped(self.depthwise(self.up(x)))


def noisy(model: nn.Module) -> nn.Module:
    """Every tensor matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (parameter[0].numel() ** -0.5))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model


def own(name: str) -> nn.Module:
    model = timm_model(name) if name.islower() else globals()[name]()
    return noisy(model)


def timm_model(name: str) -> nn.Module:
    return import_timm().create_model(name, num_classes=5, **SMALL.get(name, {}))


SMALL: dict[str, dict[str, Any]] = {
    "densenet121": {"growth_rate": 8, "block_config": (2, 3)},
    "lcnet_035": {},
}
OWN = ("Dense", "Chunked", "SplitByWidth", "Flattened", "Residual", "Depthwise")


def images(seed: int = 0) -> Tensor:
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def outputs(model: nn.Module) -> list[Tensor]:
    """In eval mode, and with the batch norms of train mode (dropout draws others for other shapes)."""
    found = []
    for train in (False, True):
        model.eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train(train)
        with torch.no_grad():
            found.append(model(images()))
    return found


def check_equal(model: nn.Module, structure: Structure, seed: int) -> nn.Module:
    """The cut model, which computes what the masked one does."""
    mask = Mask.random(structure, 0.3 + 0.2 * (seed % 3), seed, align=1)
    masked = masked_model(model, mask, structure=structure)
    cut = prune_model(copy.deepcopy(model), mask, structure=structure, optimizer=[])
    for a, b in zip(outputs(masked), outputs(cut), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * float(a.abs().max()))
    return cut


@pytest.mark.parametrize("name", [*OWN, *SMALL])
def test_cut_is_masked_and_can_be_cut_again(name: str) -> None:
    model = own(name)
    before = [tensor.clone() for tensor in model.state_dict().values()]
    possible = [scope for scope in ("inner", "stream") if scope == "inner" or name in STREAMS]
    for scope in possible:
        structure = find_structure(model, scope)
        assert structure.family == "graph"
        assert structure == find_structure(copy.deepcopy(model), scope)
        for seed in range(2):
            cut = check_equal(model, structure, seed)
        again = find_structure(cut, scope)
        assert again.names == structure.names
        assert all(a < b for a, b in zip(again.units_per_layer, structure.units_per_layer, strict=True))
        check_equal(cut, again, seed=5)
    assert all(map(torch.equal, before, model.state_dict().values()))


STREAMS = ("Residual",)


@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("Dense", {"stem.0": 8, "layers.0.0": 6, "layers.1.0": 6, "layers.2.0": 6}),
        ("Chunked", {"stem.0": 8, "expand.0": 6, "inside.0": 6}),
        ("SplitByWidth", {"stem.0": 8, "expand.0": 6, "inside.0": 6}),
        ("Flattened", {"stem.0": 8, "second.0": 6, "hidden": 10}),
        ("Residual", {"stem.0": 8, "blocks.0.a.0": 10, "blocks.1.a.0": 10}),
        # The units of a grouped convolution are its groups, and so are those of all that go with them.
        ("Depthwise", {"stem.0": 8, "up.0": 4}),
    ],
)
def test_finds_every_layer(name: str, units: dict[str, int]) -> None:
    layers = {layer.name: layer.units for _, layer in graph_layers(own(name)).layers}
    assert {key: layers.get(key) for key in units} == units


def test_a_model_without_memory_has_the_same_structure() -> None:
    with torch.device("meta"):
        empty = timm_model("densenet121")
    assert find_structure(empty) == find_structure(timm_model("densenet121"))


class AcrossChannels(Small):
    """What is no function of one channel alone, in no module."""

    def make(self) -> None:
        self.second, self.third, self.head = conv(8, 8), conv(8, 6), nn.Linear(6, 5)

    def between(self, x: Tensor) -> Tensor:
        return self.third(self.second(x).softmax(1))


class FixedSplit(Chunked):
    """Parts whose size is written in the code."""

    def between(self, x: Tensor) -> Tensor:
        a, b = self.expand(x).split(6, 1)
        return torch.cat([self.inside(a), b], 1)


class Normed(Small):
    def make(self) -> None:
        self.second, self.norm, self.third = conv(8, 8), nn.GroupNorm(2, 8), conv(8, 6)
        self.head = nn.Linear(6, 5)

    def between(self, x: Tensor) -> Tensor:
        return self.third(self.norm(self.second(x)))


class Standardised(Small):
    """Weights that are standardised across what they read."""

    def make(self) -> None:
        self.second = import_timm().layers.ScaledStdConv2d(8, 6, 3)
        self.third, self.head = conv(6, 6), nn.Linear(6, 5)

    def between(self, x: Tensor) -> Tensor:
        return self.third(self.second(x))


@pytest.mark.parametrize(
    ("kind", "part", "reason"),
    [
        (AcrossChannels, "second.0", "not what masking it is"),
        (FixedSplit, "expand.0", "not what masking it is"),
        (Normed, "second.0", r"norm \(GroupNorm\)"),
        (Standardised, "stem.0", "expected a plain convolution, got ScaledStdConv2d"),
    ],
)
def test_what_is_not_exact_stays_whole(kind: type[Small], part: str, reason: str) -> None:
    model = noisy(kind())
    structure = find_structure(model)
    assert part not in structure.names
    assert len(structure) > 0
    reasons = [why for (path, _), why in graph_layers(model).refused.items() if path == part]
    assert len(reasons) == 1
    assert re.search(reason, reasons[0])
    check_equal(model, structure, 0)


def test_the_output_is_never_cut() -> None:
    cuts = [cut for _, layer in graph_layers(own("Dense")).layers for cut in layer.slices]
    assert {cut.dim for cut in cuts if cut.tensor.startswith("head.")} == {1}


def test_a_file_brings_its_structure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was cut is loaded bit for bit, where Torch-Pruning is not installed, too."""
    model = noisy(create_model("lcnet_035", num_classes=5)).eval()
    structure = find_structure(model)
    mask = Mask.random(structure, 0.5, seed=0)
    prune_model(model, mask, structure=structure)
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    save_pruned(model, tmp_path / "model.safetensors", mask=mask, structure=structure)
    loaded = load_pruned(tmp_path / "model.safetensors")
    assert loaded.structure == structure
    with torch.no_grad():
        assert torch.equal(loaded.model(images()), model(images()))


def test_without_torch_pruning_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(UnsupportedModelError, match=r"pip install 'mvp_ext\[graph\]'$"):
        find_structure(Dense())


class Unruly(Small):
    def make(self) -> None:
        self.head = nn.Linear(8, 5)

    def between(self, x: Tensor) -> Tensor:
        raise RuntimeError("no images of this size\nat all")


def test_where_no_two_layers_are_plain_nothing_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """One would have to make what the other reads."""
    import torch_pruning

    class Own(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x)

    def never(*args: Any) -> None:
        pytest.fail("it was traced")

    pool = nn.AdaptiveAvgPool2d(1)
    model = nn.Sequential(Own(3, 8, 3), nn.ReLU(), Own(8, 8, 3), pool, nn.Flatten(), nn.Linear(8, 5))
    with monkeypatch.context() as patch:
        patch.setattr(torch_pruning, "DependencyGraph", never)
        with pytest.raises(UnsupportedModelError, match="0: expected a plain convolution or Linear, got Own"):
            find_structure(model)
    # Now a plain layer reads what another makes.
    model[2] = nn.Conv2d(8, 8, 3)
    assert find_structure(model).names == ("2",)


def test_a_model_that_cannot_be_traced_says_why() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"cannot trace it \(RuntimeError: no images of this size at"
    ):
        find_structure(Unruly())
