"""Parts of a value with weights of their own: bands, subspaces and channels, over whole generations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from diffcache import recipes
from diffcache.cells import COMPUTE, Forecast, Online, View, cell_from_json, cell_to_json
from diffcache.ops import extrapolate
from diffcache.planning import site_choices
from diffcache.predictors import PROJECTIONS, channel_table, channel_view, forecast_through, weights
from diffcache.predictors.views import leading_basis
from diffcache.recipes import Part, Predict, Recipe
from diffcache.recipes.picks import one
from diffcache.runtime import CachedDenoiser
from diffcache.schedule import Schedule
from tests.generation import (
    STEPS,
    Quiet,
    Request,
    TextDiT,
    calibration,
    compiled,
    make,
    sample,
    schedule_of,
    shared_calibration,
    timestep_embedding,
)
from tests.test_given import Timeless

GRID = "CCgCggCg"
REUSE, LINE = {"predictor": "reuse", "options": {}}, {"predictor": "newton", "options": {"order": 1}}
VIEWS = {
    "low_band": View("low_band", {"cutoff": 0.3}, (REUSE,)),
    "subspace": View("subspace", {"rank": 3}, (LINE,)),
    "channels": View("channels", {"labels": [0, 1, 2, 1] * 4}, (REUSE, LINE)),
}
OUTSIDE = Online("hermite", 3, {"order": 2})


def online(name: str) -> Online:
    return replace(OUTSIDE, view=VIEWS[name])


def viewed(name: str, grid: str = GRID, **options: Any) -> CachedDenoiser:
    found = shared_calibration()
    return found.cached(schedule_of(found, {"stack0": grid}, online=online(name)), **options)


def by_hand(name: str, request: Request, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The same generation in plain PyTorch, with history in a list."""
    model, x, prompt = make().to(dtype), request.latent().to(dtype), request.embeds().to(dtype)
    made: list[tuple[int, torch.Tensor]] = []
    basis: list[torch.Tensor] = []
    with torch.no_grad():
        for step, t in enumerate(request.times()):
            c = model.time(timestep_embedding(t, 32).to(dtype)) + model.text(prompt).mean(1)
            start = h = model.embed(x)
            if GRID[step] == "C":
                for block in model.blocks:
                    h = block(h, c)
                made.insert(0, (step, h - start))
            else:
                h = forecast(name, start, made[:3], step, basis)
            x = x - model.head(h) / request.steps
    return x


def forecast(name: str, anchor: Any, made: Sequence[Any], step: int, basis: list[torch.Tensor]) -> torch.Tensor:
    steps, values = [at for at, _ in made], [value for _, value in made]
    outside = weights("hermite", steps, step, order=2)
    inside = [weights(rule["predictor"], steps, step, **rule["options"]) for rule in VIEWS[name].inside]
    count = max(map(len, [outside, *inside]))
    if name == "channels":
        table = channel_table([outside, *inside], VIEWS[name].options["labels"])
        return extrapolate(anchor, values[:count], table)
    options: dict[str, Any] = dict(VIEWS[name].options)
    if name == "subspace":
        if not basis:
            basis.append(leading_basis(values[0], rank=3))
        options = {"basis": basis[0]}
    return forecast_through(lambda v: PROJECTIONS[name](v, **options), values, inside[0], outside, anchor)


