"""Branches of guidance: who is who, what is left out and does not run, what stands for it, who decides."""

from __future__ import annotations

import functools
import gc
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import diffcache
from diffcache.cells import GateSpec, Online
from diffcache.gates import make_gate
from diffcache.guidance import Guidance
from diffcache.guidance_rules import weighted
from diffcache.profiling import Calibration
from diffcache.recipes import Part, Predict, Recipe
from diffcache.recipes.picks import one
from diffcache.runtime import CachedDenoiser
from diffcache.schedule import Schedule
from tests.generation import STEPS, Quiet, Request, TokenDiT, calibration, sample, schedule_of

MODES = (
    "separate",
    "separate, conditional first",
    "context",
    "context, conditional first",
    "batched",
    "batched, flipped",
)
ITEMS = (Request(seed=0, prompt=0), Request(seed=50, prompt=50))
SCALE = 3.0


def steps_of(denoiser: nn.Module, request: Request, mode: str, stop: int = STEPS) -> Iterator[torch.Tensor]:
    """Classifier-free guidance in one of the ways that samplers have; yields the latent after every step."""
    x, cond = request.latent(), request.embeds()
    none = torch.zeros_like(cond)
    order = ("cond", "uncond") if "flipped" in mode else ("uncond", "cond")
    both = torch.cat([{"cond": cond, "uncond": none}[name] for name in order])
    named = getattr(denoiser, "cache_context", None) if mode.startswith("context") else None
    for t in request.times()[:stop]:
        found: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            if mode.startswith("batched"):
                found = dict(zip(order, denoiser(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2), strict=True))
            else:
                for name in ("cond", "uncond") if "conditional first" in mode else ("uncond", "cond"):
                    with named(name) if named else nullcontext():
                        found[name] = denoiser(x, t, cond if name == "cond" else none)
            x = x - (found["uncond"] + SCALE * (found["cond"] - found["uncond"])) / request.steps
        yield x


def guide(denoiser: nn.Module, request: Request, mode: str) -> torch.Tensor:
    *_, last = steps_of(denoiser, request, mode)
    return last


@functools.cache
def found(mode: str) -> Calibration:
    return calibration(TokenDiT, lambda denoiser, item: guide(denoiser, item, mode), ITEMS)


def eager(mode: str) -> nn.Module:
    return found(mode).captured.denoiser


def cached(mode: str, guidance: Guidance | None, rows: dict[str, str] | None = None, **options: Any) -> CachedDenoiser:
    made = schedule_of(found(mode), rows or {}, **{k: v for k, v in options.items() if k in ("gate", "online")})
    rest = {k: v for k, v in options.items() if k not in ("gate", "online")}
    return found(mode).cached(replace(made, guidance=guidance, **rest))


class Counting(nn.Linear):
    """Counts the rows that pass: a branch that is left out must not."""

    rows = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Counting.rows += len(x)
        return super().forward(x)


def rows_run(denoiser: CachedDenoiser, request: Request, mode: str) -> tuple[torch.Tensor, int]:
    """The result, and how many samples went through the head of the denoiser."""
    guide(denoiser, request, mode)  # captures and checks are no part of it
    head, Counting.rows = denoiser.denoiser.head, 0
    kind, head.__class__ = head.__class__, Counting
    try:
        guide(denoiser, request, mode)  # another class is another graph
        Counting.rows = 0
        result = guide(denoiser, request, mode)
    finally:
        head.__class__ = kind
    return result, Counting.rows


def by_hand(mode: str, request: Request, computed: tuple[int, ...], rule: str) -> torch.Tensor:
    """The same with the denoiser itself and the rule written out."""
    model, x, cond = eager(mode), request.latent(), request.embeds()
    none, kept = torch.zeros_like(cond), torch.zeros(())
    with torch.no_grad():
        for step, t in enumerate(request.times()):
            v_cond = model(x, t, cond)
            if step in computed:
                v_none = model(x, t, none)
                kept = v_none if rule == "reuse" else v_none - v_cond
            else:
                v_none = {"reuse": kept, "fold": v_cond, "difference": v_cond + kept}[rule]
            x = x - (v_none + SCALE * (v_cond - v_none)) / request.steps
    return x


