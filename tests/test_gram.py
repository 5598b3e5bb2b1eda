"""Closed forms on Gram matrices against the values themselves; profiles on disk."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from diffcache import gram
from diffcache.predictors import weights
from diffcache.profile_record import Profile, SiteProfile


def values(prompts: int = 3, steps: int = 9, size: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(prompts, steps, size))


def gram_of(v: np.ndarray) -> np.ndarray:
    return np.einsum("ptd,psd->pts", v, v)


def test_forecast_error_is_the_squared_distance() -> None:
    v = values()
    history, rule = [5, 3, 0], [1.5, -0.7, 0.2]
    distance = v[:, 7] - np.einsum("k,pkd->pd", rule, v[:, history])
    expected = np.mean((distance**2).sum(-1) / (v**2).sum(-1).mean(-1))
    assert gram.forecast_error(gram_of(v), history, 7, rule) == pytest.approx(expected)


@given(order=st.integers(0, 2), gaps=st.lists(st.integers(1, 4), min_size=2, max_size=2), ahead=st.integers(1, 4))
def test_polynomial_trajectories_have_no_error(order: int, gaps: list[int], ahead: int) -> None:
    s = np.arange(14)[:, None] / 10
    v = sum(values(2, 1, seed=i) * s**i for i in range(order + 1))
    history = [9, 9 - gaps[0], 9 - sum(gaps)]
    rule = weights("newton", history, 9 + ahead, order=order)
    assert gram.forecast_error(gram_of(v), history[: order + 1], 9 + ahead, rule) < 1e-9


def test_unshrunk_fit_is_the_constrained_minimum() -> None:
    v, history, target = values(2, 6, 30), [4, 2, 1], 5
    G = gram_of(v)
    prior = [*weights("newton", history, target, order=1), 0.0]
    fitted = gram.fit_weights(G, history, target, prior=prior, shrink=0.0)
    best = gram.forecast_error(G, history, target, fitted)
    assert fitted.sum() == pytest.approx(1.0)
    for move in np.random.default_rng(1).normal(size=(50, 3)) * 0.1:
        assert gram.forecast_error(G, history, target, fitted + move - move.mean()) >= best
    free = gram.fit_weights(G, history, target, prior=prior, shrink=0.0, sum_to_one=False)
    assert gram.forecast_error(G, history, target, free) < best
    # random values have nothing in common: the free fit shrinks towards zero, which is why it is not the default
    assert abs(free.sum()) < 0.5


def test_shrinking_leads_from_the_fit_to_the_prior() -> None:
    G, history, prior = gram_of(values()), [4, 2], [2.0, -1.0]
    fits = [gram.fit_weights(G, history, 6, prior=prior, shrink=s) for s in (1e-6, 1e-2, 1.0, 1e9)]
    errors = [gram.forecast_error(G, history, 6, fit) for fit in fits]
    assert errors == sorted(errors)
    assert fits[-1] == pytest.approx(prior)


@pytest.mark.parametrize("v", [np.zeros((1, 5, 4)), np.ones((2, 5, 4))], ids=["zero", "constant"])
def test_still_values_keep_the_prior(v: np.ndarray) -> None:
    fitted = gram.fit_weights(gram_of(v), [3, 2, 0], 4, prior=[2.0, -1.0, 0.0])
    assert fitted == pytest.approx([2.0, -1.0, 0.0])
    assert gram.forecast_error(gram_of(v), [3, 2], 4, [2.0, -1.0]) == pytest.approx(0.0)


def test_similarity_maps() -> None:
    v = values()
    G = gram_of(v)
    cosine, distance = gram.cosine(G), gram.relative_l2(G)
    norms = np.linalg.norm(v, axis=-1)
    assert cosine[2, 5] == pytest.approx(np.mean((v[:, 2] * v[:, 5]).sum(-1) / norms[:, 2] / norms[:, 5]))
    assert distance[2, 5] == pytest.approx(np.mean(np.linalg.norm(v[:, 2] - v[:, 5], axis=-1) / norms[:, 2]))
    assert np.diag(cosine) == pytest.approx(np.ones(9))
    assert np.abs(np.diag(distance)).max() < 1e-6
    assert np.isfinite(gram.cosine(np.zeros((1, 3, 3)))).all()


def test_gram_refusals() -> None:
    with pytest.raises(ValueError, match=r"expected a Gram matrix of shape \[prompts, steps, steps\], got \[3, 3\]"):
        gram.scale(np.eye(3))
    with pytest.raises(ValueError, match="2 weights for a history of 1"):
        gram.fit_weights(gram_of(values()), [1], 2, prior=[1.0, 0.0])


def profile() -> Profile:
    site = SiteProfile("blocks.1 -> out", True, 90.0, 4096, gram_of(values()), np.linspace(0, 1, 9))
    return Profile(9, 100.0, (site,), tuple(1 - i / 9 for i in range(9)), "3f9a")


def test_profile_round_trip(tmp_path: Path) -> None:
    before = profile()
    before.save(tmp_path / "p.safetensors")
    after = Profile.load(tmp_path / "p.safetensors")
    assert (after.steps, after.total_flops, after.clock, after.fingerprint) == (9, 100.0, before.clock, "3f9a")
    site, saved = before.sites[0], after.site("blocks.1 -> out")
    assert (saved.residual, saved.flops_saved, saved.bytes_kept) == (True, 90.0, 4096)
    assert np.array_equal(saved.gram, site.gram)
    assert np.array_equal(saved.sensitivity, site.sensitivity)


def test_profile_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no site 'x' in this profile; it has \['blocks.1 -> out'\]"):
        profile().site("x")
    with pytest.raises(ValueError, match=r"sensitivity has shape \[3\], expected \[9\]"):
        SiteProfile("x", False, 1.0, 1, gram_of(values()), np.ones(3))
    with pytest.raises(ValueError, match="not finite"):
        SiteProfile("x", False, 1.0, 1, gram_of(values()) * np.nan, np.ones(9))
    with pytest.raises(ValueError, match="measured over 9 steps, the profile has 8"):
        Profile(8, 100.0, profile().sites)
    with pytest.raises(ValueError, match="saves 90 FLOPs of a call that costs 50"):
        Profile(9, 50.0, profile().sites)
    (tmp_path / "junk").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match="no safetensors file"):
        Profile.load(tmp_path / "junk")
    save_file({"x": np.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="holds no profile"):
        Profile.load(tmp_path / "other")
