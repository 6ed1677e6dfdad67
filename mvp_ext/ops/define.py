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


def define(schema: str, *, fake: Callable[..., Any], run: Callable[..., Any]) -> Any:
    """Register one op; returns its callable overload. ``run`` gets CPU and CUDA tensors."""
    name = schema[: schema.index("(")]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    torch.library.register_fake(f"mvp_ext::{name}", fake, lib=_library)
    return getattr(torch.ops.mvp_ext, name).default


def nobody_listens() -> bool:
    """No mode, transform or profiler would see a call of an op: its kernel may be called directly."""
    return _dispatch_modes() == 0 and _transforms() is None and not _profiler_enabled()
