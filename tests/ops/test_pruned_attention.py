"""pruned_attention against its reference, and against timm's layout: removed heads are gone, the rest is unchanged."""

import pytest
import torch
from backends import move
from pruned_helpers import BY_NAME, FLOATS, assert_as_exact_as_torch, draw_index, generator, to

from mvp_ext.ops import pruned_attention, reference


def draw(batch, tokens, channels, heads, head_dim, kept, seed=0):
    """x, qkv weight and bias, proj weight and bias, head_index; scaled so that the softmax is no step."""
    g = generator(seed)
    width = heads * head_dim
    return [
        torch.randn(batch, tokens, channels, generator=g),
        torch.randn(3 * width, channels, generator=g) / channels**0.5,
        torch.randn(3 * width, generator=g),
        torch.randn(channels, width, generator=g) / width**0.5,
        torch.randn(channels, generator=g),
        draw_index(heads, kept, seed),
    ]


SIZES = [
    (1, 1, 1, 1, 1, 1),
    (2, 5, 7, 3, 4, 2),
    (1, 33, 24, 6, 8, 1),
    (3, 17, 48, 3, 16, 3),
    (2, 197, 64, 2, 32, 1),
]


@pytest.mark.parametrize("dtype", FLOATS, ids=BY_NAME)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_reference(size, dtype, device):
    arguments = move(device, *to(dtype, draw(*size)))
    for options in ({}, {"scale": 0.3}):
        options["num_heads"] = size[3]
        for without in ((), (2, 4)):
            some = [None if i in without else a for i, a in enumerate(arguments)]
            y = pruned_attention(*some, **options)
            assert_as_exact_as_torch(y, "pruned_attention", reference.pruned_attention, some, options)


def test_input_major_projection_and_any_order():
    x, *rest = draw(2, 19, 40, 5, 8, 3)
    qkv_weight, qkv_bias, proj_weight, proj_bias, _ = rest
    heads = torch.tensor([4, 0, 2])
    y = pruned_attention(
        x, qkv_weight, qkv_bias, proj_weight.t().contiguous().t(), proj_bias, heads, num_heads=5
    )
    same = pruned_attention(x, qkv_weight, qkv_bias, proj_weight, proj_bias, heads.sort().values, num_heads=5)
    torch.testing.assert_close(y, same)


def test_equals_the_dense_layer_with_removed_heads_zeroed():
    x, qkv_weight, qkv_bias, proj_weight, proj_bias, heads = draw(2, 11, 24, 4, 6, 2)
    dense = proj_weight.clone()
    removed = [h for h in range(4) if h not in heads.tolist()]
    for h in removed:
        dense[:, 6 * h : 6 * h + 6] = 0
    wanted = reference.pruned_attention(
        x, qkv_weight, qkv_bias, dense, proj_bias, torch.arange(4), num_heads=4
    )
    y = pruned_attention(x, qkv_weight, qkv_bias, proj_weight, proj_bias, heads, num_heads=4)
    torch.testing.assert_close(y, wanted)


def test_sizes_of_nothing():
    x, *weights, heads = draw(2, 5, 8, 2, 4, 1)
    y = pruned_attention(x, *weights, heads[:0], num_heads=2)
    assert torch.equal(y, weights[3].expand(2, 5, 8))
    assert pruned_attention(x[:0], *weights, heads, num_heads=2).shape == (0, 5, 8)
    assert pruned_attention(x[:, :0], *weights, heads, num_heads=2).shape == (2, 0, 8)


def test_repeats():
    arguments = draw(2, 50, 64, 4, 16, 2)
    wanted = pruned_attention(*arguments, num_heads=4)
    assert all(torch.equal(pruned_attention(*arguments, num_heads=4), wanted) for _ in range(10))


def test_gradcheck():
    *floats, heads = draw(1, 3, 4, 3, 2, 2)
    floats = [t.double().requires_grad_() for t in floats]
    assert torch.autograd.gradcheck(lambda *f: pruned_attention(*f, heads, num_heads=3), floats)


def test_gradients_of_removed_heads_are_zero():
    *floats, heads = draw(2, 5, 8, 4, 2, 2)
    floats = [t.requires_grad_() for t in floats]
    pruned_attention(*floats, heads, num_heads=4).pow(2).sum().backward()
    touched = floats[1].grad.view(3, 4, 2, 8).abs().sum((0, 2, 3)) > 0
    assert touched.nonzero().flatten().tolist() == heads.tolist()
    assert floats[3].grad.shape == (8, 8)


def test_compile():
    arguments = draw(1, 4, 6, 3, 2, 2)
    compiled = torch.compile(
        lambda *a: pruned_attention(*a, num_heads=3), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(*arguments), pruned_attention(*arguments, num_heads=3))


def changed(position, value, num_heads=2):
    arguments = draw(1, 3, 8, 2, 4, 1)
    arguments[position] = value
    return arguments, num_heads


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        (changed(0, torch.zeros(3, 8)), ValueError, "pruned_attention: x: expected 3 dimensions"),
        (changed(0, torch.zeros(1, 3, 7)), ValueError, r"x: expected shape .* with K = 8, got \(1, 3, 7\)"),
        (changed(1, torch.zeros(23, 8)), ValueError, "num_heads: expected a divisor of 7.66667 .*, got 2"),
        (changed(5, torch.tensor([0]), 5), ValueError, r"num_heads: expected a divisor of 8 .*, got 5"),
        (changed(5, torch.tensor([0]), 0), ValueError, r"num_heads: expected a divisor of 8 .*, got 0"),
        (
            changed(3, torch.zeros(8, 4)),
            ValueError,
            r"proj_weight: expected shape .* = \(any, 8\), got \(8, 4\)",
        ),
        (
            changed(5, torch.tensor([0.5])),
            TypeError,
            "head_index: expected dtype int32 or int64, got float32",
        ),
        (changed(5, torch.tensor([2])), ValueError, "expected values in .*, got"),
        (changed(5, torch.tensor([-1])), ValueError, "expected values in .*, got -1"),
    ],
)
def test_errors(case, error, message):
    arguments, num_heads = case
    with pytest.raises(error, match=message):
        pruned_attention(*arguments, num_heads=num_heads)
