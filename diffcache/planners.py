"""Planners: which steps are computed, from what calibration measured.

Enters: tables of errors or changes over the steps, usually made from a site's Gram matrix by ``planning_tables.py``.
Leaves: the computed steps, in order, step 0 among them. Shortest paths are exact: the tests compare them with trying
everything.

A table of edges ``costs[i, j]``, i < j, is the cost of computing steps i and j and none between; ``j = steps`` is the
end. It has the shape ``[steps, steps + 1]``; an infinite cost forbids the edge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


# -- greedy walks with a threshold ---------------------------------------------------------------------------------


def smooth_cache(errors: Array, *, threshold: float, far_end: bool = False) -> list[int]:
    """SmoothCache (2024): from a computed step, go as far as every error on the way is within the threshold.

    ``errors[s, g]`` is the error at step s of the value made g steps before (its L1 change; column 0 is not read), with
    as many columns as the longest gap may have steps, plus one. Published thresholds 0.08 to 0.35, gaps up to 3.

    With ``far_end`` as its published code does it: the longest gap whose *last* step is within the threshold, whatever
    the steps between, and the last step of all is computed.
    """
    steps, longest = errors.shape[0], errors.shape[1] - 1
    if far_end:
        return _to_far_ends(errors, threshold)
    computed, newest = [0], 0
    for step in range(1, steps):
        gap = step - newest
        if gap > longest or not errors[step, gap] <= threshold:
            computed.append(step)
            newest = step
    return computed


def _to_far_ends(errors: Array, threshold: float) -> list[int]:
    steps, longest = errors.shape[0], errors.shape[1] - 1
    computed, step = [], 0
    while step < steps:
        computed.append(step)
        reachable = [g for g in range(1, min(longest, steps - 1 - step) + 1) if errors[step + g, g] <= threshold]
        step += max(reachable, default=0) + 1
    return sorted({*computed, steps - 1})


def block_caching(changes: Sequence[float], *, threshold: float) -> list[int]:
    """Block Caching (2023): compute when the changes since the last computed step add up to more than the threshold.

    ``changes[s]`` is the relative L1 change from step s - 1 to s; ``changes[0]`` is not read. ScalingCache's and
    EasyCache's accumulators are of the same form, on values known at run time.
    """
    computed, total = [0], 0.0
    for step in range(1, len(changes)):
        total += float(changes[step])
        if not total <= threshold:
            computed.append(step)
            total = 0.0
    return computed


def mag_cache(
    ratios: Sequence[float], *, threshold: float = 0.12, max_skips: int = 4, retention: float = 0.2
) -> list[int]:
    """MagCache (2025): skip while the norm ratios since the last computed step have multiplied to nearly one.

    ``ratios[s]`` is ``||r_s|| / ||r_{s-1}||``. After the first ``retention`` of the steps, each skipped step multiplies
    rho and adds ``|1 - rho|`` to an error; beyond the threshold or ``max_skips`` it is computed, and rho starts anew at
    one. Published (threshold, skips, retention): 0.24, 5, 0.1; 0.06, 2, 0.2; 0.12 to 0.24, 4 to 6, 0.2.
    """
    if threshold < 0 or max_skips < 0 or not 0.0 <= retention <= 1.0:
        raise ValueError(
            f"mag_cache needs threshold >= 0, max_skips >= 0 and retention in [0, 1], got {threshold}, {max_skips}, "
            f"{retention}"
        )
    steps = len(ratios)
    kept = max(math.floor(retention * steps), 1)
    computed, product, error, skipped = list(range(min(kept, steps))), 1.0, 0.0, 0
    for step in range(kept, steps):
        product *= float(ratios[step])
        skipped += 1
        error += abs(1.0 - product)
        # the published gate compares with <=, so that ratios of exactly one are skipped even at a threshold of zero
        if not error <= threshold or skipped > max_skips:
            computed.append(step)
            product, error, skipped = 1.0, 0.0, 0
    return computed


def below(changes: Sequence[float], *, limit: float, max_skips: int | None = None) -> list[int]:
    """ERTACache (2025): skip every step whose calibrated change is within the limit, up to ``max_skips`` in a row."""
    computed, skipped = [0], 0
    for step in range(1, len(changes)):
        if float(changes[step]) <= limit and (max_skips is None or skipped < max_skips):
            skipped += 1
        else:
            computed.append(step)
            skipped = 0
    return computed


def below_quantile(errors: Array, *, share: float) -> list[int]:
    """InvarDiff (2025), reading of the abstract: skip the share of the steps that change least, corrected for runs.

    The limit is the quantile ``share`` of the changes ``errors[1:, 1]``. A step behind skipped ones is measured against
    the value it would really be given, ``errors[s, g]``, and computed when that exceeds the limit.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share must lie in [0, 1], got {share}")
    if len(errors) < 2 or share == 0.0:
        return list(range(len(errors)))
    return smooth_cache(errors, threshold=float(np.quantile(errors[1:, 1], share)))


