"""Raw calls of torch.ops.mvp_ext, past the public functions' checks, with arguments that nobody should give.

Exported programs can make them. Whatever comes, an op returns or raises: it neither ends the process nor hangs.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mvp_ext  # noqa: F401  (registers the ops)

CALLS = 10_000
MEMORY = 4 * 2**30
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
OTHERS = (torch.int32, torch.int64, torch.bool, torch.uint8, torch.int8, torch.complex64)
HUGE = (2**31, 2**32 + 1, 2**57, 2**63 - 1, -(2**63))
Random = random.Random


# ---------------------------------------------------------------- calls that are right


def _size(r: Random) -> int:
    return r.choice((0, 1, 2, 3, 4, 5, 8, 16, 17, 31, 48))


def _floats(r: Random, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """In one of the memory formats that a model's tensors have."""
    tensor = torch.randn(shape).to(dtype or r.choice(FLOATS))
    if tensor.ndim == 4 and r.random() < 0.5:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor.t().contiguous().t() if tensor.ndim == 2 and r.random() < 0.3 else tensor


def _kept(r: Random, size: int) -> Tensor | None:
    """A list of some of ``size`` positions."""
    if r.random() < 0.2:
        return None
    kept = sorted(r.sample(range(size), r.randint(0, size)))
    if r.random() < 0.3:
        r.shuffle(kept)
    return torch.tensor(kept, dtype=r.choice((torch.int32, torch.int64)))


def _length(index: Tensor | None, size: int) -> int:
    return size if index is None else len(index)


def _slices(r: Random, dtypes: tuple[torch.dtype, ...]) -> tuple[list[Any], list[Any], list[Any]]:
    tensors, rows, cols = [], [], []
    for _ in range(r.randint(1, 3)):
        shape = [_size(r) for _ in range(r.randint(1, 5))]
        if r.random() < 0.05:
            shape = [r.choice((0, 2**30)), 2**20, 0]
        tensors.append(_floats(r, *shape, dtype=torch.float32).to(r.choice(dtypes)))
        small = max(shape[:2]) < 100
        rows.append(_kept(r, shape[0]) if small else None)
        cols.append(_kept(r, shape[1]) if small and len(shape) > 1 else None)
    return tensors, rows, cols


def _parts(
    r: Random, tensors: list[Any], rows: list[Any], cols: list[Any], dtypes: tuple[Any, ...]
) -> list[Any]:
    parts = []
    for tensor, row, col in zip(tensors, rows, cols, strict=True):
        part = tensor if row is None else tensor.index_select(0, row)
        part = part if col is None else part.index_select(1, col)
        parts.append(part.clone().to(r.choice(dtypes) if dtypes else part.dtype))
    return parts


def importance(r: Random) -> list[Any]:
    heads, width, rank = r.randint(1, 4), r.choice((1, 3, 8, 16, 32)), r.randint(2, 4)
    dim = r.randint(1, rank - 1)
    a = _floats(r, *[heads * width if d == dim else _size(r) for d in range(rank)])
    grad = torch.randn_like(a) if r.random() < 0.8 else torch.randn(a.shape).to(a.dtype)
    return [a, grad, r.choice(("taylor", "taylor2", "activation")), dim, r.choice((heads, heads * width))]


def meta_vote(r: Random) -> list[Any]:
    layers = [r.choice((1, 2, 7, 16, 70, 300)) for _ in range(r.randint(1, 4))]
    kept = [r.randint(1, units) for units in layers]
    voters, units, targets = _size(r), sum(layers), r.randint(0, 3)
    lead = (targets,) if r.random() < 0.5 else ()
    weights = torch.randn(*lead, voters) if lead or r.random() < 0.5 else None
    prior = r.choice((None, torch.randn(units), torch.randn(*lead, units)))
    return [
        torch.rand(voters, units) < 0.5,
        weights,
        prior,
        layers,
        kept,
        r.choice((None, 0.3)),
        r.choice((0, 7)),
    ]


def pack(r: Random) -> list[Any]:
    return list(_slices(r, (*FLOATS, torch.int64, torch.uint8, torch.bool, torch.int16)))


def unpack(r: Random) -> list[Any]:
    out, rows, cols = _slices(r, (*FLOATS, torch.int64, torch.bool))
    return [_parts(r, out, rows, cols, ()), out, rows, cols]


def merge(r: Random) -> list[Any]:
    base, rows, cols = _slices(r, FLOATS)
    voters, voter_rows, voter_cols = [], [], []
    count = r.randint(0, 3)
    for _ in range(count):
        own_rows = [_kept(r, t.shape[0]) if t.shape[0] < 100 else None for t in base]
        own_cols = [_kept(r, t.shape[1]) if t.ndim > 1 and t.shape[1] < 100 else None for t in base]
        voters += _parts(r, base, own_rows, own_cols, FLOATS)
        voter_rows += own_rows
        voter_cols += own_cols
    return [base, voters, voter_rows, voter_cols, torch.rand(count), rows, cols]


