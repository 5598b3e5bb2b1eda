"""Search: a profile and a budget in, the best schedules by predicted error out.

For each site the budget says how many steps may be computed. A dynamic programme then finds the best set of that many
steps and, per gap between them, the best weight rule: its state is the last few computed steps, and the cost of a gap
is its forecast errors weighted by the sensitivity of the final result (``gap_costs.py``). No denoiser runs; ``compile``
rolls out the best few proposals and lets the truth decide.

Proposals differ in the site, in how errors inside a gap add up, in the weight rules allowed, and in how noisy the
history is taken to be. They are ranked by one yardstick: ``E = A + kappa E B``, where A is the coherent cross-validated
error, B how much of the history's own error the weights pass on, and kappa E that error: ``E = A / (1 - kappa B)``. A
schedule with ``kappa B >= 1`` feeds on its own errors and ranks last.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffcache import gram
from diffcache.budget import Budget, Exact, Quality, Speedup
from diffcache.gap_costs import COUNTINGS, GapCosts, Index, WeightRule, gap_costs, gap_error, weight_rules
from diffcache.profile_record import Profile, SiteProfile
from diffcache.schedule import COMPUTE, Cell, Forecast, Row, Schedule

Array = NDArray[np.float64]

PREDICTORS = ("reuse", "newton", "fitted")
# Gaps longer than this are searched only where the budget leaves no choice: forecasts that far ahead are poor, and the
# table grows with the square of it.
MAX_GAP = 12
MIN_STEPS = 4
# Assumed squared errors of history values, relative like all errors here: each gives its own proposals.
NOISES = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1)
# Squared error of the history per squared error of the final result. Measured on 21 cases of an analytic denoiser
# (Gaussian mixture, 20 to 50 steps, held-out seeds): error of the first-ranked proposal relative to the best evenly
# spaced extrapolation 1.50, 0.72, 0.62, 0.67, 0.80 (geometric means) for FEEDBACK 0, 10, 20, 30, 40.
FEEDBACK = 20.0
# A Quality budget does not look below one computed step in this many.
WIDEST_FOR_QUALITY = 8


def search(
    profile: Profile,
    budget: Budget,
    *,
    sites: Sequence[str] | None = None,
    max_history: int = 3,
    predictors: Sequence[str] = PREDICTORS,
    proposals: int = 4,
) -> list[Schedule]:
    """Up to ``proposals`` different schedules within the budget, best predicted first; the same every time.

    ``sites`` restricts the candidates, ``max_history`` the tensors a forecast may read, ``predictors`` the weight rules
    (see ``gap_costs.weight_rules``). Under ``Speedup`` the order is by predicted error, under ``Quality`` by FLOPs. No
    site and no assumption about noise is proposed again while others are not: predictions mislead most in what those
    have in common, and real generations decide.
    Raises ValueError when no site can reach the budget, saying what can be reached.
    """
    if isinstance(budget, Exact):
        return [_exact(profile)]
    if profile.steps < MIN_STEPS:
        raise ValueError(
            f"this profile has {profile.steps} steps; reuse between steps needs at least {MIN_STEPS}. "
            "Sample with more steps, or use Exact()"
        )
    if max_history < 1 or proposals < 1:
        raise ValueError(f"max_history and proposals must be at least 1, got {max_history} and {proposals}")
    candidates = list(profile.sites) if sites is None else [profile.site(name) for name in sites]
    candidates = [site for site in candidates if site.flops_saved > 0]
    if not candidates:
        raise ValueError("no candidate site saves any FLOPs; name other sites, or use Exact()")
    if isinstance(budget, Speedup):
        candidates = [site for site in candidates if computed_at_speed(profile, site, budget.factor) >= 1]
        if not candidates:
            raise ValueError(_out_of_reach(profile, budget, sites))
    found: dict[tuple[Row, ...], Proposal] = {}
    for site in candidates:
        for planner in _planners(profile, site, budget, max_history, predictors):
            proposal = planner.fastest(budget) if isinstance(budget, Quality) else planner.proposal(planner.most)
            if proposal is not None:
                known = found.setdefault(proposal.schedule.rows, proposal)
                assert known.schedule.flops_fraction == proposal.schedule.flops_fraction
    if not found:
        return [_exact(profile)]
    # sorted() is stable, so that ties keep the order of the sites
    ranked = sorted(found.values(), key=lambda proposal: proposal.expected)
    if isinstance(budget, Quality):
        ranked = sorted(ranked, key=lambda proposal: proposal.schedule.flops_fraction)
    return [proposal.schedule for proposal in _spread(ranked, proposals)]


def _spread(ranked: Sequence[Proposal], count: int) -> list[Proposal]:
    """The best of each kind, then the second best of each, in the order that they were ranked in."""
    of_kind = Counter[tuple[str, float]]()
    turn = []
    for proposal in ranked:
        turn.append(of_kind[proposal.kind])
        of_kind[proposal.kind] += 1
    chosen = sorted(range(len(ranked)), key=lambda i: (turn[i], i))[:count]
    return [ranked[i] for i in sorted(chosen)]


def cost_fraction(profile: Profile, site: SiteProfile, computed: int) -> float:
    """FLOPs of a generation with this many computed steps, as a share of the uncached one's."""
    forecast = (profile.steps - computed) * (1.0 - site.flops_saved / profile.total_flops)
    return (computed + forecast) / profile.steps


