"""Tensors of any shape and layout as [outer, middle, inner] with strides: the three loops that the kernels have."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

Triple = tuple[int, int, int]


def as_triple(
    shape: Sequence[int], operands: Sequence[Tensor], keep_last: bool = False
) -> tuple[Triple, list[Triple]] | None:
    """The sizes, and the strides of each operand broadcast to ``shape``; None where three dimensions are too few.

    Neighbouring dimensions are merged where every operand steps through them as through one; with ``keep_last`` the
    last one stays what it is, for sums along it.
    """
    strides = [operand.expand(shape).stride() for operand in operands]
    last = len(shape) - 1
    merged: list[tuple[int, list[int]]] = []  # innermost first
    for place in range(last, -1, -1):
        size, steps = shape[place], [stride[place] for stride in strides]
        if size == 1 and not (keep_last and place == last):
            continue
        inner = merged[-1] if merged else None
        mergeable = inner is not None and not (keep_last and len(merged) == 1)
        if inner is not None and mergeable and all(s == i * inner[0] for s, i in zip(steps, inner[1], strict=True)):
            merged[-1] = (inner[0] * size, inner[1])
        else:
            merged.append((size, steps))
    if len(merged) > 3:
        return None
    while len(merged) < 3:
        merged.append((1, [0] * len(strides)))
    inner, middle, outer = merged
    triples = [(o, m, i) for o, m, i in zip(outer[1], middle[1], inner[1], strict=True)]
    return (outer[0], middle[0], inner[0]), triples


def laid_out_alike(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors themselves when their elements lie in memory alike; else contiguous copies of those that are not."""
    if all(tensor.stride() == tensors[0].stride() for tensor in tensors):
        return list(tensors)
    return [tensor.contiguous() for tensor in tensors]


def lie_alike(tensors: Sequence[Tensor]) -> bool:
    """Whether elements lie in memory as those of the first do; strides of dimensions of one element mean nothing."""
    first = tensors[0]
    steps = first.stride()
    return all(
        tensor.stride() == steps
        or all(n == 1 or a == b for n, a, b in zip(first.shape, steps, tensor.stride(), strict=True))
        for tensor in tensors[1:]
    )
