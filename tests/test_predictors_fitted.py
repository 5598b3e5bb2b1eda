"""Fitted weights against the values whose Gram matrix they see; views against the parts they stand for."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffcache import gram
from diffcache.ops import extrapolate
from diffcache.predictors import FITTED, channel_table, fitted_weights, forecast_through, projection, weights
from diffcache.predictors.fitted import fitted
from diffcache.predictors.views import (
    PROJECTIONS,
    best_rules,
    describe_channels,
    k_means,
    low_band,
    principal_basis,
    split,
    subspace,
)


def values(prompts: int = 4, steps: int = 9, size: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(prompts, steps, size))


def gram_of(v: np.ndarray) -> np.ndarray:
    return np.einsum("ptd,psd->pts", v, v)


def error(v: np.ndarray, history: list[int], target: int, rule: list[float]) -> float:
    return float(np.square(v[:, target] - np.einsum("k,pkd->pd", rule, v[:, history[: len(rule)]])).sum())


# -- fitted --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(FITTED))
@pytest.mark.parametrize("history", [[5], [5, 3], [5, 3, 0]])
def test_still_values_are_reused(name: str, history: list[int]) -> None:
    v = np.repeat(values(steps=1), 9, axis=1)
    rule = fitted_weights(name, gram_of(v), history, 7)
    assert 1 <= len(rule) <= len(history)
    assert sum(rule) == pytest.approx(1.0, abs=1e-4)  # l2p's ridge pulls a little towards zero


def test_l2p_is_the_ridge_solution_on_the_deployed_history() -> None:
    v = values()
    v /= np.sqrt(np.square(v).sum(-1).mean(-1))[:, None, None]  # every prompt counts alike
    G, history = gram_of(v), [6, 4, 1]
    mean = G.mean(0)
    among = mean[np.ix_(history, history)]
    expected = np.linalg.solve(among + 1e-5 * np.trace(among) / 3 * np.eye(3), mean[history, 8])
    np.testing.assert_allclose(fitted_weights("l2p", G, history, 8), expected, rtol=1e-5)
    best = error(v, history, 8, fitted_weights("l2p", G, history, 8, ridge=0.0))
    for name in sorted(set(FITTED) - {"l2p"}):
        assert error(v, history, 8, fitted_weights(name, G, history, 8)) >= best - 1e-9
    assert len(fitted_weights("l2p", G, history, 8, count=2)) == 2


def test_least_squares_beats_the_line_it_shrinks_towards() -> None:
    v = values().cumsum(1)
    rule = fitted_weights("least_squares", gram_of(v), [6, 4, 1], 8)
    assert sum(rule) == pytest.approx(1.0)
    line = weights("newton", [6, 4, 1], 8, order=1)
    assert gram.forecast_error(gram_of(v), [6, 4, 1], 8, rule) < gram.forecast_error(gram_of(v), [6, 4], 8, line)


def test_scaling_is_the_published_moving_average() -> None:
    v = values(prompts=3)
    d, step = v[:, 6] - v[:, 5], v[:, 7] - v[:, 6]
    alphas = (d * step).sum(-1) / (d * d).sum(-1)
    alpha = 0.97 * (0.97 * alphas[0] + 0.03 * alphas[1]) + 0.03 * alphas[2]
    assert fitted_weights("scaling", gram_of(v), [5, 3], 7) == pytest.approx([1 + alpha, -alpha])  # k = N = 2
    assert fitted_weights("scaling", gram_of(v), [5, 3], 7)[1] == pytest.approx(-alpha)
    line = np.arange(9)[None, :, None] * values(steps=1)
    assert fitted_weights("scaling", gram_of(line), [5, 3], 8) == pytest.approx([2.5, -1.5])


def test_scaling_for_the_deployed_history_is_the_best_point_on_the_line() -> None:
    v = values()
    v /= np.sqrt(np.square(v).sum(-1).mean(-1))[:, None, None]
    rule = np.array(fitted_weights("scaling", gram_of(v), [5, 3], 8, deployed=True))
    best = error(v, [5, 3], 8, rule)
    for move in (-0.1, 0.01, 0.3):
        assert error(v, [5, 3], 8, rule + np.array([move, -move])) > best


@given(angle=st.floats(0.05, 1.2), growth=st.floats(0.6, 1.5))
def test_tao_is_exact_on_spirals(angle: float, growth: float) -> None:
    """Changes that turn by one angle and grow by one factor from step to step, in one plane for each prompt."""
    turns = [growth**t * np.exp(1j * angle * t) for t in range(9)]
    path = np.cumsum(turns)
    planes = values(steps=2, size=6)
    planes[:, 1] -= planes[:, 0] * (planes[:, :1] * planes[:, 1:]).sum(-1) / np.square(planes[:, 0]).sum(-1)[:, None]
    planes /= np.linalg.norm(planes, axis=-1, keepdims=True)
    v = path.real[None, :, None] * planes[:, :1] + path.imag[None, :, None] * planes[:, 1:]
    rule = fitted_weights("tao", gram_of(v), [6, 5, 4], 7)
    np.testing.assert_allclose(np.einsum("k,pkd->pd", rule, v[:, [6, 5, 4]]), v[:, 7], rtol=1e-5, atol=1e-5)


def test_norm_ratio() -> None:
    v = values() * np.arange(1, 10)[:, None]
    norms = np.linalg.norm(v, axis=-1)
    assert fitted_weights("norm_ratio", gram_of(v), [4, 2], 7) == pytest.approx([(norms[:, 7] / norms[:, 4]).mean()])
    assert fitted_weights("norm_ratio", np.zeros((1, 9, 9)), [4], 7) == [1.0]


def test_fitted_refusals() -> None:
    G = gram_of(values())
    with pytest.raises(ValueError, match=r"unknown fitted predictor 'x'; known: \['l2p'"):
        fitted_weights("x", G, [1], 2)
    with pytest.raises(ValueError, match=r"no options \['alpha'\]; it takes \['momentum', 'deployed'\]"):
        fitted_weights("scaling", G, [1], 2, alpha=1.0)
    for history, target in (([], 2), ([1, 2], 3), ([2, 2], 3), ([2], 2), ([2], 9)):
        with pytest.raises(ValueError, match="expected earlier steps, newest first"):
            fitted_weights("l2p", G, history, target)
    with pytest.raises(ValueError, match="registered already"):
        fitted("l2p")(FITTED["l2p"])


# -- views ---------------------------------------------------------------------------------------------------------


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("transform", ["dct", "fft"])
def test_low_band_is_a_projection_that_keeps_slow_waves(transform: str) -> None:
    v = noise(2, 30, 4)
    low = low_band(v, cutoff=0.2, transform=transform)
    torch.testing.assert_close(low_band(low, cutoff=0.2, transform=transform), low)
    assert (low * (v - low)).sum().abs() < 1e-9
    torch.testing.assert_close(low_band(v, cutoff=1.0, transform=transform), v)
    torch.testing.assert_close(low_band(v, cutoff=0.0, transform=transform), v.mean(1, keepdim=True).expand(v.shape))
    n, whole = torch.arange(30, dtype=torch.float64), 2 * torch.pi / 30
    waves = [
        torch.cos(torch.pi / 30 * (n + 0.5) * k) if transform == "dct" else torch.cos(whole * n * k) for k in (2, 9)
    ]
    slow, fast = (wave[None, :, None].expand(1, 30, 2).contiguous() for wave in waves)
    torch.testing.assert_close(low_band(slow + fast, cutoff=0.2, transform=transform), slow)
    torch.testing.assert_close(low_band(v.mT, cutoff=0.2, transform=transform, dim=-1), low.mT)


@pytest.mark.parametrize("name", sorted(PROJECTIONS))
def test_forecast_through_is_each_part_forecast_by_its_own_weights(name: str) -> None:
    history = [noise(2, 16, 6, seed=i) for i in range(3)]
    options = {"basis": torch.linalg.qr(noise(6, 2, seed=9)).Q} if name == "subspace" else {"cutoff": 0.3}
    inside, outside = [1.0], [2.5, -2.0, 0.5]
    anchor = noise(2, 16, 6, seed=5)
    parts = [split(h, name, **options) for h in history]
    expected = anchor + parts[0][0] + sum(w * rest for w, (_, rest) in zip(outside, parts, strict=True))
    result = forecast_through(lambda v: PROJECTIONS[name](v, **options), history, inside, outside, anchor)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(PROJECTIONS))
def test_views_of_a_still_history_are_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    value = noise(2, 16, 6, dtype=dtype)
    options = {"basis": torch.linalg.qr(noise(6, 2, seed=9)).Q} if name == "subspace" else {"cutoff": 0.3}
    result = forecast_through(
        lambda v: PROJECTIONS[name](v, **options), [value.clone() for _ in range(3)], [1.0], [2.5, -2.0, 0.5]
    )
    assert result.dtype == dtype
    assert torch.equal(result, value)


def test_principal_basis() -> None:
    directions = torch.linalg.qr(noise(6, 6)).Q
    v = noise(500, 6, seed=1) * torch.tensor([10.0, 5.0, 0.1, 0.1, 0.1, 0.1]) @ directions.T
    basis = principal_basis(v, energy=0.99).double()
    assert basis.shape == (6, 2)
    torch.testing.assert_close(basis.T @ basis, torch.eye(2, dtype=torch.float64), atol=1e-6, rtol=0)
    assert (subspace(v, basis=basis) - v).norm() < 0.1 * v.norm()
    assert principal_basis(v, energy=0.999999, max_rank=3).shape == (6, 3)
    assert principal_basis(v, energy=1.0).shape == (6, 6)


def test_channel_table_gives_every_channel_its_cluster_s_weights() -> None:
    history = [noise(2, 5, 4, seed=i) for i in range(3)]
    rules, labels = [[1.0], [1.5, -0.5], [2.5, -2.0, 0.5]], [0, 2, 1, 2]
    result = extrapolate(None, history, channel_table(rules, labels))
    for channel, label in enumerate(labels):
        expected = sum(w * h[..., channel] for w, h in zip(rules[label], history, strict=False))
        torch.testing.assert_close(result[..., channel], expected)
    with pytest.raises(ValueError, match="labels must name one of the 3 clusters"):
        channel_table(rules, [0, 3])


def test_clusters_of_channels_find_the_rule_that_fits_each() -> None:
    """Half the channels stand still but for noise, half run straight: reuse for these, extrapolation for those."""
    s = torch.arange(8, dtype=torch.float64)[:, None, None]
    still = noise(1, 20, 5) + 0.001 * noise(8, 20, 5, seed=1)
    straight = noise(1, 20, 5, seed=2) + s * noise(1, 20, 5, seed=3)
    trajectory = torch.cat([still, straight], dim=-1)
    labels = k_means(describe_channels(trajectory), 2)
    assert len(set(labels[:5].tolist())) == len(set(labels[5:].tolist())) == 1
    assert labels[0] != labels[5]
    rules = [[1.0], weights("taylor", [6.0, 4.0], 7.0, order=1)]
    chosen = best_rules(trajectory, labels, [6, 4], 7, rules)
    assert (chosen[int(labels[0])], chosen[int(labels[5])]) == (0, 1)
    assert torch.equal(labels, k_means(describe_channels(trajectory), 2))


def test_view_refusals() -> None:
    v = noise(1, 8, 4)
    with pytest.raises(ValueError, match="no more than there is history"):
        forecast_through(low_band, [v], [1.0], [2.0, -1.0])
    with pytest.raises(ValueError, match="transform 'dct' or 'fft'"):
        low_band(v, transform="dst")
    with pytest.raises(ValueError, match="energy is a share"):
        principal_basis(v, energy=0.0)
    with pytest.raises(ValueError, match="at least four steps"):
        describe_channels(noise(3, 4, 4))
    with pytest.raises(ValueError, match="1 to 8 clusters"):
        k_means(noise(8, 2), 9)
    with pytest.raises(ValueError, match="unknown projection"):
        split(v, "high")
    with pytest.raises(ValueError, match="registered already"):
        projection("low_band")(low_band)