class AnyDtype(TextDiT):
    """Its timestep embedding has the dtype of the latent."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        c = self.time(timestep_embedding(t, 32).to(x.dtype)) + self.text(prompt).mean(1)
        h = self.embed(x)
        for block in self.blocks:
            h = block(h, c)
        return self.head(h)


def run(denoiser: torch.nn.Module, request: Request, dtype: torch.dtype) -> torch.Tensor:
    x, prompt = request.latent().to(dtype), request.embeds().to(dtype)
    with torch.no_grad():
        for t in request.times():
            x = x - denoiser(x, t, prompt) / STEPS
    return x


@pytest.mark.parametrize("name", VIEWS)
def test_a_generation_is_what_its_parts_give_by_hand(name: str) -> None:
    denoiser, request = viewed(name), Request(seed=3, batch=2)
    with Quiet():
        first, second = sample(denoiser, request), sample(denoiser, request)
    assert torch.equal(first, second)
    assert torch.equal(first, by_hand(name, request))
    assert denoiser.steps_forecast == 2 * GRID.count("g")
    (programs,) = denoiser._programs.values()
    forecasting = [program for program in programs.made() if program.history]
    assert len({tuple(program.history) for program in forecasting}) == len(forecasting), "a view has a program too many"


def test_in_half_precision() -> None:
    found = calibration(AnyDtype)
    found.captured.denoiser.to(torch.bfloat16)
    request = Request(seed=3, batch=2)
    for name in VIEWS:
        denoiser = found.cached(schedule_of(found, {"stack0": GRID}, online=online(name)))
        with Quiet():
            result = run(denoiser, request, torch.bfloat16)
        assert denoiser.steps_forecast == GRID.count("g")
        assert torch.equal(result, by_hand(name, request, torch.bfloat16))


@pytest.mark.parametrize("name", VIEWS)
def test_nothing_changes_so_all_is_reused_bit_for_bit(name: str) -> None:
    """A denoiser that does not see the time, at a latent that stands still."""
    found, request = calibration(Timeless), Request(seed=3, batch=2)

    def walk(grid: str) -> list[torch.Tensor]:
        denoiser = found.cached(schedule_of(found, {"stack0": grid}, online=online(name)))
        x, prompt = request.latent(), request.embeds()
        with torch.no_grad(), Quiet():
            return [denoiser(x, t, prompt) for t in request.times()]

    assert all(torch.equal(a, b) for a, b in zip(walk("CCgCgggg"), walk("CCrCrrrr"), strict=True))


@pytest.mark.parametrize("name", VIEWS)
def test_known_steps_are_the_same(name: str) -> None:
    """A fixed schedule, and one that is settled at run time."""

    def when(plan: Any, site: Any) -> Any:
        return [step for step in range(plan.steps) if GRID[step] == "C"]

    predictor = Predict("hermite", {"order": 2}, view=VIEWS[name].to_json())
    found = shared_calibration()
    plan = recipes.Plan(STEPS, site_choices(found), found.profile.clock)
    schedule = Recipe(parts=(Part(sites=one("stack0"), when=when, predictor=predictor),)).schedule(plan)
    assert all(isinstance(cell, Forecast) and cell.view for cell in schedule.rows[0].cells if cell is not COMPUTE)
    assert Schedule.from_json(schedule.to_json()) == schedule
    fixed = found.cached(schedule)
    assert torch.equal(sample(fixed, Request(seed=3)), sample(viewed(name), Request(seed=3)))
    assert not fixed._streams


@pytest.mark.parametrize("name", ["low_band", "subspace"])
def test_through_the_compiler(name: str) -> None:
    request = Request(seed=3)
    expected = sample(viewed(name), request)
    with Quiet():
        result = sample(viewed(name, backend="inductor"), request)
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", VIEWS)
def test_small_history(name: str) -> None:
    plain, small = sample(viewed(name), Request(seed=3)), sample(viewed(name, history_dtype="int8"), Request(seed=3))
    assert 0 < ((small - plain).norm() / plain.norm()).item() < 0.01


def test_a_subspace_is_found_for_each_sample_and_forgotten_after_the_generation() -> None:
    denoiser, request = viewed("subspace"), Request(seed=3, batch=2)
    together = sample(denoiser, request)
    for number in range(2):
        alone = sample(denoiser, Request(seed=3 + number, prompt=number))
        torch.testing.assert_close(alone, together[number : number + 1], rtol=1e-4, atol=1e-5)
    assert not denoiser._streams


def test_the_leading_basis_is_the_principal_one() -> None:
    generator = torch.Generator().manual_seed(1)
    directions = torch.linalg.qr(torch.randn(12, 3, generator=generator)).Q
    values = torch.randn(2, 5, 6, 3, generator=generator) @ directions.T
    values = values + 1e-3 * torch.randn(values.shape, generator=generator)
    basis = leading_basis(values, rank=3)
    assert basis.shape == (2, 12, 3)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(3).expand(2, 3, 3), atol=1e-5, rtol=0)
    kept = PROJECTIONS["subspace"](values, basis=basis)
    assert (kept - values).norm() < 0.01 * values.norm()
    assert torch.equal(leading_basis(values, rank=3), basis)
    assert leading_basis(values, rank=40).shape == (2, 12, 12)


def test_channels_find_their_rules_in_calibration() -> None:
    rules = [REUSE, LINE, {"predictor": "newton", "options": {"order": 2}}]

    def clusters(plan: Any, site: Any) -> View:
        values = torch.from_numpy(plan.trajectory(site.name))
        assert values.shape == (STEPS - 1, 9, 16)
        return channel_view(values, rules, clusters=4)

    def every_other(plan: Any, site: Any) -> Any:
        return range(0, plan.steps, 2)

    part = Part(sites=one("stack0"), when=every_other, predictor=Predict("reuse", view=clusters))
    denoiser = compiled(Recipe(parts=(part,)))
    cell = denoiser.schedule.rows[0].cells[7]
    assert isinstance(cell, Forecast)
    assert cell.view is not None
    assert len(cell.view.options["labels"]) == 16
    assert Schedule.from_json(denoiser.schedule.to_json()) == denoiser.schedule
    assert torch.equal(sample(denoiser, Request(seed=3)), sample(denoiser, Request(seed=3)))


def test_channel_view_knows_straight_channels_from_still_ones() -> None:
    steps = torch.arange(8.0)[:, None, None]
    noise = torch.randn(8, 5, 3, generator=torch.Generator().manual_seed(0))
    trajectory = torch.cat([1.0 + 0.01 * noise, steps + torch.zeros(8, 5, 3)], dim=-1)
    view = channel_view(trajectory, [REUSE, LINE], clusters=2)
    assert view.options["labels"] == [0, 0, 0, 1, 1, 1]
    assert view.inside == (LINE,)


def test_cells_as_json() -> None:
    for name in VIEWS:
        cell = online(name)
        assert cell_from_json(cell_to_json(cell)) == cell
    fixed = Forecast((2, 0), (1.5, -0.5), View("low_band", {"cutoff": 0.1}, ((1.0, 0.0),)))
    assert cell_from_json(cell_to_json(fixed)) == fixed
    assert not Forecast((2,), (1.0,), View("low_band", {}, ((1.0,),))).is_reuse
    assert "view" not in cell_to_json(Online())  # type: ignore[operator]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="has 2 rules inside; expected one"):
        View("low_band", {}, (REUSE, LINE))
    with pytest.raises(
        ValueError, match=r"labels \[0, 3\]; expected labels=, one number for each channel, from 0 .* to 2"
    ):
        View("channels", {"labels": [0, 3]}, (REUSE, LINE))
    with pytest.raises(ValueError, match="expected 2 finite ones, one per step"):
        Forecast((2, 0), (1.5, -0.5), View("low_band", {}, ((1.0,),)))
    found = shared_calibration()
    for predictor, view, message in (
        (
            "taylor",
            View("high_band", {}, (REUSE,)),
            r"unknown projection 'high_band'; known: \['low_band', 'subspace'\]",
        ),
        ("curvature", View("low_band", {}, (REUSE,)), "are for whole values"),
        ("taylor", View("low_band", {}, ({"predictor": "modes", "options": {}},)), "are for whole values"),
    ):
        with pytest.raises(ValueError, match=message):
            found.cached(schedule_of(found, {"stack0": GRID}, online=Online(predictor, 2, view=view)))
    with pytest.raises(ValueError, match="a view needs rules by name"):
        Predict("l2p", fitted=True, view=VIEWS["low_band"]).at(recipes.Plan(STEPS), site_choices(found)[0])
    with pytest.raises(ValueError, match="looks at the values of 'a' in calibration"):
        recipes.Plan(STEPS).trajectory("a")
