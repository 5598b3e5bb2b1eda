"""Samples that decide for themselves: what shares a sample's batch changes neither its decisions nor a bit of it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import diffcache
from diffcache import recipes
from diffcache.cells import GateSpec
from diffcache.guidance import Guidance
from diffcache.profiling import Calibration
from diffcache.recipes import Part, Predict, Recipe
from diffcache.recipes.picks import one
from diffcache.runtime import CachedDenoiser
from diffcache.schedule import Schedule
from tests.generation import ITEMS, STEPS, Quiet, Request, TextDiT, calibration, make, sample, schedule_of
from tests.test_branches import Averaging, Counted, Drawing

GATES = {
    "latent": GateSpec("accumulated_change", {"threshold": 0.15}),
    "probe": GateSpec("accumulated_change", {"threshold": 0.46, "probe": "block:blocks.0"}),
}
GATED = "C" + "g" * (STEPS - 1)
# One that moves much, one that hardly does: their decisions differ.
REQUESTS = (Request(seed=4, prompt=2), Request(seed=9, prompt=7), Request(seed=5, prompt=3))
SIZES = (1.0, 0.02, 0.3)


@functools.cache
def found() -> Calibration:
    return calibration(TextDiT)


def cached(rows: dict[str, str], **options: Any) -> CachedDenoiser:
    made = schedule_of(found(), rows, **{k: v for k, v in options.items() if k == "gate"})
    run = {k: v for k, v in options.items() if k != "gate"}
    return found().cached(replace(made, samples="alone"), **run)


def together(denoiser: nn.Module, chosen: tuple[int, ...], stop: int = STEPS) -> Iterator[torch.Tensor]:
    """These of the requests as one batch; yields the latent after every step."""
    x = torch.cat([REQUESTS[index].latent() * SIZES[index] for index in chosen])
    prompt = torch.cat([REQUESTS[index].embeds() for index in chosen])
    for t in REQUESTS[0].times()[:stop]:
        with torch.no_grad():
            x = x - denoiser(x, t.expand(len(x)).contiguous(), prompt) / STEPS
        yield x


def generate(denoiser: nn.Module, chosen: tuple[int, ...]) -> torch.Tensor:
    *_, last = together(denoiser, chosen)
    return last


def alone(denoiser: nn.Module, chosen: tuple[int, ...]) -> torch.Tensor:
    return torch.cat([generate(denoiser, (index,)) for index in chosen])


@pytest.mark.parametrize("where", GATES)
def test_company_changes_neither_decisions_nor_a_bit(where: str) -> None:
    denoiser = cached({"output": GATED}, gate=GATES[where])
    with Quiet():
        each = [generate(denoiser, (index,)) for index in range(3)]
        decided = [log for _, log in denoiser.decisions]
        assert len({tuple(log) for log in decided}) > 1, "they should decide differently"
        for chosen in ((0, 1), (1, 0), (0, 1, 2), (2, 0)):
            denoiser.reset()
            result = generate(denoiser, chosen)
            assert torch.equal(result, torch.cat([each[index] for index in chosen]))
            assert denoiser.decisions == [(f"[{k}]", decided[index]) for k, index in enumerate(chosen)]
    assert not denoiser._streams


def test_samples_that_decide_together_do_change() -> None:
    """What the default is, and why: a batch shares one decision, that of its safest sample."""
    denoiser = found().cached(schedule_of(found(), {"output": GATED}, gate=GATES["latent"]))
    assert not torch.equal(generate(denoiser, (0, 1))[:1], generate(denoiser, (0,)))


@pytest.mark.parametrize("rows", [{"stack0": "CCfCfCrf"}, {"stack0": "CCfCfCrf", "attn:blocks.0.attn": "CrrCrrCr"}])
def test_fixed_schedules_too(rows: dict[str, str]) -> None:
    """A batch of three runs other kernels than one sample does; cut into samples it gives the same bits."""
    denoiser = cached(rows)
    with Quiet():
        assert torch.equal(generate(denoiser, (0, 1, 2)), alone(denoiser, (0, 1, 2)))
        assert torch.equal(alone(denoiser, (0, 1)), alone(found().cached(schedule_of(found(), rows)), (0, 1)))


def test_all_computed_is_eager_bit_for_bit() -> None:
    model = found().captured.denoiser
    for denoiser in (cached({}), cached({"output": GATED}, gate=GateSpec("accumulated_change", {"threshold": 0.0}))):
        assert torch.equal(generate(denoiser, (0, 1, 2)), alone(model, (0, 1, 2)))
        assert denoiser.steps_forecast == 0


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_a_generation_after_an_interrupted_one(stop: int) -> None:
    denoiser = cached({"stack0": GATED}, gate=GATES["latent"])
    expected = generate(denoiser, (0, 1))
    with Quiet():
        for chosen in ((0, 1), (1, 2, 0), (2,)):
            for _ in together(denoiser, chosen, stop):
                pass
            assert torch.equal(generate(denoiser, (0, 1)), expected)


def test_two_batches_in_turn() -> None:
    denoiser = cached({"stack0": GATED}, gate=GATES["latent"])
    expected = [generate(denoiser, (0, 1)), generate(denoiser, (2,)), generate(denoiser, (1, 0, 2))]
    with Quiet():
        walks = [together(denoiser, chosen) for chosen in ((0, 1), (2,), (1, 0, 2))]
        results = list(zip(*walks, strict=True))[-1]
    assert all(map(torch.equal, expected, results))


# -- guidance ---------------------------------------------------------------------------------------------------------


def guided(denoiser: nn.Module, chosen: tuple[int, ...], mode: str) -> torch.Tensor:
    x = torch.cat([REQUESTS[index].latent() * SIZES[index] for index in chosen])
    cond = torch.cat([REQUESTS[index].embeds() for index in chosen])
    none = torch.zeros_like(cond)
    both = torch.cat([none, cond])
    with torch.no_grad():
        for t in REQUESTS[0].times():
            t = t.expand(len(x)).contiguous()
            if mode == "batched":
                v_none, v_cond = denoiser(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
            elif mode == "conditional first":
                v_cond, v_none = denoiser(x, t, cond), denoiser(x, t, none)
            else:
                v_none, v_cond = denoiser(x, t, none), denoiser(x, t, cond)
            x = x - (v_none + 3.0 * (v_cond - v_none)) / STEPS
    return x


@functools.cache
def found_guided(mode: str) -> Calibration:
    return calibration(TextDiT, lambda denoiser, item: guided(denoiser, (item,), mode), (0, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decide": "shared"},
        {"guidance": Guidance("difference", (0, 1, 5))},
        {"guidance": Guidance("fold", (0, 1, 2), history="mean"), "decide": "shared"},
    ],
    ids=["separate", "shared", "difference", "fold, shared"],
)
@pytest.mark.parametrize("mode", ["unconditional first", "conditional first", "batched"])
def test_guided_samples(mode: str, options: dict[str, Any]) -> None:
    """A sample is then a pair, whether its branches come in two calls or as rows of both halves."""
    made = schedule_of(found_guided(mode), {"output": GATED}, gate=GATES["latent"])
    denoiser = found_guided(mode).cached(replace(made, samples="alone", **options))
    with Quiet():
        each = [guided(denoiser, (index,), mode) for index in range(3)]
        for chosen in ((0, 1), (2, 1, 0)):
            assert torch.equal(guided(denoiser, chosen, mode), torch.cat([each[index] for index in chosen]))
    assert not denoiser._streams
    if "guidance" in options:
        assert any("-" in cells for _, log in denoiser.decisions for cells in log)


@pytest.mark.parametrize("mode", ["unconditional first", "conditional first", "batched"])
def test_a_gate_of_guidance_decides_for_each_sample(mode: str) -> None:
    gate = GateSpec("guidance_change", {"budget": 0.3})
    schedule = replace(Schedule.exact(STEPS), samples="alone", guidance=Guidance("difference", (0, 1), gate))
    denoiser = found_guided(mode).cached(replace(schedule, clock=found_guided(mode).profile.clock))
    with Quiet():
        each = [guided(denoiser, (index,), mode) for index in range(3)]
        decided = [[cells for cells in log] for _, log in denoiser.decisions]
        assert len({tuple(log) for log in decided if any("-" in cells for cells in log)}) > 1, "they should differ"
        assert torch.equal(guided(denoiser, (1, 2, 0), mode), torch.cat([each[index] for index in (1, 2, 0)]))


# -- recipes, files, limits -------------------------------------------------------------------------------------------


def recipe(gate: GateSpec | None = GATES["latent"]) -> Recipe:
    return Recipe(parts=(Part(sites=one("stack"), gate=gate, predictor=Predict()),)).each_sample()


def test_a_recipe_for_each_sample_compiles_and_loads(tmp_path: Path) -> None:
    items = [replace(item, batch=2) for item in ITEMS]
    fast = diffcache.compile(make(), items, recipe=recipe(), sample=sample, verbose=False)
    assert fast.schedule.samples == "alone"
    assert 0 < fast.schedule.flops_fraction < 1
    fast.save(tmp_path)
    again = diffcache.load(make(), tmp_path)
    assert again.schedule == fast.schedule
    assert again.pattern == fast.pattern
    request = Request(seed=9, batch=3)
    assert torch.equal(sample(again, request), sample(fast, request))
    ones = [replace(request, seed=9 + k, prompt=k, batch=1) for k in range(3)]
    assert torch.equal(sample(again, request), torch.cat([sample(again, one) for one in ones]))


def test_a_plain_recipe_for_each_sample() -> None:
    fast = diffcache.compile(
        make(), list(ITEMS), recipe=recipes.uniform(interval=2).each_sample(), sample=sample, verbose=False
    )
    assert torch.equal(generate(fast, (0, 1, 2)), alone(fast, (0, 1, 2)))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Averaging, "the result made in parts differs from the whole by"),
        (Drawing, "draws random numbers"),
        (Counted, "writes to its own state"),
    ],
)
def test_samples_that_cannot_be_cut_are_refused(kind: type[nn.Module], message: str) -> None:
    denoiser = calibration(kind).cached(replace(Schedule.exact(STEPS), samples="alone"))  # type: ignore[arg-type]
    sample(denoiser, Request())  # one sample is not cut
    with pytest.raises(ValueError, match=f"cannot be cut: .*{message}"):
        sample(denoiser, Request(batch=2))


class Table(TextDiT):
    """Takes positions that all samples share; as many as there are tokens."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x + ids[:, None].sin(), t, prompt)


