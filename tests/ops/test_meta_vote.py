"""meta_vote against its reference, to the last bit: votes, masks, indices and the sampled noise."""

import math

import pytest
import torch
from backends import move, on_gpu
from emulator import emulated
from isa import OLDER, run_on
from torch.fx.experimental.proxy_tensor import make_fx

from mvp_ext.ops import kept_units, meta_vote, reference
from mvp_ext.ops.meta_vote import meta_vote_op
from mvp_ext.ops.philox import gumbel_noise, philox4x32, portable_log

NAN, INF = float("nan"), float("inf")
LAYERS = {
    "one unit": [1],
    "primes": [7, 31, 2, 13],
    "around a vector": [31, 32, 33, 63, 64, 65],
    "resnet18": [64, 64, 128, 128, 256, 256, 512, 512],
    "heads": [6] * 12,
    "heads and MLP": [6, 96] * 3,
}


def draw(layers, voters, targets=None, seed=0, kind="random"):
    """Masks, weights and a prior; "ties" draws the last two from three values."""
    generator = torch.Generator().manual_seed(seed)
    units = sum(layers)
    masks = torch.rand(voters, units, generator=generator) < 0.4
    shape = (voters,) if targets is None else (targets, voters)
    weights, prior = torch.randn(shape, generator=generator), torch.randn(units, generator=generator)
    if kind == "ties":
        weights, prior = weights.round(), prior.round()
    return masks, weights, prior


def assert_same(ours, wanted):
    assert ours.kept == wanted.kept
    for name in ("votes", "mask", "index"):
        a, b = getattr(ours, name), getattr(wanted, name)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        assert torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0)), name


@pytest.mark.parametrize("temperature", [None, 0.5])
@pytest.mark.parametrize("targets", [None, 1, 3])
@pytest.mark.parametrize("voters", [0, 1, 5, 33, 300])
@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS.keys())
def test_equals_reference(layers, voters, targets, temperature, device):
    for kind in ("random", "ties"):
        masks, weights, prior = move(device, *draw(layers, voters, targets, seed=voters, kind=kind))
        for options in ({"weights": weights, "prior": prior}, {"weights": weights}, {"prior": prior}, {}):
            arguments = {"layers": layers, "keep": 0.3, "temperature": temperature, "seed": 7, **options}
            assert_same(meta_vote(masks, **arguments), reference.meta_vote(masks, **arguments))


@pytest.mark.parametrize("temperature", [None, 0.5])
@pytest.mark.parametrize("layers", [[70_001, 3], [70_000, 4]], ids=str)
def test_wide_layer(layers, temperature, device):
    """More units than a block of the CUDA kernel has threads for; and rows that are not, and are, whole words."""
    masks, weights, prior = move(device, *draw(layers, 5, 2, kind="ties"))
    arguments = {"layers": layers, "keep": 0.3, "prior": prior, "temperature": temperature, "seed": 7}
    assert_same(meta_vote(masks, weights, **arguments), reference.meta_vote(masks, weights, **arguments))


def test_by_hand(device):
    masks = torch.tensor([[1, 1, 0, 0, 1, 0], [1, 0, 1, 0, 1, 0], [0, 1, 1, 0, 0, 1]], dtype=torch.bool)
    masks, weights = move(device, masks, torch.tensor([1.0, 2.0, 4.0]))
    vote = meta_vote(masks, weights, layers=[4, 2], keep=0.5)
    assert vote.votes.tolist() == [3, 5, 6, 0, 3, 4]
    assert vote.mask.tolist() == [False, True, True, False, False, True]
    assert vote.index.tolist() == [1, 2, 1]  # counted within the layer, ascending
    assert vote.kept == (2, 1)


def test_ties_go_to_the_prior_then_to_the_lower_unit(device):
    masks = torch.ones(1, 6, dtype=torch.bool, device=device)
    assert meta_vote(masks, layers=[6], keep=0.5).index.tolist() == [0, 1, 2]
    prior = torch.tensor([0.0, NAN, -INF, 5.0, -0.0, 0.0], device=device)
    chosen = [meta_vote(masks, layers=[6], keep=[k], prior=prior).index.tolist() for k in range(1, 7)]
    assert chosen == [[3], [0, 3], [0, 3, 4], [0, 3, 4, 5], [0, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]


def test_the_prior_never_outranks_a_vote(device):
    masks, prior = move(device, torch.tensor([[True, False, False]]), torch.tensor([-INF, INF, 1.0]))
    vote = meta_vote(masks, layers=[3], keep=[2], prior=prior)
    assert vote.index.tolist() == [0, 1]


def test_nan_votes_rank_below_every_number(device):
    masks = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0]], dtype=torch.bool)
    masks, weights = move(device, masks, torch.tensor([NAN, -INF]))
    vote = meta_vote(masks, weights, layers=[4], keep=[2])
    assert vote.mask.tolist() == [False, True, True, False]  # −inf and 0 before NaN
    assert vote.votes.isnan().tolist() == [True, False, False, True]  # only the units that voter kept
    assert meta_vote(masks, weights, layers=[4], keep=[3]).index.tolist() == [0, 1, 2]


