"""A pruned model is the masked dense model without the zeros: its outputs, its training, its files' shapes."""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from emulator import emulated
from tiny import tiny_images, tiny_model
from torch import Tensor, nn

from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.structure import Structure, UnsupportedModelError
from mvp_ext.model.surgery import expand_state, masked_model, prune_model
from mvp_ext.timm_compat import import_timm

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = [
    ("test_resnet", "inner"),
    ("test_resnet", "all"),
    ("test_vit", "heads"),
    ("test_vit", "heads+mlp"),
    ("test_resnet", "stream"),
]


def parts(name: str, scope: str, seed: int = 0, **kwargs: Any) -> tuple[nn.Module, Structure, Mask]:
    """A tiny model, its structure, and an unaligned random mask of keep ratio 0.2 to 0.8."""
    model = tiny_model(name, **kwargs)
    structure = find_structure(model, scope)
    return model, structure, Mask.random(structure, 0.2 + 0.15 * (seed % 5), seed, align=1)


def assert_same_function(a: nn.Module, b: nn.Module, x: Tensor) -> None:
    """Equal to float rounding in eval mode, in train mode, and in the gradient of the images. Changes neither."""
    for training in (False, True):
        results = []
        for model in (copy.deepcopy(a).train(training), copy.deepcopy(b).train(training)):
            images = x.clone().requires_grad_()
            y = model(images)
            y.square().sum().backward()
            results.append((y.detach(), images.grad))
        for one, other in zip(*results, strict=True):
            assert one is not None
            torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-4 * float(one.abs().max()))


@pytest.mark.parametrize(("name", "scope"), CASES)
def test_equals_the_masked_dense_model(name: str, scope: str) -> None:
    for seed in range(5):
        model, structure, mask = parts(name, scope, seed)
        masked = masked_model(model, mask)
        pruned = prune_model(model, mask, structure=structure)
        assert pruned is model
        assert_same_function(
            pruned.double(), masked.double(), tiny_images(model, batch=3, seed=seed).double()
        )


@pytest.mark.parametrize(
    ("name", "kwargs", "scope"),
    [
        ("resnet18", {}, "all"),
        ("resnet50", {}, "all"),
        ("seresnet18", {}, "inner"),
        ("resnetaa50", {}, "inner"),
        (
            "test_vit",
            {"qkv_bias": False, "qk_norm": True, "init_values": 1e-1, "proj_bias": False},
            "heads+mlp",
        ),
        ("deit_tiny_distilled_patch16_224", {"img_size": 32, "depth": 2}, "heads+mlp"),
    ],
)
def test_equals_the_masked_dense_model_in_other_families(
    name: str, kwargs: dict[str, Any], scope: str
) -> None:
    model, structure, mask = parts(name, scope, seed=2, **kwargs)
    masked = masked_model(model, mask).eval()
    pruned = prune_model(model, mask, structure=structure).eval()
    x = tiny_images(model, batch=2)
    with torch.no_grad():
        expected, got = masked(x), pruned(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_removed_means_removed(tiny_resnet: Any) -> None:
    """Zeroed weights alone are not a removed filter: the norm's shift still comes out. masked_model zeroes that too."""
    structure = find_structure(tiny_resnet)
    mask = Mask.random(structure, 0.5, seed=0)
    wrong = copy.deepcopy(tiny_resnet).eval()
    for layer in structure:
        wrong.get_submodule(layer.name).weight.data[~mask.layers[layer.name]] = 0
    x = tiny_images(tiny_resnet)
    with torch.no_grad():
        pruned = prune_model(tiny_resnet, mask).eval()(x)
        assert not torch.allclose(wrong(x), pruned, rtol=1e-2)


@pytest.mark.parametrize(("name", "scope"), CASES)
def test_shapes_and_sizes_say_what_the_tensors_are(name: str, scope: str) -> None:
    model, structure, mask = parts(name, scope)
    dense = {n: t.shape for n, t in model.state_dict().items()}
    prune_model(model, mask)
    changed = {n for n, t in model.state_dict().items() if n in dense and t.shape != dense[n]}
    assert changed == set(mask.index_in(structure))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels)
        elif isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
        elif isinstance(module, nn.BatchNorm2d):
            assert module.weight.shape == module.running_mean.shape == (module.num_features,)
    for layer in structure:
        if layer.kind == "head":
            attn: Any = model.get_submodule(layer.name)
            assert attn.num_heads == mask.kept[layer.name]
            assert attn.attn_dim == attn.num_heads * attn.head_dim == attn.proj.in_features
            assert attn.head_dim == 16
            assert attn.scale == 16**-0.5
    assert find_structure(model, scope).units_per_layer == tuple(mask.kept.values())