def _linear(r: Random) -> tuple[list[Any], Tensor]:
    dtype, out_block, in_block = r.choice(FLOATS), r.choice((1, 1, 2, 8)), r.choice((1, 1, 2, 8))
    blocks, in_blocks = r.choice((0, 1, 3, 5, 20)), r.choice((0, 1, 3, 5, 20))
    outputs, inputs = blocks * out_block, in_blocks * in_block
    out_index, in_index = _kept(r, blocks), _kept(r, in_blocks)
    lead = [r.choice((0, 1, 2, 3, 5, 9, 33)) for _ in range(r.randint(0, 2))]
    width = _length(in_index, in_blocks) * in_block
    bias = r.choice((None, _floats(r, outputs, dtype=dtype)))
    weight = _floats(r, outputs, inputs, dtype=dtype)
    call = [torch.randn(*lead, width).to(dtype), weight, bias, out_index, in_index, out_block, in_block]
    return call, torch.randn(*lead, outputs).to(dtype)


def pruned_linear(r: Random) -> list[Any]:
    call, residual = _linear(r)
    return [*call, r.choice((None, residual)), r.random() < 0.3]


def pruned_linear_gelu(r: Random) -> list[Any]:
    return _linear(r)[0]


def residual_add(r: Random) -> list[Any]:
    rank = r.randint(1, 4)
    dim = r.randint(0, rank - 1)
    shape = [_size(r) for _ in range(rank)]
    index = _kept(r, shape[dim])
    residual = _floats(r, *shape)
    shape[dim] = kept = _length(index, shape[dim])
    affine = [r.choice((None, torch.randn(kept))) for _ in range(2)]
    return [residual, _floats(r, *shape, dtype=residual.dtype), index, *affine, r.random() < 0.5, dim]


OPS: dict[str, Callable[[Random], list[Any]]] = {
    made.__name__: made
    for made in (
        importance, merge, meta_vote, pack, pruned_linear, pruned_linear_gelu, residual_add, unpack
    )
}  # fmt: skip


# ---------------------------------------------------------------- and what makes them wrong


def _freed(r: Random, value: Any) -> Any:
    """A tensor whose memory others have freed, or half of it. torch itself reads past its end, so do this last."""
    if isinstance(value, list) and value:
        at = r.randrange(len(value))
        return [*value[:at], _freed(r, value[at]), *value[at + 1 :]]
    if not isinstance(value, Tensor) or value.is_meta:
        return value
    value = value.clone()
    storage = value.untyped_storage()
    storage.resize_(int(storage.nbytes() * r.choice((0, 0.5))))
    return value


def _nothing_of_much(r: Random, tensor: Tensor) -> Tensor:
    """No index lists: where one is wrong, its values are listed, as (in torch) they are for ever."""
    return torch.empty(r.choice(((0, 2**40), (2**40, 0), (2**29, 2**29, 0))), dtype=tensor.dtype)