def with_table(denoiser: nn.Module, request: Request) -> torch.Tensor:
    x, prompt, ids = request.latent(), request.embeds(), torch.arange(request.tokens).float()
    with torch.no_grad():
        for t in request.times():
            x = x - denoiser(x, t, prompt, ids) / STEPS
    return x


def test_what_samples_share_is_not_cut() -> None:
    """Even where it happens to have as many rows as the batch."""
    table = calibration(Table, with_table)
    assert table.pattern.shared == ((("item", "ids"),),)
    denoiser = table.cached(replace(schedule_of(table, {"stack0": "CCfCfCrf"}), samples="alone"))
    request = Request(seed=3, batch=9)
    ones = [replace(request, seed=3 + k, prompt=k, batch=1) for k in range(9)]
    with Quiet():
        assert torch.equal(with_table(denoiser, request), torch.cat([with_table(denoiser, one) for one in ones]))


def test_the_history_of_all_samples_counts() -> None:
    entry = 9 * 16 * 4
    denoiser = cached({"stack0": "CrCrCrCr"}, max_cache_bytes=2 * entry)
    generate(denoiser, (0, 1))
    assert denoiser.steps_forecast == 2 * 4
    with pytest.warns(UserWarning, match="max_cache_bytes"):
        assert torch.equal(generate(denoiser, (0, 1, 2)), generate(found().captured.denoiser, (0, 1, 2)))