@pytest.mark.parametrize(("name", "scope"), CASES)
def test_pruning_again_composes(name: str, scope: str) -> None:
    model, _, outer = parts(name, scope, seed=4)
    dense = copy.deepcopy(model)
    prune_model(model, outer)
    inner = Mask.random(find_structure(model, scope), 0.5, seed=9, align=1)
    masked = masked_model(model, inner)
    prune_model(model, inner)
    composed = Mask.compose(outer, inner)
    x = tiny_images(model, batch=2)
    assert_same_function(model, masked, x)
    assert_same_function(prune_model(dense, composed), model, x)


def test_full_mask_changes_nothing(tiny_resnet: nn.Module) -> None:
    before = dict(tiny_resnet.state_dict(keep_vars=True))
    prune_model(tiny_resnet, Mask.full(find_structure(tiny_resnet, "all")))
    after = tiny_resnet.state_dict(keep_vars=True)
    assert before.keys() == after.keys()
    assert all(after[name] is tensor for name, tensor in before.items())


def test_layout_dtype_and_marks_stay(tiny_resnet: Any) -> None:
    tiny_resnet.to(memory_format=torch.channels_last, dtype=torch.bfloat16)
    weight = tiny_resnet.layer1[0].conv1.weight
    weight.requires_grad_(False)
    weight.note = "mine"
    prune_model(tiny_resnet, Mask.random(find_structure(tiny_resnet), 0.5, seed=0))
    weight = tiny_resnet.layer1[0].conv1.weight
    assert weight.dtype is torch.bfloat16
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.requires_grad
    assert weight.note == "mine"


