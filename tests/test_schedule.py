"""Schedules: what is refused and why, liveness, structures, the printed grid, JSON."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffcache.schedule import COMPUTE, SKIP, Forecast, GateSpec, Online, Row, Schedule

C = COMPUTE


def reuse(step: int) -> Forecast:
    return Forecast((step,), (1.0,))


@st.composite
def rows(draw: st.DrawFn, site: str, steps: int) -> Row:
    computed = {0} | draw(st.sets(st.integers(0, steps - 1)))
    gate = draw(st.sampled_from([None, GateSpec("always"), GateSpec("max_gap", {"limit": 3})]))
    if draw(st.booleans()):
        online = Online("taylor", draw(st.integers(1, 3)), {"order": 2}, draw(st.booleans()))
        cells = [C if step in computed else online for step in range(steps)]
        return Row(site, draw(st.booleans()), tuple(cells), gate)
    cells = []
    for step in range(steps):
        if step in computed:
            cells.append(C)
            continue
        earlier = sorted((s for s in computed if s < step), reverse=True)
        count = draw(st.integers(1, min(3, len(earlier))))
        weights = draw(st.lists(st.floats(-5, 5), min_size=count, max_size=count))
        cells.append(Forecast(tuple(earlier[:count]), tuple(weights)))
    return Row(site, draw(st.booleans()), tuple(cells), gate)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    steps = draw(st.integers(1, 12))
    names = draw(st.lists(st.text(min_size=1, max_size=8), unique=True, max_size=3))
    return Schedule(
        steps,
        tuple(draw(rows(name, steps)) for name in names),
        fingerprint=draw(st.text(max_size=5)),
        clock=draw(st.sampled_from([(), tuple(1.0 - i / 7 for i in range(steps))])),
        origin="test",
        flops_fraction=draw(st.floats(0.01, 1.0)),
    )


def two_sites() -> Schedule:
    stack = Row("stack", True, (C, C, Forecast((1, 0), (2.0, -1.0)), C, reuse(3), reuse(3)))
    inner = Row("stack.3.attn", False, (C, reuse(0), SKIP, C, SKIP, SKIP))
    return Schedule(6, (stack, inner), flops_fraction=0.55)


@given(schedules())
def test_json_round_trip(schedule: Schedule) -> None:
    assert Schedule.from_json(schedule.to_json()) == schedule


@given(schedules())
def test_liveness_agrees_with_reads(schedule: Schedule) -> None:
    held: dict[str, set[int]] = {row.site: set() for row in schedule.rows}
    for step in range(schedule.steps):
        for row in schedule.rows:
            cell = row.cells[step]
            if isinstance(cell, Forecast):
                assert set(cell.steps) <= held[row.site]
        for site in schedule.writes(step):
            held[site].add(step)
        live = schedule.live_after(step)
        for site, kept in held.items():
            assert set(live.get(site, ())) <= kept
            held[site] = set(live.get(site, ()))
    assert not any(held.values())


@given(schedules())
def test_distinct_columns_cover_every_step_once(schedule: Schedule) -> None:
    groups = schedule.distinct_columns()
    assert sorted(step for steps in groups.values() for step in steps) == list(range(schedule.steps))
    for structure, steps in groups.items():
        assert all(schedule.structure(step) == structure for step in steps)


def test_grid() -> None:
    assert str(two_sites()) == (
        "schedule: 2 sites x 6 steps, 55 % of FLOPs computed, 5 programs\n"
        "  stack         CCfCrr\n"
        "  stack.3.attn  Cr.C..\n"
        "  step          0    5"
    )


def test_queries() -> None:
    schedule = two_sites()
    assert schedule.computed_steps() == (0, 3)
    assert schedule.column(2) == (Forecast((1, 0), (2.0, -1.0)), SKIP)
    assert schedule.writes(0) == {"stack", "stack.3.attn"}
    assert schedule.writes(1) == {"stack"}
    assert schedule.live_after(1) == {"stack": (1, 0)}
    assert schedule.live_after(2) == {}
    assert schedule.live_after(4) == {"stack": (3,)}
    assert [s.kinds for s in schedule.distinct_columns()] == ["CC", "Cr", "f.", "CC", "r."]


def test_weights_do_not_make_programs() -> None:
    cells = (C, C, Forecast((1, 0), (2.0, -1.0)), Forecast((1, 0), (3.0, -2.0)))
    assert list(Schedule(4, (Row("x", False, cells),)).distinct_columns().values()) == [(0, 1), (2, 3)]


def test_only() -> None:
    schedule = two_sites()
    inner = schedule.only(["stack.3.attn"])
    assert inner.rows[0].cells == (C,) * 6
    assert inner.rows[1].cells == (C, reuse(0), C, C, C, C)
    assert schedule.only(["stack", "stack.3.attn"]).rows == schedule.rows
    with pytest.raises(ValueError, match=r"no rows for sites \['stak'\]; its sites are \['stack', 'stack.3.attn'\]"):
        schedule.only(["stak"])


def test_exact() -> None:
    schedule = Schedule.exact(4)
    assert schedule.computed_steps() == (0, 1, 2, 3)
    assert len(schedule.distinct_columns()) == 1
    assert Schedule.from_json(schedule.to_json()) == schedule


@pytest.mark.parametrize(
    ("steps", "cells", "message"),
    [
        (2, (reuse(0), C), "site 'x' forecasts step 0, but nothing is cached yet"),
        (3, (C, C), "site 'x' has 2 cells but the schedule has 3 steps"),
        (3, (C, C, reuse(2)), "reads step 2; a forecast may read only earlier steps"),
        (3, (C, reuse(0), reuse(1)), r"reads step 1, where it is not computed; it is computed at \[0\]"),
        (2, (C, SKIP), r"sites \['x'\] are skipped at step 1, but no site is forecast there"),
        (2, (C, "C"), "expected COMPUTE, SKIP, a Forecast, Online or Partial"),
    ],
)
def test_bad_rows(steps: int, cells: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(steps, (Row("x", False, cells),))


def test_bad_schedules() -> None:
    row = Row("x", False, (C, C))
    with pytest.raises(ValueError, match=r"sites \['x'\] have more than one row"):
        Schedule(2, (row, row))
    with pytest.raises(ValueError, match="2 steps but 3 clock values"):
        Schedule(2, (row,), clock=(1.0, 0.5, 0.0))
    with pytest.raises(ValueError, match="at least one step"):
        Schedule(0)
    with pytest.raises(ValueError, match="share of the uncached FLOPs"):
        Schedule(2, flops_fraction=1.2)
    with pytest.raises(ValueError, match="step 2 is outside"):
        Schedule(2).column(2)


@pytest.mark.parametrize(
    ("steps", "weights", "message"),
    [
        ((), (), "no steps to read"),
        ((1, 0), (1.0,), "2 steps but 1 weights"),
        ((0, 1), (0.5, 0.5), "newest first"),
        ((1, 1), (0.5, 0.5), "without duplicates"),
        ((1,), (float("nan"),), "must be finite"),
    ],
)
def test_bad_forecasts(steps: tuple, weights: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Forecast(steps, weights)


def test_bad_gate_options() -> None:
    with pytest.raises(ValueError, match="plain JSON values"):
        GateSpec("x", {"f": print})


def test_refused_files() -> None:
    good = json.loads(two_sites().to_json())
    with pytest.raises(ValueError, match="version 99, this diffcache reads up to 1; upgrade"):
        Schedule.from_json(json.dumps(good | {"version": 99}))
    with pytest.raises(ValueError, match="not JSON"):
        Schedule.from_json(two_sites().to_json()[:-20])
    with pytest.raises(ValueError, match="lacks 'format'"):
        Schedule.from_json("[1, 2]")
    with pytest.raises(ValueError, match="damaged"):
        Schedule.from_json(json.dumps({k: v for k, v in good.items() if k != "rows"}))
    good["rows"][0]["cells"][0] = "?"
    with pytest.raises(ValueError, match=r"\?"):
        Schedule.from_json(json.dumps(good))