def omni_cache(curvature: Sequence[float], *, computed: int, last: bool = True) -> list[int]:
    """OmniCache (2025), reading of the abstract: compute where the sampling path bends most, else reuse.

    ``curvature[s]`` is the bend at step s (``planning_tables.path_curvature``); step 0 and with ``last`` the last one
    are computed in any case. Equal bends: the earlier step. Its filter of cache noise is not published in what we read.
    """
    steps = len(curvature)
    forced = {0, steps - 1} if last else {0}
    _check_count(computed, len(forced), steps)
    order = sorted(set(range(steps)) - forced, key=lambda step: (-float(curvature[step]), step))
    return sorted(forced | set(order[: computed - len(forced)]))


# -- shortest paths ------------------------------------------------------------------------------------------------


def shortest_path(
    costs: Array, *, computed: int, first: int = 1, last: int = 0, longest: int | None = None
) -> list[int]:
    """Exactly ``computed`` steps with the least sum of edges; the first and last few steps forced, gaps limited."""
    edges = allowed_edges(costs, first=first, last=last, longest=longest)
    steps = len(edges)
    _check_count(computed, 1, steps)
    best = np.full((computed + 1, steps + 1), np.inf)
    came = np.zeros((computed + 1, steps + 1), dtype=np.intp)
    best[0, 0] = 0.0
    for count in range(1, computed + 1):
        total = best[count - 1, :steps, None] + edges
        best[count], came[count] = total.min(axis=0), total.argmin(axis=0)
    if not np.isfinite(best[computed, steps]):
        raise ValueError(_no_path(computed, steps))
    found, place = [], steps
    for count in range(computed, 0, -1):
        place = int(came[count, place])
        found.append(place)
    return found[::-1]


def lemica(costs: Array, *, computed: int, first: int = 1, last: int = 0, longest: int | None = None) -> list[int]:
    """LeMiCa (2025): the least worst edge, then the least second worst, and so on (lexicographic minimax path).

    Its edges cost the L1 error of the final result when only that gap is cached. Adding one edge to two paths keeps
    their order, so the best path to every step is enough.
    """
    edges = allowed_edges(costs, first=first, last=last, longest=longest)
    steps = len(edges)
    _check_count(computed, 1, steps)
    best: dict[int, tuple[tuple[float, ...], list[int]]] = {0: ((), [])}
    for _ in range(computed):
        after: dict[int, tuple[tuple[float, ...], list[int]]] = {}
        for place, (worst, path) in best.items():
            if place == steps:
                continue
            for end in np.flatnonzero(np.isfinite(edges[place])).tolist():
                ranked = tuple(sorted((*worst, float(edges[place, end])), reverse=True))
                if end not in after or ranked < after[end][0]:
                    after[end] = (ranked, [*path, place])
        best = after
    if steps not in best:
        raise ValueError(_no_path(computed, steps))
    return best[steps][1]


def cem(
    distances: Array,
    *,
    computed: int,
    interval: int | None = None,
    spread: int = 1,
    longest: int = 10,
    first: int = 1,
    last: int = 0,
) -> list[int]:
    """CEM (2026): the least cumulative error, with gaps near those of the method it is added to.

    ``distances[s, n]`` is the mean cosine distance of the output at s to that n steps before. A gap that ends at s with
    n skipped steps costs ``n^2 sum_{t <= s} distances[t, n]``, and lies within ``spread`` of ``interval`` and up to
    ``longest``, 10. Without an interval it is the rounded even one. Gaps between forced steps are always 1.
    """
    steps, reach = distances.shape
    _check_count(computed, first + last, steps)
    even = interval or max(round((steps - first + 1 - last) / (computed - first + 1 - last)), 1)
    cumulative = np.cumsum(distances, axis=0) * np.arange(reach) ** 2
    costs = np.full((steps, steps + 1), np.inf)
    for i in range(steps):
        for gap in range(max(even - spread, 1), min(even + spread, longest, reach, steps - i) + 1):
            costs[i, i + gap] = cumulative[min(i + gap, steps - 1), gap - 1]
    for i in (*range(first - 1), *range(steps - max(last, 1), steps)):
        if i + 1 <= steps:
            costs[i, i + 1] = min(costs[i, i + 1], 0.0)
    return shortest_path(costs, computed=computed, first=first, last=last)


