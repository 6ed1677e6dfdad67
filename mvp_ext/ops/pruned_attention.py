"""Multi-head self-attention of the kept heads, computed from the FULL weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mvp_ext.ops.checks import (
    FLOATS,
    INDICES,
    check_float,
    check_int,
    check_range,
    check_shape,
    check_tensor,
    renamed,
)
from mvp_ext.ops.define import derivative_by
from mvp_ext.ops.pruned_linear import pruned_linear


def pruned_attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    head_index: Tensor,
    *,
    num_heads: int,
    scale: float | None = None,
) -> Tensor:
    """Multi-head self-attention of the kept heads only, from the full weights (timm's layout).

    y = concat_h softmax(q_h k_hᵀ · scale) v_h · W_proj[:, kept]ᵀ + b_proj, q, k, v = x · W_qkv[kept]ᵀ + b_qkv[kept]

    Args:
        x: float [B, n, C].
        qkv_weight: [3 · H · D, C]: rows of q, then k, then v, head by head. qkv_bias: [3 · H · D] or None.
        proj_weight: [C, H · D]; a transposed view (input-major) is faster. proj_bias: [C] or None.
        head_index: int32 or int64, kept heads in [0, H). None kept: the result is proj_bias.
        num_heads: H of the full weights.
        scale: of the scores. Default D ** -0.5, D the head dim, whatever is kept.

    Returns:
        [B, n, C]. Differentiable in x and all weights and biases.

    Raises:
        TypeError, ValueError: kinds, dtypes, shapes, devices, a head out of range.

    Linear layers by ``pruned_linear``, attention by scaled_dot_product_attention.
    """
    op = "pruned_attention"
    check_tensor(op, "x", x, ndim=3, dtypes=FLOATS)
    check_tensor(op, "qkv_weight", qkv_weight, ndim=2)
    check_tensor(op, "proj_weight", proj_weight, ndim=2)
    check_tensor(op, "head_index", head_index, ndim=1, dtypes=INDICES, device=x.device)
    num_heads = check_int(op, "num_heads", num_heads)
    width = qkv_weight.shape[0] // 3
    if num_heads < 1 or qkv_weight.shape[0] % (3 * num_heads):
        raise ValueError(
            f"{op}: num_heads: expected a divisor of {qkv_weight.shape[0] / 3:g} (qkv_weight.shape[0] / 3),"
            f" got {num_heads}"
        )
    check_shape(op, "proj_weight", proj_weight, (None, width), "[C, H · D]")
    head_dim = width // num_heads
    scale = head_dim**-0.5 if scale is None else check_float(op, "scale", scale)
    batch, tokens, _ = x.shape
    parts = torch.cat([head_index, head_index + num_heads, head_index + 2 * num_heads])
    kept = head_index.shape[0]
    try:
        qkv = pruned_linear(x, qkv_weight, qkv_bias, parts, out_block=head_dim)
    except (TypeError, ValueError, NotImplementedError) as error:
        check_range(op, "head_index", head_index, num_heads)
        names = {"weight": "qkv_weight", "bias": "qkv_bias", "out_index": "head_index"}
        raise renamed(error, op, names) from error
    q, k, v = qkv.view(batch, tokens, 3, kept, head_dim).permute(2, 0, 3, 1, 4).unbind(0)  # [B, kept, n, D]
    if derivative_by(x, qkv_weight, qkv_bias, proj_weight, proj_bias) == "formula":
        # The fused kernels know neither forward-mode AD nor all transforms.
        y = ((q @ k.transpose(-2, -1)) * scale).softmax(-1) @ v
    else:
        y = F.scaled_dot_product_attention(q, k, v, scale=scale)
    y = y.transpose(1, 2).flatten(2)  # [B, n, kept · D]
    try:
        return pruned_linear(y, proj_weight, proj_bias, None, head_index, in_block=head_dim)
    except (TypeError, ValueError, NotImplementedError) as error:
        names = {"weight": "proj_weight", "bias": "proj_bias", "in_index": "head_index"}
        raise renamed(error, op, names) from error
