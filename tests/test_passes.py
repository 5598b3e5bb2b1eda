"""Each pass on a graph where it fires and on one where it must not; the runner that times, verifies and bisects."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.utils._pytree import tree_flatten

import diffcache
from diffcache import pipeline, recipes
from diffcache.graphs import count_ops, find_output
from diffcache.passes.apply_schedule import apply_schedule
from diffcache.passes.drop_dead_writes import drop_dead_writes
from diffcache.passes.eliminate_dead_code import eliminate_dead_code
from diffcache.passes.flatten_inputs import flatten_inputs
from diffcache.passes.fuse_forecasts import fuse_forecasts
from diffcache.passes.hoist_step_invariant import hoist_step_invariant
from diffcache.passes.subset_tokens import subset_tokens
from diffcache.pipeline import PREPARE, SPECIALISE, PassReport, bisect_passes, known_passes, run_passes
from diffcache.programs import Programs
from diffcache.schedule import COMPUTE, SKIP, Forecast
from diffcache.sites import Site
from diffcache.tracing.captured import capture
from diffcache.tracing.printer import format_graph
from tests.generation import Request, compiled, sample, schedule_of, shared_calibration

Golden = Callable[[str], None]
PROMPT = (("item", "prompt"),)


class Tiny(nn.Module):
    """Two layers on the latent and one on the prompt."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.second, self.text = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(3, 4)

    def forward(self, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        context = torch.tanh(self.text(prompt))
        h = self.first(x) * t
        return self.second(torch.relu(h)) + h * context


def inputs(seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(2, 4, generator=generator),
        torch.rand(1, generator=generator),
        torch.randn(2, 3, generator=generator),
    )


def captured(model: nn.Module | None = None, *args: Any) -> fx.GraphModule:
    return capture(model or Tiny(), *(args or inputs())).graph_module


def flat(model: nn.Module | None = None, *args: Any) -> fx.GraphModule:
    module = flatten_inputs(captured(model, *args))
    module.recompile()
    return module


def lines(module: fx.GraphModule, title: str = "program") -> str:
    return format_graph(module, title=title)


SITE = Site("second", "block", ("second",), (None,), "second", 1.0, 1)
RESIDUAL = Site("second", "block", ("second",), ("mul",), "second", 1.0, 1)


# -- flatten_inputs ---------------------------------------------------------------------------------------------------


class Nested(nn.Module):
    def forward(self, x: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
        return x * extra["scale"] + extra["ids"][1]


def test_flatten_inputs_gives_every_leaf_a_placeholder(golden: Golden) -> None:
    x, extra = torch.ones(2), {"scale": 3.0, "ids": (torch.zeros(2), torch.ones(2)), "flag": "yes"}
    before = captured(Nested(), x, extra)
    text = lines(before, "before")
    after = flatten_inputs(before)
    after.recompile()
    golden(f"{text}\n\n{lines(after, 'after')}")
    leaves = [x, extra["scale"], extra["ids"][1]]
    found = dict(zip(after.meta["inputs"], leaves, strict=False))
    assert (("item", "x"),) in found
    follow = {"x": x, "extra": extra}
    given = [diffcache.tracing.tree.follow(follow, path) for path in after.meta["inputs"]]  # type: ignore[attr-defined]
    assert torch.equal(after(*given), Nested()(x, extra))


def test_flatten_inputs_leaves_flat_arguments_alone() -> None:
    module = captured()
    before = lines(module)
    assert lines(flatten_inputs(module)) == before
    assert module.meta["inputs"] == ((("item", "x"),), (("item", "t"),), (("item", "prompt"),))


# -- hoist_step_invariant ---------------------------------------------------------------------------------------------


def test_hoisting_moves_the_prompt_to_a_prologue(golden: Golden) -> None:
    module = flat()
    expected = module(*inputs(1))
    module = hoist_step_invariant(module, invariant={PROMPT})
    module.recompile()
    prologue = module.meta["prologue"]
    golden(f"{lines(prologue, 'prologue')}\n\n{lines(module, 'body')}")
    assert torch.equal(module(*inputs(1), *prologue(*inputs(1))), expected)
    assert module.meta["hoisted"] == count_ops(prologue.graph) == 2


class TwoBlocks(nn.Module):
    """Each block brings the table that both use to its own shape."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = x * torch.sin(prompt).mean(1).unsqueeze(1)
        return x * t


def test_equal_values_come_out_of_the_prologue_once() -> None:
    merged, apart = (flat(TwoBlocks()) for _ in range(2))
    last = [node.name for node in apart.graph.nodes if node.target == "unsqueeze"][-1]
    merged = hoist_step_invariant(merged, invariant={PROMPT})
    apart = hoist_step_invariant(apart, invariant={PROMPT}, named={last})
    for module, count in ((merged, 1), (apart, 2)):
        module.recompile()
        hoisted = module.meta["prologue"](*inputs())
        assert len(hoisted) == count
        assert torch.equal(module(*inputs(), *hoisted), TwoBlocks()(*inputs()))


def test_what_sites_go_by_comes_out_of_the_prologue_though_only_it_reads_it() -> None:
    module = flat(TwoBlocks())
    (sine, *_) = [node.name for node in module.graph.nodes if node.target is torch.sin]
    module = hoist_step_invariant(module, invariant={PROMPT}, named={sine})
    given = {node.meta.get("captured_as"): node for node in module.graph.nodes if node.op == "placeholder"}
    assert sine in given
    assert not given[sine].users
    assert torch.equal(module.meta["prologue"](*inputs())[0], torch.sin(inputs()[2]))


class MasksText(nn.Module):
    """The prompt is written into before anything reads it; the writes are hoisted, what follows them is not."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        text = prompt.mean(1, keepdim=True)
        text[..., :1] = 0.0
        return x * text + t


def test_nothing_waits_for_a_write_that_was_hoisted() -> None:
    module = hoist_step_invariant(flat(MasksText()), invariant={PROMPT})
    nodes = set(module.graph.nodes)
    assert any(node.meta.get("writes") for node in module.meta["prologue"].graph.nodes)
    assert all(dep in nodes for node in nodes for dep in node.meta.get("deps", ()))
    module.recompile()
    assert torch.equal(module(*inputs(), *module.meta["prologue"](*inputs())), MasksText()(*inputs()))


def test_hoisting_without_invariant_inputs_does_nothing() -> None:
    module = flat()
    before = lines(module)
    assert lines(hoist_step_invariant(module)) == before
    assert module.meta["prologue"] is None


class Random(nn.Module):
    def forward(self, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        return x * t + torch.rand_like(prompt).sum()


class Writes(nn.Module):
    """Every step adds to memory that came from the prompt."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        total = prompt.sum(1, keepdim=True) * 1.0
        total.add_(t)
        return x * total


class Returned(nn.Module):
    """The caller gets memory that does not depend on the step, and may write to it."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * t, prompt * 2


@pytest.mark.parametrize("kind", [Random, Writes, Returned])
def test_hoisting_keeps_off_what_a_step_draws_writes_or_returns(kind: type[nn.Module]) -> None:
    module = hoist_step_invariant(flat(kind()), invariant={PROMPT})
    module.recompile()
    prologue = module.meta["prologue"]
    hoisted = prologue(*inputs()) if prologue is not None else ()
    for seed in range(3):  # the same hoisted values for all steps, as in a generation
        step = (*inputs(seed)[:2], inputs()[2])
        torch.manual_seed(seed)
        ours = module(*step, *hoisted)
        torch.manual_seed(seed)
        theirs = kind()(*step)
        for a, b in zip(*((v if isinstance(v, tuple) else (v,)) for v in (ours, theirs)), strict=True):
            assert torch.equal(a, b)
        if isinstance(ours, tuple):
            ours[1].zero_()


# -- apply_schedule ---------------------------------------------------------------------------------------------------


def test_a_computed_cell_only_keeps_the_value(golden: Golden) -> None:
    module = flat()
    expected = module(*inputs(1))
    module = apply_schedule(module, sites=[SITE], cells=[COMPUTE])
    module.recompile()
    golden(lines(module))
    result, (kept,) = module(*inputs(1))
    assert torch.equal(result, expected)
    assert module.meta["writes"] == [(0, 0)]
    h = Tiny().first(inputs(1)[0]) * inputs(1)[1]
    assert torch.equal(kept, Tiny().second(torch.relu(h)))


def test_a_reuse_puts_history_in_the_place_of_the_value(golden: Golden) -> None:
    module = apply_schedule(flat(), sites=[SITE], cells=[Forecast((0,), (1.0,))])
    golden(lines(eliminate_dead_code(module)))
    module.recompile()
    history = torch.full((2, 4), 0.5)
    result, writes = module(*inputs(1), history)
    x, t, prompt = inputs(1)
    model = Tiny()
    assert torch.equal(result, history + model.first(x) * t * torch.tanh(model.text(prompt)))
    assert writes == ()
    assert module.meta["weights"] == []


def test_a_residual_forecast_adds_to_the_current_anchor(golden: Golden) -> None:
    module = apply_schedule(flat(), sites=[RESIDUAL], cells=[Forecast((2, 0), (1.5, -0.5))])
    golden(lines(eliminate_dead_code(module)))
    assert module.meta["history"] == [(0, 0, 0), (0, 0, 1)]
    assert module.meta["weights"] == [0]


def test_true_residuals_reproduce_the_program() -> None:
    kept = apply_schedule(flat(), sites=[RESIDUAL], cells=[COMPUTE])
    kept.recompile()
    expected, (residual,) = kept(*inputs(1))
    forecast = eliminate_dead_code(apply_schedule(flat(), sites=[RESIDUAL], cells=[Forecast((2, 0), (1.5, -0.5))]))
    forecast.recompile()
    result, _ = forecast(*inputs(1), residual, residual, torch.tensor([1.0, -0.5]))
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("upstream_first", [True, False])
@pytest.mark.parametrize("behind", [COMPUTE, Forecast((0,), (1.0,))])
def test_the_anchor_of_a_row_behind_a_forecast_is_the_forecast(upstream_first: bool, behind: Any) -> None:
    front = Site("mul", "block", ("mul",), (None,), "", 1.0, 1)
    pairs = [(front, Forecast((0,), (1.0,))), (RESIDUAL, behind)][:: 1 if upstream_first else -1]
    module = apply_schedule(flat(), sites=[site for site, _ in pairs], cells=[cell for _, cell in pairs])
    module = eliminate_dead_code(module)
    assert not [node for node in module.graph.nodes if node.target == "first"]  # nothing reads what it would make
    module.recompile()
    x, t, prompt = inputs(1)
    h, model = torch.full((2, 4), 0.5), Tiny()
    context = torch.tanh(model.text(prompt))
    if behind is COMPUTE:
        result, (kept,) = module(x, t, prompt, h)
        second = model.second(torch.relu(h))
        assert torch.equal(kept, second - h)
        assert torch.equal(result, second + h * context)
    else:
        residual, weight = torch.full((2, 4), 0.25), torch.tensor([1.0])  # weights are in difference form
        row = 0 if upstream_first else 1
        given = {f"history_{row}_0_0": h, f"history_{1 - row}_0_0": residual, f"weights_{1 - row}": weight}
        names = [node.target for node in module.graph.nodes if node.op == "placeholder"][3:]
        result, _ = module(x, t, prompt, *(given[str(name)] for name in names))
        torch.testing.assert_close(result, h + residual + h * context)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
def test_a_site_that_stands_on_another_forecast(order: tuple[int, int]) -> None:
    """Two blocks in a row: neither is computed, in whichever order their rows come."""
    found = shared_calibration()
    sites = [found.sites[f"block:blocks.{block}"] for block in order]
    schedule = schedule_of(found, {site.name: "Crrrrrrr" for site in sites})
    program = Programs(found.captured.variants[0], (), sites).program(schedule, 1)
    run = {node.meta.get("path", "").split(".")[1] for node in program.module.graph.nodes if node.op == "call_module"
           if node.meta.get("path", "").startswith("blocks")}  # fmt: skip
    assert run == {"2"}


def test_a_skipped_cell_neither_keeps_nor_forecasts() -> None:
    module = flat()
    before = lines(module)
    module = apply_schedule(module, sites=[SITE], cells=[SKIP])
    assert module.meta["writes"] == module.meta["history"] == []
    assert find_output(module.graph).args[0][1] == ()  # type: ignore[index]
    assert lines(module).splitlines()[:-1] == before.splitlines()[:-1]


def test_a_site_of_another_graph_is_refused() -> None:
    other = Site("blocks.7", "block", ("blocks_7_add",), (None,), "", 1.0, 1)
    with pytest.raises(ValueError, match=r"site 'blocks.7' names nodes \['blocks_7_add'\] that this graph lacks"):
        apply_schedule(flat(), sites=[other], cells=[COMPUTE])


def test_a_kept_value_that_the_caller_gets_is_a_copy() -> None:
    output = Site("output", "output", ("add",), (None,), "", 1.0, 1)
    module = apply_schedule(flat(), sites=[output], cells=[COMPUTE])
    module.recompile()
    result, (kept,) = module(*inputs(1))
    assert torch.equal(result, kept)
    assert result.data_ptr() != kept.data_ptr()


# -- drop_dead_writes and eliminate_dead_code -------------------------------------------------------------------------


def test_dead_writes_are_dropped_and_live_ones_stay() -> None:
    sites = [RESIDUAL, Site("first", "block", ("first",), (None,), "first", 1.0, 1)]
    module = apply_schedule(flat(), sites=sites, cells=[COMPUTE, COMPUTE])
    assert module.meta["writes"] == [(0, 0), (1, 0)]
    drop_dead_writes(module, live=[0, 1])
    assert module.meta["writes"] == [(0, 0), (1, 0)]
    ops = count_ops(module.graph)
    eliminate_dead_code(drop_dead_writes(module, live=[1]))
    assert module.meta["writes"] == [(1, 0)]
    assert count_ops(module.graph) == ops - 1, "the subtraction of the residual is dead as well"
    eliminate_dead_code(drop_dead_writes(module, live=[]))
    assert find_output(module.graph).args[0][1] == ()  # type: ignore[index]


def test_dead_code_goes_with_the_forecast() -> None:
    module = apply_schedule(flat(), sites=[SITE], cells=[Forecast((0,), (1.0,))])
    assert "second(" in lines(module)
    assert "second(" not in lines(eliminate_dead_code(module))


def test_a_live_program_has_no_dead_code() -> None:
    module = flat()
    before = lines(module)
    assert lines(eliminate_dead_code(module)) == before


@pytest.mark.parametrize("kind", [Random, Writes])
def test_draws_and_writes_that_matter_stay(kind: type[nn.Module]) -> None:
    module = flat(kind())
    before = count_ops(module.graph)
    eliminate_dead_code(module)
    assert count_ops(module.graph) == before
    assert any(node.target in (torch.rand_like, "add_") for node in module.graph.nodes)


# -- the runner -------------------------------------------------------------------------------------------------------


def test_passes_run_in_order_and_are_reported() -> None:
    module, reports = run_passes(captured(), PREPARE, {"hoist_step_invariant": {"invariant": {PROMPT}}}, title="tiny")
    assert [r.name for r in reports] == ["flatten_inputs", "hoist_step_invariant"]
    assert all(isinstance(r, PassReport) and r.milliseconds >= 0 for r in reports)
    assert (reports[1].before, reports[1].after) == (8, 6)
    assert count_ops(module.graph) == 6
    assert re.fullmatch(r"hoist_step_invariant +\d+\.\d ms +8 -> +6 ops", str(reports[1]))


def test_the_module_given_is_left_as_it_was() -> None:
    module = captured()
    before, expected = lines(module), module(*inputs(1))
    run_passes(module, PREPARE, {"hoist_step_invariant": {"invariant": {PROMPT}}}, title="tiny")
    assert lines(module) == before
    assert torch.equal(module(*inputs(1)), expected)


def test_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFCACHE_DISABLE_PASSES", "eliminate_dead_code,fuse_everything")
    with pytest.raises(ValueError, match=r"unknown passes \['fuse_everything'\] to disable; known: \['flatten_inputs'"):
        run_passes(captured(), PREPARE, {}, title="tiny")
    monkeypatch.setenv("DIFFCACHE_DISABLE_PASSES", "apply_schedule")
    with pytest.raises(ValueError, match=r"\['apply_schedule'\] fix how a program is called"):
        compiled()


@pytest.mark.parametrize("name", [n for n in known_passes() if n not in pipeline.REQUIRED])
def test_optional_passes_change_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipes.uniform(interval=2, start=2, predictor="taylor", order=1)
    expected = sample(compiled(recipe), Request(seed=4))
    by_option = compiled(recipe, disable_passes=[name])
    assert torch.equal(sample(by_option, Request(seed=4)), expected)
    monkeypatch.setenv("DIFFCACHE_DISABLE_PASSES", name)
    by_variable = compiled(recipe)
    assert torch.equal(sample(by_variable, Request(seed=4)), expected)
    ran = {report.name for programs in by_variable._programs.values() for report in programs.reports}
    assert ran == set(known_passes()) - {name}


def spoil(gm: fx.GraphModule, *, live: Any = ()) -> fx.GraphModule:
    """A broken pass: every module's argument becomes its value."""
    for node in gm.graph.nodes:
        if node.op == "call_module" and node.target == "second":
            node.replace_all_uses_with(node.args[0])
    return gm


def test_bisection_finds_a_broken_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil.__name__ = "drop_dead_writes"  # it stands in for a pass that went wrong
    broken = tuple(spoil if p is drop_dead_writes else p for p in SPECIALISE)
    expected = flat()(*inputs(1))

    def is_bad(disabled: frozenset[str]) -> bool:
        module, _ = run_passes(flat(), broken, {}, title="tiny", disable=disabled)
        return not torch.equal(module(*inputs(1))[0], expected)

    assert bisect_passes(is_bad) == "drop_dead_writes"
    with pytest.raises(ValueError, match="nothing to bisect"):
        bisect_passes(lambda disabled: False)
    assert bisect_passes(lambda disabled: True) is None


def test_errors_name_the_pass_and_the_program() -> None:
    options = {"apply_schedule": {"sites": [Site("x", "block", ("nowhere",), (None,), "", 1.0, 1)], "cells": [COMPUTE]}}
    with pytest.raises(ValueError, match="nowhere") as caught:
        run_passes(flat(), SPECIALISE, options, title="tiny-column07")
    assert caught.value.__notes__ == ["in pass 'apply_schedule' of tiny-column07, after ['take_segment']"]


def test_a_pass_that_breaks_the_graph_is_caught() -> None:
    def shuffle(gm: fx.GraphModule) -> fx.GraphModule:
        nodes = [n for n in gm.graph.nodes if n.op.startswith("call_")]
        nodes[-1].append(nodes[0])
        return gm

    def forget(gm: fx.GraphModule) -> None:
        return None

    for bad, message in ((shuffle, "used before it has been defined"), (forget, "returned a NoneType")):
        with pytest.raises((RuntimeError, AssertionError), match=message) as caught:
            run_passes(flat(), (bad,), {}, title="tiny")  # type: ignore[arg-type]
        assert f"in pass '{bad.__name__}' of tiny" in caught.value.__notes__[0]


class Gated(nn.Module):
    """What stands around a branch of a diffusion transformer; ``tap`` reads the value before the branch joins it."""

    def __init__(self, affine: bool = False, tap: str = "") -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.branch, self.ada, self.head = nn.Linear(4, 4), nn.Linear(1, 12), nn.Linear(4, 4)
        self.norm, self.tap = nn.LayerNorm(4, eps=1e-6, elementwise_affine=affine), tap

    def forward(self, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        gate, scale, shift = self.ada(t).chunk(3, dim=-1)
        out = self.branch(x)
        h = x + gate * out
        y = self.head(self.norm(h) * (1 + scale) + shift)
        return y + {"": 0, "h": h, "out": out}[self.tap]


BRANCH = Site("branch", "block", ("branch",), (None,), "branch", 1.0, 1)


def fused(model: nn.Module) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The program that forecasts the branch, before and after the pass."""
    plain = eliminate_dead_code(
        apply_schedule(flatten_inputs(captured(model)), sites=[BRANCH], cells=[Forecast((1, 0), (1.5, -0.5))])
    )
    plain.recompile()
    after = fuse_forecasts(pipeline.copy_graph_module(plain))
    pipeline.verify(after)
    after.recompile()
    return plain, after


def operations(module: fx.GraphModule) -> list[str]:
    names = ("extrapolate", "extrapolate_modulate", "norm")
    found = [str(node.target).removeprefix("diffcache.").removesuffix(".default") for node in module.graph.nodes]
    return [name for name in found if name in names]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["extrapolate_modulate"]),
        ({"tap": "h"}, ["extrapolate_modulate"]),
        ({"tap": "out"}, ["extrapolate", "norm"]),  # the branch alone is wanted as well
        ({"affine": True}, ["extrapolate", "norm"]),
    ],
    ids=str,
)
def test_fusion_changes_no_bit(options: dict[str, Any], expected: list[str]) -> None:
    plain, after = fused(Gated(**options))
    assert operations(after) == expected
    arguments = (*inputs()[:2], inputs()[2], torch.randn(2, 4), torch.randn(2, 4), torch.tensor([1.0, -0.5]))
    with torch.no_grad():
        (before,), (result,) = (tree_flatten(m(*arguments)[0])[0] for m in (plain, after))
    assert torch.equal(result, before)
    assert count_ops(after.graph) < count_ops(plain.graph) or options.get("tap") == "out"


def test_fusion_leaves_other_dtypes_alone() -> None:
    class Mixed(Gated):
        def forward(self, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
            gate = self.ada(t)[..., :4].double()  # the sum is in float64
            return self.head((x + gate * self.branch(x)).float())

    assert operations(fused(Mixed())[1]) == ["extrapolate"]


def test_fused_forecasts_as_text(golden: Golden) -> None:
    golden(format_graph(fused(Gated(tap="h"))[1], title="gated"))


def test_dump_writes_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden: Golden) -> None:
    folder = tmp_path / "dump"
    monkeypatch.setenv("DIFFCACHE_DUMP", str(folder))
    compiled(recipes.uniform(interval=4))
    written = sorted(file.name for file in folder.iterdir())
    golden("\n".join(written))
    for name in written:
        assert (folder / name).read_text().strip(), name
    schedule = (folder / "denoiser-schedule.txt").read_text()
    assert "CrrrCrrr" in schedule
    assert "nodes are cached on a forecast step" in schedule


def test_passes_neither_print_nor_time_nor_log() -> None:
    banned = re.compile(r"\bprint\(|\bimport (time|logging|warnings|os|sys)\b|\bfrom (time|logging|warnings|os|sys)\b")
    files = sorted((Path(__file__).parents[1] / "passes").glob("*.py"))
    assert len(files) > 5
    found = [f"{file.name}: {line}" for file in files for line in file.read_text().splitlines() if banned.search(line)]
    assert not found


@pytest.mark.parametrize("pass_", [*PREPARE, *SPECIALISE], ids=lambda p: p.__name__)
def test_passes_say_whether_they_are_exact(pass_: Any) -> None:
    text = (Path(__file__).parents[1] / "passes" / f"{pass_.__name__}.py").read_text()
    approximate = pass_ in (apply_schedule, subset_tokens)
    assert text.startswith('"""Approximate' if approximate else '"""Exact.')
    assert "Before::" in text
    assert "After" in text
