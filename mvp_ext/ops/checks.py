"""The checks of the public ops. Each error says op, argument, what was expected and what came.

TypeError for a wrong kind or dtype, ValueError for a wrong shape, range or device, NotImplementedError for a layout.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from mvp_ext.ops._native import native

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INDICES = (torch.int32, torch.int64)


def check_tensor(
    op: str,
    name: str,
    value: object,
    *,
    ndim: int | tuple[int, ...] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """``value`` as a dense tensor of one of the given ranks, dtypes, and on the given device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise NotImplementedError(f"{op}: {name}: expected a strided tensor, got layout {value.layout}")
    if dtypes is not None and value.dtype not in dtypes:
        expected = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(
            f"{op}: {name}: expected dtype {expected}, got {str(value.dtype).removeprefix('torch.')}"
        )
    if ndim is not None and value.ndim != ndim:
        ranks = (ndim,) if isinstance(ndim, int) else ndim
        if value.ndim not in ranks:
            expected = " or ".join(map(str, ranks))
            raise ValueError(f"{op}: {name}: expected {expected} dimensions, got shape {tuple(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{op}: {name}: expected device {device}, got {value.device}")
    return value


def same_kind(tensor: object, other: object) -> bool:
    """Whether both are plain floating CPU tensors of one dtype and of one shape. One native call, for small ops that
    take less time than their checks. False says nothing: then ask ``check_tensor`` and ``check_shape``, who explain.
    """
    return not torch.compiler.is_compiling() and bool(native().same_kind(tensor, other))


def check_shape(op: str, name: str, value: Tensor, expected: Sequence[int | None], letters: str) -> None:
    """``value.shape`` equals ``expected`` (None: any size); ``letters`` names the dimensions, like "[N, U]"."""
    shape = tuple(value.shape)
    if shape == expected:
        return
    if len(shape) != len(expected) or any(
        e is not None and e != s for e, s in zip(expected, shape, strict=True)
    ):
        wanted = tuple("any" if e is None else e for e in expected)
        raise ValueError(f"{op}: {name}: expected shape {letters} = {wanted}, got {shape}".replace("'", ""))


def check_index(op: str, name: str, index: Tensor | None, block: int, size: int, device: torch.device) -> int:
    """How many of ``size`` positions ``index`` keeps. Its values are checked where they are read."""
    if index is None:
        return size
    check_tensor(op, name, index, ndim=1, dtypes=INDICES, device=device)
    if block < 1 or size % block:
        raise ValueError(f"{op}: block of {name}: expected a divisor of {size}, got {block}")
    return index.shape[0] * block


def check_bias(
    op: str,
    bias: Tensor | None,
    weight: Tensor,
    *,
    name: str = "bias",
    size: int | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
) -> None:
    """None, or a vector with an entry for each output of the weight (or ``size`` of them), of its dtype by default."""
    if bias is not None:
        check_tensor(op, name, bias, ndim=1, dtypes=dtypes or (weight.dtype,), device=weight.device)
        size = weight.shape[0] if size is None else size
        if bias.shape[0] != size:
            check_shape(op, name, bias, (size,), "[O]")


def check_range(
    op: str, name: str, index: Tensor | None, size: int, *, noun: str = "values", unique: bool = False
) -> None:
    """Values of an index in [0, size), none of them twice if ``unique``; ``noun`` is the error's word for them.

    Where they can be read without waiting for a device: so only to explain an error, or where no kernel looks.
    """
    if index is None or not index.is_cpu or torch.compiler.is_compiling():
        return
    try:
        units = index.tolist()
    except (RuntimeError, AssertionError):  # a fake tensor, or one of many under vmap
        return
    for unit in units:
        if not 0 <= unit < size:
            raise ValueError(f"{op}: {name}: expected {noun} in [0, {size}), got {unit}")
    if unique and len(set(units)) < len(units):
        twice = next(unit for at, unit in enumerate(units) if unit in units[:at])
        raise ValueError(f"{op}: {name}: expected no index twice, got {twice} again")


def check_int(op: str, name: str, value: Any) -> int:
    """``value`` as an int, from whatever is an integer: numpy's, and torch's symbols; not a bool."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value  # type: ignore[return-value]
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    raise TypeError(f"{op}: {name}: expected an int, got {value!r}")


def check_float(op: str, name: str, value: Any) -> float:
    """``value`` as a float, from whatever is a real number: numpy's, and torch's symbols; not a bool."""
    if isinstance(value, (float, torch.SymFloat)):
        return value  # type: ignore[return-value]
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    raise TypeError(f"{op}: {name}: expected a number, got {value!r}")


def plain_numbers(instance: Any) -> None:
    """A frozen dataclass's numbers of numpy as Python's, which JSON knows."""
    for field in fields(instance):
        value = getattr(instance, field.name)
        if isinstance(value, numbers.Real) and type(value) not in (bool, int, float):
            plain = int(value) if isinstance(value, numbers.Integral) else float(value)
            object.__setattr__(instance, field.name, plain)


def renamed(error: Exception, op: str, names: Mapping[str, str]) -> Exception:
    """The error of an op that another op called, as one of the op that the user called, with its argument's name."""
    head, _, message = str(error).partition(": ")
    name, _, rest = message.partition(": ")
    return type(error)(f"{op}: {names.get(name, name)}: {rest}" if rest else f"{op}: {message or head}")


def autocast_is_on(tensor: Tensor) -> bool:
    """Whether autocast would cast what is computed from it. On meta tensors torch raises instead of saying no."""
    return tensor.device.type != "meta" and torch.is_autocast_enabled(tensor.device.type)
