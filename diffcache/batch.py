"""A batch cut into calls of fewer samples, and their results put together again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffcache.call_pattern import CallPattern, input_leaves
from diffcache.tracing import tree
from diffcache.tracing.session import Bound
from diffcache.tracing.variant import Variant

CANNOT = "the batch of this call cannot be cut: "
TOGETHER = "; or take a recipe without guidance= and each_sample(), which run a batch as it comes"
Rows = Sequence[int]  # of the batch, in the order in which a part has them


def batch_size(bound: Bound, pattern: CallPattern) -> int:
    """Samples of this call: the first dimension of its latent; 0 where it has none."""
    latent = input_leaves(bound).get(pattern.probe) if pattern.probe is not None else None
    return len(latent) if isinstance(latent, Tensor) and latent.ndim else 0


def call_kind(bound: Bound) -> Any:
    """Equal for calls with inputs of the same shapes."""
    return tuple((path, getattr(leaf, "shape", None)) for path, leaf in input_leaves(bound).items())


def cut(bound: Bound, pattern: CallPattern, rows: Rows, whole: int) -> Bound:
    """The call of some rows of a batch of ``whole`` samples; inputs without the batch dimension are shared.

    Raises:
        ValueError: an input has neither one row nor as many as the latent.
    """
    if list(rows) == list(range(whole)):
        return bound
    parts = {}
    for path, leaf in input_leaves(bound).items():
        if path in pattern.shared or not isinstance(leaf, Tensor) or not leaf.ndim or len(leaf) == 1:
            continue
        if len(leaf) != whole:
            raise ValueError(
                f"{CANNOT}input {tree.show(path)} has {len(leaf)} rows, the latent {whole}; calibrate with inputs of "
                f"the same kind{TOGETHER}"
            )
        parts[path] = taken(leaf, rows)
    return tree.with_leaves(bound, parts)


def taken(leaf: Tensor, rows: Rows) -> Tensor:
    """A copy of these rows, in memory of its own: where a tensor lies may decide which kernel runs."""
    first, count = rows[0], len(rows)
    if list(rows) == list(range(first, first + count)):
        return leaf[first : first + count].clone()
    return leaf[list(rows)]


def part_of(result: Any, rows: Rows, whole: int) -> Any:
    """These rows of every tensor that the denoiser returned for a batch of ``whole`` samples.

    Raises:
        ValueError: a tensor does not have one row for each sample.
    """
    return mapped(result, lambda leaf: taken(_with_rows(leaf, whole), rows))


def _with_rows(leaf: Tensor, count: int) -> Tensor:
    if not leaf.ndim or len(leaf) != count:
        raise ValueError(
            f"{CANNOT}of {count} samples the denoiser returns a tensor of shape {list(leaf.shape)}{TOGETHER}"
        )
    return leaf


def mapped(result: Any, change: Any) -> Any:
    """The result with every tensor changed."""
    leaves = {path: change(leaf) for path, leaf in tree.walk(result) if isinstance(leaf, Tensor)}
    return tree.with_leaves(result, leaves)


def joined(parts: Sequence[Any], rows: Sequence[Rows]) -> Any:
    """Results of parts as the result of their batch; ``rows[i]`` is where the rows of ``parts[i]`` belong.

    Raises:
        ValueError: a tensor of a result does not have one row for each sample.
    """
    order = torch.tensor([row for part in rows for row in part]).argsort().tolist()
    plain = order == list(range(len(order)))
    found = [{path: leaf for path, leaf in tree.walk(part) if isinstance(leaf, Tensor)} for part in parts]
    leaves = {}
    for path in found[0]:
        several = [_with_rows(leaves_of[path], len(part)) for leaves_of, part in zip(found, rows, strict=True)]
        together = torch.cat(several)
        leaves[path] = together if plain else together[order]
    return tree.with_leaves(parts[0], leaves)


def refuse_effects(variant: Variant, cannot: str = CANNOT, drawing: bool = True) -> None:
    """Raise ValueError for a denoiser that must run exactly once a call, because it does more than return a result."""
    effects = {
        "writes to its own state": bool(variant.trace.persistent),
        "writes to its inputs": variant.trace.writes_inputs,
        "draws random numbers": drawing and any(node.meta.get("random") for node in variant.trace.graph.nodes),
    }
    for effect, found in effects.items():
        if found:
            raise ValueError(f"{cannot}the denoiser {effect}, and has to run once for every call{TOGETHER}")


def check_equal(whole: Any, parts: Any, what: str, within: float | None = None) -> None:
    """Raise ValueError where values made in parts are not those of the whole batch.

    Compared by relative L2; allowed is rounding, the square root of the dtype's precision, unless ``within`` says more.
    """
    for (path, a), (_, b) in zip(tree.walk(whole), tree.walk(parts), strict=True):
        if not isinstance(a, Tensor):
            continue
        allowed = torch.finfo(a.dtype).eps ** 0.5 if a.is_floating_point() or a.is_complex() else 0.0
        error = _relative(a, b) if a.shape == b.shape else float("inf")
        if not error <= (allowed if within is None else max(allowed, within)):
            raise ValueError(
                f"{CANNOT}{what}{tree.show(path)} made in parts differs from the whole by {error:.2g} (relative L2). "
                f"Samples depend on one another, or an input has rows of another kind{TOGETHER}"
            )


def _relative(a: Tensor, b: Tensor) -> float:
    wide = torch.complex128 if a.is_complex() else torch.float64
    a, b = a.detach().to(wide), b.detach().to(wide)
    return float((a - b).norm() / a.norm().clamp_min(1e-30))
