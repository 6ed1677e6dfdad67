"""How an op becomes known to torch, and the one way round torch's dispatcher.

``torch.library.Library`` is used directly: ``custom_op`` costs about three times as much a call.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from mvp_ext.ops._native import native
from mvp_ext.ops.device import on_cuda

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
    user_op = name.removesuffix("_gelu")
    kinds = [text.split()[0] for text in parameters.split(",")]
    names = [text.split()[1].rstrip(")") for text in parameters.split(",")]
    single = [at for at, kind in enumerate(kinds) if kind in ("Tensor", "Tensor?")]
    lists = [at for at, kind in enumerate(kinds) if kind.startswith("Tensor") and kind.endswith("[]")]

    def check(arguments: tuple[Any, ...]) -> None:
        """No kernel reads or writes where a tensor has no memory."""
        for at in single:
            if not _has_memory(arguments[at]):
                raise _freed(user_op, names[at])
        for at in lists:
            for number, tensor in enumerate(arguments[at]):
                if not _has_memory(tensor):
                    raise _freed(user_op, f"{names[at]}[{number}]")

    def run_checked(*arguments: Any) -> Any:
        # Anybody may have called the op, and torch is asked about its arguments before the kernel checks them.
        native().check_arguments(name, arguments)
        return run(*arguments)

    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, run_checked, key)
    torch.library.register_fake(f"mvp_ext::{name}", fake, lib=_library)
    op = getattr(torch.ops.mvp_ext, name).default

    def call(*arguments: Any) -> Any:
        observed = dispatch_is_observed()
        # Of small calls on a CPU the most: one native call sees what takes Python as long as the kernel.
        if not observed and native().are_plain(arguments):
            return run(*arguments)
        if not observed and _are_plain(arguments, single, lists):
            try:
                check(arguments)
            except NotImplementedError:
                pass  # no storage: one of many tensors in a batch of gradients
            else:
                return run(*arguments)
        try:
            with torch.no_grad():
                return op(*arguments)
        except AssertionError as error:
            if "FakeTensor" not in str(error):
                raise
            raise ValueError(f"{user_op}: expected fake tensors or real ones, got both: {error}") from error

    return call


def _has_memory(tensor: Tensor | None) -> bool:
    """False of a tensor whose storage was freed (``untyped_storage().resize_(0)``)."""
    return tensor is None or bool(tensor.untyped_storage().data_ptr()) or tensor.numel() == 0


def check_memory(op: str, **tensors: Tensor | None) -> None:
    """For an op whose tensors torch's own ops read, which do not look. Tensors that are not plain are theirs."""
    if not dispatch_is_observed():
        for name, tensor in tensors.items():
            plain = tensor is not None and type(tensor) in _PLAIN and (tensor.is_cpu or tensor.is_cuda)
            if plain and not _has_memory(tensor):
                raise _freed(op, name)


def _freed(op: str, argument: str) -> ValueError:
    return ValueError(f"{op}: {argument}: expected a tensor with memory, got one whose storage was freed")


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
functorch_is_active = _private("_C._are_functorch_transforms_active")  # the one that torch.compile knows
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


def derivative_by(*tensors: Tensor | None) -> Literal["function", "formula"] | None:
    """How the derivatives of an op in these tensors come about; None: nobody asks for any, the op is called alone.

    "function": by an autograd.Function. Forward-mode AD and torch.func's transforms pass by those, silently; for them
    the op is computed by a "formula" of torch's own ops, which know every transform.
    """
    transformed = functorch_is_active()
    if forward_ad_is_on() or (transformed and (torch.compiler.is_compiling() or not _is_only_mapped())):
        return "formula"
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and (
                tensor.requires_grad or (transformed and _unwrapped(tensor).requires_grad)
            ):
                return "formula" if transformed else "function"
    return None


def is_only_computed(x: Tensor, *others: Tensor | None) -> bool:
    """Of plain CPU tensors, in a call that nobody observes: whether nobody casts or derives what is computed from them,
    or has the CUDA emulator do it, whose tensors are plain ones, too."""
    return not on_cuda(x) and not torch.is_autocast_enabled("cpu") and derivative_by(x, *others) is None


def _is_only_mapped() -> bool:
    """Whether vmap is the only transform at work; False where this version of torch does not tell."""
    functorch = torch._C._functorch
    names = ("get_interpreter_stack", "is_functorch_wrapped_tensor", "get_unwrapped")
    return all(hasattr(functorch, name) for name in names) and all(
        level.key().name == "Vmap" for level in functorch.get_interpreter_stack() or ()
    )


def _unwrapped(tensor: Tensor) -> Tensor:
    """What vmap was given: the tensors that it hands on never say that they require a gradient."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


# No subclass, whose __torch_function__ or __torch_dispatch__ would see the call.
_PLAIN = frozenset((Tensor, Parameter))


def _are_plain(arguments: tuple[Any, ...], single: list[int], lists: list[int]) -> bool:
    """Whether all tensors are as torch makes them. ``single``, ``lists``: where to find tensors, and lists of them.

    Not plain is also the imaginary part of a conjugate, whose sign is a bit that the dispatcher knows.
    """
    first = arguments[0]
    for at in single:
        tensor = arguments[at]
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.is_neg()):
            return False
    for at in lists:
        for tensor in arguments[at]:
            if tensor is not None and (type(tensor) not in _PLAIN or tensor.is_neg()):
                return False
    if lists and lists[0] == 0:
        first = first[0]
    return bool(first.is_cpu or first.is_cuda)
