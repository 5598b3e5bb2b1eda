"""Weights made from values: exact where their model holds, reuse where nothing changes, one sample at a time."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffcache.ops import extrapolate, extrapolate_reference
from diffcache.predictors import FROM_VALUES, modal, weights, weights_from_values
from diffcache.predictors.from_values import decomposed, from_values

STEPS = [12.0, 9.0, 6.0, 3.0, 0.0]
TARGET = 13.5


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def forecast(name: str, history, steps, target, **given) -> Tensor:
    operands, table = weights_from_values(name, history, steps, target, **given)
    assert table.shape[0] == len(operands)
    return extrapolate(None, operands, table)


def inputs(name: str, values: list[Tensor], probes: list[Tensor], now: Tensor) -> dict:
    """What the rule wants beside its history."""
    return {"probe_history": probes, "probe_now": now} if FROM_VALUES[name].probe else {}


# -- what holds for all of them ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(FROM_VALUES))
def test_nothing_changed_is_reuse_bit_for_bit(name: str, dtype: torch.dtype, count: int) -> None:
    value, probe = noise(2, 5, 4, dtype=dtype), noise(2, 5, 4, seed=1, dtype=dtype)
    history, probes = [value.clone() for _ in range(count)], [probe.clone() for _ in range(count)]
    result = forecast(name, history, STEPS[:count], TARGET, **inputs(name, history, probes, probe.clone()))
    assert result.dtype == dtype
    assert torch.equal(result, value)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("name", sorted(FROM_VALUES))
def test_samples_do_not_see_each_other(name: str, count: int) -> None:
    history = [noise(3, 6, 4, seed=i) + 2 for i in range(count)]
    probes = [noise(3, 6, 4, seed=10 + i) + 2 for i in range(count)]
    now = noise(3, 6, 4, seed=20) + 2
    together = forecast(name, history, STEPS[:count], TARGET, **inputs(name, history, probes, now))
    for i in range(3):
        alone = [h[i : i + 1] for h in history]
        given = inputs(name, alone, [p[i : i + 1] for p in probes], now[i : i + 1])
        torch.testing.assert_close(forecast(name, alone, STEPS[:count], TARGET, **given), together[i : i + 1])


@pytest.mark.parametrize("case", ["zero", "still values", "still probe", "huge"])
@pytest.mark.parametrize("name", sorted(FROM_VALUES))
def test_weights_are_finite(name: str, case: str) -> None:
    history, probes = [noise(2, 5, 4, seed=i) for i in range(5)], [noise(2, 5, 4, seed=10 + i) for i in range(5)]
    now = noise(2, 5, 4, seed=20)
    if case == "zero":
        history, probes, now = [h * 0 for h in history], [p * 0 for p in probes], now * 0
    elif case == "still values":
        history = [history[0].clone() for _ in history]
    elif case == "still probe":
        probes = [now.clone() for _ in probes]
    else:
        history = [h * 1e30 for h in history]
    _, table = weights_from_values(name, history, STEPS, TARGET, **inputs(name, history, probes, now))
    assert torch.isfinite(table).all()


@pytest.mark.parametrize("name", sorted(set(FROM_VALUES) - {"decomposed", "modes"}))
def test_consistent_rules_have_a_total_of_exactly_one(name: str) -> None:
    history, probes = [noise(2, 5, 4, seed=i) for i in range(5)], [noise(2, 5, 4, seed=10 + i) for i in range(5)]
    _, table = weights_from_values(
        name, history, STEPS, TARGET, **inputs(name, history, probes, noise(2, 5, 4, seed=9))
    )
    assert (table[0] == 1.0).all()


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("name", sorted(set(FROM_VALUES) - {"modes"}))
def test_the_host_never_looks_at_a_value(name: str, count: int) -> None:
    """Tensors without data: whatever asked for a number would fail. Only modes must wait, and says so."""
    history = [torch.empty(2, 6, 4, device="meta", dtype=torch.bfloat16) for _ in range(count)]
    given = inputs(name, history, history, torch.empty(2, 6, 4, device="meta", dtype=torch.bfloat16))
    operands, table = weights_from_values(name, history, STEPS[:count], TARGET, **given)
    assert table.is_meta
    assert table.dtype == torch.float32
    assert extrapolate_reference(None, operands, table).shape == (2, 6, 4)


# -- each where its model holds ------------------------------------------------------------------------------------


@given(
    rates=st.lists(st.floats(0.4, 1.15), min_size=1, max_size=3, unique_by=lambda r: round(r, 1)),
    angle=st.floats(0.15, 0.6),
    ahead=st.floats(0.2, 3.5),
)
def test_modes_are_exact_on_sums_of_modes(rates: list[float], angle: float, ahead: float) -> None:
    """Real modes, and for short lists a pair that swings: rank at most 5 from 6 snapshots."""
    parts = [noise(2, 3, 4, seed=i) for i in range(5)]

    def value(s: float) -> Tensor:
        total = sum(part * rate ** (s / 3) for part, rate in zip(parts, rates, strict=False))
        if len(rates) < 3:
            total = total + parts[3] * math.cos(angle * s / 3) + parts[4] * math.sin(angle * s / 3)
        return total

    steps = [15.0, 12.0, 9.0, 6.0, 3.0, 0.0]
    result = forecast("modes", [value(s) for s in steps], steps, 15 + ahead, cutoff=1e-7, ridge=0.0)
    torch.testing.assert_close(result, value(15 + ahead), rtol=1e-4, atol=1e-4)


def test_modes_follow_a_straight_line() -> None:
    """A double eigenvalue at one, which no sum of modes has: the fit still finds the line."""
    a, b = noise(1, 50), noise(1, 50, seed=1)
    steps = [8.0, 6.0, 4.0, 2.0]
    result = forecast("modes", [a + b * s for s in steps], steps, 9.0)
    torch.testing.assert_close(result, a + b * 9.0, rtol=1e-3, atol=1e-3)


def test_modes_match_the_published_algorithm_on_the_values_themselves() -> None:
    snapshots = (noise(60, 5, seed=3).cumsum(1) * 0.3 + noise(60, 1, seed=4) * 3).numpy()
    before, after = snapshots[:, :-1], snapshots[:, 1:]
    left, sizes, right = np.linalg.svd(before, full_matrices=False)
    kept = (sizes > 1e-4 * sizes[0]).sum()
    back = right[:kept].T / sizes[:kept]
    values, vectors = np.linalg.eig(left[:, :kept].T @ after @ back)
    phi = (after @ back) @ vectors
    amplitudes = np.linalg.lstsq(phi, snapshots[:, -1].astype(complex), rcond=None)[0]
    expected = (phi @ (values.astype(complex) ** 0.6 * amplitudes)).real
    form = modal.modal_weights(snapshots.T @ snapshots, 0.6, cutoff=1e-4, ridge=0.0)
    newest_first = snapshots.T[::-1]
    others = zip(form[1:], newest_first[1:-1], strict=True)
    result = form[0] * newest_first[0] + sum(w * (h - newest_first[0]) for w, h in others)
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-6)


def test_modes_need_four_equal_distances() -> None:
    steps = [10.0, 8.0, 6.0, 3.0, 0.0]
    history = [noise(1, 8, seed=i) for i in range(5)]
    result = forecast("modes", history, steps, 11.0)
    line = weights("taylor", steps, 11.0, order=1)
    torch.testing.assert_close(result, line[0] * history[0] + line[1] * history[1])


def test_trend_is_exact_when_probe_and_value_move_alike() -> None:
    a, b, p, q = (noise(2, 6, seed=i) for i in range(4))
    # the value moves by 3, the probe by 3 units; ahead both by 1, 1.5 and 9: the last is clipped to a factor of 1.5
    for ahead, moved in ((1.0, 1.0), (1.5, 1.5), (9.0, 1.5)):
        history, probes = [a + 3 * b, a], [p + 3 * q, p]
        result = forecast("trend", history, [3.0, 0.0], 4.0, probe_history=probes, probe_now=p + (3 + ahead) * q)
        torch.testing.assert_close(result, a + (3 + moved) * b)
    back = forecast("trend", [a + 3 * b, a], [3.0, 0.0], 4.0, probe_history=[p + 3 * q, p], probe_now=p + q)
    torch.testing.assert_close(back, a + 3 * b)


@given(moves=st.lists(st.floats(0.1, 3.0), min_size=3, max_size=3), order=st.integers(1, 2))
def test_relation_is_exact_on_outputs_linear_in_a_straight_input(moves: list[float], order: int) -> None:
    matrix, offset, start, way = noise(7, 7), noise(1, 7, seed=1), noise(2, 7, seed=2), noise(2, 7, seed=3)

    def state(distance: float) -> tuple[Tensor, Tensor]:
        given = start + distance * way
        return given, given @ matrix + offset

    places = np.cumsum(moves)[::-1]
    pairs = [state(float(place)) for place in places]
    now, expected = state(float(places[0]) + 0.7)
    result = forecast(
        "relation",
        [out for _, out in pairs][: order + 1],
        [3.0, 2.0, 1.0][: order + 1],
        4.0,
        probe_history=[given for given, _ in pairs][: order + 1],
        probe_now=now,
        order=order,
    )
    # of second order the direction may turn round where the moves shrink fast; its length is right all the same
    if order == 1:
        torch.testing.assert_close(result, expected)
    newest = pairs[0][1]
    torch.testing.assert_close((result - newest).norm(dim=1), (expected - newest).norm(dim=1))


@given(a=st.tuples(st.floats(-2, 2), st.floats(-0.5, 0.5)), b=st.tuples(st.floats(0.5, 2), st.floats(-0.05, 0.05)))
def test_decomposed_is_exact_on_its_model(a: tuple[float, float], b: tuple[float, float]) -> None:
    """v = a(t) z + b(t) ||z|| u with a, b linear in t and u fixed, at right angles to every latent."""
    u = torch.zeros(2, 8, dtype=torch.float64)
    u[:, 0] = 1.0

    def state(t: float, seed: int) -> tuple[Tensor, Tensor]:
        z = noise(2, 8, seed=seed)
        z[:, 0] = 0.0
        return z, (a[0] + a[1] * t) * z + (b[0] + b[1] * t) * z.norm(dim=1, keepdim=True) * u

    times = [0.5, 0.8]
    pairs = [state(t, i) for i, t in enumerate(times)]
    z, expected = state(0.35, 7)
    result = forecast(
        "decomposed", [v for _, v in pairs], times, 0.35, probe_history=[z for z, _ in pairs], probe_now=z
    )
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_decomposed_with_one_step_scales_with_the_latent() -> None:
    z, v = noise(2, 8), noise(2, 8, seed=1)
    result = forecast("decomposed", [v], [0.0], 1.0, probe_history=[z], probe_now=2.0 * z)
    torch.testing.assert_close(result, 2.0 * v)
    assert decomposed([v], [0.0], 1.0, probe_history=[z], probe_now=z).shape == (3, 2, 1)


def test_every_token_chooses_its_own_rule() -> None:
    steps, target = [9.0, 6.0, 3.0], 11.0
    rules = [[1.0, 0.0, 0.0]] + [
        [*rule, *[0.0] * (3 - len(rule))]
        for rule in (weights("taylor", steps, target - 1.0, order=1), weights("taylor", steps, target, order=2))
    ]
    probes = [noise(1, 3, 16, seed=i) for i in range(3)]
    history = [noise(1, 3, 5, seed=10 + i) for i in range(3)]
    mix = torch.tensor(rules, dtype=torch.float64).T[:, None, :, None]  # token i follows rule i
    now = sum(m * p for m, p in zip(mix, probes, strict=True))
    result = forecast("token_choice", history, steps, target, probe_history=probes, probe_now=now)
    torch.testing.assert_close(result, sum(m * h for m, h in zip(mix, history, strict=True)))
    with pytest.raises(ValueError, match="needs a probe with the tokens of the value"):
        forecast("token_choice", history, steps, target, probe_history=probes, probe_now=now[:, :2])


def test_token_choice_tells_angles_far_below_single_precision() -> None:
    """1 - cos of the two candidates is about 1e-10 and 0; the cosine itself would be one for both."""
    p = noise(1, 40, 16, dtype=torch.float32) + 3
    d = 1e-4 * noise(1, 40, 16, seed=1, dtype=torch.float32)
    probes, now = [p, p - d], p + d / 3
    _, table = weights_from_values(
        "token_choice", [p, p], [6.0, 3.0], 7.0, probe_history=probes, probe_now=now, max_order=1, shifts=1
    )
    expected = torch.tensor(weights("taylor", [6.0, 3.0], 7.0, order=1))
    torch.testing.assert_close(table[1].flatten(), expected[1].expand(40))


def test_curvature_reuses_calm_tokens_and_damps_bending_ones() -> None:
    base, way = noise(1, 3, 4), torch.ones(1, 1, 4, dtype=torch.float64)
    # token 0 runs straight, token 1 turns a little, token 2 turns a lot
    turn = torch.tensor([0.0, 0.5, 4.0], dtype=torch.float64)[None, :, None] * noise(1, 3, 4, seed=2)
    history = [base + 4 * way + turn, base + 2 * way, base]
    k = 1.0
    result = forecast("curvature", history, [4.0, 2.0, 0.0], 5.0, low=0.2, high=0.8, max_skips=2.0)
    v, v1 = (history[0] - history[1]) / 2, (history[1] - history[2]) / 2
    torch.testing.assert_close(result[:, 0], history[0][:, 0])
    torch.testing.assert_close(result[:, 1], (history[0] + k * v)[:, 1])
    torch.testing.assert_close(result[:, 2], (history[0] + k * (0.5 * v + 0.5 * v1))[:, 2])
    with pytest.raises(ValueError, match="quantiles"):
        forecast("curvature", history, [4.0, 2.0, 0.0], 5.0, low=0.9, high=0.1)


def test_refusals() -> None:
    v = noise(1, 4)
    with pytest.raises(ValueError, match=r"unknown predictor from values 'x'; known: \['curvature'"):
        weights_from_values("x", [v], [0.0], 1.0)
    with pytest.raises(ValueError, match=r"no options \['probe'\]; it takes \['low', 'high'\]"):
        weights_from_values("trend", [v], [0.0], 1.0, probe=v)
    with pytest.raises(ValueError, match=r"got 1 history tensors for steps \[1.0, 0.0\]"):
        weights_from_values("modes", [v], [1.0, 0.0], 2.0)
    with pytest.raises(ValueError, match="looks at the latent that the denoiser is given: give probe_now"):
        weights_from_values("decomposed", [v], [0.0], 1.0)
    with pytest.raises(ValueError, match="which must have the shape of the value"):
        weights_from_values("decomposed", [v], [0.0], 1.0, probe_history=[v[:, :2]], probe_now=v[:, :2])
    with pytest.raises(ValueError, match="registered already"):
        from_values("trend", newest=1)(decomposed)