# -- who is who -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_calibration_tells_the_branches_apart(mode: str) -> None:
    branches = found(mode).pattern.branches
    assert branches is not None
    assert branches.batched == mode.startswith("batched")
    assert branches.unconditional == (1 if "conditional first" in mode or "flipped" in mode else 0)
    assert set(branches.names) == ({"cond", "uncond"} if mode.startswith("context") else set())


def test_without_guidance_there_are_no_branches() -> None:
    pattern = calibration(TokenDiT).pattern
    assert pattern.branches is None
    alike = [Request(seed=3, batch=2), Request(seed=60, prompt=7, batch=2)]
    assert calibration(TokenDiT, items=alike).pattern.branches is None


def test_equal_prompts_do_not_tell_and_are_refused() -> None:
    items = [Request(seed=0), Request(seed=50)]
    for mode in ("separate", "batched"):
        blind = calibration(TokenDiT, lambda d, item, mode=mode: guide(d, item, mode), items)
        assert blind.pattern.branches is not None
        assert blind.pattern.branches.unconditional is None
        with pytest.raises(
            ValueError, match=r"does not tell which it is: both branches .*two or more different prompts"
        ):
            blind.cached(replace(Schedule.exact(STEPS), guidance=Guidance()))
    named = calibration(TokenDiT, lambda d, item: guide(d, item, "context"), items)
    assert named.pattern.branches is not None
    assert named.pattern.branches.unconditional == 0


def test_a_denoiser_without_guidance_is_refused() -> None:
    with pytest.raises(ValueError, match=r"saw no two branches: 1 streams.*guidance on at every step"):
        calibration(TokenDiT).cached(replace(Schedule.exact(STEPS), guidance=Guidance()))


# -- what stands for the unconditional result -------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_all_computed_is_eager_bit_for_bit(mode: str) -> None:
    request = Request(seed=7, prompt=3)
    everything = cached(mode, Guidance(computed=tuple(range(STEPS))))
    assert torch.equal(guide(everything, request, mode), guide(eager(mode), request, mode))
    strict = Guidance(gate=GateSpec("guidance_change", {"budget": 0.0}))
    denoiser = cached(mode, strict)
    assert torch.equal(guide(denoiser, request, mode), guide(eager(mode), request, mode))
    assert denoiser.steps_forecast == 0


@pytest.mark.parametrize("rule", ["difference", "fold", "reuse"])
@pytest.mark.parametrize("mode", MODES)
def test_rules_are_what_they_say_and_leave_out_what_they_say(mode: str, rule: str) -> None:
    computed = (0, 1, 2) if rule == "fold" else (0, 1, 4)
    request = Request(seed=7, prompt=3)
    denoiser = cached(mode, Guidance(rule, computed))
    with Quiet():
        result, rows = rows_run(denoiser, request, mode)
    assert rows == STEPS + len(computed)
    assert torch.equal(result, by_hand(mode, request, computed, rule))
    assert not denoiser._streams


@pytest.mark.parametrize("mode", MODES)
def test_batches_of_other_sizes(mode: str) -> None:
    request, computed = Request(seed=7, prompt=3, batch=3), (0, 3)
    denoiser = cached(mode, Guidance("difference", computed))
    with Quiet():
        result = guide(denoiser, request, mode)
    assert torch.allclose(result, by_hand(mode, request, computed, "difference"), atol=1e-6)
    assert denoiser.steps_forecast == STEPS - len(computed)


@pytest.mark.parametrize("mode", ["separate", "batched"])
def test_flops_count_what_was_left_out(mode: str) -> None:
    denoiser = cached(mode, Guidance("difference", (0, 3)))
    guide(denoiser, Request(seed=7), mode)
    assert denoiser.flops / denoiser.flops_in_full == pytest.approx((STEPS + 2) / (2 * STEPS), rel=0.02)


