"""The peers' rules as we read them, in plain Python: what a recipe has to do, and what the tests hold the peers to.

Each takes what the peer looked at and returns what it decided: the steps it computes, or weights over computed steps.
None of this is the peers' code. ``test_peers.py`` compares every rule with the decisions of the peer itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

Weights = tuple[tuple[int, float], ...]


def change(new: torch.Tensor, old: torch.Tensor) -> float:
    """``mean|new - old| / mean|old|`` over everything, in the tensors' dtype."""
    return ((new - old).abs().mean() / old.abs().mean()).item()


def first_block_cache(residuals: Sequence[torch.Tensor], threshold: float) -> tuple[list[int], list[float]]:
    """Steps computed by diffusers' first block cache, and the numbers it compared with the threshold.

    ``residuals``: output minus input of the first block at every step.
    """
    computed, measured, kept = [0], [], residuals[0]
    for step, residual in enumerate(residuals[1:], start=1):
        measured.append(change(residual, kept))
        if measured[-1] > threshold:
            computed.append(step)
            kept = residual
    return computed, measured


def dbcache(
    residuals: Sequence[torch.Tensor],
    threshold: float = 0.08,
    *,
    warmup: int = 8,
    warmup_interval: int = 1,
    max_cached: int = -1,
    max_in_row: int = -1,
    max_accumulated: float | None = None,
    mask: Sequence[int] | None = None,
    static: bool = False,
) -> tuple[list[int], list[float]]:
    """Steps computed by cache-dit's DBCache, and the numbers it compared; ``residuals`` over the first F blocks."""
    if mask is not None:
        leading = next((i for i, one in enumerate(mask) if not one), len(mask))
        warmup = min(warmup, leading)
    computed: list[int] = []
    measured: list[float] = []
    kept: torch.Tensor | None = None
    cached, in_row, accumulated = 0, 0, 0.0
    for step, residual in enumerate(residuals):
        masked = mask is not None and step < len(mask)
        limited = (
            (0 <= max_cached <= cached)
            or (0 <= max_in_row <= in_row)
            or (max_accumulated is not None and 0 < max_accumulated <= accumulated)
        )
        if step in range(0, warmup, warmup_interval) or (masked and mask is not None and mask[step] == 1):
            skip = False
        elif mask is not None and static:
            skip = True
        elif limited or threshold <= 0 or kept is None:
            skip = False
        elif threshold >= 1:
            skip = True
        else:
            measured.append(change(residual, kept))
            accumulated += max(measured[-1], 0.0)
            skip = measured[-1] < threshold
        if skip:
            cached, in_row = cached + 1, in_row + 1
        else:
            kept, in_row = residual, 0
            computed.append(step)
    return computed, measured


def taylorseer_steps(steps: int, interval: int = 5, before: int = 3, after: int | None = None) -> list[int]:
    """Steps computed by diffusers' TaylorSeer."""
    return [
        s for s in range(steps)
        if s < before or (s - before - 1) % interval == 0 or (after is not None and s >= after)
    ]  # fmt: skip


def ladder(computed: Sequence[int], target: int, order: int, first: int = 0) -> Weights:
    """Weights of TaylorSeer's ladder of backward differences, newest computed step first.

    ``D_0 = Y``, ``D_{j+1} = (D_j - D_j of the update before) / gap``, forecast ``sum_j D_j k^j / j!``. Derivatives are
    formed only at computed steps ``>= first``: 0 in diffusers, 3 in cache-dit.
    """
    past = [step for step in computed if step < target]
    differences: list[dict[int, float]] = []
    for number, step in enumerate(past):
        new: list[dict[int, float]] = [{step: 1.0}]
        if step >= first and number:
            gap = step - past[number - 1]
            for j in range(min(order, len(differences))):
                read = new[j].keys() | differences[j].keys()
                new.append({s: (new[j].get(s, 0.0) - differences[j].get(s, 0.0)) / gap for s in read})
        differences = new
    k = target - past[-1]
    total: dict[int, float] = {}
    for j, difference in enumerate(differences):
        for step, weight in difference.items():
            total[step] = total.get(step, 0.0) + weight * k**j / math.factorial(j)
    return tuple(sorted(((s, w) for s, w in total.items() if w != 0.0), reverse=True))


