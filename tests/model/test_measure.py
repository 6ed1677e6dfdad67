"""Counts against arithmetic done by hand; timing against models whose cost is known."""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch
from torch import nn

from mvp_ext.model import measure
from mvp_ext.model.measure import Latency, Measurement


class Attention(nn.Module):
    """One projection, then scaled dot-product attention over the tokens."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.qkv = nn.Linear(3, 3 * heads * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(2).transpose(1, 2)  # [B, n, 3]
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, self.width)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v)


class Sleeper(nn.Module):
    """Takes a known time and remembers who ran when."""

    def __init__(self, name: str, seconds: float, log: list[str]) -> None:
        super().__init__()
        self.name, self.seconds, self.log = name, seconds, log
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.log.append(self.name)
        stride = self.layer.weight.stride()
        self.during = (self.training, torch.is_grad_enabled(), torch.get_num_threads(), stride)
        time.sleep(self.seconds)
        return x


def test_parameters_are_counted_once() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(5, 6), nn.Linear(5, 6))
    assert measure.count_parameters(model) == (3 * 4 * 9 + 4) + 8 + 2 * (5 * 6 + 6)
    model[3].weight = model[2].weight
    assert measure.count_parameters(model) == (3 * 4 * 9 + 4) + 8 + (5 * 6 + 6) + 6


def test_a_multiply_add_counts_two() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(4 * 16, 10))
    expected = 2 * (16 * 4 * 3 * 9 + 64 * 10)
    assert measure.count_flops(model, (3, 8, 8)) == expected
    assert measure.count_flops(model, (3, 8, 8), batch=5) == 5 * expected


def test_attention_is_counted_on_the_cpu() -> None:
    heads, width, tokens = 2, 8, 16
    expected = 2 * (tokens * 3 * 3 * heads * width) + 2 * (2 * heads * tokens * tokens * width)
    assert measure.count_flops(Attention(heads, width), (3, 4, 4)) == expected


def test_counting_leaves_modes_and_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5)).train()
    model[1].eval()
    measure.count_flops(model, (3, 4, 4))
    assert model.training
    assert model[0].training
    assert not model[1].training
    assert model[0].num_batches_tracked == 0


def test_latency_takes_turns_and_orders_by_cost() -> None:
    log: list[str] = []
    costs = (("a", 1e-3), ("b", 4e-3), ("c", 1e-3))
    models = {name: Sleeper(name, seconds, log) for name, seconds in costs}
    result = measure.latency(models, (3, 2, 2), batch=4, rounds=6)
    assert {r.rounds for r in result.values()} == {6}
    turns = log[-18:]
    rounds = [tuple(turns[i : i + 3]) for i in range(0, 18, 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) == 6, "an order came twice"
    for r in result.values():
        assert 1.0 <= r.p10_ms <= r.median_ms <= r.p90_ms
        assert r.throughput == pytest.approx(4e3 / r.median_ms)
    assert result["b"].p10_ms >= 4.0


def test_latency_restores_what_it_changes() -> None:
    threads = torch.get_num_threads()
    model = Sleeper("a", 0, []).train()
    weight, stride = model.layer.weight.data_ptr(), model.layer.weight.stride()
    measure.latency({"a": model}, (3, 2, 2), rounds=1, threads=1, channels_last=True)
    assert model.during[:3] == (False, False, 1)
    assert model.during[3] == (27, 1, 9, 3)  # channels_last
    assert model.training
    assert torch.get_num_threads() == threads
    assert (model.layer.weight.data_ptr(), model.layer.weight.stride()) == (weight, stride)
    model.layer(torch.ones(1, 3, 4, 4)).sum().backward()
    assert model.layer.weight.grad is not None


def test_time_bounds_the_rounds() -> None:
    models = {"a": Sleeper("a", 2e-3, [])}
    assert measure.latency(models, (3, 2, 2), seconds=0.0)["a"].rounds == measure.MIN_ROUNDS
    assert 8 <= measure.latency(models, (3, 2, 2), seconds=0.05)["a"].rounds <= 25


@pytest.mark.parametrize(
    ("models", "batch", "message"),
    [
        ({}, 1, "expected at least one model"),
        ({"a": nn.Identity()}, 0, "batch: expected at least 1, got 0"),
        ({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2, device="meta")}, 1, "expected one device, got"),
    ],
)
def test_latency_says_what_is_wrong(models: dict[str, nn.Module], batch: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure.latency(models, (3, 2, 2), batch=batch)


def test_measure_puts_it_together() -> None:
    models = {"wide": nn.Conv2d(3, 8, 3), "narrow": nn.Conv2d(3, 4, 3)}
    result = measure.measure(models, (3, 8, 8), batches=(1, 2), seconds=0.0)
    assert result["wide"].flops == 2 * result["narrow"].flops
    assert [x.batch for x in result["wide"].latency] == [1, 2]
    as_dict = result["narrow"].to_dict()
    assert as_dict["parameters"] == 4 * 28
    assert as_dict["latency"][1]["throughput"] > 0
    with pytest.raises(ValueError, match=r"not timed at batch 3, but at \[1, 2\]"):
        result["wide"].at(3)


def made(flops: int, median_ms: float) -> Measurement:
    return Measurement("m", 1, flops, (Latency(1, median_ms, median_ms, median_ms, 1),))


@pytest.mark.parametrize(
    ("flops", "ms", "share"),
    [(50, 5.0, 1.0), (50, 7.5, 0.5), (50, 10.0, 0.0), (50, 12.0, -0.4), (100, 5.0, None), (120, 9.0, None)],
)
def test_share_of_saving(flops: int, ms: float, share: float | None) -> None:
    got = measure.share_of_saving(made(100, 10.0), made(flops, ms), 1)
    assert got == (None if share is None else pytest.approx(share))


def test_counts_are_remembered_only_where_nothing_changed() -> None:
    """A stride, a size or another forward is another count; other weights are not."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
    whole = measure.count_flops(model, (3, 8, 8))
    with torch.no_grad():
        model[0].weight.add_(1)
    assert measure.count_flops(model, (3, 8, 8)) == whole
    assert measure.count_flops(model, (3, 16, 16)) == 4 * whole
    model[0].stride = (2, 2)
    assert measure.count_flops(model, (3, 8, 8)) == whole // 4
    model[0].forward = lambda images: images  # type: ignore[method-assign]
    assert measure.count_flops(model, (3, 8, 8)) == 0


def test_it_rests_before_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(measure.time, "sleep", lambda seconds: called.append(f"rest {seconds}"))
    runs = {name: partial(called.append, name) for name in "ab"}
    measure.time_in_turn(runs, rounds=3, pause=0.5)
    # And a call that is not timed.
    assert called[::3] == ["rest 0.5"] * (len(called) // 3)
    assert called[1::3] == called[2::3]
    assert set(called[1::3]) == {"a", "b"}
    # So long a rest counts in how many rounds there is time for.
    called.clear()
    measure.time_in_turn(runs, seconds=5.0, pause=0.5)
    assert called.count("a") == 2 * (measure.WARM_UP_ROUNDS + 10)
    called.clear()
    measure.time_in_turn(runs, rounds=1)
    assert not [each for each in called if each.startswith("rest")]
