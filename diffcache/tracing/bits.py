"""Bitwise equality of tensors."""

from __future__ import annotations

import torch


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Bitwise equality of values, NaN equal to NaN."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    if x.layout != torch.strided or y.layout != torch.strided:
        return bool(torch.equal(x.to_dense(), y.to_dense()))
    equal = x == y
    if x.is_floating_point() or x.is_complex():
        equal = equal | ((x != x) & (y != y))
    return bool(equal.all())
