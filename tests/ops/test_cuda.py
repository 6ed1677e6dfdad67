"""What only a GPU can show: CUDA graphs, streams, torch.compile, both devices agreeing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from digits import digits_task, tiny_backbone
from torch import Tensor

from mvp_ext.model.checkpoint import load_pruned
from mvp_ext.ops import importance, merge, meta_vote, pack, pruned_linear, residual_add
from mvp_ext.pruning.build import build_universal, build_zoo
from mvp_ext.pruning.methods import METHOD_NAMES
from mvp_ext.pruning.prune import prune
from mvp_ext.pruning.settings import Schedule, Settings, VoteOptions
from mvp_ext.train.recipe import Recipe
from mvp_ext.zoo.zoo import Zoo

pytestmark = pytest.mark.cuda
Op = Callable[..., Any]
LAYERS = [64, 6, 1, 300, 1536, 33]


def ops() -> dict[str, tuple[Op, list[Tensor]]]:
    """Name → (op of floating tensors, inputs on the GPU that may be overwritten)."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator).to("cuda", dtype)

    masks = torch.rand(5, sum(LAYERS), generator=generator).lt(0.5).cuda()
    rows, cols = torch.arange(0, 64, 2, device="cuda"), torch.arange(1, 48, 3, device="cuda")
    half = torch.bfloat16

    def voted(weights: Tensor, prior: Tensor) -> Any:
        return meta_vote(masks, weights, layers=LAYERS, keep=0.3, prior=prior, temperature=0.5, seed=3)[:3]

    def merged(base: Tensor, voter: Tensor) -> Any:
        return merge([base], [[voter]], [[rows]], [[cols]], torch.ones(1, device="cuda"), [rows + 1], [None])

    return {
        "meta_vote": (voted, [draw(5), draw(sum(LAYERS))]),
        "importance": (
            lambda a, grad: importance(a, grad, kind="taylor"),
            [draw(8, 32, 14, 14, dtype=half), draw(8, 32, 14, 14, dtype=half)],
        ),
        "residual_add": (
            lambda residual, y: residual_add(residual, y, rows, activation="relu"),
            [draw(4, 64, 7, 7), draw(4, 32, 7, 7)],
        ),
        "pack": (
            lambda weight, bias: pack([weight, bias], [rows, rows], [cols, None]),
            [draw(64, 48), draw(64)],
        ),
        "merge": (merged, [draw(64, 48), draw(32, 16)]),
        "pruned_linear": (
            lambda x, weight: pruned_linear(x, weight, None, rows),
            [draw(40, 48, dtype=half), draw(64, 48, dtype=half)],
        ),
        "pruned_linear, library": (
            lambda x, weight: pruned_linear(x, weight, None, rows, cols),
            [draw(40, 16), draw(64, 48)],
        ),
    }


NAMES = [
    "meta_vote", "importance", "residual_add", "pack", "merge", "pruned_linear", "pruned_linear, library",
]  # fmt: skip


