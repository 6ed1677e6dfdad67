"""How an op becomes known to torch: schema, fake and device implementations in one call.

``torch.library.Library`` is used directly: ``custom_op`` costs about three times as much a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Looked up once: small ops ask for them at every call.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._functorch.peek_interpreter_stack
_profiler_enabled = torch.autograd._profiler_enabled

_library = torch.library.Library("mvp_ext", "DEF")


def define(
    schema: str, *, fake: Callable[..., Any], cpu: Callable[..., Any], cuda: Callable[..., Any] | None = None
) -> Any:
    """Register one op; returns its callable overload. Without ``cuda`` a CUDA tensor gets an error, no fallback."""
    name = schema[: schema.index("(")]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, cpu, "CPU")
    _library.impl(name, cuda or _without_cuda(name), "CUDA")
    torch.library.register_fake(f"mvp_ext::{name}", fake, lib=_library)
    return getattr(torch.ops.mvp_ext, name).default


def nobody_listens() -> bool:
    """No mode, transform or profiler would see a call of an op: its kernel may be called directly."""
    return _dispatch_modes() == 0 and _transforms() is None and not _profiler_enabled()


def _without_cuda(name: str) -> Callable[..., Any]:
    def raise_(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            f"{name}: expected CPU tensors, got CUDA tensors, and this build of mvp_ext has no CUDA kernel for it. "
            "Move the tensors with .cpu(), or use mvp_ext.ops.reference on the GPU."
        )

    return raise_
