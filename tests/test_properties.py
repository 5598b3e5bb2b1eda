"""For every schedule: a constant trajectory is a fixed point, reuse adds no work, only what is read later is kept."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diffcache import gap_costs, gram
from diffcache.graphs import count_ops
from diffcache.predictors import PREDICTORS
from diffcache.predictors import weights as predict
from diffcache.profiling import Calibration
from diffcache.schedule import COMPUTE, Cell, Forecast, Row, Schedule
from diffcache.sites import Site
from tests.generation import STEPS, Request, TextDiT, calibration, sample, walk

COMPUTED = (0, 1, 3, 4)
# A residual site adds the forecast of `value - anchor` to the anchor: the difference and the sum round once each.
RESIDUAL_ULP = 2
# Weights that sum to one only to rounding scale the value by that rounding.
FITTED_ULP = 4


@functools.cache
def found() -> Calibration:
    return calibration(Still)


def chosen_sites() -> dict[str, Site]:
    """Four sites that do not lie in one another's way: two direct, two residual."""
    names = ("attn:blocks.0.attn", "ff:blocks.1.mlp", "block:blocks.2", "block:blocks.1")
    return {name: found().sites[name] for name in names}


def cells_of(name: str, **options: float) -> tuple[Cell, ...]:
    cells: list[Cell] = []
    for step in range(STEPS):
        history = [made for made in reversed(COMPUTED) if made < step]
        if step in COMPUTED:
            cells.append(COMPUTE)
            continue
        weights = predict(name, history, step, **options)
        cells.append(Forecast(tuple(history[: len(weights)]), tuple(weights)))
    return tuple(cells)


def schedule_for(sites: list[Site], cells: tuple[Cell, ...]) -> Schedule:
    return Schedule(STEPS, tuple(Row(site.name, site.residual, cells) for site in sites), clock=found().profile.clock)


class Still(TextDiT):
    """The timestep only counts the steps: with one latent at every call, nothing inside changes."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x, t * 0.0 + 500.0, prompt)


def constant_trajectory(denoiser: nn.Module) -> list[torch.Tensor]:
    request = Request(seed=11)
    x, prompt = request.latent(), request.embeds()
    with torch.no_grad():
        return [denoiser(x, t, prompt) for t in request.times()]


def eager_constant() -> torch.Tensor:
    first, *others = constant_trajectory(found().captured.denoiser)
    assert all(torch.equal(first, other) for other in others)
    return first


def ulps(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference in units in the last place of the largest value."""
    return float((a - b).abs().max() / (torch.finfo(a.dtype).eps * b.abs().max()))


def subsets(names: Any) -> list[tuple[str, ...]]:
    names = list(names)
    return [s for size in range(1, len(names) + 1) for s in itertools.combinations(names, size)]


@pytest.mark.parametrize("name", sorted(PREDICTORS))
def test_a_constant_trajectory_is_a_fixed_point(name: str) -> None:
    """Over all subsets of sites: bitwise for direct sites, within a few units in the last place for residual ones."""
    expected, sites = eager_constant(), chosen_sites()
    cells = cells_of(name)
    base = found().cached(schedule_for(list(sites.values()), cells))
    for subset in subsets(sites):
        denoiser = base.with_schedule(schedule_for([sites[n] for n in subset], cells))
        results = constant_trajectory(denoiser)
        assert denoiser.steps_forecast == STEPS - len(COMPUTED)
        if any(sites[n].residual for n in subset):
            assert max(ulps(result, expected) for result in results) <= RESIDUAL_ULP, subset
        else:
            assert all(torch.equal(result, expected) for result in results), subset


@pytest.mark.parametrize("site", ["output", "stack0:blocks.0..blocks.2", "stack:blocks.0..blocks.2"])
@pytest.mark.parametrize("name", sorted(PREDICTORS))
def test_the_large_sites_are_fixed_points_too(name: str, site: str) -> None:
    record = found().sites[site]
    results = constant_trajectory(found().cached(schedule_for([record], cells_of(name))))
    if record.residual:
        assert max(ulps(result, eager_constant()) for result in results) <= RESIDUAL_ULP
    else:
        assert all(torch.equal(result, eager_constant()) for result in results)