def fastercache(conditional: torch.Tensor, difference: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """As its code has it: spectra moved to the centre, a disc of a fifth of the smaller side."""

    def split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        moved = torch.fft.fftshift(torch.fft.fft2(x), dim=(-2, -1))
        height, width = x.shape[-2:]
        y, x_ = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        mask = (x_ - width // 2) ** 2 + (y - height // 2) ** 2 <= (min(height, width) // 5) ** 2
        return moved * mask, moved * ~mask

    (c_low, c_high), (d_low, d_high) = split(conditional), split(difference)
    whole = c_low + low * d_low + c_high + high * d_high
    return torch.fft.ifft2(torch.fft.ifftshift(whole, dim=(-2, -1))).real


@pytest.mark.parametrize("shape", [(2, 3, 12, 20), (1, 4, 5, 15, 11)])
def test_bands_are_those_of_fastercache(shape: tuple[int, ...]) -> None:
    conditional, difference = torch.randn(shape), torch.randn(shape)
    for low, high in ((1.1, 1.0), (1.0, 1.1), (1.0, 1.0), (0.0, 2.0)):
        ours = conditional + weighted(difference, (low, high), 0.2)
        assert torch.allclose(ours, fastercache(conditional, difference, low, high), atol=1e-5)
    assert torch.equal(weighted(difference, (1.0, 1.0), 0.2), difference)


def test_bands_need_height_and_width() -> None:
    guidance = Guidance(computed=(0, 4), bands=((1.1, 1.0),) * STEPS)
    with pytest.raises(ValueError, match=r"splits frequencies of \[batch, .., height, width\].*returns \[1, 9, 4\]"):
        guide(cached("separate", guidance), Request(), "separate")


# -- together with rows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["separate", "separate, conditional first", "batched"])
def test_the_conditional_branch_follows_its_rows_as_if_alone(mode: str) -> None:
    """With rule fold the result after the fold is that of the conditional branch, on its own history."""
    grid = "CrCfCrCf"
    denoiser = cached(mode, Guidance("fold", (0, 1, 2)), {"stack0": grid})
    request = Request(seed=7, prompt=3)
    with Quiet():
        folded = guide(denoiser, request, mode)
        assert torch.equal(folded, guide(denoiser, request, mode))
    rows = cached(mode, None, {"stack0": grid})
    model, x, cond = rows, request.latent(), request.embeds()
    none = torch.zeros_like(cond)
    with torch.no_grad():
        for step, t in enumerate(request.times()):
            v_cond = model(x, t, cond)
            v_none = model(x, t, none) if step < 3 else v_cond
            x = x - (v_none + SCALE * (v_cond - v_none)) / STEPS
    assert torch.allclose(folded, x, atol=1e-6)


@pytest.mark.parametrize("mode", ["separate", "batched"])
def test_forecasts_that_read_a_step_left_out_are_computed(mode: str) -> None:
    denoiser = cached(mode, Guidance("difference", (0, 1, 5)), {"stack0": "CCCrrrCr"})
    with Quiet():
        guide(denoiser, Request(seed=7), mode)
    logs = [log for _, log in denoiser.decisions]
    if mode == "batched":
        assert logs == [["C", "C", "-C", "-r", "-r", "C", "-C", "-r"]]
    else:
        assert logs == [["C", "C", "-", "-", "-", "C", "-", "-"], ["C", "C", "C", "r", "r", "r", "C", "r"]]


def test_online_rows_read_what_their_branch_has() -> None:
    online = Online("taylor", 2, {"order": 1})
    denoiser = cached("separate", Guidance("difference", (0, 1, 5)), {"stack0": "CCggggCg"}, online=online)
    with Quiet():
        guide(denoiser, Request(seed=7), "separate")
    assert [log for _, log in denoiser.decisions] == [
        ["C", "C", "-", "-", "-", "f", "-", "-"],
        ["C", "C", "f", "f", "f", "f", "C", "f"],
    ]


@pytest.mark.parametrize("options", [{}, {"history_dtype": "int8"}], ids=["as it is", "int8"])
@pytest.mark.parametrize("mode", ["separate", "separate, conditional first", "batched", "batched, flipped"])
def test_folding_with_the_mean_of_both_histories(mode: str, options: dict[str, Any]) -> None:
    """T-GATE: what a site keeps of the last step with both branches is their mean."""
    guidance, request = Guidance("fold", (0, 1, 2), history="mean"), Request(seed=7, prompt=3)
    schedule = replace(schedule_of(found(mode), {"output": "CCCrrrrr"}), guidance=guidance)
    with Quiet():
        result = guide(found(mode).cached(schedule, **options), request, mode)
    model, x, cond = eager(mode), request.latent(), request.embeds()
    none, mean = torch.zeros_like(cond), torch.zeros(())
    with torch.no_grad():
        for step, t in enumerate(request.times()):
            if step < 3:
                v_cond, v_none = model(x, t, cond), model(x, t, none)
                mean = (v_cond + v_none) / 2
            else:
                v_cond = v_none = mean
            x = x - (v_none + SCALE * (v_cond - v_none)) / STEPS
    assert torch.allclose(result, x, atol=1e-6)


# -- gates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_gate_of_guidance(mode: str) -> None:
    def left_out(budget: float, max_since: int = 5) -> list[int]:
        gate = GateSpec("guidance_change", {"budget": budget, "max_since": max_since})
        denoiser = cached(mode, Guidance("difference", (0, 1), gate))
        with Quiet():
            result = guide(denoiser, Request(seed=7, prompt=3), mode)
            assert torch.equal(guide(denoiser, Request(seed=7, prompt=3), mode), result)
        logs = [log for _, log in denoiser.decisions]
        return sorted({step for log in logs for step, cells in enumerate(log) if cells.startswith("-")})

    assert left_out(0.0) == []
    assert left_out(1e9) == [2, 3, 4, 5, 6]
    assert left_out(1e9, 2) == [2, 3, 5, 6]
    some = left_out(0.5)
    assert len(left_out(0.05)) < len(some) < 6


def test_what_the_gate_measures() -> None:
    """By hand: the change of the difference a step, times the steps that were left out."""
    gate = make_gate("guidance_change", budget=0.3)
    one, two = torch.ones(1, 4), torch.full((1, 4), 1.2)
    moment = functools.partial(diffcache.gates.Moment, steps=9)
    assert gate.see([0 * one, one], moment(step=0, since=0), True) is None
    assert not gate.follow(moment(step=1, since=1), None).any()
    gate.learn(gate.see([0 * one, two], moment(step=2, since=2), True).reshape(1, 1).numpy())  # 0.2 in two steps
    assert [bool(gate.follow(moment(step=2 + k, since=k), None)) for k in (1, 2, 3, 4)] == [True, True, False, False]


def test_folding_at_run_time_is_for_good() -> None:
    def folded(similarity: float) -> list[str]:
        gate = GateSpec("guidance_agreement", {"similarity": similarity})
        denoiser = cached("context", Guidance("fold", (0, 1), gate))
        with Quiet():
            guide(denoiser, Request(seed=7, prompt=3), "context")
        return dict(denoiser.decisions)["uncond"]

    assert folded(-1.0) == ["C", "C", *"------"]
    assert folded(1.1) == ["C"] * STEPS


@diffcache.gates.gate("test: output")
class AfterTheConditional(diffcache.gates.Gate):
    """Looks at the conditional result of the step."""

    def __init__(self, probe: str = "output") -> None:
        self.probe = probe

    def follow(self, moment: Any, numbers: Any) -> Any:
        return numbers[:, 0] < 1e9


def test_a_gate_may_look_at_the_conditional_result() -> None:
    guidance = Guidance("difference", (0, 1), GateSpec("test: output"))
    denoiser = cached("context, conditional first", guidance)
    with Quiet():
        guide(denoiser, Request(seed=7), "context, conditional first")
    assert dict(denoiser.decisions)["uncond"] == ["C", "C", *"------"]
    for mode in ("context", "batched"):
        with pytest.raises(ValueError, match=r"looks at 'output' .*may look at one of \['', 'latent'\]"):
            cached(mode, guidance)
    with pytest.raises(ValueError, match=r"looks at 'block:blocks\.0'"):
        cached("context", Guidance("difference", (0, 1), GateSpec("test: output", {"probe": "block:blocks.0"})))


# -- several generations ----------------------------------------------------------------------------------------------


GUIDED = Guidance("difference", (0, 1, 5))


@pytest.mark.parametrize("stop", [1, 2, 3, 6])
@pytest.mark.parametrize("mode", MODES)
def test_a_generation_after_an_interrupted_one(mode: str, stop: int) -> None:
    denoiser, request = cached(mode, GUIDED, {"stack0": "CCfCrCfr"}), Request(seed=7, prompt=3)
    expected = guide(denoiser, request, mode)
    with Quiet():
        for seed in (7, 8):
            for _ in steps_of(denoiser, Request(seed=seed, prompt=3), mode, stop):
                pass
            assert torch.equal(guide(denoiser, request, mode), expected)


@pytest.mark.parametrize("mode", ["separate", "separate, conditional first"])
@pytest.mark.parametrize("step", [0, 3])
def test_a_generation_after_one_that_stopped_between_its_branches(mode: str, step: int) -> None:
    denoiser, request = cached(mode, GUIDED), Request(seed=7, prompt=3)
    expected = guide(denoiser, request, mode)
    *_, x = [request.latent(), *steps_of(denoiser, request, mode, step)]
    with torch.no_grad():
        denoiser(x, request.times()[step], request.embeds() * ("conditional first" in mode))
    assert torch.equal(guide(denoiser, request, mode), expected)


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
@pytest.mark.parametrize("mode", MODES)
def test_two_requests_in_turn_give_what_each_gives_alone(mode: str, first: Request, second: Request) -> None:
    denoiser = cached(mode, GUIDED, {"stack0": "CCfCrCfr"})
    alone = [guide(denoiser, first, mode), guide(denoiser, second, mode)]
    with Quiet():
        walks = [steps_of(denoiser, request, mode) for request in (first, second)]
        together = list(zip(*walks, strict=True))[-1]
    assert all(map(torch.equal, alone, together))
    assert not denoiser._streams


@pytest.mark.parametrize("samples", ["together", "alone"])
@pytest.mark.parametrize("mode", MODES)
def test_nothing_of_a_generation_waits_for_the_garbage_collector(mode: str, samples: str) -> None:
    denoiser = cached(mode, GUIDED, {"stack0": "CCfCrCfr"}, samples=samples)
    guide(denoiser, Request(seed=7), mode)
    gc.collect()
    gc.disable()
    try:
        walk = steps_of(denoiser, Request(seed=7), mode)
        next(walk)
        streams = [weakref.ref(s) for stream in denoiser._streams for s in (stream, *stream.parts)]
        generations = [weakref.ref(s.generation) for stream in denoiser._streams for s in (stream, *stream.parts)]
        assert len(streams) >= (1 if mode.startswith("batched") else 2)
        for _ in walk:
            pass
        assert all(kept() is None for kept in (*streams, *generations))
    finally:
        gc.enable()


@pytest.mark.parametrize("mode", ["separate", "separate, conditional first", "batched"])
def test_calls_without_guidance_run_as_they_are(mode: str) -> None:
    """The same denoiser with guidance off: one branch, or a batch that is no pair."""
    denoiser = cached(mode, GUIDED)
    assert torch.equal(sample(denoiser, Request(seed=7)), sample(eager(mode), Request(seed=7)))
    two = Request(seed=7, batch=2)
    if mode == "batched":
        with pytest.warns(UserWarning, match="calibrated as two branches, but is not"):
            assert torch.equal(sample(denoiser, two), sample(eager(mode), two))
    else:
        assert torch.equal(sample(denoiser, two), sample(eager(mode), two))
    assert denoiser.steps_forecast == 0


@pytest.mark.parametrize("mode", MODES)
def test_without_a_clock_to_read_calls_are_counted(mode: str) -> None:
    """As with timesteps on a GPU."""
    made = found(mode)
    blind = CachedDenoiser(
        made.captured,
        replace(schedule_of(made, {"stack0": "CCfCrCfr"}), guidance=GUIDED, clock=()),
        replace(made.pattern, clock=None, clock_values=()),
        made.finder,
    )
    seeing, request = cached(mode, GUIDED, {"stack0": "CCfCrCfr"}), Request(seed=7, prompt=3)
    expected = guide(seeing, request, mode)
    for _ in range(2):
        assert torch.equal(guide(blind, request, mode), expected)
    assert blind.steps_forecast == 2 * seeing.steps_forecast


def test_more_than_two_branches_share_decisions_but_not_guidance() -> None:
    def three(denoiser: nn.Module, request: Request) -> torch.Tensor:
        x, cond = request.latent(), request.embeds()
        with torch.no_grad():
            for t in request.times():
                x = x - (denoiser(x, t, cond) * 3 - denoiser(x, t, cond * 0) - denoiser(x, t, cond * 0.5)) / STEPS
        return x

    made = calibration(TokenDiT, three, ITEMS)
    assert made.pattern.streams == 3
    with pytest.raises(ValueError, match="saw no two branches: 3 streams"):
        made.cached(replace(Schedule.exact(STEPS), guidance=GUIDED))
    gate = GateSpec("accumulated_change", {"threshold": 0.18, "probe": "block:blocks.0.attn"})
    schedule = replace(schedule_of(made, {"output": "C" + "g" * (STEPS - 1)}, gate), decide="shared")
    denoiser = made.cached(schedule)
    with Quiet():
        three(denoiser, Request(seed=7, prompt=3))
    logs = [log for _, log in denoiser.decisions]
    assert len(logs) == 3
    assert logs[0] == logs[1] == logs[2]


def test_branches_with_different_latents_are_computed() -> None:
    denoiser = cached("separate, conditional first", GUIDED)
    request = Request(seed=7)

    def apart(model: nn.Module) -> torch.Tensor:
        x, cond = request.latent(), request.embeds()
        y = x
        with torch.no_grad():
            for t in request.times():
                x, y = x - model(x, t, cond) / STEPS, y - model(y, t, cond * 0) / STEPS
        return x + y

    with pytest.warns(UserWarning, match="different latents"):
        assert torch.equal(apart(denoiser), apart(eager("separate, conditional first")))


def test_a_conditional_call_that_does_not_come_as_expected() -> None:
    denoiser, request = cached("separate", Guidance("difference", (0, 1)), {"stack0": "CCCrCrCr"}), Request(seed=7)
    model, x, cond = eager("separate"), request.latent(), request.embeds()
    with torch.no_grad():
        for step, t in enumerate(request.times()):
            x_cond = x + 1 if step == 2 else x
            v_none = denoiser(x, t, cond * 0)
            if step == 2:
                with pytest.warns(UserWarning, match="conditional call of step 2 has other inputs"):
                    v_cond = denoiser(x_cond, t, cond)
            else:
                v_cond = denoiser(x_cond, t, cond)
            if step in (2, 3, 4, 6):  # at step 3 there is nothing to reuse: what step 2 kept was of another latent
                assert torch.equal(v_cond, model(x_cond, t, cond))
            if step in (3, 4, 6):
                assert torch.equal(v_none, model(x, t, cond * 0))
            x = x - v_cond / STEPS


@pytest.mark.parametrize("mode", MODES[:4])
def test_writing_into_results_does_not_reach_the_other_branch(mode: str) -> None:
    denoiser, request = cached(mode, GUIDED), Request(seed=7, prompt=3)
    expected = guide(denoiser, request, mode)

    class Spoiled(nn.Module):
        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            result = denoiser(*inputs)
            kept = result.clone()
            result.zero_()
            return kept

        cache_context = staticmethod(denoiser.cache_context)

    assert torch.equal(guide(Spoiled(), request, mode), expected)


# -- who decides ------------------------------------------------------------------------------------------------------


def shared(mode: str, decide: str, budget: float) -> list[list[str]]:
    gate = GateSpec("accumulated_change", {"threshold": budget, "probe": "block:blocks.0.attn"})
    denoiser = cached(mode, None, {"output": "C" + "g" * (STEPS - 1)}, gate=gate, decide=decide)
    with Quiet():
        result = guide(denoiser, Request(seed=7, prompt=3), mode)
        assert torch.equal(guide(denoiser, Request(seed=7, prompt=3), mode), result)
    return [log for _, log in denoiser.decisions][:2]


@pytest.mark.parametrize("mode", ["separate", "context, conditional first"])
def test_shared_decisions_are_those_of_the_branch_called_first(mode: str) -> None:
    for budget in (0.17, 0.18, 0.19, 0.2):
        first, second = shared(mode, "separate", budget)
        if first != second:
            break
    assert first != second
    assert shared(mode, "shared", budget) == [first, first]


def test_shared_decisions_with_a_branch_left_out() -> None:
    gate = GateSpec("accumulated_change", {"threshold": 1e9, "max_since": 2})
    guidance = Guidance("difference", (0, 1, 5))
    for mode in MODES[:4]:
        denoiser = cached(mode, guidance, {"stack0": "C" + "g" * (STEPS - 1)}, gate=gate, decide="shared")
        with Quiet():
            guide(denoiser, Request(seed=7), mode)
        logs = sorted("".join(log) for _, log in denoiser.decisions)
        # what the conditional branch reads at step 5 was made at step 3, where the other was left out: it computes
        assert logs == ["Cr---C--", "CrrCrrCr"], mode


# -- recipes, files, pipelines ----------------------------------------------------------------------------------------


def recipe(**options: Any) -> Recipe:
    part = Part(sites=one("stack"), when=lambda plan, site: range(0, plan.steps, 2), predictor=Predict())
    return Recipe(parts=(part,), guidance=Guidance("difference", (0, 2, 4)), **options)


@pytest.mark.parametrize("mode", ["separate", "batched"])
def test_a_recipe_with_guidance_compiles_and_loads(mode: str, tmp_path: Path) -> None:
    def draw(denoiser: nn.Module, item: Request) -> torch.Tensor:
        return guide(denoiser, item, mode)

    model, request = eager(mode), Request(seed=9, prompt=4)
    fast = diffcache.compile(model, list(ITEMS), recipe=recipe(decide="shared"), sample=draw, verbose=False)
    assert fast.schedule.flops_fraction < 0.6
    assert fast.report.measured_error < 0.1
    assert fast.report.computed == 3
    assert re.search(r"unconditional \(difference\) +C-C-C---\n", str(fast.schedule))
    fast.save(tmp_path)
    again = diffcache.load(model, tmp_path)
    assert again.schedule == fast.schedule
    assert again.pattern == fast.pattern
    assert torch.equal(guide(again, request, mode), guide(fast, request, mode))


def test_a_recipe_of_guidance_alone() -> None:
    made = Recipe(guidance=lambda plan: Guidance("fold", tuple(range(plan.steps // 2))))
    fast = diffcache.compile(
        eager("separate"), list(ITEMS), recipe=made, sample=lambda d, item: guide(d, item, "separate"), verbose=False
    )
    assert fast.schedule.flops_fraction == pytest.approx(0.75, abs=0.02)
    assert fast.schedule.computed_steps() == (0, 1, 2, 3)
    assert torch.equal(
        guide(fast, Request(seed=7), "separate"), by_hand("separate", Request(seed=7), (0, 1, 2, 3), "fold")
    )


def test_a_gate_that_lets_nothing_pass_is_refused() -> None:
    made = Recipe(guidance=Guidance(gate=GateSpec("guidance_change", {"budget": 0.0})))
    with pytest.raises(ValueError, match="lets nothing pass"):
        diffcache.compile(
            eager("separate"),
            list(ITEMS),
            recipe=made,
            sample=lambda d, item: guide(d, item, "separate"),
            verbose=False,
        )


def test_guidance_goes_through_json() -> None:
    gate = GateSpec("guidance_change", {"budget": 0.1})
    for guidance in (
        Guidance("difference", (0, 3), gate, ((1.0, 1.1),) * 6, 0.25),
        Guidance("fold", (0,), history="mean"),
    ):
        schedule = replace(Schedule.exact(6), guidance=guidance, decide="shared", samples="alone")
        assert Schedule.from_json(schedule.to_json()) == schedule
    assert replace(Schedule.exact(6), guidance=guidance).only([]) == replace(Schedule.exact(6), origin="exact only []")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Guidance("guess"),
            r"unknown rule of guidance 'guess'; expected one of \['difference', 'fold', 'reuse'\]",
        ),
        (lambda: Guidance(computed=(1, 2)), "expected step 0 first"),
        (lambda: Guidance("fold", (0, 2)), "steps 0 to m - 1"),
        (lambda: Guidance("reuse", bands=((1.0, 1.0),)), "bands go with rule 'difference'"),
        (lambda: Guidance(history="mean"), "goes with rule 'fold'"),
        (lambda: Guidance(history="both"), "expected one of"),
        (lambda: Guidance(bands=((float("nan"), 1.0),)), "must be finite"),
        (lambda: Guidance(radius=0.0), "share of the smaller side"),
        (lambda: replace(Schedule.exact(4), guidance=Guidance(computed=(0, 4))), "step 4 of a schedule of 4"),
        (lambda: replace(Schedule.exact(4), guidance=Guidance(bands=((1.0, 1.0),))), "give one pair a step"),
        (lambda: replace(Schedule.exact(4), decide="both"), "expected separate or shared"),
    ],
)
def test_guidance_refusals(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_pipelines_of_diffusers() -> None:
    pytest.importorskip("diffusers")
    from tests.pipelines import digits_pipeline, dit_pipeline, embeds, images, unet_pipeline

    half = Recipe(guidance=lambda plan: Guidance("difference", tuple(range(0, plan.steps, 2))))
    digits = [{"prompt": name, "num_inference_steps": STEPS} for name in ("a bold seven", "a thin three")]
    classes = [{"class_labels": [c], "num_inference_steps": STEPS} for c in (1, 2)]
    for pipe, items in (
        (digits_pipeline(), digits),
        (dit_pipeline(), classes),
        (unet_pipeline(), [embeds(1), embeds(2)]),
    ):
        fast = diffcache.compile(pipe, items, recipe=half, verbose=False)
        assert fast.schedule.flops_fraction == pytest.approx(0.75, abs=0.05)
        assert 0 < fast.report.measured_error < 1
        first = images(fast, items[0], 3)
        assert torch.equal(first, images(fast, items[0], 3))
        assert not torch.equal(first, images(pipe, items[0], 3))


# -- what cannot be cut -----------------------------------------------------------------------------------------------


class Averaging(TokenDiT):
    """Every sample sees the mean of its batch."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x + 0.1 * prompt.mean(), t, prompt)


class Drawing(TokenDiT):
    def forward(self, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x + 0.1 * torch.randn_like(x), t, prompt)


class Counted(TokenDiT):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        self.calls.add_(1.0)
        return super().forward(x, t, prompt)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Averaging, "the result made in parts differs from the whole by"),
        (Drawing, "draws random numbers"),
        (Counted, "writes to its own state"),
    ],
)
def test_a_batch_that_cannot_be_cut_is_refused(kind: type[TokenDiT], message: str) -> None:
    denoiser = calibration(kind, lambda d, item: guide(d, item, "batched"), ITEMS).cached(
        replace(Schedule.exact(STEPS), guidance=GUIDED)
    )
    with pytest.raises(ValueError, match=f"cannot be cut: .*{message}"):
        guide(denoiser, Request(seed=7), "batched")


def test_a_call_with_effects_is_not_left_out() -> None:
    denoiser = calibration(Counted, lambda d, item: guide(d, item, "separate"), ITEMS).cached(
        replace(Schedule.exact(STEPS), guidance=GUIDED)
    )
    with pytest.raises(ValueError, match="cannot be left out: the denoiser writes to its own state"):
        guide(denoiser, Request(seed=7), "separate")
