"""Parameters, FLOPs, latency and throughput of models, and how much of a FLOP saving became time.

Models are timed in turn, round after round in one process, so that a slow phase of the machine hits all of them. A FLOP
count here counts a multiply-add as two operations, attention's matrix products included.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from mvp_ext.model.borrowed import borrowed, unwrapped
from mvp_ext.model.ends import as_input

MAX_ROUNDS = 400
# Enough for a median and for p10, p90 to differ from the extremes' noise.
MIN_ROUNDS = 7
# For the allocator, oneDNN's primitive cache and cuDNN's choice of an algorithm.
WARM_UP_ROUNDS = 3
# Of FLOP counts; then all are forgotten.
REMEMBERED_COUNTS = 4096
_counted: dict[Any, int] = {}
Name = TypeVar("Name")


@dataclass(frozen=True)
class Latency:
    """Wall-clock of one forward pass, over many passes.

    Attributes:
        batch: images in a pass.
        p10_ms: its 10th percentile in milliseconds.
        median_ms: its median.
        p90_ms: its 90th percentile.
        rounds: how many passes were timed.
    """

    batch: int
    p10_ms: float
    median_ms: float
    p90_ms: float
    rounds: int

    @property
    def throughput(self) -> float:
        """Images a second at the median."""
        return 1e3 * self.batch / self.median_ms

    def to_dict(self) -> dict[str, float]:
        """JSON values, the throughput among them."""
        return {**asdict(self), "throughput": self.throughput}


@dataclass(frozen=True)
class Measurement:
    """One model's size and speed.

    Attributes:
        name: the model's, as it was given.
        parameters: how many numbers they hold.
        flops: of one image's forward pass, a multiply-add counted as two.
        latency: one for each batch size that was timed.
    """

    name: str
    parameters: int
    flops: int
    latency: tuple[Latency, ...] = field(default=())

    def at(self, batch: int) -> Latency:
        """The latency measured at this batch size; ValueError if it was not."""
        for latency in self.latency:
            if latency.batch == batch:
                return latency
        raise ValueError(
            f"{self.name} was not timed at batch {batch}, but at {[x.batch for x in self.latency]}"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "name": self.name,
            "parameters": self.parameters,
            "flops": self.flops,
            "latency": [latency.to_dict() for latency in self.latency],
        }


def count_parameters(model: nn.Module) -> int:
    """How many numbers the model's parameters hold (a shared parameter once; buffers not counted)."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_flops(model: nn.Module, input_shape: Sequence[int], *, batch: int = 1) -> int:
    """FLOPs of one forward pass, counting a multiply-add as two: convolutions, matrix products, attention.

    Element-wise work (normalisation, activations, softmax) is not counted, as is usual.

    Args:
        model: runs once, in eval mode, uncompiled and without gradients; it is given back as it was.
        input_shape: of one image, (C, H, W).
        batch: images in the pass; the count grows in proportion.

    Counts are remembered by all that decides them: modules, with their numbers, and shapes. A pass that counts takes
    tens of milliseconds, and iterative pruning asks for the same shapes again and again.
    """
    model = unwrapped(model)
    # A replaced forward is not seen in the signature.
    if any("forward" in vars(module) for module in model.modules()):
        return _count_flops(model, input_shape, batch)
    key = (_signature(model), tuple(input_shape), batch)
    if key not in _counted:
        if len(_counted) >= REMEMBERED_COUNTS:
            _counted.clear()
        _counted[key] = _count_flops(model, input_shape, batch)
    return _counted[key]


def _signature(model: nn.Module) -> tuple[object, ...]:
    """Equal for models that compute alike but for the values of their weights."""
    values = (bool, int, float, str, tuple, type(None))
    modules = [
        (name, type(m), repr({k: v for k, v in vars(m).items() if k != "training" and isinstance(v, values)}))
        for name, m in model.named_modules()
    ]
    tensors = [(n, tuple(t.shape), t.dtype) for n, t in model.state_dict(keep_vars=True).items()]
    return (*modules, *tensors)


def _count_flops(model: nn.Module, input_shape: Sequence[int], batch: int) -> int:
    counting = FlopCounterMode(display=False, custom_mapping=_flop_formulas())
    with borrowed(model), torch.inference_mode(False), torch.no_grad():
        # The counter looks for gradients of parameters that are a module's input, as an attention pool's query is.
        model.requires_grad_(False)
        with counting as counter:
            model(_example(model, input_shape, batch))
    return int(counter.get_total_flops())


def measure(
    models: Mapping[str, nn.Module],
    input_shape: Sequence[int],
    *,
    batches: Sequence[int] = (1, 32),
    seconds: float = 2.0,
    threads: int | None = None,
    channels_last: bool = False,
    autocast: torch.dtype | None = None,
) -> dict[str, Measurement]:
    """Size and speed of several models, timed in turn. Arguments as of ``latency``."""
    timed = [
        latency(
            models,
            input_shape,
            batch=batch,
            seconds=seconds,
            threads=threads,
            channels_last=channels_last,
            autocast=autocast,
        )
        for batch in batches
    ]
    return {
        name: Measurement(
            name,
            count_parameters(model),
            count_flops(model, input_shape),
            tuple(result[name] for result in timed),
        )
        for name, model in models.items()
    }


