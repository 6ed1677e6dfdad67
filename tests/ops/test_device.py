"""What a build without CUDA kernels does with CUDA tensors: an op refuses, pruning goes on and says so."""

from __future__ import annotations

import warnings
from unittest import mock

import pytest
import torch

import mvp_ext.ops
from mvp_ext.ops import device, reference


def test_backend_for() -> None:
    assert device.backend_for(torch.device("cpu")) is mvp_ext.ops
    assert device.backend_for(torch.device("meta")) is reference
    with mock.patch.object(device, "build_info", return_value={"cuda": True}):
        assert device.backend_for(torch.device("cuda")) is mvp_ext.ops
    device._warn_once.cache_clear()
    with mock.patch.object(device, "build_info", return_value={"cuda": False}):
        with pytest.warns(UserWarning, match=r"no CUDA kernels \(no nvcc was found .* plain torch"):
            assert device.backend_for(torch.device("cuda", 1)) is reference
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # once is enough
            assert device.backend_for(torch.device("cuda")) is reference


def test_without_cuda_kernels_an_op_says_what_to_do() -> None:
    with (
        mock.patch.object(device, "build_info", return_value={"cuda": False}),
        pytest.raises(RuntimeError, match=r"got CUDA tensors, .* no nvcc was found .* MVP_USE_CUDA=ON"),
    ):
        device.cuda_kernels()