# ---- training goes on


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.02, momentum=0.9, weight_decay=1e-2, nesterov=True)


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-3, weight_decay=1e-1, amsgrad=True)


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-3, foreach=False)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), labels).backward()
    optimizer.step()


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups, and some parameters in none (frozen)."""
    decay = [p for n, p in model.named_parameters() if p.ndim > 1 and "conv1.3" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim == 1]
    return [{"params": rest, "weight_decay": 0.0}, {"params": decay}]


@torch.no_grad()
def zero_removed(model: nn.Module, structure: Structure, mask: Mask, optimizer: Any) -> None:
    """What `masked` has to mean in training: removed places of parameters, statistics and optimizer state are zero.

    Only scope `all` needs it after a step: the shift of a removed last channel gets a gradient from the stream.
    """
    state = model.state_dict(keep_vars=True)
    for layer in structure:
        removed = (~mask.layers[layer.name]).nonzero().flatten()
        for cut in layer.slices:
            places = cut.places(removed, layer.units)
            tensor = state[cut.tensor]
            states = [v for v in optimizer.state.get(tensor, {}).values() if isinstance(v, Tensor) and v.ndim]
            for each in [tensor, *states]:
                each.index_fill_(cut.dim, places, 0.0)


@pytest.mark.parametrize("make", [sgd, adamw, adam])
@pytest.mark.parametrize(("name", "scope"), [CASES[1], CASES[3], CASES[4]])
def test_next_steps_equal_the_masked_models(name: str, scope: str, make: Callable[..., Any]) -> None:
    """Pruned in the middle of training: parameters, statistics, state, EMA and learning rate go on as if masked."""
    timm = import_timm()
    model, structure, mask = parts(name, scope, seed=3)
    model.double()
    x, labels = tiny_images(model, batch=3).double(), torch.tensor([0, 3, 1])
    optimizer = make(groups_of(model))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    ema = timm.utils.ModelEmaV3(model, decay=0.7)
    for _ in range(2):
        train_step(model, optimizer, x, labels)
        scheduler.step()
        ema.update(model)

    masked = masked_model(model, mask)
    masked_optimizer = make(groups_of(masked))
    masked_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    masked_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(masked_optimizer, T_max=10)
    masked_scheduler.load_state_dict(scheduler.state_dict())
    masked_ema = timm.utils.ModelEmaV3(masked, decay=0.7)
    masked_ema.module = masked_model(ema.module, mask)
    zero_removed(masked, structure, mask, masked_optimizer)

    prune_model(model, mask, structure=structure, optimizer=optimizer, ema=ema)
    for _ in range(3):
        train_step(model, optimizer, x, labels)
        scheduler.step()
        ema.update(model)
        train_step(masked, masked_optimizer, x, labels)
        zero_removed(masked, structure, mask, masked_optimizer)
        masked_scheduler.step()
        masked_ema.update(masked)

    assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in masked_optimizer.param_groups]
    index = mask.index_in(structure)
    for small, full in ((model, masked), (ema.module, masked_ema.module)):
        wanted = full.state_dict()
        for name_, tensor in small.state_dict().items():
            if name_.endswith(".kept"):
                continue
            rows, cols = index.get(name_, (None, None))
            expected = wanted[name_] if rows is None else wanted[name_].index_select(0, rows)
            expected = expected if cols is None else expected.index_select(1, cols)
            if not name_.endswith("num_batches_tracked"):
                torch.testing.assert_close(
                    tensor, expected, rtol=1e-6, atol=1e-9, msg=lambda m, n=name_: f"{n}: {m}"
                )


def test_optimizer_holds_the_new_parameters_and_only_them(tiny_resnet: nn.Module) -> None:
    optimizer = sgd(groups_of(tiny_resnet))
    train_step(tiny_resnet, optimizer, tiny_images(tiny_resnet), torch.arange(4))
    order = [[id(p) for p in g["params"]] for g in optimizer.param_groups]
    names = {id(p): n for n, p in tiny_resnet.named_parameters()}
    prune_model(tiny_resnet, Mask.random(find_structure(tiny_resnet), 0.5, seed=0), optimizer=optimizer)
    now = dict(tiny_resnet.named_parameters())
    for group, ids in zip(optimizer.param_groups, order, strict=True):
        assert [id(p) for p in group["params"]] == [id(now[names[i]]) for i in ids]
    assert {id(p) for p in optimizer.state} <= {id(p) for p in now.values()}
    for parameter, state in optimizer.state.items():
        assert state["momentum_buffer"].shape == parameter.shape == parameter.grad.shape
    optimizer.load_state_dict(optimizer.state_dict())


def test_averaged_model_goes_on(tiny_resnet: nn.Module) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(tiny_resnet)
    averaged.update_parameters(tiny_resnet)
    prune_model(tiny_resnet, Mask.random(find_structure(tiny_resnet, "all"), 0.5, seed=0), ema=averaged)
    averaged.update_parameters(tiny_resnet)
    x = tiny_images(tiny_resnet)
    torch.testing.assert_close(averaged.eval()(x), tiny_resnet.eval()(x))


@pytest.mark.parametrize(("name", "scope"), [CASES[1], CASES[3]])
def test_the_cuda_kernel_cuts_the_same(name: str, scope: str) -> None:
    """Parameters, statistics and optimizer state."""
    results = []
    for way in (contextlib.nullcontext, emulated):
        model, structure, mask = parts(name, scope, seed=3)
        optimizer = adamw(groups_of(model))
        train_step(model, optimizer, tiny_images(model), torch.arange(4))
        with way():
            prune_model(model, mask, structure=structure, optimizer=optimizer)
        states = [v for s in optimizer.state_dict()["state"].values() for v in s.values()]
        results.append([*model.state_dict().values(), *states])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_state_that_cannot_be_cut_changes_nothing(tiny_resnet: nn.Module) -> None:
    optimizer = torch.optim.Adafactor(tiny_resnet.parameters())
    train_step(tiny_resnet, optimizer, tiny_images(tiny_resnet), torch.arange(4))
    before = dict(tiny_resnet.state_dict(keep_vars=True))
    mask = Mask.random(find_structure(tiny_resnet), 0.5, seed=0)
    with pytest.raises(
        UnsupportedModelError, match=r"optimizer Adafactor: state 'row_var' of layer1\.0\.conv1\.weight"
    ):
        prune_model(tiny_resnet, mask, optimizer=optimizer)
    assert all(before[name] is t for name, t in tiny_resnet.state_dict(keep_vars=True).items())


def test_refuses_a_mask_of_another_model(tiny_resnet: nn.Module, tiny_vit: nn.Module) -> None:
    mask = Mask.random(find_structure(tiny_vit), 0.5, seed=0)
    with pytest.raises(
        ValueError, match=r"no scope of this model has the layers of the mask \(blocks\.0\.attn"
    ):
        prune_model(tiny_resnet, mask)
    with pytest.raises(ValueError, match=r"mask: expected layer 'layer1\.0\.conv1' \(scope 'inner'\)"):
        prune_model(tiny_resnet, mask, structure=find_structure(tiny_resnet))


def test_refuses_a_structure_that_the_model_no_longer_has(tiny_resnet: nn.Module) -> None:
    structure = find_structure(tiny_resnet)
    mask = Mask.random(structure, 0.5, seed=0)
    prune_model(tiny_resnet, mask, structure=structure)
    with pytest.raises(
        UnsupportedModelError, match=r"layer1\.0\.conv1\.weight: expected 32 places in dimension 0"
    ):
        prune_model(tiny_resnet, mask, structure=structure)


def test_an_average_of_another_model_changes_nothing(tiny_resnet: nn.Module) -> None:
    mask = Mask.random(find_structure(tiny_resnet), 0.5, seed=0)
    smaller = prune_model(copy.deepcopy(tiny_resnet), mask)
    before = dict(tiny_resnet.state_dict(keep_vars=True))
    with pytest.raises(UnsupportedModelError, match=r"layer1\.0\.conv1\.weight: expected 32 places"):
        prune_model(tiny_resnet, mask, ema=torch.optim.swa_utils.AveragedModel(smaller))
    assert all(before[name] is t for name, t in tiny_resnet.state_dict(keep_vars=True).items())


# ---- back to full shapes


@pytest.mark.parametrize(("name", "scope"), CASES)
def test_expand_state(name: str, scope: str) -> None:
    model, structure, mask = parts(name, scope)
    dense, masked = copy.deepcopy(model), masked_model(model, mask)
    prune_model(model, mask)
    expanded = expand_state(model.state_dict(), structure, mask)
    wanted = masked.state_dict()
    assert expanded.keys() == wanted.keys()
    assert all(torch.equal(expanded[n], wanted[n]) for n in wanted)
    restored = expand_state(model.state_dict(), structure, mask, base=dense.state_dict())
    assert all(torch.equal(restored[n], t) for n, t in dense.state_dict().items())


def test_expand_state_refuses_another_mask(tiny_resnet: nn.Module) -> None:
    structure = find_structure(tiny_resnet)
    prune_model(tiny_resnet, Mask.random(structure, 0.5, seed=0))
    state = tiny_resnet.state_dict()
    other = Mask.random(structure, 0.25, seed=0)
    with pytest.raises(
        ValueError, match=r"layer1\.0\.conv1\.weight: expected shape \(8, 32, 3, 3\), got \(16, 32"
    ):
        expand_state(state, structure, other)
    with pytest.raises(ValueError, match=r"expected a tensor 'layer1\.0\.conv1\.weight', got none"):
        expand_state({}, structure, other)


# ---- without mvp_ext

LOAD = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mvp_ext":
            raise ImportError("mvp_ext is blocked")
sys.meta_path.insert(0, Blocked())
import torch
x, y = torch.load(sys.argv[2], weights_only=True)
torch.testing.assert_close(torch.export.load(sys.argv[1]).module()(x), y)
assert not any(name.startswith("mvp_ext") for name in sys.modules)
print("equal")
"""


@pytest.mark.parametrize(("name", "scope"), [("test_resnet", "inner"), ("test_vit", "heads+mlp")])
def test_exported_model_runs_without_mvp_ext(name: str, scope: str, tmp_path: Path) -> None:
    model, _, mask = parts(name, scope)
    prune_model(model, mask).eval()
    modules = {type(module).__module__ for module in model.modules()}
    assert not any(module.startswith("mvp_ext") for module in modules)
    x = tiny_images(model, batch=2)
    with torch.no_grad():
        torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
        torch.save((x, model(x)), tmp_path / "pair.pt")
    run = [sys.executable, "-c", LOAD, str(tmp_path / "model.pt2"), str(tmp_path / "pair.pt")]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "equal", done.stderr


def test_compiles() -> None:
    model = tiny_model("test_vit", depth=1, img_size=32)
    prune_model(model, Mask.random(find_structure(model, "heads+mlp"), 0.5, seed=0)).eval()
    x = tiny_images(model, batch=1)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-5)
