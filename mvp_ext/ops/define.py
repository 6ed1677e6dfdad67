"""How an op becomes known to torch, and the one way round torch's dispatcher.

``torch.library.Library`` is used directly: ``custom_op`` costs about three times as much a call.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from mvp_ext.ops._native import native

_library = torch.library.Library("mvp_ext", "DEF")


def define(schema: str, *, fake: Callable[..., Any], run: Callable[..., Any]) -> Callable[..., Any]:
    """Register one op; returns what calls it, with positional arguments.

    For a small call the dispatcher takes as long as the kernel. So ``run`` is called directly where nobody can tell the
    difference: the tensors are plain ones on the CPU or a GPU, and nothing of torch sees or changes calls. Else the
    dispatcher is asked, which makes the results of meta and fake tensors by ``fake``.

    The first argument is a tensor or a list of at least one. The public function has checked that all tensors are on
    its device; it also gives the op its gradient, if there is one, by an autograd.Function.
    """
    name, _, parameters = schema.partition(" -> ")[0].partition("(")
    kinds = [text.split()[0] for text in parameters.split(",")]
    single = [at for at, kind in enumerate(kinds) if kind in ("Tensor", "Tensor?")]
    lists = [at for at, kind in enumerate(kinds) if kind.startswith("Tensor") and kind.endswith("[]")]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def run_checked(*arguments: Any) -> Any:
        # Anybody may have called the op, and torch is asked about its arguments before the kernel checks them.
        native().check_arguments(name, arguments)
        return run(*arguments)

    for key in ("CPU", "CUDA"):
        _library.impl(name, run_checked, key)
    torch.library.register_fake(f"mvp_ext::{name}", fake, lib=_library)
    op = getattr(torch.ops.mvp_ext, name).default

    def call(*arguments: Any) -> Any:
        if not dispatch_is_observed() and _are_plain(arguments, single, lists):
            return run(*arguments)
        with torch.no_grad():
            return op(*arguments)

    return call


def _private(name: str) -> Callable[[], object]:
    """What is private to torch, and may be missing in another version: then nothing goes round the dispatcher."""
    try:
        found: Callable[[], object] = operator.attrgetter(name)(torch)
    except AttributeError:
        return lambda: True
    return found


# Looked up once: small ops ask for them at every call.
_function_modes = _private("_C._len_torch_function_stack")
_dispatch_modes = _private("_C._len_torch_dispatch_stack")
_functorch_transform = _private("_C._functorch.peek_interpreter_stack")
_profiler = _private("autograd._profiler_enabled")
_jit_trace = _private("_C._is_tracing")


def dispatch_is_observed() -> object:
    """True of a compiler, tracer, mode, transform, profiler or forward-mode AD that would see a call, or change it."""
    return (
        torch.compiler.is_compiling()
        or _function_modes()
        or _dispatch_modes()
        or _functorch_transform()
        or _profiler()
        or _jit_trace()
        or forward_ad_is_on()
    )


if hasattr(forward_ad, "_current_level"):

    def forward_ad_is_on() -> bool:
        return forward_ad._current_level >= 0
else:

    def forward_ad_is_on() -> bool:
        return True


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a call must go through the op's autograd.Function, which also refuses the tangents of forward-mode AD."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return forward_ad_is_on()


# No subclass, whose __torch_function__ or __torch_dispatch__ would see the call.
_PLAIN = frozenset((Tensor, Parameter, NoneType))


def _are_plain(arguments: tuple[Any, ...], single: list[int], lists: list[int]) -> bool:
    """Whether all tensors are as torch makes them. ``single``, ``lists``: where to find tensors, and lists of them."""
    first = arguments[0]
    for at in single:
        if type(arguments[at]) not in _PLAIN:
            return False
    for at in lists:
        if not _PLAIN.issuperset(map(type, arguments[at])):
            return False
    if lists and lists[0] == 0:
        first = first[0]
    return bool(first.is_cpu or first.is_cuda)
