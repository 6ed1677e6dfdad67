"""meta_vote on a GPU: all layers of a model in one launch, against the per-layer torch loop and batched torch."""

from __future__ import annotations

import torch
from bench_meta_vote import RESNET50_ALL, TorchVote
from cuda_bench import CudaBench, compiled, graphed

from mvp_ext.ops import meta_vote

RESNET50_INNER = [w for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)) for _ in range(blocks)
                  for w in (width, width)]  # fmt: skip
MODELS = {
    "resnet50 inner": RESNET50_INNER,
    "resnet50 all": RESNET50_ALL,
    "vit_small heads + MLP": [6] * 12 + [1536] * 12,
}
BATCHED = ("padded sort", "padded topk", "global sort")


def main() -> None:
    bench = CudaBench("meta_vote")
    for model, layers in MODELS.items():
        for voters in (5, 50):
            for with_prior in (False, True):
                add_case(bench, model, layers, voters, with_prior)
    add_targets(bench)
    bench.finish()


def add_case(bench: CudaBench, model: str, layers: list[int], voters: int, with_prior: bool) -> None:
    name = f"{model}, N = {voters}{', prior' if with_prior else ''}"
    if not bench.wants(name):
        return
    masks = torch.rand(voters, sum(layers)).lt(0.5).to(bench.device)
    # Multiples of 1/64 add up exactly in any order: so every formulation must agree to the last bit.
    weights = (torch.randint(1, 65, (voters,)) / 64).to(bench.device)
    prior = torch.randn(sum(layers)).to(bench.device) if with_prior else None
    torch_vote = TorchVote(layers, 0.5, str(bench.device))
    formulations = {
        "per-layer loop": torch_vote.loop,
        "padded sort": torch_vote.padded_sort,
        "padded topk": torch_vote.padded_topk,
        "global sort": torch_vote.global_sort,
    }

    def ours() -> object:
        return meta_vote(masks, weights, layers=layers, keep=0.5, prior=prior)

    def check() -> None:
        wanted = meta_vote(
            masks.cpu(), weights.cpu(), layers=layers, keep=0.5, prior=None if prior is None else prior.cpu()
        )
        for run in (lambda *_: meta_vote(masks, weights, layers=layers, keep=0.5, prior=prior),
                    *formulations.values()):  # fmt: skip
            got = run(masks, weights, prior)
            assert all(torch.equal(a.cpu(), b) for a, b in zip(got[:3], wanted[:3], strict=True)), run

    peers = {k: lambda run=run: run(masks, weights, prior) for k, run in formulations.items()}
    by_compile = compiled(bench, torch_vote.padded_topk)
    peers["padded topk, torch.compile"] = lambda: by_compile(masks, weights, prior)
    peers["ours, CUDA graph"] = graphed(bench, ours)
    goals = {"per-layer loop": 50.0, "padded topk, torch.compile": 4.0, **dict.fromkeys(BATCHED, 4.0)}
    bench.case(name, ours, peers, goals=goals, check=check, most_us=10.0)


def add_targets(bench: CudaBench) -> None:
    """Sixteen target tasks in one call, against one call each."""
    layers, voters, targets = RESNET50_ALL, 50, 16
    masks = torch.rand(voters, sum(layers)).lt(0.5).to(bench.device)
    weights = torch.rand(targets, voters).to(bench.device)

    def one_by_one() -> list[object]:
        return [meta_vote(masks, w, layers=layers, keep=0.5) for w in weights]

    bench.case(
        "resnet50 all, N = 50, 16 targets",
        lambda: meta_vote(masks, weights, layers=layers, keep=0.5),
        {"one by one": one_by_one},
    )


if __name__ == "__main__":
    main()
