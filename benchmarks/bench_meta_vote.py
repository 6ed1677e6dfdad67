"""meta_vote against the per-layer torch loop and against batched torch formulations, all with the same exact result.

On a GPU all layers of a model are one launch, and so are all target tasks.
Whatever does not change from vote to vote (padding maps, positions, thresholds' places) is prepared outside the timing,
for the peers as for us.
"""

from __future__ import annotations

from functools import partial

import torch
from harness import Bench
from torch import Tensor

from mvp_ext.ops import Vote, kept_units, meta_vote, reference

RESNET50_BLOCKS = [width for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)) for _ in range(blocks)]
RESNET50_ALL = [units for width in RESNET50_BLOCKS for units in (width, width, 4 * width)]
DEIT_SMALL = [6] * 12 + [1536] * 12
CPU_MODELS = {
    "resnet18 inner": [64, 64, 128, 128, 256, 256, 512, 512],
    "resnet18 all": [width for width in (64, 128, 256, 512) for _ in range(4)],
    "resnet50 all": RESNET50_ALL,
    "deit_small heads": [6] * 12,
    "deit_small heads + MLP": DEIT_SMALL,
}
GPU_MODELS = {
    "resnet50 inner": [units for width in RESNET50_BLOCKS for units in (width, width)],
    "resnet50 all": RESNET50_ALL,
    "deit_small heads + MLP": DEIT_SMALL,
}
Result = tuple[Tensor, Tensor, Tensor]  # mask, index, votes


class TorchVote:
    """What a user would write in torch, several ways. Ties go to the prior, if there is one, then to the lower unit."""

    def __init__(self, layers: list[int], keep: float, device: torch.device) -> None:
        with torch.device(device):
            self._prepare(layers, keep)

    def _prepare(self, layers: list[int], keep: float) -> None:
        self.layers, self.kept = layers, kept_units(layers, keep)
        self.units, self.widest, self.most = sum(layers), max(layers), max(self.kept)
        sizes = torch.tensor(layers)
        self.layer_of = torch.arange(len(layers)).repeat_interleave(sizes)
        first = sizes.cumsum(0) - sizes
        self.local = torch.arange(self.units) - first[self.layer_of]
        self.local32 = self.local.int()
        self.all_units = torch.arange(self.units)
        self.flat = self.layer_of * self.widest + self.local  # unit → place in the padded [L, widest]
        self.pad = torch.full((len(layers), self.widest), self.units)
        self.pad.view(-1)[self.flat] = torch.arange(self.units)
        self.kept_column = torch.tensor(self.kept)[:, None]
        self.winning = torch.arange(self.widest) < self.kept_column  # [L, widest]: ranks that win
        self.minus_infinity = torch.tensor([-float("inf")])
        self.lower_first = self.units - torch.arange(self.units)

    def loop(self, masks: Tensor, weights: Tensor, prior: Tensor | None) -> Result:
        mask, votes, index, first = self.minus_infinity.new_zeros(self.units, dtype=torch.bool), [], [], 0
        for units, kept in zip(self.layers, self.kept, strict=True):
            vote = weights @ masks[:, first : first + units].float()
            if prior is None:
                order = vote.sort(descending=True, stable=True).indices
            else:
                order = prior[first : first + units].sort(descending=True, stable=True).indices
                order = order[vote[order].sort(descending=True, stable=True).indices]
            chosen = order[:kept].sort().values
            mask[first + chosen] = True
            votes.append(vote)
            index.append(chosen)
            first += units
        return mask, torch.cat(index).int(), torch.cat(votes)

    def padded_sort(self, masks: Tensor, weights: Tensor, prior: Tensor | None) -> Result:
        """One stable sort of the padded votes [L, widest] (two with a prior)."""
        votes = weights @ masks.float()
        padded = torch.cat([votes, self.minus_infinity])[self.pad]
        if prior is None:
            order = padded.sort(dim=1, descending=True, stable=True).indices
        else:
            order = (
                torch.cat([prior, self.minus_infinity])[self.pad]
                .sort(dim=1, descending=True, stable=True)
                .indices
            )
            order = order.gather(1, padded.gather(1, order).sort(dim=1, descending=True, stable=True).indices)
        mask = torch.empty_like(self.winning).scatter_(1, order, self.winning).view(-1)[self.flat]
        return mask, self.local32[mask], votes

    def padded_topk(self, masks: Tensor, weights: Tensor, prior: Tensor | None) -> Result:
        """Distinct int64 keys (vote, rank), whose kept-th largest is each layer's threshold."""
        votes = weights @ masks.float()
        bits = votes.view(torch.int32)
        ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
        second = self.lower_first if prior is None else self._rank(prior)
        keys = (ordered << 32) + second
        padded = keys.new_full((len(self.layers), self.widest), -(2**63))
        padded.view(-1)[self.flat] = keys
        best = padded.topk(self.most, dim=1).values
        mask = keys >= best.gather(1, self.kept_column - 1).view(-1)[self.layer_of]
        return mask, self.local32[mask], votes

    def _rank(self, prior: Tensor) -> Tensor:
        return torch.empty_like(self.lower_first).scatter_(
            0, prior.sort(descending=True, stable=True).indices, self.lower_first
        )

    def global_sort(self, masks: Tensor, weights: Tensor, prior: Tensor | None) -> Result:
        """No padding: one sort of all units by (layer, vote, rank) in one int64 each."""
        votes = weights @ masks.float()
        bits = votes.view(torch.int32)
        ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
        order = self.all_units if prior is None else prior.sort(descending=True, stable=True).indices
        keys = (self.layer_of << 33) - ordered
        order = order[keys[order].sort(stable=True).indices]
        mask = self.minus_infinity.new_zeros(self.units, dtype=torch.bool)
        mask[order] = self.winning.view(-1)[self.flat]
        return mask, self.local32[mask], votes