def test_fitted_weights_keep_a_constant_trajectory() -> None:
    """The search's own weights, fitted on another trajectory, sum to one to rounding."""
    record = found().profile.site("output")
    rules = gap_costs.weight_rules(record, found().profile.clock, ("fitted",), 3)
    assert rules
    mean = gram.mean_gram(record.gram)
    for label, rule in rules.items():
        cells: list[Cell] = []
        for step in range(STEPS):
            history = [made for made in reversed(COMPUTED) if made < step][:3]
            if step in COMPUTED:
                cells.append(COMPUTE)
                continue
            weights = rule(mean, np.array([history]), np.array([step]))[0, 0]
            cells.append(Forecast(tuple(history), tuple(float(w) for w in weights)))
        for name in ("output", "attn:blocks.0.attn", "block:blocks.2"):
            results = constant_trajectory(found().cached(schedule_for([found().sites[name]], tuple(cells))))
            assert max(ulps(result, eager_constant()) for result in results) <= FITTED_ULP, (label, name)


def test_computing_everything_is_eager() -> None:
    """With every site's row present, and on a real trajectory."""
    rows = tuple(Row(site.name, site.residual, (COMPUTE,) * STEPS) for site in found().sites.values())
    denoiser = found().cached(Schedule(STEPS, rows, clock=found().profile.clock))
    for seed in range(3):
        request = Request(seed=seed, prompt=seed)
        assert torch.equal(sample(denoiser, request), sample(found().captured.denoiser, request))


def test_more_reuse_never_adds_operations() -> None:
    """Ops of a column with one more site reused, for all subsets."""
    sites, reuse = chosen_sites(), (COMPUTE, *(Forecast((0,), (1.0,)) for _ in range(STEPS - 1)))
    base = found().cached(schedule_for(list(sites.values()), reuse))
    request = Request()
    bound = base.captured.bind((request.latent(), request.times()[0], request.embeds()), {})
    ops: dict[frozenset[str], int] = {frozenset(): 10**9}
    for subset in subsets(sites):
        denoiser = base.with_schedule(schedule_for([sites[n] for n in subset], reuse))
        programs = denoiser.programs(denoiser.captured.variants[0], bound)
        full = count_ops(programs.full().module.graph)
        ops[frozenset(subset)] = count_ops(programs.program(denoiser.schedule, 1).module.graph)
        assert ops[frozenset(subset)] < full
    residual = {name for name, site in sites.items() if site.residual}
    for subset, count in ops.items():
        for name in set(sites) - subset:
            # a residual reuse adds its anchor; where nothing else dies with it that is the one op it may cost
            assert ops[subset | {name}] <= count + (name in residual), (subset, name)


@st.composite
def random_schedules(draw: st.DrawFn) -> Schedule:
    sites = draw(st.lists(st.sampled_from(sorted(found().sites)), min_size=1, max_size=4, unique=True))
    rows = []
    for name in sites:
        cells: list[Cell] = [COMPUTE]
        for step in range(1, STEPS):
            computed = [s for s in range(step - 1, -1, -1) if cells[s] is COMPUTE]
            count = draw(st.integers(0, min(3, len(computed))))
            if count == 0:
                cells.append(COMPUTE)
                continue
            read = sorted(draw(st.permutations(computed))[:count], reverse=True)
            rest = draw(st.lists(st.floats(-1, 1), min_size=count - 1, max_size=count - 1))
            cells.append(Forecast(tuple(read), (1.0 - sum(rest), *rest)))
        rows.append(Row(name, found().sites[name].residual, tuple(cells)))
    return Schedule(STEPS, tuple(rows), clock=found().profile.clock)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(schedule=random_schedules())
def test_random_schedules_run_and_keep_only_what_is_live(schedule: Schedule) -> None:
    denoiser = found().cached(schedule)
    for step, latent in enumerate(walk(denoiser, Request(seed=5))):
        assert torch.isfinite(latent).all()
        live = schedule.live_after(step)
        expected = {(row, made) for row, r in enumerate(schedule.rows) for made in live.get(r.site, ())}
        held = {(row, made) for stream in denoiser._streams for row, _, made in stream.history}
        assert held == expected
    assert not denoiser._streams
    forecast = STEPS - len(schedule.computed_steps())
    assert (denoiser.steps_computed, denoiser.steps_forecast) == (STEPS - forecast, forecast)
    if not forecast:
        assert torch.equal(latent, sample(found().captured.denoiser, Request(seed=5)))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(schedule=random_schedules(), seed=st.integers(0, 3))
def test_random_schedules_repeat_bitwise(schedule: Schedule, seed: int) -> None:
    denoiser = found().cached(schedule)
    first = sample(denoiser, Request(seed=seed))
    next(walk(denoiser, Request(seed=seed + 1)))  # an interrupted one in between
    assert torch.equal(sample(denoiser, Request(seed=seed)), first)
