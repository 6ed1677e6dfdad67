"""Costs as sums."""

from __future__ import annotations

from mvp_ext.train.cost import Cost


def test_costs_add_up():
    a, b = Cost(steps=1, train_flops=10, score_flops=1, seconds=0.5), Cost(steps=2, refit_flops=7, seconds=1)
    total = a + b
    assert total == Cost(steps=3, train_flops=10, score_flops=1, refit_flops=7, seconds=1.5)
    assert total.flops == 18
    assert total.to_dict()["flops"] == 18
    assert Cost.from_dict(total.to_dict()) == total
