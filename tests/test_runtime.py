"""The runtime: clean starts, branches, requests at once, calls that do not fit, what is kept and for how long."""

from __future__ import annotations

import contextlib
import copy
import inspect
import pickle
import threading
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from diffcache import recipes
from diffcache.runtime import CachedDenoiser
from diffcache.schedule import GateSpec, Schedule
from tests.generation import (
    STEPS,
    Request,
    TextDiT,
    TokenDiT,
    Unconditional,
    calibration,
    compiled,
    guided,
    make,
    sample,
    schedule_of,
    shared_calibration,
    walk,
)
from tests.plain_denoisers import timestep_embedding

GRID = "CCfCfCrf"


def cached(grid: str = GRID, site: str = "stack0", **options: Any) -> CachedDenoiser:
    """The shared model under one row."""
    found = shared_calibration()
    return found.cached(schedule_of(found, {site: grid}, **options))


def eager() -> TextDiT:
    return shared_calibration().captured.denoiser  # type: ignore[return-value]


@contextlib.contextmanager
def all_on_schedule() -> Iterator[None]:
    """A warning would mean that calls fell back to full runs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="diffcache")
        yield


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.detach(), b.detach())


# -- one generation after another -------------------------------------------------------------------------------------


def test_a_schedule_changes_the_result_and_repeats_bitwise() -> None:
    denoiser, request = cached(), Request(seed=3)
    with all_on_schedule():
        first, second = sample(denoiser, request), sample(denoiser, request)
    assert same(first, second)
    assert not same(first, sample(eager(), request))
    assert torch.allclose(first, sample(eager(), request), atol=0.1)
    assert (denoiser.steps_computed, denoiser.steps_forecast) == (8, 8)


@pytest.mark.parametrize("site", ["stack0", "output"])
@pytest.mark.parametrize("stop", [1, 3, 6])
def test_a_generation_after_an_interrupted_sampler_is_clean(stop: int, site: str) -> None:
    denoiser, request = cached(site=site), Request(seed=3)
    expected = sample(denoiser, request)
    with all_on_schedule():
        for seed in (3, 4):
            interrupted = walk(denoiser, Request(seed=seed))
            for _ in range(stop):
                next(interrupted)
            interrupted.close()
            assert same(sample(denoiser, request), expected)
    assert not denoiser._streams


def test_a_generation_after_a_denoiser_that_raised_is_clean() -> None:
    denoiser, request = compiled(), Request(seed=3)
    expected = sample(denoiser, request)
    armed = False

    class Exploding(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if armed:
                raise RuntimeError("out of memory")
            return super().forward(x)

    denoiser.denoiser.head.__class__ = Exploding
    broken = walk(denoiser, request)
    for _ in range(3):
        next(broken)
    armed = True
    with pytest.raises(RuntimeError, match="out of memory"):
        next(broken)
    armed = False
    assert not denoiser._streams
    assert same(sample(denoiser, request), expected)


def test_history_is_freed_after_the_last_step_and_never_more_than_liveness_says() -> None:
    found = shared_calibration()
    schedule = schedule_of(found, {"stack0": "CCCfCfrf", "attn:blocks.0.attn": "CrrCrrCr"})
    denoiser, kept = found.cached(schedule), 0
    for step, _ in enumerate(walk(denoiser, Request())):
        live = schedule.live_after(step)
        streams = denoiser._streams
        assert len(streams) == (step < STEPS - 1)
        for stream in streams:
            expected = {(row, made) for row, r in enumerate(schedule.rows) for made in live.get(r.site, ())}
            assert {(row, made) for row, _, made in stream.history} == expected
            kept = max(kept, len(stream.history))
    assert kept == 3
    assert not denoiser._streams


def test_hoisted_values_of_an_exact_schedule_are_freed_too() -> None:
    found = shared_calibration()
    denoiser = found.cached(Schedule.exact(STEPS))
    for seed in range(3):
        assert same(sample(denoiser, Request(seed=seed, prompt=seed)), sample(eager(), Request(seed=seed, prompt=seed)))
    assert not denoiser._streams


# -- branches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["separate", "context", "batched"])
def test_guidance_branches_keep_their_own_history(mode: str) -> None:
    """What one branch gives must not depend on the other: at scale 0 and 1 the result is that of one branch alone."""
    items = [Request(seed=0), Request(seed=1, prompt=5)]
    found = calibration(sampler=lambda d, item: guided(d, item, mode), items=items)
    assert found.pattern.streams == (1 if mode == "batched" else 2)
    assert found.pattern.steps == STEPS
    denoiser, request = found.cached(schedule_of(found, {"stack0": GRID})), Request(seed=7, prompt=3)
    with all_on_schedule():
        whole = guided(denoiser, request, mode, scale=1.0)
        again = guided(denoiser, request, mode, scale=1.0)
        alone = sample(denoiser, request)
    assert same(whole, again)
    assert torch.allclose(whole, alone, atol=1e-5)  # v_none + 1.0 * (v_cond - v_none) rounds
    assert not denoiser._streams


def test_the_modes_of_guidance_agree() -> None:
    denoiser, request = cached(), Request(seed=7, prompt=3)
    separate, context, batched = (guided(denoiser, request, mode) for mode in ("separate", "context", "batched"))
    assert same(separate, context)
    reference = {mode: guided(eager(), request, mode) for mode in ("separate", "batched")}
    if same(*reference.values()):
        assert same(separate, batched)
    assert torch.allclose(separate, batched, atol=1e-5)


def test_equal_conditions_in_both_branches_stay_correct() -> None:
    """An empty prompt makes both branches the same call."""
    denoiser = cached()

    def both(model: Any) -> torch.Tensor:
        request = Request(seed=2)
        x, cond, none = request.latent(), request.embeds(), request.embeds()
        with torch.no_grad():
            for t in request.times():
                v_none, v_cond = model(x, t, none), model(x, t, cond)
                x = x - (v_none + 3.0 * (v_cond - v_none)) / STEPS
        return x

    with all_on_schedule():
        assert same(both(denoiser), sample(denoiser, Request(seed=2)))


# -- several requests at once -----------------------------------------------------------------------------------------


def interleave(denoiser: Any, requests: list[Request], prompts: list[Any] | None = None) -> list[torch.Tensor]:
    walks = [walk(denoiser, r, p) for r, p in zip(requests, prompts or [None] * len(requests), strict=True)]
    return list(list(zip(*walks, strict=True))[-1])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Request(seed=1, prompt=1), Request(seed=2, prompt=2)),
        (Request(seed=1, prompt=1), Request(seed=2, prompt=1)),
        (Request(seed=1, prompt=1), Request(seed=1, prompt=2)),
        (Request(seed=1, batch=1), Request(seed=2, batch=3)),
    ],
    ids=["other prompt and seed", "other seed", "other prompt", "other batch"],
)
@pytest.mark.parametrize("site", ["stack0", "output"])
def test_two_requests_in_turn_give_what_each_gives_alone(first: Request, second: Request, site: str) -> None:
    denoiser = cached(site=site)
    alone = [sample(denoiser, first), sample(denoiser, second)]
    with all_on_schedule():
        together = interleave(denoiser, [first, second])
    assert same(alone[0], together[0])
    assert same(alone[1], together[1])
    assert not denoiser._streams


def test_two_seeds_in_turn_with_the_same_prompt_object() -> None:
    denoiser, prompt = cached(), Request().embeds()
    requests = [Request(seed=seed) for seed in (1, 2, 3)]
    alone = [sample(denoiser, request) for request in requests]
    with all_on_schedule():
        together = interleave(denoiser, requests, [prompt] * 3)
    assert all(map(same, alone, together))


def test_two_seeds_in_turn_without_any_condition() -> None:
    found = calibration(Unconditional)
    assert found.pattern.invariant == ()
    denoiser = found.cached(schedule_of(found, {"stack0": GRID}))
    requests = [Request(seed=1), Request(seed=2)]
    alone = [sample(denoiser, request) for request in requests]
    with all_on_schedule():
        together = interleave(denoiser, requests)
        assert all(map(same, alone, together))
        late = walk(denoiser, requests[0])  # the second starts when the first is half way
        for _ in range(3):
            next(late)
        second = walk(denoiser, requests[1])
        for _ in range(2):
            next(second)
        *_, first_result = late
        *_, second_result = second
    assert same(first_result, alone[0])
    assert same(second_result, alone[1])


def test_other_step_counts_in_turn_never_borrow_history() -> None:
    """Steps of the one generation fall on timesteps of the other."""
    denoiser, prompt = cached(), Request().embeds()
    short, long = Request(seed=1), Request(seed=2, steps=2 * STEPS)
    alone = sample(denoiser, short)
    interrupted = walk(denoiser, Request(seed=3), prompt)
    for _ in range(3):
        next(interrupted)
    with pytest.warns(UserWarning, match="computed in full"):
        assert same(sample(denoiser, long, prompt), sample(eager(), long))
    assert same(sample(denoiser, short, prompt), alone)


def test_threads_give_what_each_gives_alone() -> None:
    denoiser = compiled()
    requests = [Request(seed=s, prompt=s % 2, batch=1 + s % 2, tokens=9 + s % 3) for s in range(6)]
    alone = [sample(compiled(), request) for request in requests]  # by another object: here captures meet as well
    results: list[Any] = [None] * len(requests)
    start = threading.Barrier(len(requests))

    def run(index: int) -> None:
        start.wait()
        try:
            results[index] = sample(denoiser, requests[index])
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for request, one, other in zip(requests, alone, results, strict=True):
        assert isinstance(other, torch.Tensor), f"{request}: {other!r}"
        assert same(one, other), request
    assert not denoiser._streams


@pytest.mark.parametrize("site", ["stack0", "output", "block:blocks.1.attn"])
def test_a_batch_gives_what_its_samples_give_alone(site: str) -> None:
    found = calibration(TokenDiT)
    model, denoiser = found.captured.denoiser, found.cached(schedule_of(found, {site: GRID}))
    batch, ones = Request(seed=4, prompt=2, batch=2), [Request(seed=4, prompt=2), Request(seed=5, prompt=3)]
    assert same(sample(model, batch), torch.cat([sample(model, one) for one in ones]))
    with all_on_schedule():
        assert same(sample(denoiser, batch), torch.cat([sample(denoiser, one) for one in ones]))


def test_many_interrupted_requests_are_forgotten() -> None:
    denoiser = cached()
    for seed in range(40):
        next(walk(denoiser, Request(seed=seed, prompt=seed)))
    assert len(denoiser._streams) <= 16


# -- calls that do not fit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [4, 7, 9, 16])
def test_another_step_count_is_a_full_run_and_says_so_once(steps: int) -> None:
    denoiser, request = cached(), Request(seed=3, steps=steps)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = [sample(denoiser, request), sample(denoiser, request)]
    ours = [str(w.message) for w in caught if "diffcache" in str(w.message)]
    assert len(ours) == 1
    assert "computed in full" in ours[0]
    assert "Calibrate with the step count" in ours[0]
    assert all(same(result, sample(eager(), request)) for result in results)
    assert same(sample(denoiser, Request(seed=3)), sample(cached(), Request(seed=3)))


def test_another_resolution_keeps_the_schedule() -> None:
    denoiser, request = cached(), Request(seed=3, tokens=25)
    with all_on_schedule():
        result = sample(denoiser, request)
    assert denoiser.steps_forecast == GRID.count("f") + GRID.count("r")
    assert torch.allclose(result, sample(eager(), request), atol=0.1)


def test_a_call_without_the_sites_runs_in_full_and_says_so_once() -> None:
    found = shared_calibration()
    schedule = schedule_of(found, {"stack0": GRID})
    renamed = replace(schedule, rows=(replace(schedule.rows[0], site="stack0:layers.0..layers.2"),))
    denoiser = found.cached(renamed)
    with pytest.warns(UserWarning, match=r"sites \['stack0:layers.0..layers.2'\] are not in the graph") as caught:
        result = sample(denoiser, Request(seed=3))
    assert len(caught) == 1
    assert same(result, sample(eager(), Request(seed=3)))
    assert (denoiser.steps_computed, denoiser.steps_forecast) == (8, 0)


def test_the_warning_points_at_the_caller() -> None:
    denoiser = cached()
    with pytest.warns(UserWarning, match="computed in full") as caught:
        sample(denoiser, Request(steps=5))
    assert caught[0].filename.endswith("generation.py")


def test_timesteps_that_differ_within_a_batch_run_in_full() -> None:
    denoiser, request = cached(), Request(seed=1, batch=2)
    x, prompt = request.latent(), request.embeds()
    mixed = [torch.stack([t[0], t[1] + 40.0]) for t in request.times()]
    with torch.no_grad():
        with pytest.warns(UserWarning, match="computed in full"):
            assert same(denoiser(x, mixed[0], prompt), eager()(x, mixed[0], prompt))
        for t in mixed[1:]:
            x = x * 0.9
            assert same(denoiser(x, t, prompt), eager()(x, t, prompt))


def test_python_float_timesteps() -> None:
    items = [Request(python_time=True), Request(seed=50, prompt=50, python_time=True)]
    found = calibration(items=items)
    denoiser = found.cached(schedule_of(found, {"stack0": GRID}))
    with all_on_schedule():
        result = sample(denoiser, Request(seed=3, python_time=True))
    assert same(result, sample(cached(), Request(seed=3)))


def test_unconditional_model() -> None:
    denoiser = compiled(kind=Unconditional)
    with all_on_schedule():
        first, second = sample(denoiser, Request(seed=3)), sample(denoiser, Request(seed=3))
    assert same(first, second)
    assert denoiser.steps_forecast > 0


def test_a_schedule_without_a_clock_takes_the_calibrated_one() -> None:
    found = shared_calibration()
    denoiser = found.cached(replace(schedule_of(found, {"stack0": GRID}), clock=()))
    with all_on_schedule():
        assert same(sample(denoiser, Request(seed=3)), sample(cached(), Request(seed=3)))


class Embedded(TextDiT):
    """Takes the timestep as an embedding, larger than the latent of these tests."""

    def __init__(self) -> None:
        super().__init__()
        self.time = torch.nn.Linear(128, 16)

    def forward(self, x: torch.Tensor, emb: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        c = self.time(emb) + self.text(prompt).mean(1)
        h = self.embed(x)
        for block in self.blocks:
            h = block(h, c)
        return self.head(h)


def embedded(denoiser: Any, request: Request, stop: int = STEPS) -> torch.Tensor:
    x, prompt = request.latent(), request.embeds()
    with torch.no_grad():
        for t in request.times()[:stop]:
            x = x - denoiser(x, timestep_embedding(t, 128), prompt) / request.steps
    return x


def test_a_time_embedding_serves_as_the_clock() -> None:
    found = calibration(Embedded, embedded)
    assert found.pattern.clock == (("item", "emb"),)
    assert found.pattern.probe == (("item", "x"),)
    denoiser = found.cached(schedule_of(found, {"stack0": GRID}))
    with all_on_schedule():
        expected = embedded(denoiser, Request(seed=3))
        assert denoiser.steps_forecast == 4
        embedded(denoiser, Request(seed=3), stop=3)
        assert same(embedded(denoiser, Request(seed=3)), expected)
    with pytest.warns(UserWarning, match="computed in full"):
        assert same(embedded(denoiser, Request(steps=5)), embedded(denoiser.denoiser, Request(steps=5)))


class Summing(TextDiT):
    """Adds to a buffer before it takes one path or another."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        self.total.add_(t[0])
        return super().forward(x, t, prompt) * (2.0 if t[0].item() < 500 else 1.0)


