"""Forecasts that are checked on a block: what runs, whichever way it goes, and what comes out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from diffcache.finding import SiteFinder
from diffcache.gates import Gate, Moment, gate, make_gate
from diffcache.ops import extrapolate
from diffcache.predictors import weight_table, weights
from diffcache.programs import Program, Programs
from diffcache.recipes import Part, Predict, Recipe
from diffcache.recipes.picks import one
from diffcache.runtime import CachedDenoiser
from diffcache.schedule import COMPUTE, SKIP, Forecast, GateSpec, Online, Row, Schedule
from diffcache.tracing import tree
from tests.denoisers import CAPTURABLE
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
from tests.test_segments import family, names, run, same

BEFORE, LAST = "blocks[:-1]", "blocks[-1:]"
LINE = Online("taylor", 2, {"order": 1})


@gate("told")
class Told(Gate):
    """Checks every forecast and accepts those of the steps it is told."""

    checks = True

    def __init__(self, *, probe: str, accepted: list[int]):
        self.probe, self.accepted = probe, accepted

    def follow(self, moment: Moment, numbers: Any) -> Any:
        return np.full(len(numbers), moment.step in self.accepted)


def verified(spec: GateSpec, grid: str = "CCgggggg", online: Online = LINE, **options: Any) -> CachedDenoiser:
    found = shared_calibration()
    sites = [found.finder.first(name) for name in (BEFORE, LAST)]
    found.sites.update({site.name: site for site in sites})
    schedule = schedule_of(found, {site.name: grid for site in sites}, spec, online)
    return found.cached(schedule, **options)


def checking(**options: Any) -> GateSpec:
    found = shared_calibration().finder.first(LAST).name
    return GateSpec("told" if "accepted" in options else "verify", {"probe": found, **options})


@contextmanager
def watched() -> Iterator[list[list[str]]]:
    """The captured nodes of each program that runs, in order."""
    ran: list[list[str]] = []
    call = Program.__call__

    def run(self: Program, *args: Any) -> Any:
        ran.append(names(self))
        return call(self, *args)

    Program.__call__ = run  # type: ignore[method-assign]
    try:
        yield ran
    finally:
        Program.__call__ = call  # type: ignore[method-assign]


def runs(denoiser: CachedDenoiser, request: Request) -> list[list[list[str]]]:
    """For each step the nodes of the programs that it ran."""
    found = []
    x, prompt = request.latent(), request.embeds()
    with torch.no_grad(), Quiet():
        for t in request.times():
            with watched() as ran:
                x = x - denoiser(x, t, prompt) / STEPS
            found.append(ran)
    return found


def test_an_accepted_step_runs_the_check_and_the_head_only_and_a_refused_one_nothing_but_the_check_twice() -> None:
    denoiser = verified(checking(accepted=[2, 3, 5]), disable_passes=("fuse_forecasts",))  # nodes keep their names
    request = Request(seed=3)
    sample(denoiser, request)  # captures
    steps = runs(denoiser, request)
    assert denoiser.decisions[-1][1] == ["CC", "CC", "f.", "f.", "CC", "f.", "CC", "CC"]
    computed, accepted, refused = steps[1], steps[3], steps[4]
    prefix, rest, head = computed
    everything = [node for part in computed for node in part]
    assert len(set(everything)) == len(everything), "a node ran twice"
    assert accepted[0] == refused[0] == prefix
    check = accepted[1]
    assert set(check) < set(rest)
    assert accepted == [prefix, check, head]
    assert refused == [prefix, check, rest, head]
    # what is run on the forecast is the last block, and nothing that does not depend on it
    assert all(name.startswith(("blocks_2", "getitem")) for name in check)
    assert sum("attn_qkv" in name for name in check) == 1
    assert sum("attn_qkv" in name for name in rest) == 3
    assert not any("ada" in name or "attn" in name for name in [*prefix, *head] if not name.startswith("blocks_2_ada"))
    assert any(name.startswith("blocks_2_ada") for name in prefix), "it does not depend on the forecast"


def test_always_refused_is_exact_and_costs_the_checks() -> None:
    denoiser, request = verified(checking(accepted=[])), Request(seed=3, batch=2)
    with Quiet():
        assert torch.equal(sample(denoiser, request), sample(make(), request))
    assert denoiser.steps_forecast == 0
    assert denoiser.decisions[0][1] == ["CC"] * STEPS
    assert denoiser.flops > denoiser.flops_in_full


@pytest.mark.parametrize("name", [name for name in CAPTURABLE if name not in ("branch", "item", "hooks", "random")])
def test_any_denoiser_with_blocks(name: str) -> None:
    """Refused is exact, and runs nothing but the check twice; accepted runs none of the blocks before it."""
    captured, variant, bound, _, _ = family(name)
    parts = SiteFinder(captured).parts(variant, bound)
    try:
        sites = [parts.named(BEFORE), parts.named(LAST)]
    except ValueError as error:
        pytest.skip(f"no such blocks: {error}")
    programs = Programs(variant, (), sites, probes=[sites[1]], checks={sites[1].name: [0]})
    here = next(number for number, rows in enumerate(programs.rows) if rows == [0, 1])
    schedule = Schedule(3, tuple(Row(site.name, site.residual, (COMPUTE, Online(), Online())) for site in sites))
    leaves, whole = programs.leaves(bound), Programs(variant, (), ())
    with torch.no_grad():
        result, history, ran = run(programs, schedule, 0, [COMPUTE, COMPUTE], leaves, {})
        hoisted = whole.prologue(*leaves) if whole.prologue is not None else ()
        assert same(result, whole.full()(leaves, hoisted, {}, (), {})[0])
        everything = [node for program in ran for node in names(program)]
        assert len(set(everything)) == len(everything), "a node ran twice"
        on_trial = [Forecast((0,), (1.0,)), SKIP]
        trial = programs.program(schedule, 1, on_trial, here)
        trial.refuse_effects()
        blocks = {node for node in names(ran[here])} - set(names(trial))
        assert blocks, "the check computes everything"
        # the forecast is what was computed, so accepting it gives the same up to rounding
        accepted, written, _ = run(programs, schedule, 1, on_trial, leaves, history)
        assert not written
        for (_, a), (_, b) in zip(tree.walk(accepted), tree.walk(result), strict=True):
            if isinstance(a, torch.Tensor):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def by_hand(request: Request, accepted: list[int]) -> torch.Tensor:
    """Forecasts of what enters the last block, which is computed on them."""
    model, x, prompt = make(), request.latent(), request.embeds()
    made: list[tuple[int, torch.Tensor]] = []
    with torch.no_grad():
        for step, t in enumerate(request.times()):
            c = model.time(timestep_embedding(t, 32)) + model.text(prompt).mean(1)
            start = h = model.embed(x)
            if step in accepted:
                rule = weights("taylor", [at for at, _ in made[:2]], step, order=1)
                h = extrapolate(start, [value for _, value in made[:2]], weight_table(rule, None))
            else:
                for block in list(model.blocks)[:-1]:
                    h = block(h, c)
                made.insert(0, (step, h - start))
            x = x - model.head(model.blocks[-1](h, c)) / request.steps
    return x


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_what_comes_out_is_the_check_s_own_result(backend: str) -> None:
    denoiser, request = verified(checking(accepted=[2, 3, 5]), backend=backend), Request(seed=3, batch=2)
    with Quiet():
        first, second = sample(denoiser, request), sample(denoiser, request)
    assert torch.equal(first, second)
    expected = by_hand(request, [2, 3, 5])
    if backend == "eager":
        assert torch.equal(first, expected)
    else:
        torch.testing.assert_close(first, expected, rtol=1e-3, atol=1e-4)
    assert denoiser.steps_forecast == 6
    assert not denoiser._streams


def test_the_errors_are_those_of_the_block() -> None:
    """What ``verify`` is given: the residual of the last block, computed on the forecast, and its own forecast."""
    seen: list[tuple[int, float]] = []

    class Recording(type(make_gate("verify", probe="x", threshold=1.0))):  # type: ignore[misc]
        def follow(self, moment: Moment, numbers: Any) -> Any:
            seen.append((moment.step, float(numbers[0, 0])))
            return numbers[:, 0] < 0

    spec = checking(threshold=1.0)
    denoiser = verified(spec)
    from diffcache.gates import GATES

    GATES["verify"], kept = Recording, GATES["verify"]
    try:
        sample(denoiser, Request(seed=3))
    finally:
        GATES["verify"] = kept
    model, request = make(), Request(seed=3)
    x, prompt = request.latent(), request.embeds()
    made: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    expected = []
    with torch.no_grad():
        for step, t in enumerate(request.times()):
            c = model.time(timestep_embedding(t, 32)) + model.text(prompt).mean(1)
            start = h = model.embed(x)
            if step >= 2:
                table = weight_table(weights("taylor", [at for at, *_ in made[:2]], step, order=1), None)
                entering = extrapolate(start, [a for _, a, _ in made[:2]], table)
                residual = extrapolate(None, [b for *_, b in made[:2]], table)
                true = model.blocks[-1](entering, c) - entering
                expected.append((step, float(((residual - true).abs() / (true.abs() + 1e-10)).mean())))
            for block in list(model.blocks)[:-1]:
                h = block(h, c)
            out = model.blocks[-1](h, c)
            made.insert(0, (step, h - start, out - h))
            x = x - model.head(out) / request.steps
    assert seen == expected


def test_unchecked_forecasts_and_the_longest_run() -> None:
    denoiser = verified(checking(threshold=1e9, unchecked=1, longest=3))
    with Quiet():
        sample(denoiser, Request(seed=3))
    assert denoiser.decisions[0][1] == ["CC", "CC", "ff", "f.", "f.", "CC", "ff", "f."]
    strict = verified(checking(threshold=0.0, unchecked=1))
    sample(strict, Request(seed=3))
    assert strict.decisions[0][1] == ["CC", "CC", "ff", "CC", "ff", "CC", "ff", "CC"]


def test_the_threshold_falls_over_the_steps() -> None:
    gate = make_gate("verify", probe="x", threshold=0.8, decay=0.1, floor=0.2)
    passes = [bool(gate.follow(Moment(step, 10, 1), np.array([[0.3]]))[0]) for step in range(10)]
    assert passes == [True] * 5 + [False] * 5  # 0.8 * 0.1 ** (4 / 10) = 0.318
    assert gate.follow(Moment(9, 10, 1), np.array([[0.2]]))[0]
    assert not gate.follow(Moment(0, 10, 1), np.array([[np.nan]]))[0]
    assert gate.follow(Moment(0, 10, 1), np.array([[0.1], [0.9]])).tolist() == [True, False]


@pytest.mark.parametrize("measure", ["relative", "l2", "cosine"])
def test_errors(measure: str) -> None:
    gate = make_gate("verify", probe="x", threshold=0.1, measure=measure)
    a = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    moment = Moment(1, 10, 1)
    assert torch.allclose(gate.check(a, a, moment), torch.zeros(2), atol=1e-6)
    found = gate.check(a.bfloat16(), torch.cat([a[:1], -a[1:]]), moment)
    assert found.dtype == torch.float32
    assert found[1] == pytest.approx(2.0, rel=1e-2)
    assert found[0] < 0.01


def test_the_sample_that_is_refused_decides_for_its_batch() -> None:
    spec = checking(threshold=0.0, floor=0.0)
    errors = []
    for seed in (3, 4):
        denoiser = verified(spec)
        sample(denoiser, Request(seed=seed))
        errors.append(denoiser.steps_forecast)
    assert errors == [0, 0]
    lax = verified(checking(threshold=1e9))
    sample(lax, Request(seed=3, batch=2))
    assert lax.steps_forecast == STEPS - 2


def test_with_weights_from_values_and_small_history() -> None:
    online = Online("curvature", 3)
    for options in ({}, {"history_dtype": "int8"}):
        denoiser = verified(checking(threshold=1e9), "CCCggggg", online, **options)
        with Quiet():
            first, second = sample(denoiser, Request(seed=3)), sample(denoiser, Request(seed=3))
        assert torch.equal(first, second)
        assert denoiser.decisions[0][1] == ["CC"] * 3 + ["v."] * 5


def test_beside_another_gate_at_the_same_place() -> None:
    """A second row, of the head's side, looks at the checked block: it is shown what was accepted, or what is true."""
    found = shared_calibration()
    verify, before, last = checking(accepted=[2, 3, 5]), found.finder.first(BEFORE), found.finder.first(LAST)
    found.sites.update({before.name: before, last.name: last})
    output = next(site for site in found.sites.values() if site.role == "output")
    probe = GateSpec("accumulated_change", {"threshold": 1e9, "max_since": 1, "probe": last.name})
    rows = schedule_of(found, {before.name: "CCgggggg", last.name: "CCgggggg"}, verify, LINE).rows
    rows += schedule_of(found, {output.name: "CCgggggg"}, probe, Online()).rows
    denoiser = found.cached(Schedule(STEPS, rows, clock=found.profile.clock))
    with Quiet():
        first, second = sample(denoiser, Request(seed=3)), sample(denoiser, Request(seed=3))
    assert torch.equal(first, second)
    assert denoiser.decisions[0][1] == ["CCC", "CCC", "f.r", "f.C", "CCr", "f.C", "CCr", "CCC"]