def _misaligned(tensor: Tensor) -> Tensor:
    data = bytearray(b"\1" + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return torch.frombuffer(data, dtype=tensor.dtype, count=tensor.numel(), offset=1).reshape(tensor.shape)


def _wrong_values(r: Random, tensor: Tensor) -> Tensor:
    values = [r.choice((-1, 0, 1, 2, 48, *HUGE)) for _ in range(tensor.numel())]
    if tensor.dtype is torch.int64:
        return torch.tensor(values, dtype=torch.int64).reshape(tensor.shape)
    return torch.tensor([v % 2**31 for v in values]).to(tensor.dtype).reshape(tensor.shape)


CHANGES: list[Callable[[Random, Tensor], Any]] = [
    lambda r, t: None,
    lambda r, t: t.to(r.choice(OTHERS)),
    lambda r, t: t.to(r.choice(FLOATS)),
    lambda r, t: t.to("meta"),
    lambda r, t: torch.empty(0, dtype=t.dtype),
    lambda r, t: _nothing_of_much(r, t) if t.is_floating_point() else t,
    lambda r, t: t.unsqueeze(r.randint(0, t.ndim)),
    lambda r, t: t[None, None, None, None],
    lambda r, t: t.flatten(),
    lambda r, t: t.sum(),
    lambda r, t: t.transpose(0, -1),
    lambda r, t: t.narrow(r.randrange(t.ndim), 0, 1),
    lambda r, t: t.repeat_interleave(2, r.randrange(t.ndim)),
    lambda r, t: t.repeat_interleave(2, t.ndim - 1)[..., ::2],
    lambda r, t: t[..., :1].expand(t.shape),
    lambda r, t: torch.zeros(1, dtype=t.dtype).expand(r.choice((2**60, 2**62))),
    lambda r, t: torch.as_strided(t, t.shape, [r.choice((0, 1)) for _ in t.shape]),
    lambda r, t: torch._neg_view(t),
    lambda r, t: torch.complex(t.float(), t.float()).conj().imag,
    lambda r, t: _misaligned(t),
    lambda r, t: t.to_sparse(),
    lambda r, t: t.float().to_mkldnn(),
    lambda r, t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    lambda r, t: torch.nested.nested_tensor([t, t]),
    _wrong_values,
    _wrong_values,
    _wrong_values,
]  # fmt: skip


def _changed(r: Random, value: Any) -> Any:
    if isinstance(value, list):
        value = list(value)
        way = r.randrange(4)
        if way == 0 or not value:
            return value + value[:1] if value else [r.choice((0, 1, *HUGE))]
        at = r.randrange(len(value))
        if way == 1:
            del value[at]
        else:
            value[at] = _changed(r, value[at])
        return value
    if isinstance(value, Tensor):
        # Once is enough for a kind that torch itself hardly knows, and for a size.
        plain = value.layout is torch.strided and not value.is_quantized and not value.is_nested
        return r.choice(CHANGES)(r, value) if plain and max((1, *value.shape)) < 100_000 else value
    if isinstance(value, str):
        return r.choice(("", "Taylor", "taylor\0", "x" * 10_000, "\u2028"))
    if isinstance(value, float):
        return r.choice((0.0, -1.0, float("nan"), float("inf"), 1e-300, 1e300))
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return r.choice((0, -1, -2, 1, 2, 3, 7, *HUGE))
    return r.choice(
        (torch.ones(3), torch.zeros(2, 2, dtype=torch.int64), torch.tensor([0]), torch.tensor([1, 0]))
    )


def make_call(seed: int) -> tuple[str, list[Any]]:
    """An op's name and its arguments: of every fourth call right ones, else with up to three changes."""
    r = Random(seed)
    torch.manual_seed(seed)
    name = r.choice(list(OPS))
    arguments = OPS[name](r)
    for _ in range(r.randint(0, 3)):
        at = r.randrange(len(arguments))
        with contextlib.suppress(Exception):  # not every tensor can be made so
            arguments[at] = _changed(r, arguments[at])
    if r.random() < 0.1:
        at = r.randrange(len(arguments))
        with contextlib.suppress(Exception):
            arguments[at] = _freed(r, arguments[at])
    return name, arguments


def describe(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(describe, value))}]"
    if not isinstance(value, Tensor):
        return repr(value)[:200]
    text = f"{value.dtype} {list(value.shape)} {value.device} {value.layout}"
    if value.layout is not torch.strided or value.is_nested or value.is_meta or value.is_quantized:
        return f"<{text}>"
    enough = value.untyped_storage().nbytes() >= value.numel() * value.itemsize
    values = (
        f" = {value.tolist()}" if enough and 0 < value.numel() < 10 and not value.is_floating_point() else ""
    )
    return f"<{text} strides {value.stride()}, storage {value.untyped_storage().nbytes()}{values}>"


def run_calls(first: int, calls: int, log: Path) -> None:
    """Makes the calls; before each, its seed goes to ``log``. Prints how many of each op returned."""
    torch.set_num_threads(1)  # threads would wait for each other, long on a busy machine
    if "asan" not in os.environ.get("LD_PRELOAD", ""):  # which takes up terabytes of addresses
        # A call that asks for more shall be refused; writing so much takes longer than all the rest.
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    returned: Counter[str] = Counter()
    with log.open("wb", buffering=0) as file:
        for seed in range(first, first + calls):
            name, arguments = make_call(seed)
            os.pwrite(file.fileno(), struct.pack("q", seed), 0)
            with contextlib.suppress(Exception):
                getattr(torch.ops.mvp_ext, name)(*arguments)
                returned[name] += 1
    print(*(f"{name}={returned[name]}" for name in OPS))


def test_raw_calls_end_no_process(tmp_path: Path) -> None:
    log = tmp_path / "seed"
    # It starts where this process did, so it imports the same mvp_ext.
    command = [sys.executable, __file__, "0", str(CALLS), str(log)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        code, output = done.returncode, done.stdout
        said = done.stderr[-2000:]
    except subprocess.TimeoutExpired:
        code, output, said = -1, "", "it hangs"
    if code != 0:
        (seed,) = struct.unpack("q", log.read_bytes())
        name, arguments = make_call(seed)
        raise AssertionError(
            f"call {seed} ended it ({code}): {name}({', '.join(map(describe, arguments))})\n{said}"
        )
    returned = {name: int(count) for name, _, count in (word.partition("=") for word in output.split())}
    # Not all were refused, or nothing was tried.
    assert min(returned.values()) > CALLS / len(OPS) / 5, returned


def test_every_op_is_called() -> None:
    registered = {
        name.removeprefix("mvp_ext::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("mvp_ext::")
    }
    assert registered == set(OPS)


if __name__ == "__main__":
    run_calls(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
