"""Plain rules: what the papers print, and what holds for every rule."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffcache import when
from diffcache.published_tables import LOOKBACKS, TABLES
from diffcache.when import RULES, resample

# Options for any number of steps, where a rule needs some.
OPTIONS = {
    "mask": lambda steps: {"bits": [1] + [0] * (steps - 1)},
    "bins": lambda steps: {"compute": [1, steps], "cached": [2]},
    "preset": lambda steps: {"speed": "fast"},
    "quadratic_centre": lambda steps: {"computed": 2, "centre": steps // 2},
    "in_times": lambda steps: {"times": [1000.0 * (1 - s / steps) for s in range(steps)], "interval": 3},
    "first": lambda steps: {"computed": 4},
    "table": lambda steps: {"name": "dpcache-flux-13"},
}


@pytest.mark.parametrize("name", sorted(RULES))
@given(steps=st.integers(8, 120))
def test_every_rule_computes_step_0_and_steps_that_exist(name: str, steps: int) -> None:
    computed = RULES[name](steps, **OPTIONS.get(name, lambda steps: {})(steps))
    assert computed == sorted(set(computed))
    assert computed[0] == 0
    assert computed[-1] < steps
    assert all(type(step) is int for step in computed)


def test_every() -> None:
    assert when.every(10, interval=3) == [0, 3, 6, 9]
    assert when.every(10, interval=3, warm_up=2) == [0, 1, 2, 5, 8]  # s < W or (s - W) % N == 0
    assert when.every(10, interval=3, warm_up=2, offset=-1) == [0, 1, 4, 7]  # the counter reaches N - 1
    assert when.every(10, interval=3, warm_up=2, offset=1) == [0, 1, 3, 6, 9]  # (s - W - 1) % N == 0
    assert when.every(10, interval=3, warm_up=2, last=2) == [0, 1, 2, 5, 8, 9]
    assert when.every(3, interval=9, warm_up=5) == [0, 1, 2]


def test_growing_windows_compute_as_often_as_published() -> None:
    assert len(when.growing(50, growth=0.75)) == 14
    assert len(when.growing(50, growth=3.0)) == 10
    assert when.growing(12, warm_up=2, window=2.0, growth=1.0) == [0, 1, 3, 6, 10]


def test_bins_and_presets() -> None:
    assert when.bins(10, compute=[3, 1, 1], cached=[2, 2, 1]) == [0, 1, 2, 5, 8, 9]
    assert when.bins(10, compute=[3, 1, 1], cached=[2, 2, 1], last=False) == [0, 1, 2, 5, 8]
    assert when.bins(7, compute=[2, 9], cached=[3]) == [0, 1, 5, 6]
    # the bins of cache-dit's own comments, for 28 steps; the last step is forced
    assert when.preset(28, speed="slow") == [*range(8), 9, 10, 11, 14, 15, 16, 19, 20, 23, 27]
    assert [len(when.preset(28, speed=speed)) for speed in ("slow", "medium", "fast", "ultra")] == [18, 15, 11, 8]
    # bins 4 1 1 1 1 and 2 5 6 7 grow to 7 2 2 2 1 and 3 9 11 13, as in its code
    assert when.preset(50, speed="ultra") == [*range(7), 10, 11, 21, 22, 34, 35, 49]
    assert when.preset(8, speed="slow") == [0, 1, 2, 3, 4, 6, 7]
    assert when.preset(4) == [0, 1, 3]


def test_quadratic_centre_is_densest_around_the_centre() -> None:
    computed = when.quadratic_centre(50, computed=10, centre=15, power=1.4)
    assert computed == [0, 5, 9, 13, 17, 21, 26, 31, 37, 43]  # what the published function returns
    for count in range(2, 30, 3):
        assert len(when.quadratic_centre(50, computed=count, centre=15)) == count
    with pytest.raises(ValueError, match="no power down to 1 gives"):
        when.quadratic_centre(10, computed=10, centre=5)


def test_windows() -> None:
    times = [900.0, 700.0, 500.0, 300.0, 150.0, 90.0]
    assert when.in_times(6, times=times, interval=2) == [0, 2, 4, 5]
    assert when.in_times(6, times=times, interval=4) == [0, 4, 5]
    assert when.in_share(20, interval=3) == [*range(8), 8, 11, 14, 17, 19]
    assert when.first(25, computed=10) == list(range(10))
    assert when.two_phases(25) == [0, 1, 2, 7, *range(10, 25)]
    assert when.two_phases(14, gate=8, warm_up=2, before=5, after=3) == [0, 1, 2, 7, 8, 11]


@pytest.mark.parametrize("name", sorted(TABLES))
def test_published_tables(name: str) -> None:
    table = TABLES[name]
    assert table.steps == 50
    assert list(table.computed) == sorted(set(table.computed))
    assert table.computed[0] == 0
    assert table.computed[-1] < table.steps
    if name.count("-") == 2:
        assert len(table.computed) == int(name.rpartition("-")[2])
        assert table.computed[-1] == 49
    assert when.table(50, name=name) == list(table.computed)


def test_lookbacks_belong_to_computed_steps_of_their_table() -> None:
    for name, spans in LOOKBACKS.items():
        computed = TABLES[name].computed
        assert all(step in computed and step + 1 not in computed and 1 <= span <= 6 for step, span in spans.items())


@given(steps=st.integers(1, 100), wanted=st.integers(1, 100), data=st.data())
def test_resampling_keeps_order_and_ends(steps: int, wanted: int, data) -> None:
    computed = sorted({0, *data.draw(st.sets(st.integers(0, steps - 1)))})
    found = resample(computed, steps, wanted)
    assert found == sorted(set(found))
    assert found[0] == 0
    assert found[-1] < wanted
    assert len(found) <= len(computed)
    assert resample(computed, steps, steps) == computed
    if computed[-1] == steps - 1 and steps > 1:
        assert found[-1] == wanted - 1


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"rule 'mask' computes steps \[1\] of 2; expected step 0"):
        when.mask(2, bits=[0, 1])
    with pytest.raises(ValueError, match="3 bits for 2 steps"):
        when.mask(2, bits=[1, 1, 1])
    with pytest.raises(ValueError, match="cover 5 of 9 steps"):
        when.bins(9, compute=[3], cached=[2])
    with pytest.raises(ValueError, match="needs the number of steps"):
        when.every(0)
    with pytest.raises(ValueError, match="interval >= 1"):
        when.every(5, interval=0)
    with pytest.raises(ValueError, match="unknown preset 'slowest'"):
        when.preset(28, speed="slowest")
    with pytest.raises(ValueError, match="presets exist for 4, 6, and 8 or more"):
        when.preset(5)
    with pytest.raises(ValueError, match="unknown table"):
        when.table(50, name="none")
    with pytest.raises(ValueError, match="registered already"):
        when.rule("every")(when.every)
