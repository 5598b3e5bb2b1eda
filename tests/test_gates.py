"""Gates and budgets: limits, refusals, what a gate is shown."""

import math
from typing import Any

import numpy as np
import pytest

from diffcache.budget import Quality, Speedup
from diffcache.gates import Moment, make_gate


def follows(gate: Any, since: int = 1, *changes: float) -> bool:
    return bool(np.all(gate.follow(Moment(step=5, steps=10, since=since), np.array([changes]).T)))


def test_always() -> None:
    assert follows(make_gate("always"), 1, math.inf)


def test_accumulated_change() -> None:
    gate = make_gate("accumulated_change", threshold=0.2, max_since=3)
    assert follows(gate, 1, 0.1)
    assert follows(gate, 2, 0.09)
    assert not follows(gate, 3, 0.02)
    gate.done(Moment(5, 10, 3), computed=True)
    assert follows(gate, 1, 0.19)
    assert not follows(gate, 4, 0.0)
    assert not follows(gate, 1, math.nan)
    assert not follows(make_gate("accumulated_change", threshold=0.0), 1, 0.0)


def test_each_sample_has_its_own_sum() -> None:
    gate = make_gate("accumulated_change", threshold=0.2)
    moment = Moment(5, 10, 1)
    assert gate.follow(moment, np.array([[0.1], [0.19]])).tolist() == [True, True]
    assert gate.follow(moment, np.array([[0.05], [0.05]])).tolist() == [True, False]


def test_change_stops_at_its_limits() -> None:
    gate = make_gate("change", threshold=0.5, max_since=2, max_forecasts=3, max_total=1.0)
    moment = Moment(5, 10, 1)
    assert follows(gate, 1, 0.4)
    gate.done(moment, computed=False)
    assert not follows(gate, 3, 0.4)  # too many in a row: not compared, so not added
    assert not follows(gate, 1, 0.5)  # compared and not less; the sum is now 0.9
    gate.done(moment, computed=True)  # and is not set back
    assert follows(gate, 1, 0.2)
    assert not follows(gate, 1, 0.0)
    gate = make_gate("change", threshold=0.5, max_forecasts=1)
    gate.done(moment, computed=False)
    assert not follows(gate, 1, 0.0)
    assert not follows(make_gate("change", threshold=0.0), 1, 0.0)


def test_max_gap() -> None:
    gate = make_gate("max_gap", limit=2)
    assert [follows(gate, since) for since in (1, 2, 3)] == [True, True, False]
    assert not follows(make_gate("max_gap", limit=0), 1)


def test_gate_refusals() -> None:
    with pytest.raises(ValueError, match=r"unknown gate 'sometimes'; known: \['accumulated_change'"):
        make_gate("sometimes")
    with pytest.raises(ValueError, match="missing a required"):
        make_gate("max_gap")
    with pytest.raises(ValueError, match="threshold of 0 or more"):
        make_gate("accumulated_change", threshold=math.nan)


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