def mag_cache(
    ratios: Sequence[float], steps: int, threshold: float = 0.06, max_skip: int = 3, retention: float = 0.2
) -> list[int]:
    """Steps computed by diffusers' MagCache; its sums are fp32."""
    if len(ratios) != steps:
        ratios = [ratios[round(i * (len(ratios) - 1) / (steps - 1))] for i in range(steps)]
    computed = []
    rho, error, skipped = torch.tensor(1.0), torch.tensor(0.0), 0
    for step in range(steps):
        if step >= int(retention * steps + 0.5):
            rho, skipped = rho * ratios[step], skipped + 1
            error = error + (1.0 - rho).abs()
            if computed and error <= threshold and skipped <= max_skip:
                continue
            rho, error, skipped = torch.tensor(1.0), torch.tensor(0.0), 0
        computed.append(step)
    return computed


def attention_broadcast(timesteps: Sequence[float], interval: int, window: tuple[float, float]) -> list[int]:
    """Steps at which diffusers' PAB computes an attention of that interval; the count runs from the first step on."""
    return [s for s, t in enumerate(timesteps) if s % interval == 0 or not window[0] < t < window[1]]


def faster_cache_steps(timesteps: Sequence[float], interval: int, window: tuple[float, float]) -> list[int]:
    """Steps at which diffusers' FasterCache computes attention in a guidance-distilled model."""
    return [s for s, t in enumerate(timesteps) if not window[0] < t < window[1] or (s > 0 and s % interval == 0)]


def faster_cache(computed: Sequence[int], steps: int, weight: float = 0.5) -> dict[int, Weights]:
    """For every step that is not computed, the weights over computed ones: guesses are guessed from guesses."""
    values: list[dict[int, float]] = []
    found: dict[int, Weights] = {}
    for step in range(steps):
        if step in computed:
            values.append({step: 1.0})
            continue
        newest, older = values[-1], values[-2] if len(values) > 1 else values[-1]
        guess = {
            s: (1 + weight) * newest.get(s, 0.0) - weight * older.get(s, 0.0) for s in newest.keys() | older.keys()
        }
        values.append(guess)
        found[step] = tuple(sorted(((s, w) for s, w in guess.items() if w != 0.0), reverse=True))
    return found


def guidance_steps(timesteps: Sequence[float], interval: int = 5, window: tuple[float, float] = (-1, 641)) -> list[int]:
    """Steps at which diffusers' FasterCache runs both halves of a batched call."""
    return [s for s, t in enumerate(timesteps) if s == 0 or not window[0] < t < window[1] or s % interval == 0]


def guidance_bands(timesteps: Sequence[float], both: Sequence[int], boost: float = 1.1) -> list[tuple[float, float]]:
    """What the low and the high part of the last full step's difference count; the factors compound over skips."""
    pairs, low, high = [], 1.0, 1.0
    for step, t in enumerate(timesteps):
        if step in both:
            low = high = 1.0
        else:
            low, high = low * (boost if 99 < t < 901 else 1.0), high * (boost if t < 301 else 1.0)
        pairs.append((low, high))
    return pairs


def split_frequencies(x: torch.Tensor) -> list[torch.Tensor]:
    """FasterCache's low and high part of the shifted spectrum over the last two axes, radius ``min(H, W) // 5``."""
    spectrum = torch.fft.fftshift(torch.fft.fft2(x))
    height, width = x.shape[-2:]
    rows, columns = torch.arange(height)[:, None] - height // 2, torch.arange(width)[None] - width // 2
    low = rows**2 + columns**2 <= (min(height, width) // 5) ** 2
    return [spectrum * low, spectrum * ~low]


def uniform(steps: int, interval: int) -> list[int]:
    """Steps computed by DeepCache's helper."""
    return list(range(0, steps, interval))


def smoothcache_schedule(errors: Sequence[Sequence[float]], threshold: float, steps: int) -> list[int]:
    """SmoothCache's greedy schedule, 1 for a computed step.

    ``errors[g - 1][i]`` is the relative L1 change from step i to step i + g, averaged over the blocks of a kind. At a
    computed step i the largest g with ``errors <= threshold`` is skipped; only the far end is asked.
    """
    schedule, step = [1] * steps, 0
    while step < steps:
        gaps = [g for g, row in enumerate(errors, start=1) if step < len(row) and row[step] <= threshold]
        gap = max(gaps, default=0)
        schedule[step + 1 : step + 1 + gap] = [0] * len(schedule[step + 1 : step + 1 + gap])
        step += gap + 1
    schedule[0] = schedule[-1] = 1
    return schedule


def smoothcache_errors(values: Sequence[Sequence[torch.Tensor]], lookahead: int = 3) -> list[list[float]]:
    """The errors that rule needs, from the values of each block's child at every step of an uncached run."""
    steps = len(values[0])
    return [
        [
            sum(((a[i] - a[i + g]).abs().sum() / a[i + g].abs().sum()).item() for a in values) / len(values)
            for i in range(steps - g)
        ]
        for g in range(1, lookahead + 1)
    ]