def main() -> None:
    bench = Bench("meta_vote")
    for name, layers in (GPU_MODELS if bench.gpu else CPU_MODELS).items():
        for voters in (5, 50):
            for with_prior in (False, True):
                add_case(bench, name, layers, voters, with_prior)
    if bench.gpu:
        add_targets(bench)
    bench.finish()


def add_case(bench: Bench, model: str, layers: list[int], voters: int, with_prior: bool) -> None:
    name = f"{model}, N = {voters}{', prior' if with_prior else ''}"
    if not bench.wants(name):
        return
    masks = torch.rand(voters, sum(layers)).lt(0.5).to(bench.device)
    # Multiples of 1/64 add up exactly in any order: so every formulation must agree to the last bit.
    weights = (torch.randint(1, 65, (voters,)) / 64).to(bench.device)
    prior = torch.randn(sum(layers)).to(bench.device) if with_prior else None
    torch_vote = TorchVote(layers, 0.5, bench.device)
    formulations = {
        "per-layer loop": torch_vote.loop,
        "padded sort": torch_vote.padded_sort,
        "padded topk": torch_vote.padded_topk,
        "global sort": torch_vote.global_sort,
    }

    def ours() -> Vote:
        return meta_vote(masks, weights, layers=layers, keep=0.5, prior=prior)

    def check() -> None:
        on_cpu = (masks.cpu(), weights.cpu())
        prior_on_cpu = None if prior is None else prior.cpu()
        wanted = reference.meta_vote(*on_cpu, layers=layers, keep=0.5, prior=prior_on_cpu)[:3]
        for run in (lambda *_: ours()[:3], *formulations.values()):
            got = run(masks, weights, prior)
            assert all(torch.equal(a.cpu(), b) for a, b in zip(got, wanted, strict=True)), run

    compiled, graph = "padded topk, torch.compile", "ours, CUDA graph"
    peers = {key: partial(run, masks, weights, prior) for key, run in formulations.items()}
    peers[compiled] = bench.compiled(torch_vote.padded_topk, masks, weights, prior)
    peers[graph] = bench.graphed(ours)
    if bench.gpu:
        floors = dict.fromkeys([*formulations, compiled], 4.0) | {"per-layer loop": 50.0}
    elif sum(layers) > 1000:
        floors = dict.fromkeys(formulations, 8) | {"per-layer loop": 12}
    else:
        # 72 heads are too few to win by much: there the floor is not to lose.
        floors = dict.fromkeys(formulations, 1)
    bench.case(name, ours, peers, floors=floors, check=check, most_us=10.0 if bench.gpu else None)


def add_targets(bench: Bench) -> None:
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
