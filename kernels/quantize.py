"""Triton kernel of ``torch.ops.diffcache.quantize``: the residual, its largest value per row, and the small copy."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffcache.kernels.starting import Start

LONGEST_ROW = 16384  # elements


@triton.jit
def quantize_kernel(  # type: ignore[no-untyped-def]  # Triton's values have no types
    p_value, p_anchor, p_out, p_scale, columns,
    LARGEST: tl.constexpr, HAS_ANCHOR: tl.constexpr, ROUND: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One row: ``scale = max|value - anchor| / LARGEST``, ``out = (value - anchor) / scale``."""
    VALUE: tl.constexpr = p_value.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    m = column < columns
    b_value = tl.load(p_value + row * columns + column, mask=m, other=0.0).to(tl.float32)
    if HAS_ANCHOR:
        b_anchor = tl.load(p_anchor + row * columns + column, mask=m, other=0.0).to(tl.float32)
        b_value = (b_value - b_anchor).to(VALUE).to(tl.float32)
    scale = tl.max(tl.abs(b_value), axis=0) / LARGEST
    scale = tl.where(scale > 0.0, scale, 1.0)
    b_out = b_value / scale
    if ROUND:  # to the nearest, ties to even, as torch.round: adding 1.5 * 2^23 leaves no bit behind the point
        b_out = (b_out + 12582912.0) - 12582912.0
    tl.store(p_out + row * columns + column, b_out.to(p_out.dtype.element_ty), mask=m)
    tl.store(p_scale + row, scale)


def quantize(
    start: Start, value: Tensor, anchor: Tensor | None, dtype: torch.dtype, largest: float
) -> tuple[Tensor, Tensor] | None:
    """Launch the kernel on checked arguments; None for rows that are too long for one program."""
    columns = value.shape[-1]
    if columns > LONGEST_ROW:
        return None
    value = value.contiguous()
    out = start.empty(like=value, dtype=dtype)
    scale = start.empty(*value.shape[:-1], 1, dtype=torch.float32, device=value.device)
    if value.numel():
        start(
            quantize_kernel, (value.numel() // columns,),
            value, value if anchor is None else anchor.contiguous(), out, scale, columns,
            LARGEST=largest, HAS_ANCHOR=anchor is not None, ROUND=not dtype.is_floating_point,
            COLUMNS=triton.next_power_of_2(columns),
        )  # fmt: skip
    return out, scale
