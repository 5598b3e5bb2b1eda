"""Search: the dynamic programme against brute force, budgets, refusals, and real roll-outs of an analytic denoiser."""

import itertools
import math

import numpy as np
import pytest

from diffcache import gap_costs, gram, recipes, searching
from diffcache.budget import Exact, Quality, Speedup
from diffcache.profile_record import Profile, SiteProfile
from diffcache.schedule import Forecast, Schedule, SiteChoice
from diffcache.searching import predicted_error, search


class Mixture:
    """Exact flow-matching velocity of a Gaussian mixture in ``D`` dimensions, sampled with Euler steps."""

    def __init__(self, steps: int, shift: float) -> None:
        u = np.linspace(1, 0, steps + 1)
        self.clock = shift * u / (1 + (shift - 1) * u)
        self.centres = np.random.default_rng(0).normal(size=(12, 48))
        self.spread = 0.35

    def velocity(self, x: np.ndarray, t: float) -> np.ndarray:
        variance = (1 - t) ** 2 * self.spread**2 + t * t
        offset = x[:, None] - (1 - t) * self.centres
        logits = -(offset**2).sum(-1) / (2 * variance)
        share = np.exp(logits - logits.max(1, keepdims=True))
        share /= share.sum(1, keepdims=True)
        clean = self.centres + (1 - t) * self.spread**2 / variance * offset
        return (share[..., None] * (t / variance * offset - clean)).sum(1)

    def roll(
        self, x: np.ndarray, schedule: Schedule | None = None, wrong: tuple[int, np.ndarray] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Final result ``[P, D]`` and the velocities ``[T, P, D]``; ``wrong`` adds an error at one step."""
        history: list[np.ndarray] = []
        for step, (t, after) in enumerate(itertools.pairwise(self.clock)):
            cell = schedule.rows[0].cells[step] if schedule is not None else None
            if isinstance(cell, Forecast):
                v = sum(w * history[made] for made, w in zip(cell.steps, cell.weights, strict=True))
            else:
                v = self.velocity(x, t)
            if wrong is not None and wrong[0] == step:
                v = v + wrong[1]
            history.append(v)
            x = x + (after - t) * v
        return x, np.stack(history)

    def profile(self, prompts: int, seed: int) -> Profile:
        noise = np.random.default_rng(seed).normal(size=(prompts, 48))
        final, v = self.roll(noise)
        G = np.einsum("tpd,spd->pts", v, v)
        sensitivity = np.zeros(len(v))
        for step in range(len(v)):
            error = v[max(step - 1, 0)] - v[max(step, 1)]
            error *= 0.02 * np.sqrt(gram.scale(G))[:, None] / np.linalg.norm(error, axis=1, keepdims=True)
            moved, _ = self.roll(noise, wrong=(step, error))
            sensitivity[step] = np.mean(((moved - final) ** 2).sum(1) / (final**2).sum(1)) / 0.02**2
        site = SiteProfile("output", False, 0.99, 1, G, sensitivity)
        return Profile(len(v), 1.0, (site,), tuple(self.clock[:-1].tolist()))

    def error(self, schedule: Schedule) -> float:
        """Relative L2 to the uncached result on 64 trajectories that no calibration has seen."""
        noise = np.random.default_rng(99).normal(size=(64, 48))
        final, cached = self.roll(noise)[0], self.roll(noise, schedule)[0]
        return math.sqrt(np.mean(((cached - final) ** 2).sum(1) / (final**2).sum(1)))


def smooth_profile(steps: int = 8, saved: float = 0.9, names: tuple[str, ...] = ("stack",), seed: int = 0) -> Profile:
    generator = np.random.default_rng(seed)
    t = np.linspace(0, 1, steps)
    basis = np.stack([np.exp(-k * t) * np.cos(3 * k * t + k) for k in range(6)], axis=1)
    sites = []
    for name in names:
        v = np.einsum("tk,pkd->ptd", basis, generator.normal(size=(3, 6, 24)))
        sites.append(SiteProfile(name, True, saved, 1, np.einsum("ptd,psd->pts", v, v), generator.random(steps)))
    return Profile(steps, 1.0, tuple(sites), tuple((1 - t).tolist()), "3f9a")


def speed(profile: Profile, computed: int) -> Speedup:
    # a hair less, so that rounding does not cost a step
    return Speedup(1 / searching.cost_fraction(profile, profile.sites[0], computed) - 1e-9)


@pytest.mark.parametrize("counting", gap_costs.COUNTINGS)
@pytest.mark.parametrize("memory", [1, 2, 3, 4])
@pytest.mark.parametrize("computed", [1, 2, 4, 6])
def test_dynamic_programme_equals_brute_force(computed: int, memory: int, counting: str) -> None:
    profile = smooth_profile(8)
    site = profile.sites[0]
    rules = gap_costs.weight_rules(site, profile.clock, searching.PREDICTORS, memory)
    costs = gap_costs.gap_costs(site, rules, memory, 8).error[counting].min(axis=0)
    best, came = searching._walk(costs, computed)
    chosen = searching._trace_back(costs, best, came, computed)

    def total(steps: tuple[int, ...]) -> float:
        return sum(brute_gap(profile, rules, memory, counting, steps, i) for i in range(len(steps)))

    every = [(0, *rest) for rest in itertools.combinations(range(1, 8), computed - 1)]
    assert chosen is not None
    assert total(tuple(chosen)) == pytest.approx(min(map(total, every)), rel=1e-9, abs=1e-15)


def brute_gap(
    profile: Profile, rules: dict, memory: int, counting: str, steps: tuple[int, ...], position: int
) -> float:
    """The same cost, written down one gap, one rule, one fold and one step at a time."""
    site = profile.sites[0]
    end = (*steps, profile.steps)[position + 1]
    history = steps[max(0, position + 1 - memory) : position + 1][::-1]
    targets = np.arange(history[0] + 1, end)
    whole = gram.mean_gram(site.gram)
    costs = []
    for label, rule in rules.items():
        folds = gap_costs._folds(site) if label.startswith("fitted") else [(whole, whole)]
        cost = 0.0
        for fit, held in folds:
            errors = np.eye(profile.steps)[targets]
            for error, row in zip(errors, rule(fit, np.array([history]), targets)[0], strict=True):
                error[list(history)] -= row
            weighted = np.sqrt(site.sensitivity[targets])[:, None] * errors
            if counting == "coherent":
                weighted = weighted.sum(axis=0, keepdims=True)
            cost += float(np.einsum("mi,ij,mj->", weighted, held, weighted)) / len(folds)
        costs.append(max(cost, 0.0))
    return min(costs)


@pytest.mark.parametrize("max_history", [1, 2, 3])
@pytest.mark.parametrize("computed", [1, 3, 6, 11])
def test_speed_budget_is_met_with_exactly_as_many_steps(computed: int, max_history: int) -> None:
    profile = smooth_profile(12)
    budget = speed(profile, computed)
    found = search(profile, budget, max_history=max_history)
    assert 1 <= len(found) <= 4
    assert len({schedule.rows for schedule in found}) == len(found)
    for schedule in found:
        assert len(schedule.computed_steps()) == computed
        assert 1 / schedule.flops_fraction >= budget.factor
        assert schedule.fingerprint == "3f9a"
        assert schedule.clock == profile.clock
        longest = max(len(c.steps) for row in schedule.rows for c in row.cells if isinstance(c, Forecast))
        assert longest <= max_history
    assert search(profile, budget, max_history=max_history) == found


def test_predictors_and_sites_can_be_chosen() -> None:
    profile = smooth_profile(12, names=("a", "b"))
    budget = speed(profile, 5)
    assert {row.site for s in search(profile, budget, sites=["b"]) for row in s.rows} == {"b"}
    (reuse, *_) = search(profile, budget, predictors=("reuse",))
    assert all(cell.is_reuse for row in reuse.rows for cell in row.cells if isinstance(cell, Forecast))
    assert search(profile, budget, predictors=("taylor", "hermite"))[0].rows


def test_quality_budget() -> None:
    profile = smooth_profile(16)
    counts = []
    for rel_l2 in (1e-4, 1e-2, 0.3, 0.9):
        found = search(profile, Quality(rel_l2=rel_l2))
        assert predicted_error(profile, found[0]) <= rel_l2**2
        counts.append(len(found[0].computed_steps()))
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < counts[0]
    exact = Schedule(16, fingerprint="3f9a", clock=profile.clock, origin="exact")
    assert search(profile, Quality(rel_l2=1e-9)) == [exact]


def test_exact_budget() -> None:
    (schedule,) = search(smooth_profile(3), Exact())
    assert not schedule.rows


def test_predicted_error_of_the_exact_schedule_is_zero() -> None:
    profile = smooth_profile(8)
    assert predicted_error(profile, Schedule.exact(8)) == 0.0


def test_refusals() -> None:
    with pytest.raises(ValueError, match="has 3 steps; reuse between steps needs at least 4"):
        search(smooth_profile(3), Speedup(1.5))
    message = (
        r"Speedup\(3\) is out of reach: .* 'stack' \(50 % of a call\), reaches 1.78x with one of 8 .* less than 1.77"
    )
    with pytest.raises(ValueError, match=message):
        search(smooth_profile(8, saved=0.5), Speedup(3.0))
    with pytest.raises(ValueError, match=r"no site 'x' in this profile; it has \['stack'\]"):
        search(smooth_profile(8), Speedup(1.5), sites=["x"])
    with pytest.raises(ValueError, match="saves any FLOPs"):
        search(smooth_profile(8, saved=0.0), Speedup(1.5))
    with pytest.raises(ValueError, match="give no rule with max_history=1; add 'reuse'"):
        search(smooth_profile(8), Speedup(1.5), predictors=("newton",), max_history=1)
    with pytest.raises(ValueError, match="unknown predictor 'magic'"):
        search(smooth_profile(8), Speedup(1.5), predictors=("magic",))


@pytest.mark.parametrize("computed", [7, 9, 14])
def test_search_beats_even_spacing_on_unseen_trajectories(computed: int) -> None:
    mixture = Mixture(28, shift=3.0)
    profile = mixture.profile(prompts=4, seed=1)
    site = SiteChoice("output", False, 0.99, "output")
    even = min(
        mixture.error(
            recipes.evenly(computed=computed, predictor=name, order=order, site="output").schedule(
                recipes.Plan(28, [site])
            )
        )
        for name, order in [("taylor", 1), ("taylor", 2), ("newton", 2)]
    )
    found = [mixture.error(schedule) for schedule in search(profile, speed(profile, computed))]
    # the first by prediction already wins; the best of four, which roll-outs pick, wins clearly
    assert found[0] < 0.6 * even
    assert min(found) < 0.5 * even
