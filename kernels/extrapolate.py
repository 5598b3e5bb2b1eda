"""Triton kernels of ``torch.ops.diffcache.extrapolate``: every history tensor is read once, the result written once.

``dense_kernel`` takes tensors that lie in memory alike without gaps, as history does: no strides, and few arguments,
for each costs time to launch. ``extrapolate_kernel`` takes every layout, gates, tables, scales and the modulated norm.
The eager body in ``diffcache/ops.py`` is the truth, down to where it rounds. Nothing is registered here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffcache.kernels.layout import as_triple, laid_out_alike, lie_alike
from diffcache.kernels.starting import Start

MAX_HISTORY = 6
BLOCK = 2048  # elements of one program, where no sum along a row asks for more: 128-bit loads on every GPU
DENSE_BLOCK = 2048  # of dense_kernel, by 128 threads: 32 bytes of each tensor in flight for each
LONGEST_ROW = 16384  # elements that one program can normalise


@triton.jit
def dense_kernel(  # type: ignore[no-untyped-def]  # Triton's values have no types
    p_out, p_anchor, p_h0, p_h1, p_h2, p_h3, p_h4, p_h5, p_weights, numel,
    K: tl.constexpr, HAS_ANCHOR: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``out = anchor + total h_0 + sum_{k>=1} w_k (h_k - h_0)`` over ``BLOCK`` neighbours; all is loaded before use."""
    start = tl.program_id(0).to(tl.int64) * BLOCK  # in int64, for a video passes 2^31 elements
    o = tl.arange(0, BLOCK)
    m = o < numel - start
    b_h0 = tl.load(p_h0 + start + o, mask=m, other=0.0)
    if K > 1:
        b_h1 = tl.load(p_h1 + start + o, mask=m, other=0.0)
    if K > 2:
        b_h2 = tl.load(p_h2 + start + o, mask=m, other=0.0)
    if K > 3:
        b_h3 = tl.load(p_h3 + start + o, mask=m, other=0.0)
    if K > 4:
        b_h4 = tl.load(p_h4 + start + o, mask=m, other=0.0)
    if K > 5:
        b_h5 = tl.load(p_h5 + start + o, mask=m, other=0.0)
    if HAS_ANCHOR:
        b_anchor = tl.load(p_anchor + start + o, mask=m, other=0.0)

    b_base = b_h0.to(WIDE)
    b_out = b_base * tl.load(p_weights).to(WIDE)
    if K > 1:
        b_out += tl.load(p_weights + 1).to(WIDE) * (b_h1.to(WIDE) - b_base)
    if K > 2:
        b_out += tl.load(p_weights + 2).to(WIDE) * (b_h2.to(WIDE) - b_base)
    if K > 3:
        b_out += tl.load(p_weights + 3).to(WIDE) * (b_h3.to(WIDE) - b_base)
    if K > 4:
        b_out += tl.load(p_weights + 4).to(WIDE) * (b_h4.to(WIDE) - b_base)
    if K > 5:
        b_out += tl.load(p_weights + 5).to(WIDE) * (b_h5.to(WIDE) - b_base)
    if HAS_ANCHOR:
        b_out += b_anchor.to(WIDE)
    tl.store(p_out + start + o, b_out.to(p_out.dtype.element_ty), mask=m)


