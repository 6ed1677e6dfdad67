"""meta_vote against the per-layer torch loop and against batched torch formulations, all with the same exact result.

Whatever does not change from vote to vote (padding maps, positions, thresholds' places) is prepared outside the timing,
for the peers as for us.
"""

from __future__ import annotations

import torch
from harness import Bench
from torch import Tensor

from mvp_ext.ops import Vote, kept_units, meta_vote, reference

RESNET18_INNER = [64, 64, 128, 128, 256, 256, 512, 512]
RESNET18_ALL = [width for width in (64, 128, 256, 512) for _ in range(4)]
RESNET50_ALL = [w for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)) for _ in range(blocks)
                for w in (width, width, 4 * width)]  # fmt: skip
CASES = {
    "resnet18 inner": RESNET18_INNER,
    "resnet18 all": RESNET18_ALL,
    "resnet50 all": RESNET50_ALL,
    "deit_small heads": [6] * 12,
    "deit_small heads + MLP": [6] * 12 + [1536] * 12,
}
Result = tuple[Tensor, Tensor, Tensor]  # mask, index, votes


class TorchVote:
    """What a user would write in torch, several ways. Ties go to the prior, if there is one, then to the lower unit."""

    def __init__(self, layers: list[int], keep: float, device: str = "cpu") -> None:
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
    generator = torch.Generator().manual_seed(0)
    for name, layers in CASES.items():
        for voters in (5, 50):
            for with_prior in (False, True):
                masks = torch.rand(voters, sum(layers), generator=generator) < 0.5
                # Multiples of 1/64 add up exactly in any order: so every formulation must agree to the last bit.
                weights = torch.randint(1, 65, (voters,), generator=generator) / 64
                prior = torch.randn(sum(layers), generator=generator) if with_prior else None
                add_case(
                    bench,
                    f"{name}, N = {voters}{', prior' if with_prior else ''}",
                    layers,
                    masks,
                    weights,
                    prior,
                )
    bench.finish()


def add_case(
    bench: Bench, name: str, layers: list[int], masks: Tensor, weights: Tensor, prior: Tensor | None
) -> None:
    torch_vote = TorchVote(layers, 0.5)
    peers = {
        "per-layer loop": torch_vote.loop,
        "padded sort": torch_vote.padded_sort,
        "padded topk": torch_vote.padded_topk,
        "global sort": torch_vote.global_sort,
    }

    def check() -> None:
        wanted = reference.meta_vote(masks, weights, layers=layers, keep=0.5, prior=prior)[:3]
        for peer in (lambda *_: ours()[:3], *peers.values()):
            assert all(torch.equal(a, b) for a, b in zip(peer(masks, weights, prior), wanted, strict=True)), (
                peer
            )

    def ours() -> Vote:
        return meta_vote(masks, weights, layers=layers, keep=0.5, prior=prior)

    bench.case(
        name,
        ours,
        {key: lambda peer=peer: peer(masks, weights, prior) for key, peer in peers.items()},
        # 72 heads are too few to win by much: there the floor is not to lose.
        floors=dict.fromkeys(peers, 8) | {"per-layer loop": 12}
        if sum(layers) > 1000
        else dict.fromkeys(peers, 1),
        check=check,
    )


if __name__ == "__main__":
    main()
