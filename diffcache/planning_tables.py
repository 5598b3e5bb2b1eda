"""What planners read, made from a site's Gram matrix: errors of reuse, costs of gaps, norm ratios, curvature.

``G`` is float64 ``[prompts, steps, steps]`` (see ``gram.py``); papers measure in L1, a Gram matrix knows L2, and the
docstrings say where that is a substitute. Everything is a mean over prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from diffcache import gram, predictors
from diffcache.predictors.mean_velocity import velocity_bend

Array = NDArray[np.float64]


def reuse_errors(G: Array, *, longest: int) -> Array:
    """``[steps, longest + 1]``: ``||v_s - v_{s-g}|| / ||v_s||``, infinite where there is no step s - g.

    For ``planners.smooth_cache`` (L2 for its L1) and ``planners.below_quantile``.
    """
    return _by_gap(gram.relative_l2(G), longest, np.inf)


def cosine_distances(G: Array, *, longest: int) -> Array:
    """``[steps, longest + 1]``: one minus the cosine of ``v_s`` and ``v_{s-n}``, zero where there is no step s - n.

    For ``planners.cem``.
    """
    return _by_gap(1.0 - gram.cosine(G), longest, 0.0)


def changes(G: Array) -> Array:
    """``[steps]``: ``||v_s - v_{s-1}|| / ||v_s||``, zero at step 0. For ``planners.block_caching`` and ``below``."""
    return np.array([0.0, *np.diagonal(gram.relative_l2(G), offset=-1)])


def norm_ratios(G: Array) -> Array:
    """``[steps]``: ``||v_s|| / ||v_{s-1}||``, one at step 0 (MagCache takes the mean over tokens of their ratios)."""
    norms = np.sqrt(np.clip(np.einsum("ptt->pt", G), 0.0, None))
    ratios = norms[:, 1:] / np.where(norms[:, :-1] > 0, norms[:, :-1], 1.0)
    return np.array([1.0, *ratios.mean(axis=0)])


def resample_by_nearest(values: Sequence[float], steps: int) -> list[float]:
    """A value for each of ``steps`` steps, from the nearest place of a calibration with another number (MagCache)."""
    if not len(values) or steps < 1:
        raise ValueError(f"got {len(values)} values to spread over {steps} steps; both must be 1 or more")
    last, scale = len(values) - 1, max(steps - 1, 1)
    return [float(values[round(step * last / scale)]) for step in range(steps)]


def path_curvature(G: Array, times: Sequence[float] | None = None) -> Array:
    """``[steps]``: how much the sampling path bends at each step, ``||v_s - v_{s-1}|| / (|t_s - t_{s-1}| ||v_s||)``.

    G is that of the denoiser's output, taken for the path's velocity; without times the steps count. The first step
    gets the bend of the second. For ``planners.omni_cache``.
    """
    gaps = np.ones(G.shape[1] - 1) if times is None else np.abs(np.diff(np.asarray(times, dtype=np.float64)))
    if len(gaps) != G.shape[1] - 1 or not (gaps > 0).all():
        raise ValueError(f"expected {G.shape[1]} different times, one per step, got {list(times or [])}")
    bends = changes(G)[1:] / gaps
    return np.array([bends[0] if len(bends) else 0.0, *bends])


def reuse_costs(G: Array, sensitivity: Sequence[float] | None = None) -> Array:
    """Edges ``[steps, steps + 1]``: the squared errors of reusing step i at i+1 ... j-1, times sensitivity, added up.

    With ``planners.shortest_path`` this is CacheQuant's (2025) grouping of steps: each group shares its first value.
    """
    mean, weights = gram.mean_gram(G), _weights(sensitivity, G)
    level = np.diagonal(mean)
    squares = np.clip(level[None, :] + level[:, None] - 2.0 * mean, 0.0, None) * weights  # [i, step]
    costs = np.full((len(mean), len(mean) + 1), np.inf)
    for i in range(len(mean)):
        costs[i, i + 1 :] = [0.0, *np.cumsum(squares[i, i + 1 :])]
    return costs


def forecast_costs(
    G: Array, predictor: str = "taylor", sensitivity: Sequence[float] | None = None, **options: float
) -> Array:
    """``[steps, steps, steps + 1]`` for ``planners.dp_cache``: errors of forecasting between j and k from j and i.

    The registered fixed predictor sees the two computed steps j and i (one where there is no i, index 0); a gap costs
    the sum of the norms of its errors, times the square root of the sensitivity (L2 where the paper has L1).
    """
    mean, weights = gram.mean_gram(G), np.sqrt(_weights(sensitivity, G))
    steps = len(mean)
    costs = np.full((steps, steps, steps + 1), np.inf)
    for newest in range(steps):
        for before in range(-1, newest):
            if before < 0 and newest > 0:
                continue  # step 0 is always computed, so only it has nothing before it
            history = [newest] if before < 0 else [newest, before]
            total = [0.0]
            for step in range(newest + 1, steps):
                rule = predictors.weights(predictor, history, step, **options)
                c = np.zeros(steps)
                c[step] = 1.0
                c[history[: len(rule)]] -= rule
                total.append(total[-1] + weights[step] * np.sqrt(max(float(c @ mean @ c), 0.0)))
            costs[before + 1, newest, newest + 1 :] = total
    return costs


def mean_velocity_costs(G: Array, times: Sequence[float], lookbacks: Sequence[int] = (1, 2, 3, 4, 5, 6)) -> Array:
    """``[K, steps, steps + 1]`` for ``planners.mean_cache``: how wrong the mean velocity over an edge is forecast.

    ``times`` has one value more than there are steps. From step i on, velocities are forecast as
    ``predictors.mean_velocity_weights`` does, on a history that is computed; an edge costs the norm of the difference
    between the mean of its true and of its forecast velocities over its time (L2 where the paper has L1).
    """
    mean = gram.mean_gram(G)
    steps = len(mean)
    gaps = np.diff(np.asarray(times, dtype=np.float64))
    if len(gaps) != steps:
        raise ValueError(
            f"expected {steps + 1} times for {steps} steps, the last where sampling ends, got {len(times)}"
        )
    costs = np.full((len(lookbacks), steps, steps + 1), np.inf)
    for place, span in enumerate(lookbacks):
        for newest in range(steps):
            rows = np.eye(steps)
            missed = np.zeros(steps)
            costs[place, newest, newest + 1] = 0.0
            for step in range(newest + 1, steps):
                rows[step] = rows[step - 1] - velocity_bend(rows, gaps, step, span) * gaps[step]
                missed = missed + gaps[step] * (np.eye(steps)[step] - rows[step])
                passed = abs(float(gaps[newest : step + 1].sum()))
                costs[place, newest, step + 1] = np.sqrt(max(float(missed @ mean @ missed), 0.0)) / passed
    return costs


def step_errors(Gs: Sequence[Array], sensitivities: Sequence[Sequence[float]] | None = None) -> Array:
    """``[sites, steps]``: the squared error of reusing step s - 1 at s, times sensitivity, for ``planners.routers``."""
    rows = []
    for index, G in enumerate(Gs):
        costs = reuse_costs(G, None if sensitivities is None else sensitivities[index])
        rows.append([0.0, *(costs[step - 1, step + 1] for step in range(1, len(costs)))])
    return np.array(rows)


def _by_gap(table: Array, longest: int, missing: float) -> Array:
    steps = len(table)
    result = np.full((steps, longest + 1), missing)
    for gap in range(min(longest, steps - 1) + 1):
        result[gap:, gap] = np.diagonal(table, offset=-gap)
    return result


def _weights(sensitivity: Sequence[float] | None, G: Array) -> Array:
    weights = np.ones(G.shape[1]) if sensitivity is None else np.asarray(sensitivity, dtype=np.float64)
    if weights.shape != G.shape[1:2]:
        raise ValueError(f"sensitivity has {len(weights)} values for {G.shape[1]} steps; give one per step")
    return weights