@triton.jit
def _places(b_row, b_column, middle, s0, s1, s2):  # type: ignore[no-untyped-def]  # Triton's values have no types
    """Offsets [rows, columns] into a tensor of strides (s0, s1, s2); in int64, for a video passes 2^31 elements."""
    b_start = (b_row // middle).to(tl.int64) * s0 + (b_row % middle).to(tl.int64) * s1
    return b_start[:, None] + b_column.to(tl.int64)[None, :] * s2


@triton.jit
def _history(p_value, p_scale, places, b_scale_places, m, SCALED: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    b_value = tl.load(p_value + places, mask=m, other=0.0).to(WIDE)
    if SCALED:
        b_value = b_value * tl.load(p_scale + b_scale_places, mask=m, other=0.0).to(WIDE)
    return b_value


@triton.jit
def _weight(p_weights, k, s_k, places, m, TABLE: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    if TABLE:
        b_weight = tl.load(p_weights + k * s_k + places, mask=m, other=0.0).to(WIDE)
    else:
        b_weight = tl.load(p_weights + k * s_k).to(WIDE)
    return b_weight


@triton.jit
def extrapolate_kernel(  # type: ignore[no-untyped-def]
    p_out, p_modulated, p_anchor,
    p_h0, p_h1, p_h2, p_h3, p_h4, p_h5,
    p_s0, p_s1, p_s2, p_s3, p_s4, p_s5,
    p_weights, p_gate, p_factor, p_shift,
    rows, middle, columns,
    out0, out1, out2,
    anchor0, anchor1, anchor2,
    history0, history1, history2,
    scale0, scale1, scale2,
    weight_k, weight0, weight1, weight2,
    gate0, gate1, gate2,
    factor0, factor1, factor2,
    shift0, shift1, shift2,
    eps,
    K: tl.constexpr, HAS_ANCHOR: tl.constexpr, HAS_GATE: tl.constexpr, SCALED: tl.constexpr, TABLE: tl.constexpr,
    MODULATE: tl.constexpr, KEEP: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``f = total h_0 + sum_{k>=1} w_k (h_k - h_0)``, then ``out = anchor + gate f``, then its modulated norm."""
    VALUE: tl.constexpr = p_out.dtype.element_ty
    column_blocks = tl.cdiv(columns, COLUMNS)
    b_row = (tl.program_id(0) // column_blocks) * ROWS + tl.arange(0, ROWS)
    b_column = (tl.program_id(0) % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    m = (b_row < rows)[:, None] & (b_column < columns)[None, :]

    o_h = _places(b_row, b_column, middle, history0, history1, history2)
    o_s = _places(b_row, b_column, middle, scale0, scale1, scale2)
    o_w = _places(b_row, b_column, middle, weight0, weight1, weight2)
    b_base = _history(p_h0, p_s0, o_h, o_s, m, SCALED, WIDE)
    b_out = b_base * _weight(p_weights, 0, weight_k, o_w, m, TABLE, WIDE)
    if K > 1:
        b_older = _history(p_h1, p_s1, o_h, o_s, m, SCALED, WIDE) - b_base
        b_out += _weight(p_weights, 1, weight_k, o_w, m, TABLE, WIDE) * b_older
    if K > 2:
        b_older = _history(p_h2, p_s2, o_h, o_s, m, SCALED, WIDE) - b_base
        b_out += _weight(p_weights, 2, weight_k, o_w, m, TABLE, WIDE) * b_older
    if K > 3:
        b_older = _history(p_h3, p_s3, o_h, o_s, m, SCALED, WIDE) - b_base
        b_out += _weight(p_weights, 3, weight_k, o_w, m, TABLE, WIDE) * b_older
    if K > 4:
        b_older = _history(p_h4, p_s4, o_h, o_s, m, SCALED, WIDE) - b_base
        b_out += _weight(p_weights, 4, weight_k, o_w, m, TABLE, WIDE) * b_older
    if K > 5:
        b_older = _history(p_h5, p_s5, o_h, o_s, m, SCALED, WIDE) - b_base
        b_out += _weight(p_weights, 5, weight_k, o_w, m, TABLE, WIDE) * b_older

    if HAS_GATE:  # rounded where the operations that this replaces round
        o_g = _places(b_row, b_column, middle, gate0, gate1, gate2)
        b_gate = tl.load(p_gate + o_g, mask=m, other=0.0).to(WIDE)
        b_out = (b_out.to(VALUE).to(WIDE) * b_gate).to(VALUE).to(WIDE)
    if HAS_ANCHOR:
        o_a = _places(b_row, b_column, middle, anchor0, anchor1, anchor2)
        b_out += tl.load(p_anchor + o_a, mask=m, other=0.0).to(WIDE)
    o_out = _places(b_row, b_column, middle, out0, out1, out2)
    if KEEP:
        tl.store(p_out + o_out, b_out.to(VALUE), mask=m)

    if MODULATE:
        b_out = tl.where(m, b_out.to(VALUE).to(WIDE), 0.0)
        b_mean = tl.sum(b_out, axis=1) / columns
        b_centred = tl.where(m, b_out - b_mean[:, None], 0.0)
        b_spread = tl.sqrt(tl.sum(b_centred * b_centred, axis=1) / columns + eps)
        b_norm = (b_centred / b_spread[:, None]).to(VALUE).to(WIDE)
        o_f = _places(b_row, b_column, middle, factor0, factor1, factor2)
        b_norm = (b_norm * tl.load(p_factor + o_f, mask=m, other=0.0).to(WIDE)).to(VALUE).to(WIDE)
        o_t = _places(b_row, b_column, middle, shift0, shift1, shift2)
        b_norm += tl.load(p_shift + o_t, mask=m, other=0.0).to(WIDE)
        tl.store(p_modulated + o_out, b_norm.to(VALUE), mask=m)


def _launch_dense(start: Start, out: Tensor, anchor: Tensor | None, values: list[Tensor], weights: Tensor) -> None:
    """On tensors whose elements lie alike and without gaps."""
    newest, numel = values[0], out.numel()
    padded = (values + [newest] * MAX_HISTORY)[:MAX_HISTORY]
    start(
        dense_kernel, (triton.cdiv(numel, DENSE_BLOCK),),
        out, newest if anchor is None else anchor, *padded, weights, numel,
        K=len(values), HAS_ANCHOR=anchor is not None,
        WIDE=tl.float64 if out.dtype == torch.float64 else tl.float32,
        BLOCK=DENSE_BLOCK,
    )  # fmt: skip


def extrapolate(
    start: Start,
    anchor: Tensor | None,
    history: Sequence[Tensor],
    scales: Sequence[Tensor],
    weights: Tensor,
    gate: Tensor | None = None,
    dtype: torch.dtype | None = None,
    modulation: tuple[Tensor, Tensor, float, bool] | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Launch the kernel: the value, and its modulated norm (the value again without ``modulation``).

    ``start`` makes results and starts kernels. The other arguments are those of the operations, checked;
    ``modulation`` is factor, shift, eps and whether the value is wanted. None where the kernel cannot do it: more than
    ``MAX_HISTORY`` tensors, operands whose layouts do not agree in three dimensions, or a row too long to be
    normalised.
    """
    values = laid_out_alike(history)
    newest = values[0]
    factor, shift, eps, keep = modulation or (newest, newest, 0.0, True)
    out = start.empty(like=newest, dtype=dtype or newest.dtype)
    modulated = start.empty(like=out) if modulation is not None and keep else out
    value = out if keep else start.empty(0, dtype=out.dtype, device=out.device)
    if not out.numel():
        return value, modulated
    if len(values) > MAX_HISTORY or (modulation is not None and out.shape[-1] > LONGEST_ROW):
        return None
    weights = weights.to(out.device)
    table = weights.ndim > 1
    if not (scales or table or modulation) and gate is None and weights.is_contiguous():
        if lie_alike([out, *values, *(() if anchor is None else (anchor,))]):
            _launch_dense(start, out, anchor, values, weights)
            return out, out
    scaled = laid_out_alike(scales) if scales else [newest]
    # an operand that is absent stands in as the newest value: never read, and no obstacle to merging dimensions
    operands = [out, newest if anchor is None else anchor, newest, scaled[0], weights[0] if table else newest,
                newest if gate is None else gate, factor, shift]  # fmt: skip
    found = as_triple(out.shape, operands, keep_last=modulation is not None)
    if found is None:
        return None
    (outer, middle, columns), strides = found
    per_row = triton.next_power_of_2(columns)
    block_columns = per_row if modulation is not None else min(per_row, BLOCK)
    block_rows = max(1, min(triton.next_power_of_2(outer * middle), BLOCK // block_columns))
    count = triton.cdiv(outer * middle, block_rows) * triton.cdiv(columns, block_columns)
    s_out, s_anchor, s_history, s_scale, s_weight, s_gate, s_factor, s_shift = strides
    padded = (values + [newest] * MAX_HISTORY)[:MAX_HISTORY]
    padded_scales = (scaled + [scaled[0]] * MAX_HISTORY)[:MAX_HISTORY]
    start(
        extrapolate_kernel, (count,),
        out, modulated, operands[1], *padded, *padded_scales, weights, operands[5], factor, shift,
        outer * middle, middle, columns,
        *s_out, *s_anchor, *s_history, *s_scale, weights.stride(0), *s_weight, *s_gate, *s_factor, *s_shift, eps,
        K=len(values), HAS_ANCHOR=anchor is not None, HAS_GATE=gate is not None, SCALED=bool(scales),
        TABLE=table, MODULATE=modulation is not None, KEEP=keep,
        WIDE=tl.float64 if out.dtype == torch.float64 else tl.float32,
        ROWS=block_rows, COLUMNS=block_columns,
    )  # fmt: skip
    return value, modulated
