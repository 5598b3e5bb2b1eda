"""What stands for an unconditional result that is not computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffcache.batch import mapped
from diffcache.guidance import Guidance
from diffcache.memory import Kept, in_full
from diffcache.ops import quantize
from diffcache.tracing import tree

Differences = Mapping[tree.Path, Tensor]


def stand_in(guidance: Guidance, step: int, conditional: Any, difference: Differences | None) -> Any:
    """By the rules "difference" and "fold", from the conditional result of this step; None where nothing is known."""
    if guidance.rule == "fold":
        return mapped(conditional, Tensor.clone)
    leaves = {path: leaf for path, leaf in tree.walk(conditional) if isinstance(leaf, Tensor)}
    if difference is None or any(path not in difference for path in leaves):
        return None
    weights = guidance.bands[step] if guidance.bands else None
    found = {path: leaf + weighted(difference[path], weights, guidance.radius) for path, leaf in leaves.items()}
    return tree.with_leaves(conditional, found)


def weighted(difference: Tensor, weights: tuple[float, float] | None, radius: float) -> Tensor:
    """``low * (low frequencies) + high * (high frequencies)`` over the last two dimensions.

    The sum of both bands of the conditional result is that result, so that weighting the difference alone is what
    FasterCache does (arXiv 2410.19355, eq. 9 to 11): IFFT(LF_c + w1 dLF + HF_c + w2 dHF) = c + IFFT(w1 dLF + w2 dHF).

    Raises:
        ValueError: the value has no height and width.
    """
    if weights is None:
        return difference
    if difference.ndim < 4:
        raise ValueError(
            f"guidance with bands splits frequencies of [batch, .., height, width], but the denoiser returns "
            f"{list(difference.shape)}; leave bands out, which takes the whole difference"
        )
    low, high = weights
    if low == high:
        return difference * low
    height, width = difference.shape[-2:]
    inside = int(min(height, width) * radius + 1e-9)
    rows = torch.fft.fftfreq(height, 1 / height, device=difference.device)
    columns = torch.fft.fftfreq(width, 1 / width, device=difference.device)
    band = torch.where(rows[:, None] ** 2 + columns**2 <= inside**2, low, high)
    wide = difference if difference.dtype == torch.float64 else difference.float()
    return torch.fft.ifft2(torch.fft.fft2(wide) * band).real.to(difference.dtype)


def mean(a: Kept, b: Kept) -> Kept:
    """What history keeps of two branches as one."""
    if isinstance(a, tuple):
        return quantize((in_full(a) + in_full(b)) / 2, None, a[0].dtype)
    assert isinstance(b, Tensor)
    return (a + b) / 2