def test_a_failed_guard_leaves_no_write_behind() -> None:
    found = calibration(Summing)
    denoiser, totals = found.cached(Schedule.exact(STEPS)), []
    for model in (denoiser, denoiser.denoiser):
        denoiser.denoiser.total.zero_()
        sample(model, Request(seed=3))
        totals.append(float(denoiser.denoiser.total))
    assert totals[0] == totals[1]


# -- hoisting is never stale ------------------------------------------------------------------------------------------


def full(**options: Any) -> CachedDenoiser:
    found = calibration(**options)
    return found.cached(Schedule.exact(STEPS))


def test_hoisting_sees_a_prompt_changed_in_place() -> None:
    denoiser = full()
    prompt = Request().embeds()
    for seed in range(2):
        assert same(sample(denoiser, Request(seed=seed), prompt), sample(denoiser.denoiser, Request(seed=seed), prompt))
        prompt.mul_(0.5)
    walks = walk(denoiser, Request(), prompt), walk(denoiser.denoiser, Request(), prompt)
    for step, (ours, theirs) in enumerate(zip(*walks, strict=True)):
        assert same(ours, theirs), step
        if step == 3:
            prompt.add_(1.0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_hoisting_sees_a_prompt_changed_in_place_in_every_mode(mode: Any) -> None:
    denoiser = full()
    with mode():
        prompt = Request().embeds() * 1.0
        x, t = Request().latent(), Request().times()[0]
        for _ in range(3):
            assert same(denoiser(x, t, prompt), denoiser.denoiser(x, t, prompt))
            prompt.mul_(0.5)


@pytest.mark.parametrize("within", [False, True])
def test_hoisting_sees_a_weight_changed_in_place(within: bool) -> None:
    denoiser = full()
    weight = denoiser.denoiser.text[0].weight
    walks = walk(denoiser, Request()), walk(denoiser.denoiser, Request())
    for step, (ours, theirs) in enumerate(zip(*walks, strict=True)):
        assert same(ours, theirs), step
        if within and step == 3:
            with torch.no_grad():
                weight.mul_(2.0)
    with torch.no_grad():
        weight.mul_(0.7)
    assert same(sample(denoiser, Request()), sample(denoiser.denoiser, Request()))
    denoiser.denoiser.load_state_dict(make(seed=9).state_dict())
    assert same(sample(denoiser, Request()), sample(denoiser.denoiser, Request()))


def test_hoisting_sees_a_new_prompt_object() -> None:
    denoiser = full()
    for prompt in range(3):
        request = Request(prompt=prompt)
        assert same(sample(denoiser, request), sample(denoiser.denoiser, request))


def test_hoisting_runs_once_for_a_generation() -> None:
    denoiser, calls = full(), 0

    class Counting(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return super().forward(x)

    sample(denoiser, Request())
    denoiser.denoiser.text[0].__class__ = Counting
    calls = 0
    sample(denoiser, Request(prompt=4))
    captures = calls
    calls = 0
    sample(denoiser, Request(prompt=5))
    assert calls == 1, f"{calls} calls (and {captures} in the generation that captured)"


# -- the caller's tensors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["output", "stack0", "block:blocks.2"])
@pytest.mark.parametrize("grid", ["CrCrCrCr", "CCfCfCff"])
def test_writing_into_the_result_does_not_reach_history(site: str, grid: str) -> None:
    denoiser = cached(grid, site)

    def run(spoil: bool) -> torch.Tensor:
        request = Request(seed=6)
        x, prompt = request.latent(), request.embeds()
        with torch.no_grad():
            for t in request.times():
                velocity = denoiser(x, t, prompt)
                x = x - velocity / STEPS
                if spoil:
                    velocity.zero_()
        return x

    assert same(run(False), run(True))


def test_a_sampler_that_updates_the_latent_in_place() -> None:
    denoiser = cached()

    def run(model: Any) -> torch.Tensor:
        request = Request(seed=6)
        x, prompt = request.latent(), request.embeds()
        with torch.no_grad():
            for t in request.times():
                x.sub_(model(x, t, prompt), alpha=1 / STEPS)
        return x

    with all_on_schedule():
        alone = run(denoiser)
        assert same(run(denoiser), alone)
    assert torch.allclose(alone, run(eager()), atol=0.1)


def test_inference_mode_then_grad_mode() -> None:
    denoiser = compiled()
    request = Request(seed=3)
    expected = sample(denoiser, request)
    with torch.inference_mode():
        assert same(sample(denoiser, request), expected)
    x, prompt = request.latent(), request.embeds()
    with all_on_schedule():
        for t in request.times():
            velocity = denoiser(x, t, prompt)
            assert velocity.requires_grad
            x = (x - velocity / STEPS).detach()
    assert same(x, expected)


def test_gradients_reach_the_parameters_on_a_forecast_step() -> None:
    denoiser = compiled()
    request = Request(seed=3)
    x, prompt = request.latent(), request.embeds()
    denoiser.reset()
    for t in request.times()[:4]:
        velocity = denoiser(x, t, prompt)
        x = (x - velocity / STEPS).detach()
    assert (denoiser.steps_computed, denoiser.steps_forecast) == (3, 1)
    velocity.square().mean().backward()
    assert denoiser.denoiser.head.weight.grad is not None


# -- gates ------------------------------------------------------------------------------------------------------------


def test_a_gate_without_budget_is_exact() -> None:
    gate = GateSpec("accumulated_change", {"threshold": 0.0})
    denoiser = cached(gate=gate)
    assert same(sample(denoiser, Request(seed=3)), sample(eager(), Request(seed=3)))
    assert denoiser.steps_forecast == 0


def test_a_generous_gate_changes_nothing() -> None:
    denoiser = cached(gate=GateSpec("accumulated_change", {"threshold": 1e6}))
    assert same(sample(denoiser, Request(seed=3)), sample(cached(), Request(seed=3)))


def test_the_sample_that_moves_most_decides_for_its_batch() -> None:
    spec = GateSpec("accumulated_change", {"threshold": 0.15})
    requests = [Request(seed=seed, prompt=seed) for seed in range(4)]

    def forecasts(latents: torch.Tensor, prompts: torch.Tensor) -> int:
        denoiser = cached("CrrrCrrr", gate=spec)
        x = latents
        with torch.no_grad(), all_on_schedule():
            for t in requests[0].times():
                x = x - denoiser(x, t.expand(len(x)).contiguous(), prompts) / STEPS
        return denoiser.steps_forecast

    latents = [request.latent() for request in requests]
    latents[0] = latents[0] * 0.02  # so small that its steps are large beside it
    prompts = [request.embeds() for request in requests]
    alone = [forecasts(x, p) for x, p in zip(latents, prompts, strict=True)]
    assert alone[0] < min(alone[1:])
    assert forecasts(torch.cat(latents), torch.cat(prompts)) == alone[0]


def test_a_gate_vetoes_forecasts() -> None:
    denoiser = cached("CrrrCrrr", gate=GateSpec("max_gap", {"limit": 1}))
    with all_on_schedule():
        sample(denoiser, Request(seed=3))
        # computed, forecast, vetoed (computed), forecast; twice
        assert (denoiser.steps_computed, denoiser.steps_forecast) == (4, 4)
        tight = cached("CrrrCrrr", gate=GateSpec("accumulated_change", {"threshold": 0.06}))
        sample(tight, Request(seed=3))
    assert 0 < tight.steps_forecast < 6


# -- what it looks like -----------------------------------------------------------------------------------------------


def test_it_looks_like_the_denoiser() -> None:
    denoiser = compiled()
    model = denoiser.denoiser
    assert isinstance(denoiser, torch.nn.Module)
    assert inspect.signature(denoiser) == inspect.signature(model.forward)
    assert denoiser.blocks is model.blocks
    assert denoiser.training is model.training
    assert denoiser.state_dict().keys() == model.state_dict().keys()
    assert next(iter(denoiser.parameters())) is next(iter(model.parameters()))
    denoiser.load_state_dict(make(seed=5).state_dict())
    assert same(model.head.weight, make(seed=5).head.weight)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = denoiser.nothing_like_it
    assert "1 sites x 8 steps" in repr(denoiser)


def test_moving_it_to_another_dtype_recaptures() -> None:
    denoiser = compiled()
    denoiser.to(torch.float64)
    request = Request(seed=3)
    x, prompt = request.latent().double(), request.embeds().double()
    with torch.no_grad(), all_on_schedule():
        t = request.times()[0]
        # the embedding of the timestep is float32 in this model, as in many: give it what it takes
        denoiser.denoiser.time.to(torch.float32)
        assert same(denoiser(x, t, prompt), denoiser.denoiser(x, t, prompt))


@pytest.mark.parametrize("copier", [copy.deepcopy, pickle.dumps], ids=["deepcopy", "pickle"])
def test_copies_are_refused_with_the_way_to_do_it(copier: Any) -> None:
    with pytest.raises(TypeError, match=r"save\(folder\).*diffcache\.load"):
        copier(compiled())


def test_the_steps_counted_are_those_of_the_recipe() -> None:
    denoiser = compiled(recipes.evenly(computed=3))
    denoiser.reset()  # compiling tried it out
    sample(denoiser, Request(seed=3))
    assert (denoiser.steps_computed, denoiser.steps_forecast) == (3, 5)
    assert denoiser.schedule.computed_steps() == (0, 2, 5)
