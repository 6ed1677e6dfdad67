"""What all tests share: a fixed seed, the tiny models, and what to do with the tests that need a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from emulator import emulated
from tiny import tiny_model
from torch import nn


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "cuda: needs a CUDA device; skipped without one, unless MVP_REQUIRE_CUDA=1"
    )
    config.addinivalue_line(
        "markers", "sanitize: its emulated kernels are also run under AddressSanitizer and UBSan"
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") is None or torch.cuda.is_available():
        return
    if os.environ.get("MVP_REQUIRE_CUDA") == "1":
        pytest.fail("MVP_REQUIRE_CUDA=1, and torch sees no CUDA device", pytrace=False)
    pytest.skip("torch sees no CUDA device (MVP_REQUIRE_CUDA=1 makes this a failure)")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Which classes of models are known to be cut exactly is found out anew, and not noted in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        # Making an index of fonts takes long: matplotlib keeps its own.
        patch.setenv(
            "MPLCONFIGDIR", os.environ.get("MPLCONFIGDIR", str(Path.home() / ".cache" / "matplotlib"))
        )
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        # What is tested of an op is its kernel, whatever this machine's library is good at.
        patch.setenv("MVP_FASTER", "kernel")
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same global seed, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", "emulator", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where a test of an op puts its tensors. "emulator": on the CPU, and the CUDA kernels run there."""
    if request.param == "emulator":
        with emulated():
            yield torch.device("cpu")
    else:
        yield torch.device(request.param)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests of tiny models: their threads would only wait for each other, long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_resnet() -> nn.Module:
    """timm's test_resnet; see tiny.py."""
    return tiny_model("test_resnet")


@pytest.fixture
def tiny_vit() -> nn.Module:
    """timm's test_vit with 4 heads; see tiny.py."""
    return tiny_model("test_vit")


@pytest.fixture
def no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """For parts of models, which take no images: what is tried before a first cut is what these tests compare."""
    monkeypatch.setattr("mvp_ext.model.gate.verify_once", lambda *_: None)
