"""Gates and budgets: limits, refusals."""

import math

import pytest

from diffcache.budget import Quality, Speedup
from diffcache.gates import StepInfo, make_gate


def info(since: int = 1, accumulated: float = 0.0) -> StepInfo:
    return StepInfo(step=5, since_compute=since, change=accumulated, accumulated=accumulated)


def test_always() -> None:
    assert make_gate("always")(info(accumulated=math.inf))


def test_accumulated_change() -> None:
    gate = make_gate("accumulated_change", budget=0.2, max_since=3)
    assert gate(info(3, 0.19))
    assert not gate(info(3, 0.2))
    assert not gate(info(4, 0.0))
    assert not gate(info(1, math.nan))
    assert not make_gate("accumulated_change", budget=0.0)(info(1, 0.0))


def test_max_gap() -> None:
    gate = make_gate("max_gap", limit=2)
    assert [gate(info(since)) for since in (1, 2, 3)] == [True, True, False]
    assert not make_gate("max_gap", limit=0)(info(1))


def test_gate_refusals() -> None:
    with pytest.raises(
        ValueError, match=r"unknown gate 'sometimes'; known: \['accumulated_change', 'always', 'max_gap'"
    ):
        make_gate("sometimes")
    with pytest.raises(ValueError, match="missing a required"):
        make_gate("max_gap")
    with pytest.raises(ValueError, match="budget >= 0"):
        make_gate("accumulated_change", budget=math.nan)


def test_budgets() -> None:
    assert Quality(rel_l2=0.1).squared_error() == pytest.approx(0.01)
    assert Quality(psnr=30).squared_error(range_to_power=4.0) == pytest.approx(0.004)
    for factor in (1.0, 0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match="greater than 1"):
            Speedup(factor)
    for options in ({}, {"psnr": 30.0, "rel_l2": 0.1}):
        with pytest.raises(ValueError, match="exactly one"):
            Quality(**options)
    with pytest.raises(ValueError, match="above 0 dB"):
        Quality(psnr=-3)
    with pytest.raises(ValueError, match="between 0 and 1"):
        Quality(rel_l2=1.5)
