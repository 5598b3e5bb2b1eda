"""MeanCache (2026): forecasts of the mean velocity over a step, each built on the computed and forecast ones before it.

Enters: the computed steps and the sampler's clock. Leaves: for every other step, weights on computed steps. The method
works with latents; under an Euler sampler the latents are sums of velocities times step sizes, so that every forecast
is linear in the velocities computed before it, and nothing but weights is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def mean_velocity_weights(
    computed: Sequence[int], times: Sequence[float], lookback: int | Mapping[int, int] = 1
) -> dict[int, tuple[tuple[int, ...], tuple[float, ...]]]:
    """Step -> (computed steps, newest first, and their weights) for every step that is not computed.

    ``times`` holds the sampler's time (sigma) at every step and, last, where sampling ends: one more than there are
    steps. ``lookback`` is K of the paper, 1 to 6, or one K for each computed step after which steps are forecast (the
    stored edges of its schedules). With the mean velocity over the last K steps,
    ``u = sum_{j=i-K}^{i-1} v_j dt_j / (t_i - t_{i-K})``, and its bend ``B = (v_{i-K} - u) / (t_i - t_{i-K})``:
    ``v_i = v_{i-1} - B (t_{i+1} - t_i)``. K = 1 is reuse.
    The weights sum to one. Raises ValueError when step 0 is not computed or the clock does not fit.
    """
    steps = len(times) - 1
    made = sorted(set(computed))
    if not made or made[0] != 0 or made[-1] >= steps:
        raise ValueError(
            f"computed steps {made} must begin with 0 and end before {steps} (times has {steps + 1} values)"
        )
    gaps = np.diff(np.asarray(times, dtype=np.float64))
    if not ((gaps > 0).all() or (gaps < 0).all()):
        raise ValueError(f"times must be strictly monotonic, got {list(times)}; give the sampler's time at every step")
    rows = np.zeros((steps, steps))
    forecasts = {}
    newest = 0
    for step in range(steps):
        if step in made:
            rows[step, step] = 1.0
            newest = step
            continue
        span = lookback if isinstance(lookback, int) else lookback.get(newest, 1)
        rows[step] = rows[step - 1] - velocity_bend(rows, gaps, step, span) * gaps[step]
        read = [int(made) for made in np.flatnonzero(rows[step])[::-1]]
        forecasts[step] = (tuple(read), tuple(float(rows[step, made]) for made in read))
    return forecasts


def velocity_bend(weights: Array, gaps: Array, step: int, lookback: int) -> Array:
    """``B`` of ``mean_velocity_weights`` at ``step`` as weights on steps; row j of ``weights`` makes velocity j."""
    if lookback < 1:
        raise ValueError(f"lookback must be 1 or more steps, got {lookback}")
    first = step - min(lookback, step)
    if first == step - 1:
        # the mean over one step is its velocity: exactly no bend, whatever the rounding
        return np.zeros(weights.shape[1])
    passed = gaps[first:step].sum()
    mean = gaps[first:step] @ weights[first:step] / passed
    return np.asarray((weights[first] - mean) / passed)
