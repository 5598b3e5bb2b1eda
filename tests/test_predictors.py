"""Weight rules: published weights, exactness on polynomials, consistency of everything registered."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffcache.predictors import PREDICTORS, predictor, weights

GAPS = st.lists(st.integers(1, 6), min_size=0, max_size=4)


def history_of(gaps: list[int], newest: float = 20.0) -> list[float]:
    times = [newest]
    for gap in gaps:
        times.append(times[-1] - gap)
    return times


def apply(name: str, curve, history: list[float], target: float, **options: float) -> float:
    return sum(w * curve(s) for w, s in zip(weights(name, history, target, **options), history, strict=False))


@pytest.mark.parametrize("name", sorted(PREDICTORS))
@given(gaps=GAPS, ahead=st.integers(1, 8))
def test_weights_sum_to_one(name: str, gaps: list[int], ahead: int) -> None:
    history = history_of(gaps)
    result = weights(name, history, history[0] + ahead)
    assert 1 <= len(result) <= len(history)
    assert sum(result) == pytest.approx(1.0, abs=1e-9 * sum(map(abs, result)))


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@given(gaps=st.lists(st.integers(1, 5), min_size=3, max_size=4), ahead=st.floats(0.1, 6))
def test_newton_is_exact_on_polynomials_of_its_order(order: int, gaps: list[int], ahead: float) -> None:
    def curve(s: float) -> float:
        return sum((0.3 + i) * (s / 10) ** i for i in range(order + 1))

    history = history_of(gaps)
    target = history[0] + ahead
    assert apply("newton", curve, history, target, order=order) == pytest.approx(curve(target), rel=1e-7)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("taylor", {"order": 1}),
        ("taylor", {"order": 3}),
        ("foca", {}),
        ("hermite", {"order": 1, "sigma": math.sqrt(0.5)}),
    ],
)
@given(gaps=st.lists(st.integers(1, 5), min_size=1, max_size=3), ahead=st.integers(1, 6))
def test_exact_on_lines(name: str, options: dict, gaps: list[int], ahead: int) -> None:
    history = history_of(gaps)
    target = history[0] + ahead
    assert apply(name, lambda s: 2 + 0.5 * s, history, target, **options) == pytest.approx(2 + 0.5 * target)


def test_published_weights() -> None:
    even = [8.0, 4.0, 0.0]
    y = 0.75
    target = 8 + 4 * y
    assert weights("reuse", even, target) == [1.0]
    assert weights("taylor", even, target, order=2) == pytest.approx([1 + y + y * y / 2, -y - y * y, y * y / 2])
    assert weights("newton", even, target) == pytest.approx(
        [1 + y + y * (y + 1) / 2, -y - y * (y + 1), y * (y + 1) / 2]
    )
    assert weights("foca", even, 12.0) == pytest.approx([7 / 3, -5 / 3, 1 / 3])
    assert weights("adams_bashforth", even, target) == [2.0, -1.0]
    assert weights("adams_bashforth", even, target, order=3) == [3.0, -3.0, 1.0]
    assert weights("goc", even, target) == pytest.approx([2.2, -1.2])
    # HiCache with sigma = 0.5 halves the slope
    assert weights("hermite", even, target, order=1) == pytest.approx([1 + y / 2, -y / 2])
    assert weights("barycentric", even, target, order=2, alpha=1e-4) == pytest.approx(
        weights("newton", even, target, order=2), abs=1e-5
    )


def test_taylor_divides_each_difference_by_its_own_gap() -> None:
    # computed at 0, 1, 5: D1 was 1 per step at step 1 and is 2 per step at step 5, so D2 = (2 - 1) / 4
    values = {5.0: 9.0, 1.0: 1.0, 0.0: 0.0}
    assert apply("taylor", values.__getitem__, [5.0, 1.0, 0.0], 7.0, order=2) == pytest.approx(9 + 2 * 2 + 0.25 * 4 / 2)


@given(gaps=GAPS, ahead=st.integers(1, 5))
def test_descending_clock_mirrors_ascending_one(gaps: list[int], ahead: int) -> None:
    history = history_of(gaps)
    for name in ("reuse", "taylor", "newton", "adams_bashforth", "foca", "goc", "barycentric"):
        mirrored = weights(name, [-s for s in history], -(history[0] + ahead))
        assert mirrored == pytest.approx(weights(name, history, history[0] + ahead))


def test_a_new_predictor_is_a_few_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffcache.predictors.PREDICTORS", {})

    @predictor("mean")
    def mean(history, target):
        """The mean of the history."""
        return [1 / len(history)] * len(history)

    assert weights("mean", [3.0, 2.0], 4.0) == [0.5, 0.5]
    with pytest.raises(ValueError, match="registered already"):
        predictor("mean")(mean)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"unknown predictor 'tailor'; known: \['adams_bashforth'"):
        weights("tailor", [1.0], 2.0)
    with pytest.raises(ValueError, match=r"no options \['sigma'\]; it takes \['order'\]"):
        weights("taylor", [1.0], 2.0, sigma=0.5)
    with pytest.raises(ValueError, match="no history"):
        weights("reuse", [], 2.0)
    with pytest.raises(ValueError, match="equal times"):
        weights("taylor", [1.0, 1.0], 2.0)
    with pytest.raises(ValueError, match="order must be 0 or more"):
        weights("taylor", [1.0, 0.0], 2.0, order=-1)
    monkeypatch.setattr("diffcache.predictors.PREDICTORS", {"bad": lambda history, target: [0.9]})
    with pytest.raises(ValueError, match="weights that sum to one"):
        weights("bad", [1.0], 2.0)
