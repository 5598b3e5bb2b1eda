"""Planners: paths against trying everything, thresholds by hand, tables against the values they stand for."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffcache import gram, planners, planning_tables
from diffcache.predictors import mean_velocity_weights, weights

STEPS = 8


def values(prompts: int = 2, steps: int = STEPS, size: int = 12, seed: int = 0) -> np.ndarray:
    v = np.random.default_rng(seed).normal(size=(prompts, steps, size)).cumsum(1)
    return v / np.sqrt(np.square(v).sum(-1).mean(-1))[:, None, None]


def gram_of(v: np.ndarray) -> np.ndarray:
    return np.einsum("ptd,psd->pts", v, v)


def edges_of(path: tuple[int, ...], steps: int) -> list[tuple[int, int]]:
    return list(itertools.pairwise((*path, steps)))


def schedules(steps: int, computed: int, first: int = 1, last: int = 0) -> list[tuple[int, ...]]:
    forced = {*range(first), *range(steps - last, steps)}
    chosen = itertools.combinations(range(1, steps), computed - 1)
    return [(0, *rest) for rest in chosen if forced <= {0, *rest}]


# -- paths against trying everything -------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), computed=st.integers(2, 7), first=st.integers(1, 2), last=st.integers(0, 1))
def test_paths_are_the_best_of_all(seed: int, computed: int, first: int, last: int) -> None:
    if computed < first + last:
        return
    costs = np.random.default_rng(seed).random((STEPS, STEPS + 1))
    every = schedules(STEPS, computed, first, last)

    def ranked(path: tuple[int, ...]) -> list[float]:
        return sorted((costs[edge] for edge in edges_of(path, STEPS)), reverse=True)

    found = planners.shortest_path(costs, computed=computed, first=first, last=last)
    assert found == list(min(every, key=lambda path: sum(costs[edge] for edge in edges_of(path, STEPS))))
    assert planners.lemica(costs, computed=computed, first=first, last=last) == list(min(every, key=ranked))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), computed=st.integers(1, 7), first=st.integers(1, 3), last=st.integers(0, 1))
def test_dp_cache_is_the_best_of_all(seed: int, computed: int, first: int, last: int) -> None:
    if computed < first + last:
        return
    costs = np.random.default_rng(seed).random((STEPS, STEPS, STEPS + 1))

    def total(path: tuple[int, ...]) -> float:
        befores = (-1, *path)
        return sum(costs[before + 1, i, j] for before, (i, j) in zip(befores, edges_of(path, STEPS), strict=False))

    found = planners.dp_cache(costs, computed=computed, first=first, last=last)
    assert found == list(min(schedules(STEPS, computed, first, last), key=total))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), computed=st.integers(2, 6), spread=st.integers(0, 2))
def test_cem_is_the_best_of_all_near_the_interval(seed: int, computed: int, spread: int) -> None:
    distances = np.random.default_rng(seed).random((STEPS, STEPS))
    even = round(STEPS / computed)

    def total(path: tuple[int, ...]) -> float:
        result = 0.0
        for i, j in edges_of(path, STEPS):
            if abs(j - i - even) > spread and (i, j) != (STEPS - 1, STEPS):
                return math.inf
            skipped = j - i - 1
            result += skipped**2 * distances[: min(j, STEPS - 1) + 1, skipped].sum()
        return result

    best = min(schedules(STEPS, computed), key=total)
    if math.isinf(total(best)):
        with pytest.raises(ValueError, match="no schedule of"):
            planners.cem(distances, computed=computed, spread=spread)
    else:
        assert planners.cem(distances, computed=computed, spread=spread) == list(best)


def test_mean_cache_chooses_a_look_back_for_every_gap() -> None:
    costs = np.random.default_rng(3).random((3, STEPS, STEPS + 1))
    path, spans = planners.mean_cache(costs, computed=4, power=4.0, first=2, last=1)
    every = schedules(STEPS, 4, 2, 1)
    assert path == list(min(every, key=lambda p: sum(costs[:, i, j].min() ** 4 for i, j in edges_of(p, STEPS))))
    for i, j in edges_of(tuple(path), STEPS):
        assert (i in spans) == (j > i + 1)
        if i in spans:
            assert costs[spans[i] - 1, i, j] == costs[:, i, j].min()


def test_the_longest_gap_and_dead_ends() -> None:
    costs = np.zeros((STEPS, STEPS + 1))
    assert np.diff([*planners.shortest_path(costs, computed=4, longest=2), STEPS]).max() == 2
    for plan in (planners.shortest_path, planners.lemica):
        with pytest.raises(ValueError, match="no schedule of 3 steps fits 8"):
            plan(costs, computed=3, longest=2)
    with pytest.raises(ValueError, match="expected 1 to 8 computed steps, got 9"):
        planners.shortest_path(costs, computed=9)
    with pytest.raises(ValueError, match=r"expected edges of shape \[steps, steps \+ 1\]"):
        planners.shortest_path(np.zeros((3, 3)), computed=1)
    with pytest.raises(ValueError, match="no schedule of 2 steps"):
        planners.dp_cache(np.zeros((STEPS, STEPS, STEPS + 1)), computed=2, first=3)


# -- thresholds ----------------------------------------------------------------------------------------------------


def test_smooth_cache_goes_as_far_as_all_errors_allow() -> None:
    errors = np.full((7, 4), np.nan)
    errors[:, 1], errors[:, 2], errors[:, 3] = 0.1, 0.2, 0.3
    errors[3, 1] = 0.9
    assert planners.smooth_cache(errors, threshold=0.25) == [0, 3, 6]
    assert planners.smooth_cache(errors, threshold=1.0) == [0, 4]  # the table ends at gaps of three
    assert planners.smooth_cache(errors, threshold=0.1) == [0, 2, 3, 5]
    assert planners.smooth_cache(errors, threshold=0.0) == list(range(7))


def test_smooth_cache_as_published_asks_the_far_end_of_a_gap_only() -> None:
    errors = np.full((7, 4), 0.9)
    errors[2:, 2] = 0.1
    errors[5, 3] = np.nan
    assert planners.smooth_cache(errors, threshold=0.5, far_end=True) == [0, 3, 6]
    errors[3, 3] = 0.5
    assert planners.smooth_cache(errors, threshold=0.5, far_end=True) == [0, 4, 6]  # 4 reaches past the end: computed
    assert planners.smooth_cache(errors, threshold=0.0, far_end=True) == list(range(7))
    assert planners.smooth_cache(errors[:1], threshold=1.0, far_end=True) == [0]


def test_block_caching_and_below() -> None:
    changes = [9.0, 0.2, 0.2, 0.2, 0.5, 0.1, 0.1]
    assert planners.block_caching(changes, threshold=0.4) == [0, 3, 4]
    assert planners.block_caching(changes, threshold=0.0) == list(range(7))
    assert planners.below(changes, limit=0.2) == [0, 4]
    assert planners.below(changes, limit=0.2, max_skips=1) == [0, 2, 4, 6]


def test_mag_cache_by_hand() -> None:
    ratios = [1.0] * 4 + [0.9] * 6
    # from step 2 (a fifth of ten): rho 1, 1, .9, .81: errors 0, 0, .1, .29
    assert planners.mag_cache(ratios, threshold=0.2, max_skips=9, retention=0.2) == [0, 1, 5, 7, 9]
    assert planners.mag_cache(ratios, threshold=9.0, max_skips=3, retention=0.2) == [0, 1, 5, 9]
    assert planners.mag_cache(ratios, threshold=0.0, retention=0.0) == [0, 4, 5, 6, 7, 8, 9]
    with pytest.raises(ValueError, match="retention in"):
        planners.mag_cache(ratios, retention=2.0)


def test_below_quantile_corrects_runs() -> None:
    v = np.arange(10.0)[None, :, None] + 100.0
    errors = planning_tables.reuse_errors(gram_of(v), longest=5)
    # every change is the same to one percent, so one skipped step is all that any run may have
    assert planners.below_quantile(errors, share=1.0) == [0, 2, 4, 6, 8]
    assert planners.below_quantile(errors, share=0.0) == list(range(10))


def test_omni_cache_computes_where_the_path_bends() -> None:
    assert planners.omni_cache([0, 1, 5, 1, 1, 7, 1], computed=4) == [0, 2, 5, 6]
    assert planners.omni_cache([0, 1, 5, 1, 1, 7, 1], computed=2, last=False) == [0, 5]
    t = np.linspace(1.0, 0.1, 10)
    kink = np.abs(t - 0.45)[None, :, None] * np.ones((1, 10, 3))  # the velocity's change is even but for its sign
    bends = planning_tables.path_curvature(gram_of(kink + 10.0), t)
    assert bends.argmin() in (5, 6)


def test_routers_reuse_what_costs_least_error() -> None:
    errors = np.array([[0, 1, 1, 3, 1, 9.0], [0, 4, 1, 1, 1, 2]])
    found = planners.routers(errors, [1.0, 4.0], share=0.3)
    # candidates at steps 1, 3, 5: ratios 1, 3, 9 and 1, 1/4, 1/2; a goal of 9: sites (1, step 3), (1, 5), then (0, 1)
    assert {(int(site), int(step)) for site, step in np.argwhere(found)} == {(1, 3), (1, 5), (0, 1)}
    assert not planners.routers(errors, [1.0, 4.0], share=0.0).any()
    assert planners.routers(errors, [1.0, 4.0], share=0.5)[:, 1::2].all()
    with pytest.raises(ValueError, match=r"saves 0.50 of the cost, not 0.6"):
        planners.routers(errors, [1.0, 4.0], share=0.6)


@given(seed=st.integers(0, 99), share=st.floats(0.0, 0.5))
def test_routers_save_what_is_asked_and_not_one_cell_more(seed: int, share: float) -> None:
    random = np.random.default_rng(seed)
    errors, costs = random.random((3, 10)), random.random(3) + 0.1
    found = planners.routers(errors, costs, share=share)
    saved, goal = (found * costs[:, None]).sum(), share * costs.sum() * 10
    assert goal - 1e-9 <= saved <= goal + costs.max()


# -- tables --------------------------------------------------------------------------------------------------------


def test_tables_are_those_of_the_values() -> None:
    v = values()
    G, norms = gram_of(v), np.linalg.norm(v, axis=-1)
    errors = planning_tables.reuse_errors(G, longest=3)
    assert errors[5, 2] == pytest.approx((np.linalg.norm(v[:, 5] - v[:, 3], axis=-1) / norms[:, 5]).mean())
    assert np.isinf(errors[1, 2])
    distances = planning_tables.cosine_distances(G, longest=3)
    assert distances[5, 2] == pytest.approx(1 - ((v[:, 5] * v[:, 3]).sum(-1) / norms[:, 5] / norms[:, 3]).mean())
    assert distances[1, 2] == 0.0
    assert planning_tables.changes(G)[4] == pytest.approx(errors[4, 1])
    assert planning_tables.norm_ratios(G)[4] == pytest.approx((norms[:, 4] / norms[:, 3]).mean())
    assert planning_tables.norm_ratios(G)[0] == 1.0


def test_reuse_costs_make_groups() -> None:
    v, sensitivity = values(), np.arange(1.0, STEPS + 1)
    costs = planning_tables.reuse_costs(gram_of(v), sensitivity)
    expected = sum(sensitivity[s] * np.square(v[:, s] - v[:, 2]).sum(-1).mean() for s in (3, 4, 5))
    assert costs[2, 6] == pytest.approx(expected)
    assert costs[2, 3] == 0.0
    # two values, each held for a while: the grouping finds the change
    held = np.repeat(values(steps=2), [3, 5], axis=1)
    found = planners.shortest_path(planning_tables.reuse_costs(gram_of(held)), computed=2)
    assert found == [0, 3]
    assert planning_tables.step_errors([gram_of(held)])[0].argmax() == 3


def test_forecast_costs_are_the_errors_of_the_predictor() -> None:
    v = values()
    G = gram_of(v)
    costs = planning_tables.forecast_costs(G, "newton", order=1)
    expected = sum(math.sqrt(gram.forecast_error(G, [4, 1], s, weights("newton", [4, 1], s, order=1))) for s in (5, 6))
    assert costs[1 + 1, 4, 7] == pytest.approx(expected)
    assert costs[0, 0, 3] == pytest.approx(sum(math.sqrt(gram.forecast_error(G, [0], s, [1.0])) for s in (1, 2)))
    assert np.isinf(costs[0, 3, 5])
    line = np.arange(STEPS)[None, :, None] * values(steps=1)
    assert planners.dp_cache(planning_tables.forecast_costs(gram_of(line), order=1), computed=2, first=1) == [0, 1]


def test_mean_velocity_costs_are_those_of_the_forecasts() -> None:
    v, times = values(), np.linspace(1.0, 0.0, STEPS + 1) ** 1.3
    costs = planning_tables.mean_velocity_costs(gram_of(v), times, lookbacks=(1, 2, 3))
    for span, start, end in ((1, 3, 7), (3, 3, 7), (2, 5, STEPS)):
        computed = [*range(start + 1), *range(end, STEPS)]
        forecasts = mean_velocity_weights(computed, times, {start: span})
        missed = np.zeros_like(v[:, 0])
        for step in range(start + 1, end):
            read, rule = forecasts[step]
            forecast = np.einsum("k,pkd->pd", rule, v[:, list(read)])
            missed += (times[step + 1] - times[step]) * (v[:, step] - forecast)
        expected = math.sqrt(np.square(missed).sum(-1).mean()) / abs(times[end] - times[start])
        assert costs[span - 1, start, end] == pytest.approx(expected)
    assert costs[0, 2, 3] == 0.0


def test_resampling_of_ratios_and_refusals() -> None:
    assert planning_tables.resample_by_nearest([1.0, 2.0, 3.0], 5) == [1.0, 1.0, 2.0, 3.0, 3.0]  # halves go to even
    assert planning_tables.resample_by_nearest([1.0, 2.0, 3.0], 1) == [1.0]
    G = gram_of(values())
    with pytest.raises(ValueError, match="sensitivity has 3 values for 8 steps"):
        planning_tables.reuse_costs(G, [1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="expected 9 times for 8 steps"):
        planning_tables.mean_velocity_costs(G, [1.0, 0.0])
    with pytest.raises(ValueError, match="expected 8 different times"):
        planning_tables.path_curvature(G, [1.0, 0.0])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), computed=st.integers(3, STEPS))
def test_every_planner_computes_step_0_and_steps_that_exist(seed: int, computed: int) -> None:
    G = gram_of(values(seed=seed))
    changes = planning_tables.changes(G)
    plans = [
        planners.smooth_cache(planning_tables.reuse_errors(G, longest=3), threshold=0.3),
        planners.block_caching(changes, threshold=0.5),
        planners.mag_cache(planning_tables.norm_ratios(G)),
        planners.below(changes, limit=0.3),
        planners.below_quantile(planning_tables.reuse_errors(G, longest=3), share=0.5),
        planners.omni_cache(planning_tables.path_curvature(G), computed=computed),
        planners.shortest_path(planning_tables.reuse_costs(G), computed=computed),
        planners.lemica(planning_tables.reuse_costs(G), computed=computed),
        planners.cem(planning_tables.cosine_distances(G, longest=STEPS), computed=computed),
        planners.dp_cache(planning_tables.forecast_costs(G), computed=computed),
        planners.mean_cache(
            planning_tables.mean_velocity_costs(G, np.linspace(1, 0, STEPS + 1)), computed=computed, first=1
        )[0],
    ]
    for plan in plans:
        assert plan == sorted(set(plan))
        assert plan[0] == 0
        assert plan[-1] < STEPS
    assert all(len(plan) == computed for plan in plans[5:])
