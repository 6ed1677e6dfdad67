"""Whether a model is the one that its description builds: its tensors say nothing of strides, activations or hooks."""

from __future__ import annotations

from collections.abc import Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from mvp_ext.model.borrowed import own_random_numbers, twin_of

# Sides of the images that a convolutional model is tried on: it takes any, but for some that need more pixels.
TRIED_SIZES = (64, 224)
# Of the largest output: kernels of another layout or fusion may round otherwise, another function is further away.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_LOW_PRECISION = 0.05
# Values of one output that are compared.
_SAMPLED = 1 << 16
# Numbers and flags of a module that decide how it trains, or how fast it is, not what it computes.
_INERT = frozenset(
    ("training", "inplace", "momentum", "p", "drop_prob", "scale_by_keep", "in_features", "in_channels")
)
_VALUES = (bool, int, float, str, tuple, list, type(None), torch.dtype)


def difference(
    given: nn.Module, built: nn.Module, channels: int, sizes: Sequence[tuple[int, int]]
) -> str | None:
    """The first part of ``given`` that may compute something else in eval mode than its counterpart in ``built``.

    Compared are the kinds of all parts, the numbers that they hold, what was put on them (hooks, functions in place of
    methods), and then what comes out of both models, and of every part of them, for the same images.

    Args:
        given, built: with equal tensors, on one device. Neither is changed, nor is the random number generator.
        channels: of an image.
        sizes: (height, width) of images; the first is taken on which the models run.

    Returns:
        Text that names the part, what it is and what was expected; None where there is no difference.
    """
    return _of_parts(given, built) or _of_outputs(given, built, channels, sizes)


def _of_parts(given: nn.Module, built: nn.Module) -> str | None:
    ours, theirs = dict(given.named_modules()), dict(built.named_modules())
    for name in (*ours, *theirs):
        title = repr(name) if name else "the model itself"
        if name not in ours or name not in theirs:
            side = "is not in the model that is built again" if name in ours else "is missing"
            return f"part {title} {side}"
        one, other = ours[name], theirs[name]
        if type(one) is not type(other):
            return f"part {title} is {_kind(one)}, and {_kind(other)} when it is built again"
        if one._forward_hooks or one._forward_pre_hooks:
            return f"part {title} has a forward hook, which a file cannot hold"
        for key in vars(one).keys() | vars(other).keys():
            a, b = vars(one).get(key), vars(other).get(key)
            # Compiled in place, it computes the same.
            if key == "_compiled_call_impl":
                continue
            if callable(a) and not callable(b) and not isinstance(a, nn.Module):
                return f"part {title} has a function of its own as {key!r}, which a file cannot hold"
            if isinstance(a, FunctionType) and a is not b:
                return f"part {title} has another function as {key!r} than when it is built again"
            # The numbers of a part with parts are noted for others (num_classes, say); what acts of them is run below.
            leaf = not one._modules and not key.startswith("_") and key not in _INERT
            if leaf and isinstance(a, _VALUES) and isinstance(b, _VALUES) and a != b:
                return (
                    f"part {title} ({type(one).__name__}) has {key} = {a!r}, and {b!r} when it is built again"
                )
    return None


def _kind(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


@own_random_numbers()
@torch.no_grad()
def _of_outputs(
    given: nn.Module, built: nn.Module, channels: int, sizes: Sequence[tuple[int, int]]
) -> str | None:
    like = next((p for p in given.parameters() if p.is_floating_point()), torch.empty(0))
    for number, size in enumerate(sizes, 1):
        images = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0))
        # Large values reach what small ones do not: bounds of an activation, say.
        images[1] *= 30
        images = images.to(like)
        try:
            ours, theirs = _outputs_of_parts(given, images), _outputs_of_parts(built, images)
            break
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            if number == len(sizes):
                return f"the model does not run on images {tuple(images.shape)} ({error})"
    allowed = TOLERANCE.get(like.dtype, _LOW_PRECISION)
    # In the order in which parts finish, the model itself last. A part may be stepped over (by checkpointing, say).
    for name, outputs in ours.items():
        for a, b in zip(outputs, theirs.get(name, outputs), strict=False):
            if not _close(a, b, allowed):
                title = f"part {name!r}" if name else "the model itself"
                return f"{title} computes something else when it is built again"
    return None


def _outputs_of_parts(model: nn.Module, images: Tensor) -> dict[str, list[Any]]:
    """The outputs of every part that runs, by name, as they finish."""
    outputs: dict[str, list[Any]] = {}
    twin = twin_of(model)
    for name, module in twin.named_modules():
        # A part may change its output in place later, as ReLU does.
        module.register_forward_hook(
            lambda _m, _i, out, name=name: outputs.setdefault(name, []).append(_kept(out))
        )
    twin(images)
    return outputs


def _kept(value: Any) -> Any:
    """What a part put out, as it is now; of a large tensor some values, or all parts' would take a model's memory."""
    if not isinstance(value, Tensor):
        return type(value)
    values = value.flatten()
    if values.numel() <= _SAMPLED:
        return value.shape, values.clone()
    places = torch.randint(values.numel(), (_SAMPLED,), generator=torch.Generator().manual_seed(0))
    return value.shape, values[places.to(values.device)]


def _close(a: Any, b: Any, allowed: float) -> bool:
    if not isinstance(a, tuple) or not isinstance(b, tuple):
        return a is b
    (shape, x), (other, y) = a, b
    if shape != other or x.dtype != y.dtype:
        return False
    x, y = x.double(), y.double()
    finite = torch.isfinite(x)
    if not torch.equal(finite, torch.isfinite(y)):
        return False
    if not finite.any():
        return True
    return float((x - y)[finite].abs().max()) <= allowed * float(y[finite].abs().max()) + 1e-12