def latency(
    models: Mapping[str, nn.Module],
    input_shape: Sequence[int],
    *,
    batch: int = 1,
    seconds: float = 2.0,
    rounds: int | None = None,
    threads: int | None = None,
    channels_last: bool = False,
    autocast: torch.dtype | None = None,
) -> dict[str, Latency]:
    """Time the forward passes of several models in turn: one pass of each a round, in an order that changes.

    Args:
        models: name → model, all on one device (CPU or CUDA). Run in eval mode, as they are compiled; they are given
            back as they were.
        input_shape: of one image, (C, H, W).
        batch: images in a pass, ≥ 1.
        seconds: about how long a model is timed, at least ``MIN_ROUNDS`` passes.
        rounds: exactly so many passes of each model instead.
        threads: torch's CPU threads while timing; None leaves them.
        channels_last: layout of the input and of the models' 4-d weights (restored afterwards).
        autocast: torch.bfloat16 or torch.float16 to time under autocast.

    Returns:
        name → ``Latency``. On CUDA a pass is timed to its end on the device.

    Raises:
        ValueError: no model, models on different devices, batch < 1.
    """
    if not models:
        raise ValueError("latency: models: expected at least one model, got none")
    if batch < 1:
        raise ValueError(f"latency: batch: expected at least 1, got {batch}")
    devices = {_device_of(model) for model in models.values()}
    if len(devices) > 1:
        raise ValueError(f"latency: models: expected one device, got {sorted(map(str, devices))}")
    device = devices.pop()
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def run(model: nn.Module, x: Tensor) -> None:
        model(x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with (
        ExitStack() as lent,
        _weights_in(layout, models.values()),
        torch.inference_mode(),
        torch_threads(threads),
        torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None),
    ):
        for model in models.values():
            lent.enter_context(borrowed(model, compiled=True))
        runs = {
            name: partial(run, model, _example(model, input_shape, batch).contiguous(memory_format=layout))
            for name, model in models.items()
        }
        return time_in_turn(runs, batch=batch, seconds=seconds, rounds=rounds)


def time_in_turn(
    runs: Mapping[Name, Callable[[], object]],
    *,
    batch: int = 1,
    seconds: float = 2.0,
    rounds: int | None = None,
    pause: float = 0.0,
) -> dict[Name, Latency]:
    """Time functions in turn: one call of each a round, in an order that changes.

    Args:
        runs: name → what is timed, to its end.
        batch: images in a call, for the result.
        seconds: about how long the slowest is timed, at least ``MIN_ROUNDS`` calls. All get as many calls.
        rounds: exactly so many calls of each instead.
        pause: seconds of rest before each call: threads of one runtime go on spinning after a call, on the cores of
            the next. A call that is not timed follows the rest, to wake the runtime's own.
    """

    def timed(run: Callable[[], object]) -> float:
        if pause:
            time.sleep(pause)
            run()
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    warm = {name: min(timed(run) for _ in range(WARM_UP_ROUNDS)) for name, run in runs.items()}
    if rounds is None:
        slowest = max(*warm.values(), pause, 1e-6)
        rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, math.ceil(seconds / slowest)))
    samples: dict[Name, list[float]] = {name: [] for name in runs}
    orders = itertools.cycle(_rotations(list(runs)))
    for order in itertools.islice(orders, rounds):
        for name in order:
            samples[name].append(timed(runs[name]))
    return {name: _summary(batch, values) for name, values in samples.items()}


def share_of_saving(dense: Measurement, pruned: Measurement, batch: int) -> float | None:
    """What share of the FLOP saving became time: (1 − t/t_dense) / (1 − F/F_dense). None where no FLOP was saved.

    1 means that the time fell as the FLOPs did; below 0 that the smaller model is slower.
    """
    saved_flops = 1 - pruned.flops / dense.flops
    if saved_flops <= 0:
        return None
    return (1 - pruned.at(batch).median_ms / dense.at(batch).median_ms) / saved_flops


def _summary(batch: int, seconds: list[float]) -> Latency:
    p10, median, p90 = torch.tensor(seconds, dtype=torch.float64).quantile(
        torch.tensor([0.1, 0.5, 0.9]).double()
    )
    return Latency(batch, 1e3 * p10.item(), 1e3 * median.item(), 1e3 * p90.item(), len(seconds))


def _rotations(names: list[Name]) -> list[list[Name]]:
    """Each model comes first, last and after each other equally often: who ran before left its data in the cache."""
    forward = [names[i:] + names[:i] for i in range(len(names))]
    return forward + [order[::-1] for order in forward]


def _device_of(model: nn.Module) -> torch.device:
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _example(model: nn.Module, input_shape: Sequence[int], batch: int) -> Tensor:
    """Normal noise [batch, *input_shape] in the model's own dtype and on its device; the values do not matter."""
    return as_input(model, torch.randn(batch, *input_shape, generator=torch.Generator().manual_seed(0)))


@contextmanager
def _weights_in(layout: torch.memory_format, models: Iterable[nn.Module]) -> Iterator[None]:
    """The models' 4-d weights in this layout, for a while: a layout change costs a copy that timing must not see."""
    kept = [(p, p.data) for model in models for p in model.parameters() if p.ndim == 4]
    try:
        for parameter, data in kept:
            parameter.data = data.contiguous(memory_format=layout)
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """So many CPU threads of torch, for a while; None leaves them."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def _flop_formulas() -> dict[Any, Callable[..., int]]:
    """What torch's counter does not know: the CPU's attention, which it would count as nothing."""

    def attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    aten = torch.ops.aten
    names = (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_fused_attention_overrideable",
    )
    return {getattr(aten, name): attention for name in names if hasattr(aten, name)}
