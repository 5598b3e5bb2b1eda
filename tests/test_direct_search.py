"""Direct search: optima of small problems, the same every time, and only schedules that exist."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffcache import direct_search
from diffcache.direct_search import Trials

STEPS = 10


def coverage(computed: tuple[int, ...]) -> float:
    """Squared distances to the newest computed step, heavier early on: a loss with several local optima."""
    newest = [max(made for made in computed if made <= step) for step in range(STEPS)]
    return sum((step - made) ** 2 * (1 + 3 * math.cos(step) ** 2) / (1 + step) for step, made in enumerate(newest))


def best_of_all(computed: int, fixed: set[int]) -> float:
    rests = itertools.combinations(sorted(set(range(STEPS)) - fixed), computed - len(fixed))
    return min(coverage(tuple(sorted({*fixed, *rest}))) for rest in rests)


@pytest.mark.parametrize("computed", [2, 4, 6, 9, 10])
def test_budcache_finds_the_optimum_of_small_problems(computed: int) -> None:
    fixed = set(range(max(computed // 4, 1)))
    # its temperatures are for errors of latents, about a hundredth of this loss
    found = direct_search.budcache(lambda made: 0.01 * coverage(made), STEPS, computed=computed)
    assert coverage(tuple(found)) == pytest.approx(best_of_all(computed, fixed))
    measured = direct_search.budcache(coverage, STEPS, computed=computed, hot=None)
    assert coverage(tuple(measured)) == pytest.approx(best_of_all(computed, fixed))
    for result in (found, measured):
        assert len(result) == computed
        assert fixed <= set(result)
    assert measured == direct_search.budcache(coverage, STEPS, computed=computed, hot=None)


@pytest.mark.parametrize("computed", [4, 6, 10])
def test_golden_path_forces_its_four_steps(computed: int) -> None:
    found = direct_search.golden_path(coverage, STEPS, computed=computed)
    assert {0, 1, 2, STEPS - 1} <= set(found)
    assert len(found) == computed
    assert coverage(tuple(found)) == pytest.approx(best_of_all(computed, {0, 1, 2, STEPS - 1}))


def test_hill_climbing_ends_where_no_swap_is_better() -> None:
    found = direct_search.hill_climb(coverage, [0, 1, 2, 3], STEPS)
    others = direct_search.neighbours(found, STEPS)
    assert all(coverage(other) >= coverage(tuple(found)) for other in others)


def test_no_schedule_is_tried_twice_and_trials_are_limited() -> None:
    asked: list[tuple[int, ...]] = []

    def loss(computed: tuple[int, ...]) -> float:
        asked.append(computed)
        return coverage(computed)

    direct_search.budcache(loss, STEPS, computed=4)
    assert len(asked) == len(set(asked))
    asked.clear()
    direct_search.hill_climb(loss, [0, 1, 2, 3], STEPS, max_trials=7)
    assert len(asked) == 7
    with pytest.raises(ValueError, match="not a number"):
        Trials(lambda computed: math.nan)((0,))


def test_neighbours_are_all_swaps_with_shifts_first() -> None:
    found = list(direct_search.neighbours([0, 5], STEPS, radius=2))
    assert len(found) == len(set(found)) == 8
    assert set(found[:4]) == {(0, 3), (0, 4), (0, 6), (0, 7)}


def test_evolve_gives_a_front() -> None:
    front = direct_search.evolve(coverage, STEPS, generations=30)
    losses = [front[size][1] for size in sorted(front)]
    assert losses == sorted(losses, reverse=True)
    assert all(steps[0] == 0 and len(steps) == size for size, (steps, _) in front.items())
    assert front[STEPS][1] == 0.0
    assert front[4][1] == pytest.approx(best_of_all(4, {0}), rel=0.1)
    assert front == direct_search.evolve(coverage, STEPS, generations=30)


@given(data=st.data(), steps=st.integers(5, 50))
def test_interpolation_lies_between_its_ends(data, steps: int) -> None:
    large = sorted({0, steps - 1, *data.draw(st.sets(st.integers(0, steps - 1)))})
    small = sorted({0, steps - 1, *data.draw(st.sets(st.sampled_from(large)))})
    assert direct_search.interpolate(large, small, len(large), steps) == large
    if len(small) < len(large):
        assert direct_search.interpolate(large, small, len(small), steps) == small
    computed = data.draw(st.integers(len(small), len(large)))
    found = direct_search.interpolate(large, small, computed, steps)
    assert len(found) == len(set(found)) == computed
    assert found == sorted(found)
    assert found[0] == 0
    assert found[-1] == steps - 1


def test_interpolation_in_the_middle() -> None:
    # quantile functions (0, 10, 20) and (0, 2, 4, 6, 20) of 3 and 5 steps, half way at u = 0, 1/3, 2/3, 1
    assert direct_search.interpolate([0, 2, 4, 6, 20], [0, 10, 20], 4, 21) == [0, 5, 9, 20]


@settings(max_examples=30, deadline=None)
@given(steps=st.integers(4, 50), computed=st.integers(1, 20), seed=st.integers(0, 9))
def test_patterns_have_gaps_that_never_grow(steps: int, computed: int, seed: int) -> None:
    if not computed <= steps <= 10 * computed:
        with pytest.raises(ValueError, match="no schedule of"):
            direct_search.sample_patterns(steps, computed=computed)
        return
    patterns = direct_search.sample_patterns(steps, computed=computed, seed=seed)
    assert 1 <= len(patterns) <= 5
    for pattern in patterns:
        gaps = np.diff([*pattern, steps])
        assert len(pattern) == computed
        assert pattern[0] == 0
        assert (np.diff(gaps) <= 0).all()
        assert gaps.min() >= 1
        assert gaps.max() <= 10
    assert patterns == direct_search.sample_patterns(steps, computed=computed, seed=seed)


def test_all_patterns_are_drawn_when_there_are_few() -> None:
    found = direct_search.sample_patterns(6, computed=3, shortest=1, longest=4, count=50)
    assert sorted(found) == [[0, 2, 4], [0, 3, 5], [0, 4, 5]]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="1 to 10 computed steps"):
        direct_search.budcache(coverage, STEPS, computed=0)
    with pytest.raises(ValueError, match="4 to 10 steps, got 3"):
        direct_search.golden_path(coverage, STEPS, computed=3)
    with pytest.raises(ValueError, match="contain the fixed ones"):
        direct_search.hill_climb(coverage, [1, 2], STEPS)
    with pytest.raises(ValueError, match=r"3 \(the anchor's\) to 5 \(the reference's\)"):
        direct_search.interpolate([0, 1, 2, 3, 9], [0, 5, 9], 6, STEPS)
    with pytest.raises(ValueError, match="population >= 4"):
        direct_search.evolve(coverage, STEPS, population=2)
