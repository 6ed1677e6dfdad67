"""Each criterion against its definition, one example at a time, by another way than the code's."""

from __future__ import annotations

import itertools
from contextlib import contextmanager

import pytest
import torch
from digits import digits_task, tiny_backbone
from torch.nn import functional

from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.preprocessing import to_batch
from mvp_ext.model.surgery import prune_model
from mvp_ext.pruning.scores import CRITERIA, score_units

CASES = [("test_resnet", "inner"), ("test_resnet", "all"), ("test_vit", "heads"), ("test_vit", "heads+mlp")]
ON_DATA = ("taylor", "taylor2", "activation", "weight_taylor")


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request):
    """A tiny model, its structure, and six real images with labels."""
    name, scope = request.param
    torch.manual_seed(0)
    backbone = tiny_backbone(name)
    data = digits_task((0, 1, 2)).split()
    chosen = torch.tensor([0, 1, 12, 13, 24, 25])
    p = backbone.preprocessing
    images = to_batch(data.train_images[chosen], p.size, p.mean, p.std)
    return backbone.model, find_structure(backbone.model, scope), images, data.train_labels[chosen]


def score(model, structure, criterion, batches=(), **options):
    return score_units(
        model, structure, criterion, batches, image_shape=(3, 32, 32), precision="float32", **options
    )