def computed_at_speed(profile: Profile, site: SiteProfile, factor: float) -> int:
    """The most computed steps at which this site still reaches the factor; 0 or less when it cannot.

    From ``T / cost(n) >= factor`` with ``cost(n) = n + (T - n) (1 - saved)``.
    """
    saved = site.flops_saved / profile.total_flops
    most = (profile.steps / factor - profile.steps * (1.0 - saved)) / saved
    # the factor itself is often a ratio of step counts: do not lose a step to rounding
    return math.floor(most + 1e-9)


def predicted_error(profile: Profile, schedule: Schedule) -> float:
    """Predicted relative squared error of the final result; errors add up coherently inside a gap, then over gaps.

    Judged on the calibration prompts themselves: for weights fitted on them it is too low (``search`` cross-validates).
    """
    total = 0.0
    for row in schedule.rows:
        site = profile.site(row.site)
        errors = np.zeros((profile.steps, profile.steps))
        for step, cell in enumerate(row.cells):
            if isinstance(cell, Forecast):
                errors[step, step] += 1.0
                np.subtract.at(errors[step], list(cell.steps), cell.weights)
            elif errors.any():
                total += gap_error(site, errors)
                errors[:] = 0.0
        if errors.any():
            total += gap_error(site, errors)
    return total


@dataclass(frozen=True, eq=False)
class Proposal:
    """A schedule, its expected relative squared error (the yardstick in the module's docstring), and its kind.

    Of one kind are proposals for the same site under the same assumption about the noise of history.
    """

    schedule: Schedule
    expected: float
    kind: tuple[str, float]


@dataclass(frozen=True, eq=False)
class _Planner:
    """The dynamic programme of one site under one set of assumptions, walked up to ``most`` computed steps."""

    profile: Profile
    site: SiteProfile
    rules: dict[str, WeightRule]
    table: GapCosts
    memory: int
    most: int
    label: str
    history_noise: float
    # [T, g1, ..., L]: the cheapest rule's cost, and the number of that rule
    costs: Array
    cheapest: Index
    # best[n - 1][s0, g1, ...]: least cost of all gaps before s0 with n computed steps up to s0; `came` the oldest gap
    best: list[Array]
    came: list[Index]

    def proposal(self, computed: int) -> Proposal | None:
        """The best schedule with exactly this many computed steps; None when gaps would grow beyond the table."""
        chosen = _trace_back(self.costs, self.best, self.came, computed)
        if chosen is None:
            return None
        cells: list[Cell] = [COMPUTE] * self.profile.steps
        error = noise = 0.0
        for position, newest in enumerate(chosen):
            end = chosen[position + 1] if position + 1 < len(chosen) else self.profile.steps
            history = chosen[max(0, position + 1 - self.memory) : position + 1][::-1]
            gaps = [newer - older for newer, older in itertools.pairwise(history)]
            axes = self.costs.ndim - 2
            # with a memory of one the table still has an axis for the gap before
            before = newest - chosen[position - 1] if position and self.memory == 1 else 0
            place = (newest, *[*gaps, before, *[0] * axes][:axes], end - newest)
            number = int(self.cheapest[place])
            error += float(self.table.error["coherent"][(number, *place)])
            noise += float(self.table.noise["coherent"][(number, *place)])
            self._fill(cells, history, range(newest + 1, end), self.table.rules[number])
        row = Row(self.site.name, self.site.residual, tuple(cells))
        schedule = Schedule(
            self.profile.steps,
            (row,),
            fingerprint=self.profile.fingerprint,
            clock=self.profile.clock,
            origin=f"search(site={self.site.name}, computed={computed}, {self.label})",
            flops_fraction=cost_fraction(self.profile, self.site, computed),
        )
        left = 1.0 - FEEDBACK * noise
        return Proposal(schedule, error / left if left > 0 else math.inf, (self.site.name, self.history_noise))

    def fastest(self, budget: Quality) -> Proposal | None:
        """The proposal with the fewest computed steps whose expected error stays within the budget."""
        allowed = budget.squared_error()
        found = None
        low, high = 1, self.most
        # the expected error falls with every step more, so halve instead of walking
        while low <= high:
            middle = (low + high) // 2
            proposal = self.proposal(middle)
            if proposal is not None and proposal.expected <= allowed:
                found, high = proposal, middle - 1
            else:
                low = middle + 1
        return found

    def _fill(self, cells: list[Cell], history: Sequence[int], targets: Sequence[int], label: str) -> None:
        if not targets:
            return
        weights = self.rules[label](gram.mean_gram(self.site.gram), np.array([history]), np.array(targets))[0]
        for step, row in zip(targets, weights.tolist(), strict=True):
            # a zero weight would keep a tensor alive that adds nothing
            used = [(made, weight) for made, weight in zip(history, row, strict=True) if weight != 0.0]
            cells[step] = Forecast(tuple(made for made, _ in used), tuple(weight for _, weight in used))