def test_a_recipe_that_checks() -> None:
    part = Part(
        sites=one(BEFORE),
        check=one(LAST),
        when=lambda plan, site: range(3),
        gate=GateSpec("verify", {"threshold": 1e9, "longest": 2}),
        predictor=Predict("taylor", {"order": 1}),
    )
    denoiser = compiled(Recipe(parts=(part,)))
    with Quiet():
        sample(denoiser, Request(seed=3))
    assert denoiser.decisions[0][1] == ["CC", "CC", "CC", "f.", "f.", "CC", "f.", "f."]
    assert Schedule.from_json(denoiser.schedule.to_json()) == denoiser.schedule
    with pytest.raises(ValueError, match="but by no gate"):
        compiled(Recipe(parts=(Part(sites=one(BEFORE), check=one(LAST)),)))


class Noisy(type(make())):  # type: ignore[misc]
    """Draws random numbers inside its last block, shaped by what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[-1].register_forward_hook(lambda module, args, out: out + 0.0 * torch.rand_like(out))


def test_refusals() -> None:
    found = shared_calibration()
    for options in ({"measure": "l7"}, {"decay": 0.0}, {"unchecked": -1}, {"threshold": -1.0}):
        with pytest.raises(ValueError, match="gate 'verify' needs"):
            make_gate("verify", **{"probe": "x", "threshold": 1.0, **options})
    before, last = found.finder.first(BEFORE), found.finder.first(LAST)
    with pytest.raises(ValueError, match=r"give this gate to a row of that site"):
        found.cached(schedule_of(found, {before.name: "CCgggggg"}, checking(threshold=1.0), LINE))
    found.sites.update({before.name: before, last.name: last})
    early = GateSpec("verify", {"probe": "block:blocks.0", "threshold": 1.0})
    rows = {"block:blocks.0": "CCgggggg", last.name: "CCgggggg"}
    with pytest.raises(ValueError, match="cannot be checked on forecasts of"):
        sample(found.cached(schedule_of(found, rows, early, LINE)), Request())
    noisy = calibration(Noisy)
    sites = [noisy.finder.first(name) for name in (BEFORE, LAST)]
    noisy.sites.update({site.name: site for site in sites})
    denoiser = noisy.cached(schedule_of(noisy, {s.name: "CCgggggg" for s in sites}, checking(threshold=1.0), LINE))
    with pytest.raises(ValueError, match="draws random numbers or writes into what was there before"):
        sample(denoiser, Request())