def assert_scores(got, expected, rtol=1e-3):
    assert got.keys() == expected.keys()
    for name in got:
        assert got[name].dtype == torch.float32
        assert got[name].device.type == "cpu"
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(
            got[name], expected[name].float(), rtol=rtol, atol=1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@contextmanager
def gated(model, structure):
    """Multiply each unit's activation by a gate of 1, so that ∂L/∂gate = Σ_positions a · ∂L/∂a.

    Yields the gates and the activations. Activations are copied at once: the model may change them in place later.
    """
    gates = {layer.name: torch.ones(layer.units, requires_grad=True) for layer in structure}
    activations = {}
    handles = []
    for layer in structure:

        def apply(value, layer=layer):
            probe = layer.probe
            activations[layer.name] = value.detach().clone().movedim(probe.dim, -1)
            gate = gates[layer.name]
            if probe.heads is not None:
                gate = gate.repeat_interleave(value.shape[probe.dim] // probe.heads)
            shape = [1] * value.ndim
            shape[probe.dim] = -1
            return value * gate.view(shape)

        module = model.get_submodule(layer.probe.module)
        if layer.probe.side == "input":
            handles.append(module.register_forward_pre_hook(lambda m, inputs, f=apply: (f(inputs[0]),)))
        else:
            handles.append(module.register_forward_hook(lambda m, inputs, output, f=apply: f(output)))
    try:
        yield gates, activations
    finally:
        for handle in handles:
            handle.remove()


def gate_gradients(model, structure, images, labels):
    """Per example: layer → f32 [n, units] of ∂L_x/∂gate, and mean |a| of each unit."""
    gradients, means = [], []
    for image, label in zip(images, labels, strict=True):
        with gated(model, structure) as (gates, activations):
            loss = functional.cross_entropy(model(image[None]), label[None])
            found = torch.autograd.grad(loss, list(gates.values()))
        gradients.append(dict(zip(gates, found, strict=True)))
        means.append(
            {
                layer.name: activations[layer.name]
                .abs()
                .unflatten(-1, (layer.units, -1))
                .transpose(-1, -2)
                .flatten(0, -2)
                .mean(0)
                for layer in structure
            }
        )
    return (
        {name: torch.stack([g[name] for g in gradients]) for name in structure.names},
        {name: torch.stack([m[name] for m in means]) for name in structure.names},
    )


def test_scores_of_activations_per_example(case):
    model, structure, images, labels = case
    gradients, means = gate_gradients(model, structure, images, labels)
    batches = [(images, labels)]
    assert_scores(
        score(model, structure, "taylor", batches), {n: g.abs().mean(0) for n, g in gradients.items()}
    )
    assert_scores(
        score(model, structure, "taylor2", batches), {n: g.square().mean(0) for n, g in gradients.items()}
    )
    assert_scores(score(model, structure, "activation", batches), {n: m.mean(0) for n, m in means.items()})
    # The pitfall: one shared gate's gradient is |Σ_x|, which is something else here.
    of_sum = {n: g.sum(0).abs() / len(labels) for n, g in gradients.items()}
    assert any(bool((g.abs().mean(0) > 1.5 * of_sum[n]).any()) for n, g in gradients.items())


def own_weights(model, layer):
    """Views of the matrices or filters whose rows make a unit, as [units, …] by hand for the tiny models."""
    module = model.get_submodule(layer.name)
    if layer.kind == "filter":
        return [(module.weight, lambda w: w.flatten(1))]
    if layer.kind == "neuron":
        return [(module.fc1.weight, lambda w: w.flatten(1))]
    # q, k and v rows of each head
    return [
        (
            module.qkv.weight,
            lambda w: w.unflatten(0, (3, layer.units, module.head_dim)).transpose(0, 1).flatten(1),
        )
    ]


def with_biases(model, layer):
    """As above with biases and, for filters, the affine parameters of the filter's normalisation."""
    module, rows = model.get_submodule(layer.name), own_weights(model, layer)
    if layer.kind == "filter":
        norm = model.get_submodule(layer.name.replace("conv", "bn"))
        return [*rows, (norm.weight, lambda w: w[:, None]), (norm.bias, lambda w: w[:, None])]
    if layer.kind == "neuron":
        return [*rows, (module.fc1.bias, lambda w: w[:, None])]
    split = rows[0][1]
    return [*rows, (module.qkv.bias, split)]


def test_weight_taylor(case):
    """Σ (w ∂L/∂w)² over a unit's own parameters, the gradient being that of the mean loss over all batches."""
    model, structure, images, labels = case
    loss = torch.stack(
        [functional.cross_entropy(model(x[None]), y[None]) for x, y in zip(images, labels, strict=True)]
    ).mean()
    expected = {}
    for layer in structure:
        parts = with_biases(model, layer)
        found = torch.autograd.grad(loss, [w for w, _ in parts], retain_graph=True)
        expected[layer.name] = sum(
            rows((w.detach() * g).square()).sum(1) for (w, rows), g in zip(parts, found, strict=True)
        )
    assert_scores(
        score(model, structure, "weight_taylor", [(images[:4], labels[:4]), (images[4:], labels[4:])]),
        expected,
    )


def test_scores_of_weights(case):
    model, structure, _, _ = case
    for layer in structure:
        ((weight, rows),) = own_weights(model, layer)
        w = rows(weight.detach())
        expected = {
            "l1": w.abs().sum(1),
            "l2": w.norm(dim=1),
            "fpgm": torch.stack([(w - row).norm(dim=1).sum() for row in w]),
        }
        for criterion, value in expected.items():
            got = score(model, structure, criterion)[layer.name]
            torch.testing.assert_close(got, value, rtol=1e-3, atol=1e-4 * float(value.max()))


@pytest.mark.parametrize("criterion", ON_DATA)
def test_batch_size_does_not_matter(case, criterion):
    model, structure, images, labels = case
    whole = score(model, structure, criterion, [(images, labels)])
    uneven = score(model, structure, criterion, [(images[:1], labels[:1]), (images[1:], labels[1:])])
    assert_scores(uneven, whole)


def test_scoring_leaves_the_model_as_it_was(case):
    model, structure, images, labels = case
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    for criterion in CRITERIA:
        score(model, structure, criterion, [(images, labels)])
        assert model.training
    model.eval()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_scores_of_an_already_pruned_model():
    """Scope `all` again, where blocks scatter their narrower branch into the stream: same definition."""
    torch.manual_seed(0)
    model = tiny_backbone().model
    structure = find_structure(model, "all")
    prune_model(model, Mask.random(structure, 0.5, seed=3), structure=structure)
    again = find_structure(model, "all")
    images, labels = torch.randn(3, 3, 32, 32), torch.tensor([0, 3, 1])
    gradients, means = gate_gradients(model, again, images, labels)
    assert_scores(
        score(model, again, "taylor", [(images, labels)]), {n: g.abs().mean(0) for n, g in gradients.items()}
    )
    assert_scores(
        score(model, again, "activation", [(images, labels)]), {n: m.mean(0) for n, m in means.items()}
    )


def test_random_is_seeded(case):
    model, structure, _, _ = case
    a, b, other = (score(model, structure, "random", seed=seed) for seed in (5, 5, 6))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not any(torch.equal(a[n], other[n]) for n in a)
    if len(structure) > 1:
        first, second = itertools.islice(a.values(), 2)
        assert not torch.equal(first[:4], second[:4])  # one stream, not one draw a layer


def test_synflow_of_a_resnet_by_hand():
    """Σ |w ∂R/∂w| with R the summed output of the net with |w| on ones, normalisation without its running mean."""
    torch.manual_seed(0)
    model = tiny_backbone().model
    structure = find_structure(model, "inner")
    got = score(model, structure, "synflow")
    twin = tiny_backbone().model.double()
    with torch.no_grad():
        for name, tensor in twin.state_dict(keep_vars=True).items():
            if name.endswith("running_mean"):
                tensor.zero_()
            elif isinstance(tensor, torch.nn.Parameter):
                tensor.abs_()
    output = twin(torch.ones(1, 3, 32, 32, dtype=torch.float64)).sum()
    output.backward()
    for layer in structure:
        weight = twin.get_submodule(layer.name).weight
        expected = (weight * weight.grad).abs().flatten(1).sum(1)
        assert bool((got[layer.name] > 0).all())
        torch.testing.assert_close(got[layer.name].double(), expected / expected.max(), rtol=1e-4, atol=1e-6)


def test_synflow_needs_no_data_and_is_positive(case):
    model, structure, images, labels = case
    without = score(model, structure, "synflow")
    with_data = score(model, structure, "synflow", [(images, labels)])
    for name, value in without.items():
        assert bool((value >= 0).all())
        assert float(value.max()) == pytest.approx(1)
        assert torch.equal(value, with_data[name])


def test_errors(case):
    model, structure, images, labels = case
    with pytest.raises(ValueError, match=r"criterion: expected one of taylor, .*, random, got 'magic'"):
        score(model, structure, "magic")
    for criterion in ON_DATA:
        with pytest.raises(ValueError, match=f"{criterion}: expected at least one batch"):
            score(model, structure, criterion, [])
    with pytest.raises(ValueError, match="synflow: expected image_shape"):
        score_units(model, structure, "synflow")
    broken = images.clone()
    broken[0, 0, 0, 0] = float("nan")
    for criterion in ON_DATA:
        with pytest.raises(ValueError, match=f"{criterion}: expected finite scores, got NaN or inf in layer"):
            score(model, structure, criterion, [(broken, labels)])
    assert all(parameter.grad is None for parameter in model.parameters())
