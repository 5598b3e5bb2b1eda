"""Weight rules: published weights, exactness on polynomials, consistency of everything registered."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffcache.predictors import PREDICTORS, mean_velocity_weights, predictor, weights

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
        ("foca", {"heun": True}),
        ("barycentric_chebyshev", {"order": 1}),
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
    assert weights("foca", even, 12.0, heun=True) == pytest.approx([5 / 2, -2, 1 / 2])
    assert weights("foca", even, 12.0, heun=True) == pytest.approx(weights("taylor", even, 12.0, order=2))
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
    for name in sorted(set(PREDICTORS) - {"spectrum", "ramp"}):  # these two know where the generation begins and ends
        mirrored = weights(name, [-s for s in history], -(history[0] + ahead))
        assert mirrored == pytest.approx(weights(name, history, history[0] + ahead))


def test_spectrum_is_the_ridge_regression_it_says() -> None:
    history, target, degree, ridge = [12.0, 7.0, 3.0, 1.0, 0.0], 15.0, 3, 0.1
    basis = np.cos(np.arange(degree + 1) * np.arccos(2 * np.array([*history, target])[:, None] / 50 - 1))
    values = np.array([0.3, -1.0, 2.0, 0.5, 0.1])
    fit = np.linalg.solve(basis[:-1].T @ basis[:-1] + ridge * np.eye(degree + 1), basis[:-1].T @ values)
    options = {"degree": degree, "ridge": ridge, "blend": 1.0}
    assert weights("spectrum", history, target, centred=False, **options) @ values == pytest.approx(basis[-1] @ fit)
    assert sum(weights("spectrum", history, target, centred=False, **options)) < 0.995
    shifted = np.linalg.solve(basis[:-1].T @ basis[:-1] + ridge * np.eye(degree + 1), basis[:-1].T @ (values - 0.3))
    assert weights("spectrum", history, target, **options) @ values == pytest.approx(0.3 + basis[-1] @ shifted)
    line = np.array([1 + 3 / 5, -3 / 5, 0, 0, 0])
    half = 0.5 * np.array(weights("spectrum", history, target, **options)) + 0.5 * line
    assert weights("spectrum", history, target, **{**options, "blend": 0.5}) == pytest.approx(list(half))
    # without the ridge it is the polynomial through its points
    assert weights("spectrum", history[:4], target, degree=3, ridge=1e-12, blend=1.0) == pytest.approx(
        weights("newton", history[:4], target, order=3), rel=1e-3
    )


def test_ramp_and_ema() -> None:
    assert weights("ramp", [20.0, 10.0], 25.0) == pytest.approx([1.5, -0.5])
    assert weights("ramp", [20.0, 10.0], 60.0, high=0.6) == pytest.approx([1.6, -0.6])
    assert weights("ramp", [20.0, 10.0], 25.0, low=0.3, high=0.3) == pytest.approx([1.3, -0.3])
    assert weights("ema", [2.0, 1.0, 0.0], 3.0, beta=0.9) == pytest.approx([0.1, 0.09, 0.81])


def test_chebyshev_clock() -> None:
    """Three values on the nodes cos(pi/6), 0, -cos(pi/6); the target as far ahead as the newest two are apart."""
    x = math.cos(math.pi / 6)
    nodes = [x, 0.0, -x]
    expected = [math.prod((2 * x - b) / (a - b) for i, b in enumerate(nodes) if i != j) for j, a in enumerate(nodes)]
    assert weights("barycentric_chebyshev", [8.0, 4.0, 1.0], 12.0, order=2) == pytest.approx(expected)


@given(
    gaps=st.lists(st.floats(0.01, 0.2), min_size=6, max_size=12),
    lookback=st.integers(1, 6),
    data=st.data(),
)
def test_mean_velocity_is_the_published_loop(gaps: list[float], lookback: int, data) -> None:
    """Against a simulation with latents, step by step, as the paper's code does it."""
    times = list(np.cumsum([0.0, *gaps])[::-1])
    steps = len(gaps)
    computed = [0, *sorted(data.draw(st.sets(st.integers(1, steps - 1))))]
    spans = {step: data.draw(st.integers(1, lookback)) for step in computed}
    true = np.random.default_rng(0).normal(size=(steps, 3))
    latents, velocities = [np.zeros(3)], []
    for i in range(steps):
        velocity = true[i]
        if i not in computed:
            first = i - min(spans[max(c for c in computed if c < i)], i)
            passed = times[i] - times[first]
            bend = (velocities[first] - (latents[i] - latents[first]) / passed) / passed
            velocity = velocities[-1] - bend * (times[i + 1] - times[i])
        velocities.append(velocity)
        latents.append(latents[-1] + velocity * (times[i + 1] - times[i]))
    forecasts = mean_velocity_weights(computed, times, spans)
    assert sorted([*forecasts, *computed]) == list(range(steps))
    for step, (read, rule) in forecasts.items():
        assert list(read) == sorted(read, reverse=True)
        assert set(read) <= {c for c in computed if c < step}
        assert sum(rule) == pytest.approx(1.0)
        np.testing.assert_allclose(np.array(rule) @ true[list(read)], velocities[step], rtol=1e-6, atol=1e-8)


def test_mean_velocity_looking_back_one_step_is_reuse() -> None:
    forecasts = mean_velocity_weights([0, 1, 5], [1.0, 0.9, 0.7, 0.4, 0.2, 0.1, 0.05, 0.0])
    assert forecasts == {s: ((c,), (1.0,)) for s, c in ((2, 1), (3, 1), (4, 1), (6, 5))}
    with pytest.raises(ValueError, match="must begin with 0"):
        mean_velocity_weights([1], [1.0, 0.5, 0.0])
    with pytest.raises(ValueError, match="strictly monotonic"):
        mean_velocity_weights([0], [1.0, 1.0, 0.0])
    with pytest.raises(ValueError, match="lookback must be 1"):
        mean_velocity_weights([0], [1.0, 0.5, 0.0], 0)


def test_a_new_predictor_is_a_few_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffcache.predictors.registry.PREDICTORS", {})

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
    with pytest.raises(ValueError, match="spectrum needs degree >= 0"):
        weights("spectrum", [1.0, 0.0], 2.0, ridge=0.0)
    with pytest.raises(ValueError, match="ramp needs start and end to differ"):
        weights("ramp", [1.0, 0.0], 2.0, start=3.0, end=3.0)
    with pytest.raises(ValueError, match="0 <= beta < 1"):
        weights("ema", [1.0, 0.0], 2.0, beta=1.0)
    with pytest.raises(ValueError, match=r"no options \['sigma'\]; it takes \['order'\]"):
        weights("taylor", [1.0], 2.0, sigma=0.5)
    with pytest.raises(ValueError, match="no history"):
        weights("reuse", [], 2.0)
    with pytest.raises(ValueError, match="equal times"):
        weights("taylor", [1.0, 1.0], 2.0)
    with pytest.raises(ValueError, match="order must be 0 or more"):
        weights("taylor", [1.0, 0.0], 2.0, order=-1)
    monkeypatch.setattr("diffcache.predictors.registry.PREDICTORS", {"bad": lambda history, target: [0.9]})
    with pytest.raises(ValueError, match="weights that sum to one"):
        weights("bad", [1.0], 2.0)
