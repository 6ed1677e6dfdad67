"""A pytest plugin: writes down what the CPU kernels are called with and what they do, for replay.cpp.

``pytest -p record --record FILE``. A call is its op, the memory of all its tensors before and after, and its arguments
in order; all numbers are little-endian. Calls that raise, and calls with much memory, are left out.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO
from unittest import mock

import pytest
import torch
from torch import Tensor

from mvp_ext.ops._native import native

OPS = ("importance", "merge", "meta_vote", "pack", "pruned_linear", "residual_add", "unpack")
DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int64, torch.uint8, torch.bool
)  # fmt: skip
MOST_BYTES = 1 << 18


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", required=True)


@pytest.fixture(scope="session", autouse=True)
def _recorded(request: pytest.FixtureRequest) -> Iterator[None]:
    with (
        open(request.config.getoption("--record"), "wb") as file,
        mock.patch.multiple(
            native(), **{f"{op}_cpu": recording(file, op, getattr(native(), f"{op}_cpu")) for op in OPS}
        ),
    ):
        yield


def recording(file: BinaryIO, op: str, kernel: Callable[..., None]) -> Callable[..., None]:
    def call(*arguments: Any) -> None:
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage()
            for argument in arguments
            for t in (argument if isinstance(argument, list) else [argument])
            if isinstance(t, Tensor) and t.numel() > 0
        }
        if sum(s.nbytes() for s in storages.values()) > MOST_BYTES:
            return kernel(*arguments)
        before = [_bytes(s) for s in storages.values()]
        kernel(*arguments)
        parts = [_text(op), struct.pack("<q", len(before))]
        for was, storage in zip(before, storages.values(), strict=True):
            parts += [struct.pack("<q", len(was)), was, _bytes(storage)]
        numbers = {address: number for number, address in enumerate(storages)}
        parts += [_argument(argument, numbers) for argument in arguments]
        file.write(b"".join(parts))
        return None

    return call


def _bytes(storage: torch.UntypedStorage) -> bytes:
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy().tobytes()


def _text(text: str) -> bytes:
    return struct.pack("<q", len(text)) + text.encode()


def _argument(value: Any, numbers: dict[int, int]) -> bytes:
    if isinstance(value, (list, tuple)):
        return struct.pack("<q", len(value)) + b"".join(_argument(v, numbers) for v in value)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, float):
        return struct.pack("<d", value)
    if isinstance(value, int):
        return struct.pack("<q", value)
    if value is None:
        return struct.pack("<q", -1)
    assert isinstance(value, Tensor)
    empty = value.numel() == 0
    fields = (
        *(value.ndim, DTYPES.index(value.dtype), *value.shape, *value.stride()),
        -1 if empty else numbers[value.untyped_storage().data_ptr()],
        0 if empty else value.storage_offset() * value.itemsize,
    )
    return struct.pack(f"<{len(fields)}q", *fields)