@pytest.mark.parametrize("temperature", [None, 1.0])
@pytest.mark.parametrize(
    "special", [[NAN, 1.0, INF], [INF, -INF, 0.0], [-0.0, 0.0, 1e-45], [3e38, 3e38, -3e38]]
)
def test_special_weights(special, temperature, device):
    masks, _, prior = move(device, *draw([40], 3))
    arguments = {"layers": [40], "keep": 0.5, "prior": prior, "temperature": temperature, "seed": 0}
    weights = torch.tensor(special, device=device)
    assert_same(meta_vote(masks, weights, **arguments), reference.meta_vote(masks, weights, **arguments))


def test_views(device):
    """Slices with an offset, steps, transposed masks, a prior for each target, other float types."""
    layers = [50, 47]
    masks, weights, _ = move(device, *draw(layers, 12, 4))
    wide = torch.zeros(24, 131, dtype=torch.bool, device=device)
    wide[::2, 30:127] = masks
    prior = torch.randn(97, 4).to(device).T
    for m in (wide[::2, 30:127], masks.T.contiguous().T):
        for w in (weights, weights.double().T.contiguous().T, weights.bfloat16()):
            arguments = {"layers": layers, "keep": [0.25, 0.5], "prior": prior}
            assert_same(meta_vote(m, w, **arguments), reference.meta_vote(masks, w, **arguments))


def test_many_targets_equal_single_votes(device):
    layers = LAYERS["resnet18"]
    masks, weights, prior = move(device, *draw(layers, 20, 80))  # large enough for several threads
    together = meta_vote(masks, weights, layers=layers, keep=0.5, prior=prior)
    for t, w in enumerate(weights):
        alone = meta_vote(masks, w, layers=layers, keep=0.5, prior=prior)
        assert all(torch.equal(a[t], b) for a, b in zip(together[:3], alone[:3], strict=True))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_repeats_and_threads_agree(threads, device):
    if threads > 1 and on_gpu(device):
        pytest.skip("threads are the CPU's")
    layers = LAYERS["resnet18"]
    masks, weights, prior = move(device, *draw(layers, 50, 40))
    arguments = {"layers": layers, "keep": 0.3, "prior": prior, "temperature": 0.7, "seed": 3}
    wanted = reference.meta_vote(masks, weights, **arguments)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(10):
            assert_same(meta_vote(masks, weights, **arguments), wanted)
    finally:
        torch.set_num_threads(before)


def test_sizes_of_nothing(device):
    vote = meta_vote(torch.zeros(3, 0, dtype=torch.bool, device=device), layers=[], keep=0.5)
    assert (vote.mask.shape, vote.index.shape, vote.kept) == ((0,), (0,), ())
    masks, weights = move(device, torch.zeros(2, 5, dtype=torch.bool), torch.zeros(0, 2))
    vote = meta_vote(masks, weights, layers=[5], keep=0.4)
    assert [tuple(x.shape) for x in vote[:3]] == [(0, 5), (0, 2), (0, 5)]


@pytest.mark.sanitize
def test_alignments(device):
    """Layers that start anywhere in rows that start anywhere: the CUDA kernel has words of four."""
    for start in range(4):
        for layers in ([1, 2, 3, 6], [5, 4, 7], [8, 9, 3, 64], [3, 1100, 1]):
            masks, weights, prior = draw(layers, 9, 2, kind="ties")
            wide = torch.zeros(9, start + sum(layers), dtype=torch.bool, device=device)
            wide[:, start:] = masks
            arguments = {"layers": layers, "keep": 0.4, "temperature": 0.5, "seed": 1}
            for options in ({"weights": weights, "prior": prior}, {}):
                moved = {name: value.to(device) for name, value in options.items()}
                wanted = reference.meta_vote(masks, **arguments, **options)
                # The op itself: the public function would make the masks contiguous.
                ours = meta_vote_op(
                    wide[:, start:], moved.get("weights"), moved.get("prior"), layers, wanted.kept, 0.5, 1
                )
                for a, b in zip(ours, wanted[:3], strict=True):
                    assert torch.equal(a.cpu(), b)


