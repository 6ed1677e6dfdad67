"""Data-parallel training: processes that torchrun started share every batch, and come to the weights of a single one.

All processes draw the same batch from the same seed, and each takes its part. What is computed of a part (gradients,
scores, the statistics of batch norms) is summed over all of them, so that every process has the same model after every
step. The first one alone writes files; the others wait where they need them.

Gradients are averaged after the backward pass, without torch's DistributedDataParallel: that hooks into ``forward``,
and training here calls a model's ``forward_features``; and it knows parameters, which surgery replaces between rounds.
It would hide the exchange behind the backward pass, which this does not.

All of this is so inside of ``data_parallel`` alone. Elsewhere ``world()`` is 1 and nothing is exchanged, whatever
process groups the caller's program has.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

T = TypeVar("T")

# Whether one process died is torchrun's to find out; one that decodes a data set first may take its time.
_PATIENCE = timedelta(days=1)
_together = False
_blocks = 0


@contextmanager
def data_parallel(device: torch.device | str = "cpu") -> Iterator[None]:
    """For a while this process is one of those that ``torchrun`` started, and does its part of their common work.

    All of them must call the same functions with the same arguments: ``pretrain``, ``build_zoo`` and its kin,
    ``prune``, ``Trainer``, ``score_units``. A batch size is that of all processes together.

    Args:
        device: what this process computes on; CUDA tensors go by NCCL, the others by Gloo.

    Raises:
        ValueError: torchrun did not start this process (its variables RANK, WORLD_SIZE, … are not set); the process is
            in such a block already; torchrun on several machines shares a store that a restart would find in disorder.
    """
    global _together
    if _together:
        raise ValueError(
            "data_parallel: expected a process that is by itself, got one that takes part already"
        )
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    own = not dist.is_initialized()
    if own:
        store, number, processes = _rendezvous()
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=number,
            world_size=processes,
            timeout=_PATIENCE,
        )
    _together = True
    try:
        yield
    finally:
        _together = False
        if own:
            dist.destroy_process_group()


def _rendezvous() -> tuple[dist.Store, int, int]:
    """The store through which the processes find each other, this one's number, and how many they are.

    torchrun (seen with torch 2.13) gives a restart the store of those that died, with their addresses in it: half of
    all restarts hung. So each restart has a part of its own. Machines do not count their restarts alike; between them
    the store must not be that one.
    """
    global _blocks
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if kept and int(os.environ["GROUP_WORLD_SIZE"]) > 1:
        raise ValueError(
            "data_parallel: several machines: expected TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment, "
            "got a store that outlives a restart, which would hang"
        )
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if kept else "any"
    store, number, processes = next(dist.rendezvous("env://"))
    _blocks += 1
    return dist.PrefixStore(f"mvp_ext/{restart}/{_blocks}", store), number, processes


@contextmanager
def alone() -> Iterator[None]:
    """For a while this process shares nothing: work of which each process does another piece."""
    global _together
    before, _together = _together, False
    try:
        yield
    finally:
        _together = before


def world() -> int:
    """How many processes share the work; 1 outside of ``data_parallel``."""
    return dist.get_world_size() if _together else 1


def rank() -> int:
    """This process's number among them, in 0..world − 1; number 0 writes and prints."""
    return dist.get_rank() if _together else 0


def mine(pieces: Sequence[T]) -> Sequence[T]:
    """Of pieces of work that need no other process: this one's."""
    return pieces[rank() :: world()]


def wait() -> None:
    """Until all processes are here."""
    if world() > 1:
        dist.barrier()


@contextmanager
def first_alone() -> Iterator[None]:
    """The first process runs the block, then the others: they find what it left (a cache, a file)."""
    if rank() > 0:
        wait()
    yield
    if rank() == 0:
        wait()


def from_first(value: T) -> T:
    """What the first process has in place of ``value``, which can be pickled."""
    if world() == 1:
        return value
    found = [value]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def gathered(parts: Mapping[int, T]) -> list[T]:
    """All processes' parts, by their numbers."""
    everyone: list[Mapping[int, T]] = [parts] * world()
    if world() > 1:
        dist.all_gather_object(everyone, parts)
    found = {number: part for of_one in everyone for number, part in of_one.items()}
    return [found[number] for number in sorted(found)]


def add_up(tensors: Sequence[Tensor]) -> None:
    """Each tensor becomes its sum over all processes, in place: the same bits everywhere."""
    if world() > 1:
        _exchange(dist.all_reduce, tensors)


def average(tensors: Sequence[Tensor]) -> None:
    """Each tensor becomes its mean over all processes, in place."""
    if world() > 1:
        torch._foreach_div_(list(tensors), float(world()))
        add_up(tensors)


def begin_alike(weights: Sequence[Tensor]) -> None:
    """Give every process the first one's weights, and random numbers of its own for what a model draws (dropout)."""
    if world() == 1:
        return
    _exchange(lambda flat: dist.broadcast(flat, src=0), weights)
    torch.manual_seed(int(torch.randint(2**62, ())) + rank())


def _exchange(collective: Callable[[Tensor], Any], tensors: Sequence[Tensor]) -> None:
    """In one call for all tensors of a kind: each call waits for the network."""
    kinds = defaultdict(list)
    for tensor in tensors:
        kinds[tensor.device, tensor.dtype].append(tensor.detach())
    for alike in kinds.values():
        flat = torch.cat([tensor.flatten() for tensor in alike])
        collective(flat)
        for tensor, part in zip(alike, flat.split([tensor.numel() for tensor in alike]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def whole_batch_norms() -> AbstractContextManager[Any]:
    """Batch norms that train see the whole batch, in the forward pass as in the backward pass.

    torch's SyncBatchNorm would be other modules for a while, for CUDA alone; so it is what they call that is another.
    """
    return _WholeBatchNorms() if world() > 1 else nullcontext()


class _WholeBatchNorms(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is nn.functional.batch_norm:
            return _batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _Sum(torch.autograd.Function):
    """Over all processes; what each makes of it counts in the gradient of each. torch's own is deprecated."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        total = part.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient)


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.batch_norm`` of all processes' parts, which are equally large."""
    if not training:
        return nn.functional.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    axes = [axis for axis in range(x.ndim) if axis != 1]
    shape = [-1 if axis == 1 else 1 for axis in range(x.ndim)]
    count = world() * x.numel() // x.shape[1]
    # In two passes: a mean of squares less the square of the mean loses digits.
    mean = _Sum.apply(wide.sum(axes)) / count
    centred = wide - mean.view(shape)
    variance = _Sum.apply(centred.square().sum(axes)) / count
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            unbiased = variance * (count / max(1, count - 1))
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    scale = (variance + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    y = centred * scale.view(shape)
    if bias is not None:
        y = y + bias.view(shape)
    return y.to(x.dtype)
