"""Recipes: which steps they compute, which site they take, what they refuse."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffcache import recipes
from diffcache.recipes import Plan
from diffcache.schedule import Forecast, SiteChoice

SITES = [SiteChoice("blocks", True, 0.9, "stack"), SiteChoice("proj_out", False, 0.99, "output")]


def test_uniform() -> None:
    schedule = recipes.uniform(interval=3, predictor="taylor", order=1).schedule(Plan(10, SITES))
    assert schedule.computed_steps() == (0, 3, 6, 9)
    assert schedule.rows[0].site == "blocks"
    assert schedule.rows[0].residual
    cell = schedule.rows[0].cells[5]
    assert isinstance(cell, Forecast)
    assert cell.steps == (3, 0)
    assert cell.weights == pytest.approx((5 / 3, -2 / 3))
    assert schedule.flops_fraction == pytest.approx((4 + 6 * 0.1) / 10)
    assert schedule.origin == "uniform(interval=3, predictor='taylor', order=1)"
    assert recipes.uniform(interval=3, start=3).schedule(Plan(10, SITES)).computed_steps() == (0, 1, 2, 5, 8)


def test_evenly_and_steps() -> None:
    assert recipes.evenly(computed=4).schedule(Plan(10, SITES)).computed_steps() == (0, 2, 5, 7)
    schedule = recipes.steps(computed=[0, 1, 4], site="proj_out").schedule(Plan(6, SITES))
    assert schedule.computed_steps() == (0, 1, 4)
    assert schedule.rows[0].site == "proj_out"
    assert not schedule.rows[0].residual


def test_options_reach_the_predictor() -> None:
    plain = recipes.uniform(predictor="hermite", order=1).schedule(Plan(6, SITES))
    damped = recipes.uniform(predictor="hermite", order=1, options={"sigma": 0.3}, site="output").schedule(
        Plan(6, SITES)
    )
    assert plain.rows[0].cells[3] != damped.rows[0].cells[3]


@given(steps=st.integers(1, 40), interval=st.integers(1, 9), start=st.integers(1, 5))
def test_uniform_is_always_valid(steps: int, interval: int, start: int) -> None:
    schedule = recipes.uniform(interval=interval, start=start, predictor="newton").schedule(Plan(steps, SITES))
    assert schedule.computed_steps()[0] == 0
    assert set(range(min(start, steps))) <= set(schedule.computed_steps())


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"no site is named 'deepest' .*: blocks \(stack\), proj_out \(output\)"):
        recipes.uniform(site="deepest").schedule(Plan(6, SITES))
    with pytest.raises(ValueError, match=r"computes steps \[1, 2\] of 6; expected step 0"):
        recipes.steps(computed=[1, 2]).schedule(Plan(6, SITES))
    with pytest.raises(ValueError, match="needs 1 to 6 computed steps"):
        recipes.evenly(computed=7).schedule(Plan(6, SITES))
    with pytest.raises(ValueError, match="interval >= 1"):
        recipes.uniform(interval=0)
    with pytest.raises(ValueError, match="unknown predictor"):
        recipes.uniform(predictor="magic").schedule(Plan(6, SITES))