@pytest.mark.sanitize
def test_many_layers_and_voters(device):
    """More layers than a launch of the CUDA kernel takes, more voters than it stages at once."""
    layers = [1, 2, 3] * 200
    masks, weights, prior = move(device, *draw(layers, 3, 2))
    arguments = {"layers": layers, "keep": 0.5, "prior": prior, "temperature": 0.5, "seed": 1}
    assert_same(meta_vote(masks, weights, **arguments), reference.meta_vote(masks, weights, **arguments))
    for layers in ([9, 4, 3], [7, 6]):
        masks, weights, prior = move(device, *draw(layers, 1100, 2))
        arguments = {"layers": layers, "keep": 0.5, "prior": prior}
        assert_same(meta_vote(masks, weights, **arguments), reference.meta_vote(masks, weights, **arguments))


@pytest.mark.parametrize("schedule", range(1, 5))
def test_schedules(schedule):
    """In whatever order the threads of the CUDA kernel run, its bits are the CPU kernel's."""
    for layers, voters in (([64, 130, 6], 40), ([33, 2], 520), ([5000, 3], 3)):
        for kind in ("random", "ties"):
            masks, weights, prior = draw(layers, voters, 2, kind=kind)
            arguments = {"layers": layers, "keep": 0.4, "prior": prior, "temperature": 0.5, "seed": 2}
            for temperature in (None, 0.5):
                arguments["temperature"] = temperature
                wanted = meta_vote(masks, weights, **arguments)
                with emulated(schedule):
                    assert_same(meta_vote(masks, weights, **arguments), wanted)


# Sampling


def test_philox_known_answers():
    """The published test vector that fits our counters, of which two words are always zero."""
    zero = torch.zeros(1, dtype=torch.int64)
    words = [int(w) for w in philox4x32(zero, zero, 0)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_log_is_accurate():
    x = torch.logspace(math.log10(5e-8), math.log10(17), 100_001, dtype=torch.float64).float()
    exact = x.double().log()
    unit = exact.abs().float().nextafter(torch.tensor(INF)).double() - exact.abs().float().double()
    assert ((portable_log(x).double() - exact).abs() / unit).max() <= 1.1


def test_noise_is_gumbel():
    noise = gumbel_noise(200_000, seed=1).double()
    assert abs(noise.mean() - 0.577216) < 0.01
    assert abs(noise.std() - math.pi / 6**0.5) < 0.01
    for q in (0.01, 0.1, 0.5, 0.9, 0.99):
        assert abs((noise < -math.log(-math.log(q))).double().mean() - q) < 0.003


def test_noise_depends_only_on_seed_target_and_unit():
    noise = gumbel_noise(101, seed=5, targets=3)
    assert torch.equal(noise[:, :33], gumbel_noise(33, seed=5, targets=3))
    assert torch.equal(noise[0], gumbel_noise(101, seed=5))
    assert len({float(row.sum()) for row in noise} | {float(gumbel_noise(101, seed=5 + 2**32).sum())}) == 4


def test_draws_follow_the_softmax():
    """One unit of four: its frequency is its probability."""
    masks = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]], dtype=torch.bool)
    weights = torch.ones(20_000, 3)
    vote = meta_vote(masks, weights, layers=[4], keep=[1], temperature=0.8, seed=11)
    frequency = vote.mask.double().mean(0)
    probability = (torch.arange(4).double() / 0.8).softmax(0)
    assert ((frequency - probability).abs() < 4 * (probability * (1 - probability) / 20_000).sqrt()).all()


def test_low_temperature_is_topk_and_high_is_uniform():
    layers = [64, 32]
    masks, weights, _ = draw(layers, 9)
    cold = meta_vote(masks, weights, layers=layers, keep=0.5, temperature=1e-6, seed=0)
    assert torch.equal(cold.mask, meta_vote(masks, weights, layers=layers, keep=0.5).mask)
    hot = meta_vote(masks, weights.expand(4000, -1), layers=layers, keep=0.5, temperature=1e9, seed=0)
    assert (hot.mask.double().mean(0) - 0.5).abs().max() < 0.04


# Counts


@pytest.mark.parametrize(
    ("layers", "keep", "align", "kept"),
    [
        ([5, 64, 1], 0.5, 1, (3, 32, 1)),  # 2.5 rounds up
        ([10, 3], 0.01, 1, (1, 1)),
        ([10, 3], 1.0, 1, (10, 3)),
        ([64, 6, 12, 20], 0.3, 8, (16, 6, 8, 8)),  # 19 → 16; a layer smaller than align stays whole
        ([12, 12], [0.9, 0.99], 8, (8, 12)),  # 11 → 8, 12 → 16 → all 12
        ([10, 10], [3, 10], 8, (3, 10)),  # exact counts are not aligned
        ([10, 10], [3, 0.5], 1, (3, 5)),
        ([], 0.5, 1, ()),
    ],
)
def test_kept_units(layers, keep, align, kept):
    assert kept_units(layers, keep, align) == kept
    if layers:
        masks = torch.zeros(1, sum(layers), dtype=torch.bool)
        vote = meta_vote(masks, layers=layers, keep=keep, align=align)
        assert tuple(int(m.sum()) for m in vote.mask.split(layers)) == vote.kept == kept


