"""pack and unpack: exact against the reference, at every way a kernel can take."""

# ruff: noqa: E501  (the tables of errors read best with a case a line)

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from backends import move, needs_exchange, sanitized
from emulator import emulated
from isa import OLDER, run_on
from torch import Tensor

from mvp_ext.ops import pack, reference, unpack
from mvp_ext.ops._native import native

DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip
ONE_OF_EACH_SIZE = [torch.bool, torch.bfloat16, torch.float32, torch.int64]
# 1-D; short, element-wide, chunk-wide and long pieces; a linear weight; convolutions; more than 2^16 rows.
SHAPES = [
    (0,), (1,), (7,), (33,), (70001,), (0, 5), (5, 0), (1, 1), (31, 2), (32, 33), (70001, 1), (3, 70001), (64, 384),
    (9, 5, 2), (13, 17, 3, 3), (16, 8, 1, 1), (8, 16, 5, 5), (4, 6, 11, 11), (2, 3, 2, 1, 2, 3),
]  # fmt: skip


def make(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


def kept(size: int, share: float = 0.5, seed: int = 0, dtype: torch.dtype = torch.int64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + size)
    return torch.randperm(size, generator=generator)[: round(size * share)].sort().values.to(dtype)


def assert_equal(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == e.dtype
        assert g.shape == e.shape
        assert torch.equal(g, e)


def both(
    device: torch.device, tensors: list[Tensor], rows: list[Tensor | None], cols: list[Tensor | None]
) -> None:
    """pack equals the reference; unpack into other tensors equals it too, and leaves the rest alone."""
    tensors, rows, cols = ([*move(device, *values)] for values in (tensors, rows, cols))
    packed = pack(tensors, rows, cols)
    assert_equal(packed, reference.pack(tensors, rows, cols))
    ours, theirs = [torch.full_like(t, 1) for t in tensors], [torch.full_like(t, 1) for t in tensors]
    unpack(packed, ours, rows, cols)
    reference.unpack(packed, theirs, rows, cols)
    assert_equal(ours, theirs)


@pytest.mark.parametrize("dtype", sanitized(DTYPES, ONE_OF_EACH_SIZE), ids=str)
def test_all_shapes_of_one_dtype(dtype: torch.dtype, device: torch.device) -> None:
    tensors = [make(shape, dtype, seed) for seed, shape in enumerate(SHAPES)]
    for use_rows in (False, True):
        for use_cols in (False, True):
            rows = [kept(t.shape[0]) if use_rows else None for t in tensors]
            cols = [kept(t.shape[1], dtype=torch.int32) if use_cols and t.ndim > 1 else None for t in tensors]
            both(device, tensors, rows, cols)


@pytest.mark.sanitize
@pytest.mark.parametrize("share", [0.0, 0.1, 0.9, 1.0])
def test_shares(share: float, device: torch.device) -> None:
    tensors = [make(s, torch.float32) for s in [(33, 65), (64, 128, 3, 3), (31, 40, 7, 7), (50,)]]
    both(
        device,
        tensors,
        [kept(t.shape[0], share) for t in tensors],
        [kept(t.shape[1], share) if t.ndim > 1 else None for t in tensors],
    )


@pytest.mark.parametrize("shape", [(40, 70), (40, 70, 3, 3), (40, 70, 2, 1, 2), (300, 3)])
def test_any_order_and_repeats(shape: tuple[int, ...], device: torch.device) -> None:
    tensor = make(shape, torch.float32)
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(0, shape[0], (55,), generator=generator)
    cols = torch.randint(0, shape[1], (90,), generator=generator)
    on_device = [[value.to(device)] for value in (tensor, rows, cols)]
    assert_equal(pack(*on_device), reference.pack(*on_device))
    shuffled = (
        torch.randperm(shape[0], generator=generator)[:20],
        torch.randperm(shape[1], generator=generator)[: shape[1] // 2],
    )
    both(device, [tensor], [shuffled[0]], [shuffled[1]])


def test_blocks_of_heads(device: torch.device) -> None:
    heads = torch.tensor([1, 2, 5])
    index = (heads[:, None] * 64 + torch.arange(64)).reshape(-1)
    both(device, [make((384, 384), torch.float32)] * 2, [index, None], [None, index])


@pytest.mark.sanitize
def test_layouts(device: torch.device) -> None:
    weight = make((24, 18, 3, 3), torch.float32)
    last = weight.to(memory_format=torch.channels_last)
    tensors = [
        last, make((18, 24), torch.float32).t(), make((48, 18), torch.float32)[::2, 1:], weight[:, :, 1:, 1:],
        make((24, 18, 2, 2), torch.bfloat16).to(memory_format=torch.channels_last), make((99,), torch.float32)[3::4],
    ]  # fmt: skip
    rows = [kept(t.shape[0]) for t in tensors]
    cols = [kept(t.shape[1]) if t.ndim > 1 else None for t in tensors]
    both(device, tensors, rows, cols)
    both(device, [last] * 3, [None, kept(24), None], [None, None, kept(18)])
    (last, rows_at, cols_at), strided = move(device, last, kept(24), kept(18)), kept(48).to(device)[::2] // 2
    assert pack([last], [rows_at], [cols_at])[0].is_contiguous(memory_format=torch.channels_last)
    assert_equal(pack([last], [strided], [None]), reference.pack([last], [strided], [None]))


@needs_exchange
def test_of_plain_dense_tensors_nothing_is_asked_twice() -> None:
    """One native call checks, makes and fills: what costs small models most is their number of tensors."""
    filters, bias = make((24, 18, 3, 3), torch.float32), make((18,), torch.bool)
    tensors = [
        torch.nn.Parameter(filters), filters.to(memory_format=torch.channels_last), bias,
        make((24, 1, 3, 3), torch.float32).to(memory_format=torch.channels_last),
    ]  # fmt: skip
    rows = [kept(t.shape[0], dtype=torch.int32) for t in tensors]
    cols = [kept(18), kept(18), None, None]
    with mock.patch("mvp_ext.ops.pack.check_slices", side_effect=AssertionError("asked twice")):
        packed = pack(tensors, rows, cols)
    assert_equal(packed, reference.pack(tensors, rows, cols))
    assert packed[1].is_contiguous(memory_format=torch.channels_last)
    assert all(t.is_contiguous() for t in (packed[0], *packed[2:]))
    assert not any(t.requires_grad for t in packed)
    assert all(type(t) is Tensor for t in packed)


@needs_exchange
def test_what_is_not_plain_and_dense_is_asked_for() -> None:
    index = torch.tensor([0, 1])
    freed = torch.zeros(4)
    freed.untyped_storage().resize_(0)
    wrong = [
        ([freed], [index], [None]), ([torch.zeros(4)], [index], [index]), ([torch.zeros(())], [None], [None]),
        ([torch.zeros(4)], [index.float()], [None]), ([torch.zeros(4)], [index[None]], [None]), ([None], [None], [None]),
        ([torch.zeros(4, 4).t()], [index], [None]), ([torch.zeros(4, dtype=torch.complex64)], [index], [None]),
        ([torch.zeros(4)], [], [None]), ([], [], []), ([torch.zeros(4, device="meta")], [None], [None]),
        ([torch.zeros(4, dtype=torch.complex64).conj().imag], [index], [None]),
        ([torch.frombuffer(bytearray(17), dtype=torch.float32, offset=1)], [index], [None]),
    ]  # fmt: skip
    for arguments in wrong:
        assert native().pack_plain(*arguments, 1) is None
    assert native().pack_plain([torch.zeros(4)], [index], [None], 1) is not None


def test_unpack_takes_any_layout_of_packed(device: torch.device) -> None:
    rows, cols = move(device, kept(24), kept(18))
    for form in (torch.contiguous_format, torch.channels_last):
        for other in (torch.contiguous_format, torch.channels_last):
            out = make((24, 18, 3, 3), torch.float32).to(device, memory_format=form)
            part = make((12, 9, 3, 3), torch.float32, 5).to(device, memory_format=other)
            expected = out.clone()
            reference.unpack([part], [expected], [rows], [cols])
            unpack([part], [out], [rows], [cols])
            assert torch.equal(out, expected)


def test_values_survive_bit_for_bit(device: torch.device) -> None:
    tensor = torch.tensor([[float("nan"), float("inf"), -0.0, 1e-45]] * 3, device=device)
    rows, cols = move(device, torch.tensor([2]), torch.tensor([0, 2, 3]))
    packed = pack([tensor], [rows], [cols])[0]
    assert torch.equal(packed.view(torch.int32), tensor[:1, [0, 2, 3]].view(torch.int32))


def test_no_alias_no_gradient_no_stale_graph(device: torch.device) -> None:
    parameter = torch.nn.Parameter(torch.randn(4, 5, device=device))
    packed = pack([parameter], [None], [None])[0]
    assert packed.data_ptr() != parameter.data_ptr()
    assert not packed.requires_grad
    loss = (parameter * parameter).sum()
    unpack([torch.zeros(2, 5, device=device)], [parameter], [torch.tensor([0, 3], device=device)], [None])
    assert parameter[0].abs().sum() == 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_deterministic_and_empty_list(device: torch.device) -> None:
    tensors = [make((513, 700), torch.float32), make((64, 64, 3, 3), torch.float32)] * 3
    rows, cols = [kept(t.shape[0]) for t in tensors], [kept(t.shape[1]) for t in tensors]
    tensors, rows, cols = ([*move(device, *values)] for values in (tensors, rows, cols))
    first = pack(tensors, rows, cols)
    for _ in range(10):
        assert_equal(pack(tensors, rows, cols), first)
    assert pack([], [], []) == []
    unpack([], [], [], [])


@pytest.mark.sanitize
def test_slices_that_start_anywhere(device: torch.device) -> None:
    """Addresses and sizes that are multiples of every power of two up to 16 bytes, and of none."""
    store = make((4096,), torch.uint8).to(device)
    for start in (0, 1, 2, 4, 8, 16):
        for shape in ((5, 96), (5, 33), (6, 7, 24), (3, 70)):
            size = torch.Size(shape).numel()
            tensor = store[start : start + size].view(shape)
            rows, cols = move(device, kept(shape[0]), kept(shape[1]))
            both(device, [tensor] * 3, [rows, None, rows], [None, cols, cols])
            ours, theirs = torch.zeros_like(store), torch.zeros_like(store)
            for op, out in ((unpack, ours), (reference.unpack, theirs)):
                op(pack([tensor], [rows], [None]), [out[start : start + size].view(shape)], [rows], [None])
            assert torch.equal(ours, theirs)
        half = store[start : start + 2 * (size // 2)].view(torch.uint8 if start % 2 else torch.float16)
        both(device, [half], [None], [None])


@pytest.mark.sanitize
def test_long_lines(device: torch.device) -> None:
    """Lines longer than a tile of the CUDA kernel: cut anywhere, also within a column."""
    tensors = [
        make((3, 9001), torch.float32), make((2, 3001, 3), torch.int16), make((2, 40, 500), torch.float32),
        make((2, 4999, 1, 2), torch.int16).to(memory_format=torch.channels_last), make((3, 50000), torch.bfloat16),
    ]  # fmt: skip
    for cut_rows in (False, True):
        rows = [kept(t.shape[0]) if cut_rows else None for t in tensors]
        both(device, tensors, rows, [kept(t.shape[1], 0.9) for t in tensors])
        both(device, tensors, rows, [None] * len(tensors))


def test_more_tensors_and_lists_than_a_launch_takes(device: torch.device) -> None:
    tensors = [make((7, 5), torch.float32, seed) for seed in range(1000)]
    shared, own = kept(7), [kept(7, seed=seed) for seed in range(700)]
    both(device, tensors, [shared] * 1000, [None] * 1000)
    both(device, tensors[:700], [*own], [kept(5, seed=seed) for seed in range(700)])
    shapes = [make((7, 1 + n), torch.uint8) for n in range(320)]
    both(device, shapes, [shared] * 320, [None] * 320)


def test_offsets_beyond_32_bits(device: torch.device) -> None:
    """Of a tensor whose middle nobody touches, so that it takes no memory on the CPU."""
    rows, columns = 3, (1 << 31) - 8
    tensor = torch.empty(rows, columns, dtype=torch.uint8, device=device)
    ends = torch.tensor([0, columns - 5, columns - 1], device=device)
    tensor[:, ends] = make((rows, 3), torch.uint8).to(device)
    assert_equal(pack([tensor], [None], [ends]), [tensor[:, ends]])
    last = torch.tensor([2], device=device)
    unpack([torch.full((1, 3), 7, dtype=torch.uint8, device=device)], [tensor], [last], [ends])
    assert tensor[2, ends].eq(7).all()
    assert torch.equal(tensor[:2, ends].cpu(), make((rows, 3), torch.uint8)[:2])


@pytest.mark.parametrize("schedule", range(1, 5))
def test_schedules(schedule: int) -> None:
    """In whatever order the threads of the CUDA kernels run."""
    tensors = [
        make((40, 70, 3, 3), torch.float32),
        make((5000,), torch.int16),
        make((2, 9001), torch.float32),
    ]
    rows, cols = [kept(t.shape[0]) for t in tensors], [kept(70), None, kept(9001)]
    with emulated(schedule):
        both(torch.device("cpu"), tensors, rows, cols)


@pytest.mark.parametrize("wrong", [-1, 5, 1 << 32])
def test_wrong_indices_end_the_kernel(wrong: int) -> None:
    index = torch.tensor([0, wrong])
    for rows, cols in (([index], [None]), ([None], [index])):
        with emulated(), pytest.raises(RuntimeError, match="pack: rows or cols: a value out of range"):
            pack([torch.zeros(5, 5)], rows, cols)
        part = torch.zeros(2, 5) if rows[0] is not None else torch.zeros(5, 2)
        with emulated(), pytest.raises(RuntimeError, match="unpack: rows or cols: a value out of range"):
            unpack([part], [torch.zeros(5, 5)], rows, cols)


def test_opcheck() -> None:
    tensors = [
        torch.randn(6, 8),
        torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last),
        torch.randn(5),
    ]
    rows, cols = [kept(6), None, kept(5)], [kept(8), kept(4), None]
    torch.library.opcheck(torch.ops.mvp_ext.pack.default, (tensors, rows, cols))
    packed = pack(tensors, rows, cols)
    torch.library.opcheck(torch.ops.mvp_ext.unpack.default, (packed, tensors, rows, cols))


def test_compiles() -> None:
    def both_ways(a: Tensor, rows: Tensor) -> Tensor:
        part = pack([a], [rows], [None])[0] * 2
        out = torch.zeros_like(a)
        unpack([part], [out], [rows], [None])
        return out + 1

    a, rows = torch.randn(6, 4), kept(6)
    compiled = torch.compile(both_ways, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a, rows), both_ways(a, rows))


WEIGHT = torch.zeros(4, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([WEIGHT], [], [None]), ValueError, "pack: rows: expected 1 entries, one for each of tensors, got 0"),
        (([WEIGHT], [None], []), ValueError, "pack: cols: expected 1 entries"),
        ((["w"], [None], [None]), TypeError, r"pack: tensors\[0\]: expected a torch.Tensor, got str"),
        (([torch.tensor(1.0)], [None], [None]), ValueError, r"expected 1 to 6 dimensions, got shape \(\)"),
        (([torch.zeros(3)], [None], [kept(3)]), ValueError, r"expected 2 to 6 dimensions, got shape \(3,\)"),
        (([WEIGHT], [torch.tensor([0.5])], [None]), TypeError, r"rows\[0\]: expected dtype int32 or int64, got float32"),
        (([WEIGHT], [torch.zeros(1, 1, dtype=torch.int64)], [None]), ValueError, r"rows\[0\]: expected 1 dimensions"),
        (([WEIGHT], [torch.tensor([4])], [None]), ValueError, r"pack: rows\[0\]: expected indices in \[0, 4\), got 4"),
        (([WEIGHT], [None], [torch.tensor([0, -1])]), ValueError, r"pack: cols\[0\]: expected indices in \[0, 5\), got -1"),
        (([WEIGHT.to(torch.complex64)], [None], [None]), TypeError, "expected a real dtype"),
        (([WEIGHT.to("meta"), WEIGHT], [None] * 2, [None] * 2), ValueError, r"tensors\[1\]: expected device meta, got cpu"),
        (([WEIGHT.to_sparse()], [None], [None]), NotImplementedError, "expected a strided tensor"),
    ],
)  # fmt: skip
def test_pack_errors(arguments: tuple[list, list, list], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pack(*arguments)


@pytest.mark.parametrize(
    ("packed", "rows", "error", "message"),
    [
        ([torch.ones(3, 5)], torch.tensor([0, 1]), ValueError, r"unpack: packed\[0\]: expected shape \(2, 5\), got \(3, 5\)"),
        ([], torch.tensor([0, 1]), ValueError, "unpack: packed: expected 1 tensors"),
        ([torch.ones(2, 5).half()], torch.tensor([0, 1]), TypeError, r"packed\[0\]: expected dtype float32, got float16"),
        ([torch.ones(2, 5)], torch.tensor([3, 3]), ValueError, r"unpack: rows\[0\]: expected no index twice, got 3 again"),
        ([torch.ones(2, 5)], torch.tensor([0, 9]), ValueError, r"unpack: rows\[0\]: expected indices in \[0, 4\), got 9"),
    ],
)  # fmt: skip
def test_unpack_errors_write_nothing(
    packed: list[Tensor], rows: Tensor, error: type[Exception], message: str
) -> None:
    out = torch.zeros(4, 5)
    with pytest.raises(error, match=message):
        unpack(packed, [out], [rows], [None])
    assert not out.any()


@pytest.mark.parametrize("isa", OLDER)
def test_other_instruction_sets(isa: str) -> None:
    run_on(isa, __file__, "all_shapes_of_one_dtype or any_order")


def test_tensors_are_read_without_dlpack_too() -> None:
    """Versions of torch before 2.10 have no exchange API: then the fields are asked for as attributes."""
    code = (
        "import torch; torch.Tensor.__dlpack_c_exchange_api__ = None; from mvp_ext.ops import unpack;"
        "out = torch.zeros(4, 6).t(); part = torch.ones(2, 4, requires_grad=True);"
        "unpack([part], [out], [torch.tensor([1, 4])], [None]); print(out.sum(1).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[0.0, 4.0, 0.0, 0.0, 4.0, 0.0]"


def large_model(seed: int) -> list[Tensor]:
    small, wide = make((64,), torch.float32, seed), make((8, 3, 3, 3), torch.float32, seed)
    weights = [make((2048, 1024 + i), dtype, seed + i) for i, dtype in enumerate(DTYPES[:4])]
    filters = make((512, 512, 3, 3), torch.float32, seed).contiguous(memory_format=torch.channels_last)
    return [small, *weights, wide, filters]


def test_large_outputs_are_exact_apart_and_independent() -> None:
    tensors = large_model(0)
    rows: list[Tensor | None] = [None, *(kept(2048, 0.9) for _ in range(4)), None, kept(512)]
    cols: list[Tensor | None] = [None] * 6 + [kept(512)]
    expected = reference.pack(tensors, rows, cols)
    first, second = pack(tensors, rows, cols), pack(tensors, rows, cols)
    for tensor in first:
        tensor.zero_()  # reaches no other output, of this call or another
    assert_equal(second, expected)
    for tensor, wanted in zip(second, expected, strict=True):
        assert tensor.untyped_storage().nbytes() == wanted.untyped_storage().nbytes()
    assert second[-1].is_contiguous(memory_format=torch.channels_last)
    survivor = second[-1]
    del first, second, tensor
    for seed in (1, 2):  # memory that was given back is used again, but not what still lives in
        other = large_model(seed)
        assert_equal(pack(other, rows, cols), reference.pack(other, rows, cols))
    assert torch.equal(survivor, expected[-1])


def test_large_outputs_can_be_saved_and_trained(tmp_path: Path) -> None:
    tensors = [t.float() for t in large_model(3)]
    nothing: list[Tensor | None] = [None] * len(tensors)
    packed = pack(tensors, nothing, nothing)
    torch.save(packed[1], tmp_path / "one.pt")
    assert (tmp_path / "one.pt").stat().st_size < 1.1 * packed[1].nbytes
    assert torch.equal(torch.load(tmp_path / "one.pt"), tensors[1])
    parameters = [torch.nn.Parameter(t) for t in packed]
    torch.stack([p.sum() for p in parameters]).sum().backward()
    torch.optim.SGD(parameters, lr=1.0).step()
    assert_equal([p.detach() for p in parameters], [t - 1 for t in tensors])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_of_what_was_packed_is_given_back() -> None:
    """300 MB are packed and let go; the process does not keep them for a next time. In one of its own: others leave
    holes in the heap."""
    code = """
import os, torch
from pathlib import Path
from mvp_ext.ops import pack
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
torch.set_num_threads(2)
tensors = [torch.ones(1024, 1024) for _ in range(70)] + [torch.ones(4096, 1024), torch.ones(64)]
nothing = [None] * len(tensors)
pack([torch.ones(9, 9)], [None], [None])
before = resident()
packed = pack(tensors, nothing, nothing)
during = resident()
del packed
print(during - before, resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    used, left = map(int, done.stdout.split())
    assert used > 250
    assert left < 30