def _planners(
    profile: Profile, site: SiteProfile, budget: Budget, memory: int, names: Sequence[str]
) -> Iterator[_Planner]:
    """One planner for each set of assumptions about one site."""
    steps = profile.steps
    if isinstance(budget, Speedup):
        fewest = most = min(computed_at_speed(profile, site, budget.factor), steps - 1)
    else:
        fewest, most = math.ceil(steps / WIDEST_FOR_QUALITY), steps - 1
    max_gap = min(steps, max(MAX_GAP, math.ceil(1.5 * steps / fewest)))
    rules = weight_rules(site, profile.clock, names, memory)
    table = gap_costs(site, rules, memory, max_gap)
    families = {"any weights": list(rules)}
    fixed = [label for label in rules if not label.startswith("fitted")]
    if fixed and len(fixed) < len(rules):
        families["fixed weights"] = fixed
    for counting, family, noise in itertools.product(COUNTINGS, families, NOISES):
        numbers = np.array([table.rules.index(label) for label in families[family]])
        every = table.error[counting][numbers] + noise * table.noise[counting][numbers]
        costs = every.min(axis=0)
        best, came = _walk(costs, most)
        label = f"{counting} errors, {family}, noise={noise:g}"
        cheapest = numbers[every.argmin(axis=0)]
        yield _Planner(profile, site, rules, table, memory, most, label, noise, costs, cheapest, best, came)


def _walk(costs: Array, most: int) -> tuple[list[Array], list[Index]]:
    """Forward pass for 1 ... ``most`` computed steps.

    ``best'[s0 + L, L, g1] = min_{g2} best[s0, g1, g2] + cost[s0, g1, g2, L]``: the oldest gap drops out of the state.
    """
    steps, reach = costs.shape[0], costs.shape[-1] - 1
    state = np.full(costs.shape[:-1], np.inf)
    state[(0,) * state.ndim] = 0.0
    best, came = [state], [np.zeros(state.shape, dtype=np.intp)]
    for _ in range(most - 1):
        after = np.full(state.shape, np.inf)
        dropped = np.zeros(state.shape, dtype=np.intp)
        for gap in range(1, min(reach, steps - 1) + 1):
            total = state[: steps - gap] + costs[: steps - gap, ..., gap]
            after[gap:, gap] = total.min(axis=-1)
            dropped[gap:, gap] = total.argmin(axis=-1)
        best.append(after)
        came.append(dropped)
        state = after
    return best, came


def _trace_back(costs: Array, best: list[Array], came: list[Index], computed: int) -> list[int] | None:
    """The computed steps of the best walk with exactly ``computed`` of them; None when there is none."""
    steps, reach = costs.shape[0], costs.shape[-1] - 1
    finish = np.full(best[0].shape, np.inf)
    for gap in range(1, min(reach, steps) + 1):
        finish[steps - gap] = best[computed - 1][steps - gap] + costs[steps - gap, ..., gap]
    if not np.isfinite(finish).any():
        return None
    place = tuple(int(i) for i in np.unravel_index(int(finish.argmin()), finish.shape))
    chosen = [place[0]]
    for count in range(computed - 1, 0, -1):
        newest, gap, *older = place
        place = (newest - gap, *older, int(came[count][place]))
        chosen.append(place[0])
    assert not any(place), "a walk must begin at step 0, without history"
    return chosen[::-1]


def _exact(profile: Profile) -> Schedule:
    return Schedule(profile.steps, fingerprint=profile.fingerprint, clock=profile.clock, origin="exact")


def _out_of_reach(profile: Profile, budget: Speedup, sites: Sequence[str] | None) -> str:
    candidates = profile.sites if sites is None else [profile.site(name) for name in sites]
    site = max(candidates, key=lambda candidate: candidate.flops_saved)
    highest = 1.0 / cost_fraction(profile, site, 1)
    return (
        f"Speedup({budget.factor:g}) is out of reach: the site that saves most, '{site.name}' "
        f"({100 * site.flops_saved / profile.total_flops:.0f} % of a call), reaches {highest:.2f}x with one of "
        f"{profile.steps} steps computed. Ask for less than {math.floor(100 * highest) / 100:.2f}"
        + ("" if sites is None else ", or do not restrict sites")
    )
