"""Triton kernel of ``torch.ops.diffcache.extrapolate``: reads K history tensors and the anchor once, writes once.

The eager body in ``diffcache/ops.py`` is the truth. Nothing is registered here, and the module is imported only when a
CUDA tensor arrives (or by tests, under TRITON_INTERPRET=1).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_HISTORY = 6
BLOCK = 1024


@triton.jit
def extrapolate_kernel(  # type: ignore[no-untyped-def]  # pointers have no type that mypy knows
    p_out,
    p_anchor,
    p_h0,
    p_h1,
    p_h2,
    p_h3,
    p_h4,
    p_h5,
    p_weights,
    numel,
    K: tl.constexpr,
    HAS_ANCHOR: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out = total h_0 + sum_{k>=1} w_k (h_k - h_0) [+ anchor]`` on flat memory of ``numel`` elements."""
    # int64: a video latent passes 2^31 elements
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < numel
    b_base = tl.load(p_h0 + o, mask=m, other=0.0).to(WIDE)
    b_out = b_base * tl.load(p_weights).to(WIDE)
    if K > 1:
        b_out += tl.load(p_weights + 1).to(WIDE) * (tl.load(p_h1 + o, mask=m, other=0.0).to(WIDE) - b_base)
    if K > 2:
        b_out += tl.load(p_weights + 2).to(WIDE) * (tl.load(p_h2 + o, mask=m, other=0.0).to(WIDE) - b_base)
    if K > 3:
        b_out += tl.load(p_weights + 3).to(WIDE) * (tl.load(p_h3 + o, mask=m, other=0.0).to(WIDE) - b_base)
    if K > 4:
        b_out += tl.load(p_weights + 4).to(WIDE) * (tl.load(p_h4 + o, mask=m, other=0.0).to(WIDE) - b_base)
    if K > 5:
        b_out += tl.load(p_weights + 5).to(WIDE) * (tl.load(p_h5 + o, mask=m, other=0.0).to(WIDE) - b_base)
    if HAS_ANCHOR:
        b_out += tl.load(p_anchor + o, mask=m, other=0.0).to(WIDE)
    tl.store(p_out + o, b_out.to(p_out.dtype.element_ty), mask=m)


def extrapolate(anchor: Tensor | None, history: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Launch the kernel: 1 to ``MAX_HISTORY`` history tensors of one shape and dtype, weights ``[K]`` on any device.

    The result has the layout of ``torch.empty_like(history[0])``. Tensors of another layout are copied to it first.
    """
    out = torch.empty_like(history[0])
    if not out.numel():
        return out
    flat = [_laid_out_like(out, tensor) for tensor in history]
    padded = (flat + [flat[0]] * MAX_HISTORY)[:MAX_HISTORY]
    added = out if anchor is None else _laid_out_like(out, anchor)
    if weights.device != out.device or not weights.is_contiguous():
        weights = weights.to(out.device).contiguous()
    wide = tl.float64 if out.dtype == torch.float64 else tl.float32
    # Triton launches on the current device, which need not be the tensor's
    with torch.cuda.device(out.device) if out.is_cuda else contextlib.nullcontext():
        extrapolate_kernel[(triton.cdiv(out.numel(), BLOCK),)](
            out,
            added,
            *padded,
            weights,
            out.numel(),
            K=len(history),
            HAS_ANCHOR=anchor is not None,
            WIDE=wide,
            BLOCK=BLOCK,
        )
    return out


def _laid_out_like(out: Tensor, tensor: Tensor) -> Tensor:
    """The tensor itself when its elements lie in memory as those of the dense tensor ``out`` do; else a copy."""
    if tensor.stride() == out.stride():
        return tensor
    return torch.empty_like(out, dtype=tensor.dtype).copy_(tensor)
