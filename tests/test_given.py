"""Weights made from values at run time: what the denoiser does with them, over whole generations."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

import diffcache
from diffcache import recipes
from diffcache.cells import COMPUTE, Given, Online, cell_from_json, cell_to_json
from diffcache.gates import Gate, gate
from diffcache.ops import extrapolate
from diffcache.predictors import FROM_VALUES, weights_from_values
from diffcache.profiling import Calibration
from diffcache.recipes import Part, Predict
from diffcache.recipes.picks import one
from diffcache.runtime import CachedDenoiser
from diffcache.schedule import Schedule
from tests.generation import (
    STEPS,
    Quiet,
    Request,
    calibration,
    compiled,
    make,
    sample,
    schedule_of,
    shared_calibration,
    timestep_embedding,
)

GRID = "CCgCggCg"
FIRST = "block:blocks.0"


@dataclass(frozen=True)
class Case:
    """A rule at a site whose values the tests can make by hand."""

    name: str
    site: str
    probe: str = ""
    history: int = 3
    timed: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def online(self) -> Online:
        return Online(self.name, self.history, self.options, self.timed, self.probe)


CASES = [
    Case("trend", "stack0", FIRST),
    Case("relation", "stack0", "latent", options={"order": 2}),
    Case("decomposed", "output", "latent", history=2, timed=True),
    Case("token_choice", "stack0", FIRST),
    Case("curvature", "stack0"),
    Case("modes", "stack0", history=6),
]
BY_NAME = {case.name: case for case in CASES}


def by_rule(case: Case, grid: str = GRID, found: Calibration | None = None, **options: Any) -> CachedDenoiser:
    found = found or shared_calibration()
    return found.cached(schedule_of(found, {case.site: grid}, online=case.online()), **options)


def by_hand(case: Case, request: Request, grid: str = GRID) -> torch.Tensor:
    """The same generation in plain PyTorch: blocks one by one, history in a list."""
    model, x, prompt = make(), request.latent(), request.embeds()
    clock = [float(t[0]) for t in request.times()]
    made: list[tuple[int, torch.Tensor, torch.Tensor]] = []  # step, value, probe; newest first
    with torch.no_grad():
        for step, t in enumerate(request.times()):
            c = model.time(timestep_embedding(t, 32)) + model.text(prompt).mean(1)
            start = model.embed(x)
            h = model.blocks[0](start, c)
            probe = x.clone() if case.probe == "latent" else h - start
            anchor = None if case.site == "output" else start
            if grid[step] == "C":
                for block in list(model.blocks)[1:]:
                    h = block(h, c)
                value = model.head(h) if anchor is None else h
                made.insert(0, (step, value if anchor is None else value - anchor, probe))
            else:
                past = made[: min(case.history, FROM_VALUES[case.name].newest)]
                at = [clock[s] if case.timed else s for s, _, _ in past]
                looks = {"probe_now": probe, "probe_history": [p for _, _, p in past]} if case.probe else {}
                tensors, table = weights_from_values(
                    case.name, [v for _, v, _ in past], at, clock[step] if case.timed else step, **looks, **case.options
                )
                value = extrapolate(anchor, tensors, table)
            x = x - (value if case.site == "output" else model.head(value)) / request.steps
    return x


def test_every_rule_is_tried() -> None:
    assert set(BY_NAME) == set(FROM_VALUES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_generation_is_what_the_rule_gives_by_hand(case: Case) -> None:
    denoiser, request = by_rule(case), Request(seed=3, batch=2)
    with Quiet():
        first, second = sample(denoiser, request), sample(denoiser, request)
    assert torch.equal(first, second)
    assert torch.equal(first, by_hand(case, request))
    assert denoiser.decisions[0][1] == list(GRID.replace("g", "v"))
    assert denoiser.steps_forecast == 2 * GRID.count("g")
    assert not torch.equal(first, sample(make(), request))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_nothing_changes_so_all_is_reused_bit_for_bit(case: Case) -> None:
    """A denoiser that does not see the time, at a latent that stands still."""
    found = calibration(Timeless)

    def walk(grid: str) -> list[torch.Tensor]:
        denoiser, request = by_rule(case, grid, found), Request(seed=3, batch=2)
        x, prompt = request.latent(), request.embeds()
        with torch.no_grad(), Quiet():
            return [denoiser(x, t, prompt) for t in request.times()]

    assert all(torch.equal(a, b) for a, b in zip(walk("CCgCgggg"), walk("CCrCrrrr"), strict=True))


class Timeless(type(make())):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.time.weight)


@pytest.mark.parametrize("case", [BY_NAME["trend"], BY_NAME["decomposed"]], ids=lambda case: case.name)
def test_through_the_compiler(case: Case) -> None:
    request = Request(seed=3)
    expected = sample(by_rule(case), request)
    with Quiet():
        result = sample(by_rule(case, backend="inductor"), request)
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", [BY_NAME["trend"], BY_NAME["modes"]], ids=lambda case: case.name)
@pytest.mark.parametrize("options", [{"history_dtype": "int8"}, {"offload_history": True}], ids=str)
def test_small_and_offloaded_history(case: Case, options: dict[str, Any]) -> None:
    request = Request(seed=3)
    plain, other = sample(by_rule(case), request), sample(by_rule(case, **options), request)
    error = ((other - plain).norm() / plain.norm()).item()
    assert 0 < error < 0.01 if "history_dtype" in options else error == 0


def test_a_sampler_that_writes_into_its_latent() -> None:
    """The latent is kept as it was, for rules and for gates."""

    def run(denoiser: nn.Module, in_place: bool) -> torch.Tensor:
        request = Request(seed=6)
        x, prompt = request.latent(), request.embeds()
        with torch.no_grad():
            for t in request.times():
                change = denoiser(x, t, prompt) / STEPS
                x = x.sub_(change) if in_place else x - change
        return x

    found = shared_calibration()
    spec = diffcache.schedule.GateSpec("accumulated_change", {"threshold": 0.3})
    gated = found.cached(schedule_of(found, {"stack0": "Cggggggg"}, spec))
    for denoiser in (by_rule(BY_NAME["decomposed"]), by_rule(BY_NAME["relation"]), gated):
        assert torch.equal(run(denoiser, True), run(denoiser, False))
        assert len({tuple(log) for _, log in denoiser.decisions}) == 1
        assert denoiser.steps_forecast


def test_probes_live_as_long_as_what_they_go_with() -> None:
    case, kept = BY_NAME["trend"], []
    denoiser, request = by_rule(case, "CCgCggCg"), Request(seed=3)
    x, prompt = request.latent(), request.embeds()
    with torch.no_grad():
        for step, t in enumerate(request.times()):
            x = x - denoiser(x, t, prompt) / STEPS
            for stream in denoiser._streams:
                probes = stream.deciding.probes.kept[FIRST]
                assert {s for _, _, s in stream.history} == set(probes)
                kept += [weakref.ref(value) for value in probes.values()]
                expected = {0: {0}, 3: {3, 1, 0}, 4: {3, 1, 0}, 6: {6, 3, 1}}.get(step)
                assert expected is None or set(probes) == expected
    assert not denoiser._streams
    assert kept
    del stream, probes
    gc.collect()
    assert not any(ref() is not None for ref in kept)


def test_the_plan_counts_probes() -> None:
    denoiser, request = by_rule(BY_NAME["trend"]), Request(seed=3)
    sample(denoiser, request)
    (programs,) = denoiser._programs.values()
    plan = programs.memory(denoiser.schedule, denoiser.pattern)
    (site,) = {row.site for row in denoiser.schedule.rows}
    one_value = 9 * 16 * 4
    assert plan.entries == {site: 4, f"probe {FIRST}": 4}
    assert plan.entry_bytes == {site: one_value, f"probe {FIRST}": one_value, "probe latent": 9 * 4 * 4}
    assert plan.device_bytes == 8 * one_value
    assert shared_calibration().memory(denoiser.schedule, denoiser.options).device_bytes == plan.device_bytes
    by_latent = by_rule(BY_NAME["decomposed"])
    sample(by_latent, request)
    (programs,) = by_latent._programs.values()
    assert programs.memory(by_latent.schedule, by_latent.pattern).device_bytes == 6 * 9 * 4 * 4
    assert shared_calibration().memory(by_latent.schedule, by_latent.options).device_bytes == 6 * 9 * 4 * 4


@gate("every third")
class EveryThird(Gate):
    """Computes every third step."""

    probe = ""

    def follow(self, moment: Any, numbers: Any) -> Any:
        return numbers.sum(axis=1) == moment.step % 3


def test_under_a_gate() -> None:
    found, case = shared_calibration(), BY_NAME["trend"]
    spec = diffcache.schedule.GateSpec("every third")
    gated = found.cached(schedule_of(found, {"stack0": "Cggggggg"}, spec, case.online()))
    request = Request(seed=3)
    with Quiet():
        result = sample(gated, request)
    ((_, log),) = gated.decisions
    grid = "".join(log)
    assert {"C", "v"} == set(grid)
    assert torch.equal(result, by_hand(case, request, grid.replace("v", "g")))


class TwoStreams(nn.Module):
    """Two streams of tokens that both leave the blocks: a site with two values."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 16), nn.Linear(16, 4)
        self.text, self.text_head = nn.Linear(8, 16), nn.Linear(16, 4)
        self.time = nn.Linear(32, 16)
        self.blocks = nn.ModuleList(Joint() for _ in range(3))

    def forward(self, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        h, e = self.embed(x) + self.time(timestep_embedding(t, 32))[:, None], self.text(prompt)
        for block in self.blocks:
            h, e = block(h, e)
        return self.head(h) + self.text_head(e).mean(1, keepdim=True)


class Joint(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, h: torch.Tensor, e: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        both = torch.tanh(self.image(h)).mean(1, keepdim=True) + torch.tanh(self.text(e)).mean(1, keepdim=True)
        return h + self.image(both * h), e + self.text(both * e)


def two_streams() -> Calibration:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TwoStreams().eval()
    items = (Request(seed=0), Request(seed=50, prompt=50))
    return diffcache.profile(model, items, sample=sample, sensitivity_prompts=0, verbose=False)


def test_each_value_of_a_site_has_weights_of_its_own() -> None:
    found = two_streams()
    site = next(site for site in found.sites.values() if len(site.values) == 2)
    online = Online("curvature", 3)
    denoiser = found.cached(schedule_of(found, {site.name: GRID}, online=online))
    with Quiet():
        first, second = sample(denoiser, Request(seed=3)), sample(denoiser, Request(seed=3))
    assert torch.equal(first, second)
    (programs,) = denoiser._programs.values()
    inputs = {tuple(name for name in program.order if name.startswith("weights")) for program in programs.made()}
    assert inputs == {(), ("weights_0_0", "weights_0_1")}
    # on a straight line of two values "curvature" is plain extrapolation: the same as with shared weights
    straight = found.cached(schedule_of(found, {site.name: "CCggCCgg"}, online=Online("curvature", 2)))
    shared = found.cached(schedule_of(found, {site.name: "CCggCCgg"}, online=Online("newton", 2, {"order": 1})))
    torch.testing.assert_close(sample(straight, Request(seed=3)), sample(shared, Request(seed=3)))


def test_a_recipe_with_a_probe() -> None:
    def when(plan: Any, site: Any) -> Any:
        return range(0, plan.steps, 2)

    for probe in (FIRST, lambda site: FIRST):
        part = Part(sites=one("stack0"), when=when, predictor=Predict("trend", {"high": 2.0}, probe=probe))
        denoiser = compiled(recipes.Recipe(parts=(part,)))
        assert {cell.history for row in denoiser.schedule.rows for cell in row.cells if cell is not COMPUTE} == {2}
        schedule = Schedule.from_json(denoiser.schedule.to_json())
        assert schedule == denoiser.schedule
        assert schedule.rows[0].probes == (FIRST,)
        assert torch.equal(sample(denoiser.with_schedule(schedule), Request()), sample(denoiser, Request()))


def test_cells_as_json() -> None:
    for online in (Online("trend", 2, {"low": 1.0}, probe="latent"), Online("taylor", 2, timed=True), Online()):
        assert cell_from_json(cell_to_json(online)) == online
    assert "probe" not in cell_to_json(Online())  # type: ignore[operator]
    with pytest.raises(AssertionError, match="never stored"):
        cell_to_json(Given(2))
    with pytest.raises(ValueError, match="expected COMPUTE, SKIP, a Forecast, Online or Partial"):
        Schedule(2, (diffcache.schedule.Row("a", False, (COMPUTE, Given(1))),))


@pytest.mark.parametrize(
    ("online", "site", "message"),
    [
        (Online("trend", 2), "stack0", "looks at the value after the first blocks .* name it with probe="),
        (Online("curvature", 2, probe="latent"), "stack0", "looks at no probe, got probe='latent'"),
        (Online("magic", 2), "stack0", "unknown predictor 'magic'; known: .*'trend'"),
        (Online("trend", 2, {"hihg": 2.0}, probe="latent"), "stack0", r"no options \['hihg'\]"),
        (Online("trend", 2, probe="output"), "stack0", r"computed no later than \['output'\], which decide"),
        (Online("decomposed", 2, timed=True, probe="latent"), "stack0", "must have the shape of the value"),
    ],
    ids=["no probe", "a probe too many", "unknown", "option", "late probe", "shape"],
)
def test_refusals(online: Online, site: str, message: str) -> None:
    found = shared_calibration()
    names: dict[str, Callable[[], str]] = {s.role: (lambda s=s: s.name) for s in found.sites.values()}
    if online.probe == "output":
        online = Online(online.predictor, 2, probe=names["output"]())
        message = message.replace("output", names["output"]())
    with pytest.raises(ValueError, match=message):
        sample(found.cached(schedule_of(found, {site: GRID}, online=online)), Request())