def dp_cache(costs: Array, *, computed: int, first: int = 3, last: int = 0) -> list[int]:
    """DPCache (2026): the cost of a gap depends on the computed step before it too, as its forecast does.

    ``costs[i + 1, j, k]``: steps between j and k forecast from j and i; index 0 stands for no step before, k = steps
    for the end, ``[steps, steps, steps + 1]`` (``planning_tables.forecast_costs``). Published: 3 first steps forced.
    The paper keeps one predecessor for each step; here the state is the pair, so that the result is the optimum.
    """
    steps = costs.shape[1]
    if costs.shape != (steps, steps, steps + 1):
        raise ValueError(f"dp_cache needs costs of shape [T, T, T + 1], got {list(costs.shape)}")
    _check_count(computed, 1, steps)
    forced = allowed_edges(np.zeros((steps, steps + 1)), first=first, last=last)
    state = np.full((steps, steps), np.inf)  # [before + 1, newest]
    state[0, 0] = 0.0
    came = []
    for _ in range(computed - 1):
        total = state[:, :, None] + costs[:, :, :steps] + forced[None, :, :steps]  # [before + 1, newest, next]
        came.append(total.argmin(axis=0))
        state = np.full((steps, steps), np.inf)
        state[1:] = total.min(axis=0)[:-1]
    finish = state + costs[:, :, steps] + forced[None, :, steps]
    if not np.isfinite(finish).any():
        raise ValueError(_no_path(computed, steps))
    before, newest = (int(place) for place in np.unravel_index(int(finish.argmin()), finish.shape))
    found = [newest]
    for back in reversed(came):
        before, newest = int(back[before - 1, newest]), before - 1
        found.append(newest)
    return found[::-1]


def mean_cache(
    costs: Array, *, computed: int, power: float = 4.0, first: int = 5, last: int = 1
) -> tuple[list[int], dict[int, int]]:
    """MeanCache (2026): the least sum of ``cost^power``, each edge with its best look-back; published power 4 to 5.

    ``costs[K - 1, i, j]`` for look-backs K = 1, 2, ... (``planning_tables.mean_velocity_costs``). Returns the computed
    steps, and K for each that has skipped steps after it, as ``predictors.mean_velocity_weights`` takes them.
    """
    path = shortest_path(costs.min(axis=0) ** power, computed=computed, first=first, last=last)
    ends = [*path[1:], costs.shape[2] - 1]
    return path, {i: int(costs[:, i, j].argmin()) + 1 for i, j in zip(path, ends, strict=True) if j > i + 1}


def allowed_edges(costs: Array, *, first: int = 1, last: int = 0, longest: int | None = None) -> Array:
    """A copy of the edges without those that go backwards, are too long, or skip one of the forced steps."""
    steps = costs.shape[0]
    if costs.shape != (steps, steps + 1) or not steps:
        raise ValueError(f"expected edges of shape [steps, steps + 1], got {list(costs.shape)}")
    if not 1 <= first or last < 0 or (longest is not None and longest < 1):
        raise ValueError(f"expected first >= 1, last >= 0 and longest >= 1, got {first}, {last}, {longest}")
    start, end = np.arange(steps)[:, None], np.arange(steps + 1)[None, :]
    fine = (end > start) & (end - start <= (longest or steps))
    fine &= (end <= start + 1) | (start >= first - 1)  # a jump from s skips s + 1
    fine &= (end <= start + 1) | (end <= max(steps - last, 0)) if last else True
    return np.where(fine, costs, np.inf)


# -- which sites at which steps ------------------------------------------------------------------------------------


def routers(errors: Array, costs: Sequence[float], *, share: float, every_second: bool = True) -> NDArray[np.bool_]:
    """L2C (2024) and HarmoniCa (2024) without training: which site is reused at which step, ``[sites, steps]``.

    ``errors[site, s]`` is the error of reusing the value of step s - 1 at s, ``costs[site]`` what computing it costs.
    The cheapest errors for their cost are reused until ``share`` of all cost is saved: greedy, which for a knapsack is
    off by less than one site at one step. With ``every_second`` (both papers) only odd steps are candidates, so that
    errors do not build on each other. Raises ValueError when the candidates cannot save as much.
    """
    sites, steps = errors.shape
    if len(costs) != sites or not all(cost > 0 for cost in costs) or not 0.0 <= share < 1.0:
        raise ValueError(
            f"routers needs a positive cost for each of {sites} sites and a share in [0, 1), got {list(costs)}, {share}"
        )
    weights = np.asarray(costs, dtype=np.float64)
    open_steps = np.arange(1, steps, 2 if every_second else 1)
    goal = share * weights.sum() * steps
    if goal > weights.sum() * len(open_steps) * (1 + 1e-12):
        raise ValueError(
            f"reusing all sites at all {len(open_steps)} candidate steps of {steps} saves "
            f"{len(open_steps) / steps:.2f} of the cost, not {share}; ask for less or allow every step"
        )
    candidates = [(errors[site, step] / weights[site], step, site) for site in range(sites) for step in open_steps]
    reused = np.zeros((sites, steps), dtype=bool)
    saved = 0.0
    for _, step, site in sorted(candidates):
        if saved >= goal * (1 - 1e-12):
            break
        reused[site, step] = True
        saved += float(weights[site])
    return reused


def _check_count(computed: int, fewest: int, steps: int) -> None:
    if not fewest <= computed <= steps:
        raise ValueError(f"expected {fewest} to {steps} computed steps, got {computed}")


def _no_path(computed: int, steps: int) -> str:
    return (
        f"no schedule of {computed} steps fits {steps}: forced steps, the longest gap or infinite costs rule all of "
        "them out; compute more steps or loosen these"
    )