def assert_same(got: Any, expected: Any) -> None:
    got, expected = ([x] if isinstance(x, Tensor) else x for x in (got, expected))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_cuda_graphs(name: str) -> None:
    """Captured once, replayed on other values."""
    op, inputs = ops()[name]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            op(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op(*inputs)
    for _ in range(2):
        for x in inputs:
            x.copy_(torch.randn(x.shape).to(x))
        graph.replay()
        torch.cuda.synchronize()
        assert_same(captured, op(*inputs))


@pytest.mark.parametrize("name", NAMES)
def test_streams(name: str) -> None:
    """The op waits for what was enqueued before it on the same stream, and for nothing else."""
    op, inputs = ops()[name]
    new = [torch.randn(x.shape).to(x) for x in inputs]
    expected = op(*new)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # about 25 ms
        for x, value in zip(inputs, new, strict=True):
            x.copy_(value, non_blocking=True)
        got = op(*inputs)
        assert not stream.query(), "the op waited for the device"
    stream.synchronize()
    assert_same(got, expected)


@pytest.mark.parametrize("name", NAMES)
def test_repeats_are_equal(name: str) -> None:
    op, inputs = ops()[name]
    expected = op(*inputs)
    for _ in range(10):
        assert_same(op(*inputs), expected)


@pytest.mark.parametrize("name", NAMES)
def test_torch_compile(name: str) -> None:
    torch.compiler.reset()  # all of these lambdas are one to torch, which compiles it for a few shapes only
    op, inputs = ops()[name]
    compiled = torch.compile(lambda *xs: op(*[x * 1 for x in xs]), fullgraph=True)
    assert_same(compiled(*inputs), op(*inputs))


def test_both_devices_draw_the_same_masks() -> None:
    generator = torch.Generator().manual_seed(1)
    for layers in ([6] * 12 + [1536] * 12, [64, 256, 2048, 7], [1], [5000, 3], [40000]):
        units = sum(layers)
        masks = torch.rand(7, units, generator=generator).lt(0.4)
        weights, prior = torch.randn(3, 7, generator=generator), torch.randn(units, generator=generator)
        for options in (
            {},
            {"prior": prior},
            {"temperature": 0.1, "seed": 5},
            {"temperature": 2.0, "seed": 2**62 + 1, "prior": prior},
        ):
            for w in (None, weights[0], weights):
                on_cpu = meta_vote(masks, w, layers=layers, keep=0.3, **options)
                moved = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in options.items()}
                on_gpu = meta_vote(
                    masks.cuda(), None if w is None else w.cuda(), layers=layers, keep=0.3, **moved
                )
                assert all(torch.equal(a, b.cpu()) for a, b in zip(on_cpu[:3], on_gpu[:3], strict=True))


def test_more_than_2_to_the_31_elements() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs about 16 GiB of GPU memory")
    rows = 2**31 // 1000 + 7
    residual = torch.ones(rows, 1000, device="cuda", dtype=torch.bfloat16)
    y = torch.ones(rows, 1, device="cuda", dtype=torch.bfloat16)
    out = residual_add(residual, y, torch.tensor([999], device="cuda"), dim=-1)
    assert out[-1, -1] == 2
    assert out[-1, 0] == 1
    assert out[:, 999].float().mean() == 2
    # As tokens of one example: there are no more than 2³⁰ sums over positions, one for each channel of an example.
    scores = importance(residual[None], residual[None], kind="taylor", dim=2)
    torch.testing.assert_close(scores, torch.full_like(scores, float(rows)))


def test_two_devices() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    op, inputs = ops()["importance"]
    other = [x.to("cuda:1") for x in inputs]
    assert torch.equal(op(*other).cpu(), op(*inputs).cpu())
    assert torch.cuda.current_device() == 0


def test_a_wrong_index_is_an_error() -> None:
    """In a process of its own: the error ends its use of the device, as torch's own device-side assertions do."""
    code = """
import torch, mvp_ext.ops as ops
ops.residual_add(torch.ones(1, 4, 2, 2).cuda(), torch.ones(1, 1, 2, 2).cuda(), torch.tensor([4]).cuda())
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "CUDA" in done.stderr


@pytest.mark.parametrize(
    ("name", "scope"), [("test_resnet", "inner"), ("test_resnet", "all"), ("test_vit", "heads+mlp")]
)
def test_the_main_job(name: str, scope: str, tmp_path: Path) -> None:
    """A zoo and every method, all on the GPU; what was saved there loads on the CPU and says the same."""
    backbone = tiny_backbone(name).to("cuda")
    zoo = Zoo(tmp_path / "zoo")
    schedule = Schedule(share=0.5, steps_per_round=1, final_steps=2)
    settings = Settings(keep=0.5, scope=scope, schedule=schedule, recipe=Recipe(batch_size=8))
    tasks = [digits_task((3, 4, 5), "b", seed=1), digits_task((0, 1, 6), "a", seed=2)]
    build_zoo(backbone, tasks, zoo, settings)
    build_universal(backbone, tasks, zoo)
    for method in METHOD_NAMES:
        vote = VoteOptions(neighbours=2)
        result = prune(backbone, digits_task(), zoo, method=method, steps=2, vote=vote)
        assert {p.device.type for p in result.model.parameters()} == {"cuda"}
        assert 0.0 <= result.accuracy <= 1.0
        result.save(tmp_path / "small.safetensors")
        loaded = load_pruned(tmp_path / "small.safetensors").model.eval()
        x = torch.rand(3, 3, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(
                loaded(x), result.model(x.cuda()).cpu(), rtol=5e-3, atol=5e-3, check_dtype=False
            )
