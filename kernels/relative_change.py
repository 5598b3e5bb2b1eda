"""Triton kernels of ``torch.ops.diffcache.relative_change``: one read of both tensors, one number for each sample."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffcache.kernels.starting import Start

BLOCK = 4096
MAX_PARTS = 1024  # of one sample; the second kernel adds them up in one program


@triton.jit
def partial_kernel(  # type: ignore[no-untyped-def]  # Triton's values have no types
    p_new, p_old, p_partial, numel, parts, SQUARED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    """Sums of the change and of the old value over every ``parts``-th block of a sample: ``partial[sample, part]``."""
    sample, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b_change = tl.zeros([BLOCK], dtype=WIDE)
    b_size = tl.zeros([BLOCK], dtype=WIDE)
    for block in range(part, tl.cdiv(numel, BLOCK), parts):
        o = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        m = o < numel
        b_old = tl.load(p_old + sample * numel + o, mask=m, other=0.0).to(WIDE)
        b_difference = tl.load(p_new + sample * numel + o, mask=m, other=0.0).to(WIDE) - b_old
        if SQUARED:
            b_change += b_difference * b_difference
            b_size += b_old * b_old
        else:
            b_change += tl.abs(b_difference)
            b_size += tl.abs(b_old)
    p_sums = p_partial + (sample * parts + part) * 2
    tl.store(p_sums, tl.sum(b_change, axis=0))
    tl.store(p_sums + 1, tl.sum(b_size, axis=0))


@triton.jit
def ratio_kernel(p_partial, p_out, parts, SQUARED: tl.constexpr, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The parts of a sample added up, always in the same order, and divided."""
    sample = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    p_sums = p_partial + (sample * parts + part) * 2
    change = tl.sum(tl.load(p_sums, mask=part < parts, other=0.0), axis=0)
    size = tl.sum(tl.load(p_sums + 1, mask=part < parts, other=0.0), axis=0)
    ratio = change / size
    tl.store(p_out + sample, (tl.sqrt(ratio) if SQUARED else ratio).to(p_out.dtype.element_ty))


def relative_change(start: Start, new: Tensor, old: Tensor, norm: int) -> Tensor:
    """Launch the kernels on checked arguments: float32 ``[samples]``."""
    samples, numel = new.shape[0], new[0].numel()
    new, old = new.contiguous(), old.contiguous()
    blocks = triton.cdiv(numel, BLOCK)
    parts = min(blocks, MAX_PARTS)
    wide, accumulator = (tl.float64, torch.float64) if new.dtype == torch.float64 else (tl.float32, torch.float32)
    partial = start.empty(samples, parts, 2, dtype=accumulator, device=new.device)
    out = start.empty(samples, dtype=torch.float32, device=new.device)
    squared = norm == 2
    start(partial_kernel, (samples, parts), new, old, partial, numel, parts, SQUARED=squared, WIDE=wide, BLOCK=BLOCK)
    start(ratio_kernel, (samples,), partial, out, parts, SQUARED=squared, PARTS=triton.next_power_of_2(parts))
    return out
