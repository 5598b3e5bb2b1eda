"""TaylorSeer's forecast as two published packages compute it, by their own code where they are installed.

- diffusers: the state behind ``TaylorSeerCacheConfig``'s hook, factors in bfloat16 (its default);
- cache-dit: the state behind its TaylorSeer calibrator;
- *imitation*: the same arithmetic written here, one tensor operation for each term, where neither is installed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Forecast = Callable[[], Tensor]


def diffusers_taylor(history: Sequence[Tensor], steps: Sequence[int], at: int) -> Forecast:
    """Fed with ``history`` (newest first) as computed at ``steps``; forecasts step ``at``. ImportError if missing."""
    from diffusers.hooks.taylorseer_cache import TaylorSeerState

    state = TaylorSeerState(taylor_factors_dtype=history[0].dtype, max_order=len(history) - 1)
    for value, step in zip(reversed(history), reversed(steps), strict=True):
        state.current_step = step
        state.update((value,))
    state.current_step = at
    return lambda: state.predict()[0]


def cache_dit_taylor(history: Sequence[Tensor], steps: Sequence[int], at: int) -> Forecast:
    """As ``diffusers_taylor``, by cache-dit."""
    from cache_dit.caching.cache_contexts.calibrators.taylorseer import TaylorSeerState

    state = TaylorSeerState(n_derivatives=len(history) - 1)
    for value, step in zip(reversed(history), reversed(steps), strict=True):
        state.current_step = step
        state.update(value)
    state.current_step = at
    return state.approximate


def imitated_taylor(history: Sequence[Tensor], steps: Sequence[int], at: int) -> Forecast:
    """``sum_i D_i k^i / i!`` with divided differences for derivatives, one operation after the other."""
    level, derivatives = list(history), [history[0]]
    gap = steps[0] - steps[1]
    while len(level) > 1:
        level = [(new - old) / gap for new, old in itertools.pairwise(level)]
        derivatives.append(level[0])
    elapsed = at - steps[0]

    def forecast() -> Tensor:
        result = torch.zeros_like(derivatives[0])
        for order, derivative in enumerate(derivatives):
            result = result + (1 / math.factorial(order)) * derivative * (elapsed**order)
        return result

    return forecast


def taylor_peers() -> dict[str, Callable[[Sequence[Tensor], Sequence[int], int], Forecast]]:
    """Those that can be run here, by name."""
    found: dict[str, Callable[[Sequence[Tensor], Sequence[int], int], Forecast]] = {}
    probe = [torch.ones(2), torch.ones(2)]
    for name, peer in (("diffusers", diffusers_taylor), ("cache-dit", cache_dit_taylor)):
        try:
            peer(probe, [8, 4], 10)
        except ImportError as error:
            print(f"{name} is not measured: {error}")
        else:
            found[name] = peer
    return found or {"imitation": imitated_taylor}