# Errors: op, argument, expectation, what came


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"masks": [[True]]}, TypeError, "masks: expected a torch.Tensor, got list"),
        ({"masks": torch.zeros(2, 6)}, TypeError, "masks: expected dtype bool, got float32"),
        ({"masks": torch.zeros(6, dtype=torch.bool)}, ValueError, "masks: expected 2 dimensions"),
        ({"weights": torch.ones(3)}, ValueError, r"weights: expected shape .* = \(2,\), got \(3,\)"),
        ({"weights": torch.ones(1, 1, 2)}, ValueError, "weights: expected 1 or 2 dimensions"),
        ({"weights": torch.ones(2).int()}, TypeError, "weights: expected dtype"),
        ({"weights": torch.ones(2, device="meta")}, ValueError, "weights: expected device cpu, got meta"),
        ({"prior": torch.ones(5)}, ValueError, r"prior: expected shape \[U\] = \(6,\), got \(5,\)"),
        ({"prior": torch.ones(2, 6)}, ValueError, "prior: expected"),
        ({"prior": torch.ones(6).long()}, TypeError, "prior: expected dtype"),
        ({"layers": [3, 4]}, ValueError, "layers: expected a sum of 6 .*, got 7"),
        ({"layers": [6, 0]}, ValueError, "layers: expected at least 1 unit"),
        ({"keep": 0.0}, ValueError, r"keep: expected a ratio in \(0, 1\], got 0.0"),
        ({"keep": 1.5}, ValueError, r"keep: expected a ratio in \(0, 1\], got 1.5"),
        ({"keep": NAN}, ValueError, r"keep: expected a ratio in \(0, 1\], got nan"),
        ({"keep": 1}, TypeError, "keep: expected a float or a sequence"),
        ({"keep": "0.5"}, TypeError, "keep: expected a float or a sequence"),
        ({"keep": [0.5]}, ValueError, "keep: expected one entry for each of 2 layers, got 1"),
        ({"keep": [4, 1]}, ValueError, r"keep: expected a count in \[1, 3\], got 4"),
        ({"keep": [0, 1]}, ValueError, r"keep: expected a count in \[1, 3\], got 0"),
        ({"keep": [True, 1]}, TypeError, "keep: expected floats"),
        ({"align": 0}, ValueError, "align: expected at least 1, got 0"),
        ({"align": 2.0}, TypeError, "align: expected an int"),
        ({"temperature": 0.0, "seed": 1}, ValueError, "temperature: expected a number in .*, got 0.0"),
        ({"temperature": NAN, "seed": 1}, ValueError, "temperature: expected a number in .*, got nan"),
        ({"temperature": 1.0}, ValueError, "seed: expected an int where temperature is given, got None"),
        ({"temperature": 1.0, "seed": -1}, ValueError, "seed: expected an int in .*, got -1"),
    ],
)
def test_errors(change, error, message):
    arguments = {"masks": torch.zeros(2, 6, dtype=torch.bool), "layers": [3, 3], "keep": 0.5, **change}
    with pytest.raises(error, match=message):
        meta_vote(**arguments)


# Integration


def test_opcheck():
    masks, weights, prior = draw([7, 9], 4, 2)
    for temperature in (None, 0.5):
        torch.library.opcheck(
            torch.ops.mvp_ext.meta_vote.default, (masks, weights, prior, [7, 9], [3, 4], temperature, 1)
        )
    torch.library.opcheck(torch.ops.mvp_ext.meta_vote.default, (masks, None, None, [7, 9], [3, 4], None, 0))


def test_modes_see_the_op():
    """The short cut around the dispatcher is not taken where someone watches it."""
    masks, weights, _ = draw([7, 9], 4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        meta_vote(masks, weights, layers=[7, 9], keep=0.5)
    assert any(event.key == "mvp_ext::meta_vote" for event in profile.key_averages())
    graph = make_fx(lambda m, w: meta_vote(m, w, layers=[7, 9], keep=0.5)[:3])(masks, weights)
    assert any("mvp_ext.meta_vote" in str(node.target) for node in graph.graph.nodes)


def test_compile():
    masks, weights, prior = draw([7, 9], 4)

    def step(masks, weights, prior):
        vote = meta_vote(masks, weights * 2, layers=[7, 9], keep=0.5, prior=prior, temperature=0.5, seed=1)
        return vote.votes + 1, vote.mask, vote.index

    compiled = torch.compile(step, fullgraph=True)(masks, weights, prior)
    assert all(torch.equal(a, b) for a, b in zip(compiled, step(masks, weights, prior), strict=True))


@pytest.mark.parametrize("isa", OLDER)
def test_other_instruction_sets(isa):
    run_on(isa, __file__, "equals_reference or ties_go")
