"""Whole generations that compute a few tokens at some steps: exactness, what stays in history, recipes, refusals."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import diffcache
from diffcache import recipes
from diffcache.cells import COMPUTE, Cell, Forecast, GateSpec, Online, Partial, Selected, cell_from_json, cell_to_json
from diffcache.forecasting import forecast
from diffcache.guidance import Guidance
from diffcache.memory import plan_memory, token_entry
from diffcache.planning import plan_of
from diffcache.profiling import Calibration
from diffcache.recipes import Part, Plan, Predict, Recipe, Tokens
from diffcache.recipes.picks import one
from diffcache.runtime import CachedDenoiser
from diffcache.schedule import Row, Schedule, SiteChoice
from diffcache.token_choice import grid_of
from diffcache.token_programs import NEWEST
from diffcache.token_reads import kept_steps
from tests import test_branches as branches
from tests.denoisers import FAMILIES
from tests.generation import STEPS as generation_steps
from tests.generation import Quiet, Request, sample, shared_calibration

STEPS = 9
TRANSFORMERS = ("class_dit", "flux", "sd3", "pixart", "wan")
METHODS = ("toca", "duca", "clusca", "procache_tokens", "ras", "fastcache_tokens")


def generation(name: str, steps: int = STEPS, batch: int = 2) -> Callable[[nn.Module, int], torch.Tensor]:
    """All results of a denoiser, one after the other."""
    entry = FAMILIES[name]

    def generate(denoiser: nn.Module, seed: int) -> torch.Tensor:
        found = []
        with torch.no_grad():
            for step in range(steps):
                args, kwargs = entry.make_inputs(step, batch=batch)
                result = denoiser(*args, **kwargs)
                found.append((result if isinstance(result, torch.Tensor) else result[0]).detach().flatten())
        return torch.stack(found)

    return generate


@functools.cache
def calibrated(name: str) -> Calibration:
    return diffcache.profile(
        FAMILIES[name].make_model(), [0], sample=generation(name), sensitivity_prompts=0, verbose=False
    )


def run(denoiser: CachedDenoiser, name: str) -> torch.Tensor:
    """A generation twice: the second must be the first."""
    with Quiet():
        first = generation(name)(denoiser, 0)
        assert torch.equal(generation(name)(denoiser, 0), first)
    return first


def computed_in_full(name: str) -> torch.Tensor:
    return calibrated(name).references[0].reshape(STEPS, -1)


def sites_of(name: str, *roles: str) -> list[Any]:
    return [site for site in calibrated(name).finder.everywhere() if site.role in roles]


def schedule(name: str, cells: Sequence[Cell], *roles: str, gate: GateSpec | None = None) -> Schedule:
    """The same cells for every site of some roles, by default every attention and feed-forward."""
    sites = sites_of(name, *(roles or ("attention", "feedforward")))
    rows = tuple(Row(site.name, site.residual, tuple(cells), gate) for site in sites)
    return Schedule(STEPS, rows, clock=calibrated(name).profile.clock)


def grid(letters: str, partial: Partial) -> list[Cell]:
    """C compute, t ``partial``, r reuse of the step before that was computed or on some tokens."""
    made: list[Cell] = []
    for step, letter in enumerate(letters):
        newest = max((s for s in range(step) if letters[s] in "Ct"), default=0)
        made.append({"C": COMPUTE, "t": partial}.get(letter) or Forecast((newest,), (1.0,)))
    return made


class Watched(CachedDenoiser):
    """Keeps what every step came to and wrote."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[tuple[list[Cell], dict[tuple[int, int, int], torch.Tensor]]] = []
        self.held: list[set[tuple[int, int, int]]] = []

    def _advance(self, stream: Any, step: Any, column: Any, written: Any, result: Any) -> None:
        self.seen.append((list(column), dict(written)))
        super()._advance(stream, step, column, written, result)
        self.held.append(set(stream.history))


def watched(name: str, schedule: Schedule) -> Watched:
    found = calibrated(name)
    return Watched(found.captured, schedule, found.pattern, found.finder, title="watched")


# -- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dit", *TRANSFORMERS])
def test_all_tokens_are_the_full_computation(name: str) -> None:
    """Bit for bit, over a whole generation and from one step on tokens to the next."""
    for roles in (("attention", "feedforward"), ("block",), ("stack",)):
        every = Partial(1.0, "toca", {"interval": 3})
        denoiser = calibrated(name).cached(schedule(name, grid("CttttCttt", every), *roles))
        assert torch.equal(run(denoiser, name), computed_in_full(name)), roles
        assert denoiser.steps_forecast == 14


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_tokens_that_are_not_chosen_are_what_history_has(name: str) -> None:
    denoiser = watched(name, schedule(name, grid("CttrtCtrr", Partial(0.25, "toca", {"interval": 3}))))
    generation(name)(denoiser, 0)
    entries: dict[tuple[int, int], torch.Tensor] = {}
    compared = 0
    for column, written in denoiser.seen:
        for (row, part, _), value in written.items():
            cell = column[row]
            if isinstance(cell, Selected) and part < len(cell.counts):
                assert cell.tokens[part].shape == (2, cell.counts[part])
                other = torch.ones(value.shape[:2], dtype=torch.bool).scatter(1, cell.tokens[part], False)
                assert torch.equal(value[other], entries[row, part][other])
                assert not torch.equal(value[~other], entries[row, part][~other])
                compared += 1
        entries |= {(row, part): value for (row, part, _), value in written.items()}
    assert compared > 10


def test_blocks_stand_on_each_other() -> None:
    """The stream that enters a block on some tokens is what the block before came to, also where that was reused."""
    found, name = calibrated("dit"), "dit"
    blocks = sites_of(name, "block")
    every, few = Partial(1.0), Partial(0.25)
    rows = [Row(site.name, site.residual, tuple(grid("Ctttttttt", every))) for site in blocks]
    rows[0] = Row(blocks[0].name, blocks[0].residual, tuple(grid("Crrrrrrrr", every)))
    alone = found.cached(Schedule(STEPS, (rows[0],), clock=found.profile.clock))
    together = found.cached(Schedule(STEPS, tuple(rows), clock=found.profile.clock))
    assert torch.equal(run(together, name), run(alone, name))
    rows[0] = Row(blocks[0].name, blocks[0].residual, tuple(grid("Ctttttttt", few)))
    alone = found.cached(Schedule(STEPS, (rows[0],), clock=found.profile.clock))
    together = found.cached(Schedule(STEPS, tuple(rows), clock=found.profile.clock))
    assert torch.equal(run(together, name), run(alone, name))


def test_what_waits_longest_is_computed() -> None:
    """A quarter of the tokens at a time by staleness alone: after four steps all have had their turn."""
    cells = grid("Ctttttttt", Partial(0.25, "toca", {"interval": 1, "weight": 1e6, "bonus": 0.0}))
    denoiser = watched("dit", schedule("dit", cells))
    generation("dit")(denoiser, 0)
    for row in range(len(denoiser.schedule.rows)):
        chosen = [column[row].tokens[0] for column, _ in denoiser.seen[1:]]  # type: ignore[union-attr]
        for first in (0, 4):
            turns = torch.cat(chosen[first : first + 4], 1).sort(1).values
            assert torch.equal(turns, torch.arange(turns.shape[1]).expand_as(turns))


# -- what it costs ----------------------------------------------------------------------------------------------------


def test_fewer_tokens_are_fewer_flops() -> None:
    spent = []
    for share in (1.0, 0.5, 0.25):
        denoiser = calibrated("dit").cached(schedule("dit", grid("CtttCttCt", Partial(share))))
        generation("dit")(denoiser, 0)
        spent.append(denoiser.flops / denoiser.flops_in_full)
    assert 0.99 < spent[0] <= 1.0
    assert spent[0] - spent[1] == pytest.approx(2 * (spent[1] - spent[2]), rel=0.05)
    assert spent[1] < 0.75


def test_only_the_newest_keys_are_kept_and_only_while_they_are_read() -> None:
    cells = grid("CttCrrrrr", Partial(0.5, others=Online("taylor", 2, {"order": 1})))
    site = sites_of("dit", "attention")[0]
    found = calibrated("dit")
    row = Row(site.name, site.residual, tuple(cells))
    denoiser = watched("dit", Schedule(STEPS, (row,), clock=found.profile.clock))
    generation("dit")(denoiser, 0)
    keys = [(0, 1, NEWEST), (0, 2, NEWEST)]
    assert [sorted(key for key in held if key[1]) for held in denoiser.held[:4]] == [keys, keys, [], []]
    assert [sorted(step for _, part, step in held if not part) for held in denoiser.held[:5]] == [
        [0], [0, 1], [], [3], [3]
    ]  # fmt: skip
    assert denoiser.held[-1] == set()
    plan = found.memory(denoiser.schedule, denoiser.options)
    assert plan.entries == {site.name: 2, f"keys of {site.name}": 2}
    assert plan.entry_bytes[f"keys of {site.name}"] == 2 * site.bytes_kept
    # at step 1 the value of step 0 and the one that is made, the keys of step 0 and those that are made
    assert plan.device_bytes == plan.streams * 6 * site.bytes_kept


# -- cells ------------------------------------------------------------------------------------------------------------


def test_a_cell_survives_a_file() -> None:
    cell = Partial(0.0, "toca", {"interval": 3, "base": "change"}, Online("taylor", 2, {"order": 1}), 16, 0.1, "a", 2)
    assert cell_from_json(cell_to_json(cell)) == cell
    written = schedule("dit", grid("CttCttrtt", Partial(0.25)))
    assert Schedule.from_json(written.to_json()) == written
    assert "Cttttt" not in str(written)
    assert "CttCttrtt" in str(written)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Partial(0.0), "expected a share in"),
        (lambda: Partial(1.5), "expected a share in"),
        (lambda: Partial(0.5, blend=2.0, clusters=3), "a blend between 0 and 1"),
        (lambda: Partial(0.5, others=Online("trend", probe="latent")), "without probe or view"),
        (lambda: Partial(0.5, options={"a": object()}), "must be plain JSON"),
        (lambda: Schedule(2, (Row("a", False, (Partial(0.5), COMPUTE)),)), "nothing is cached yet"),
        (lambda: Schedule(2, (Row("a", False, (COMPUTE, Partial(0.5, beside="b"))),)), "'b', which has no row"),
        (lambda: calibrated("dit").cached(schedule("dit", grid("CtttttttC", Partial(0.5))), history_dtype="int8"),
         "keep it as it is"),
        (lambda: calibrated("dit").cached(schedule("dit", grid("CtttttttC", Partial(0.5, others=Online("magic"))))),
         "unknown predictor 'magic'"),
    ],
)  # fmt: skip
def test_refusals(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("partial", "message"),
    [
        (Partial(0.5, "magic"), "unknown token score 'magic'"),
        (Partial(0.5, "change"), "looks at 'before'"),
        (Partial(0.5, "toca", {"interval": 0}), "counted in intervals"),
        (Partial(0.5, beside="ff:transformer_blocks.0.ff_context"), "which has others"),
    ],
)
def test_refusals_of_a_step(partial: Partial, message: str) -> None:
    denoiser = calibrated("flux").cached(schedule("flux", grid("CtttttttC", partial)))
    with pytest.raises(ValueError, match=message):
        generation("flux")(denoiser, 0)


def test_too_little_history_is_computed() -> None:
    """A score that compares two values has none to compare at the first step."""
    denoiser = calibrated("dit").cached(schedule("dit", grid("CtttttttC", Partial(0.25, "change", looks=2))))
    run(denoiser, "dit")
    columns = denoiser.decisions[-1][1]
    assert [set(column) for column in columns[:3]] == [{"C"}, {"C"}, {"t"}]


# -- gates and segments -----------------------------------------------------------------------------------------------


def test_a_gate_permits_a_step_on_some_tokens() -> None:
    """Where it does not the step is computed in full, and what follows goes on from that."""
    partial = Partial(0.25, "toca", {"interval": 3})
    gated = schedule("dit", grid("Ctttttttt", partial), "feedforward", gate=GateSpec("max_gap", {"limit": 2}))
    denoiser = calibrated("dit").cached(gated)
    free = calibrated("dit").cached(schedule("dit", grid("CttCttCtt", partial), "feedforward"))
    assert torch.equal(run(denoiser, "dit"), run(free, "dit"))
    assert [column[0] for column in denoiser.decisions[-1][1]] == list("CttCttCtt")
    never = schedule("dit", grid("Ctttttttt", partial), gate=GateSpec("max_gap", {"limit": 0}))
    assert torch.equal(run(calibrated("dit").cached(never), "dit"), computed_in_full("dit"))


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_a_row_on_some_tokens_in_a_later_segment(name: str) -> None:
    """A gate looks at the first block; what it lets pass is exact with all tokens, and the same as without a cut."""
    blocks = sites_of(name, "block")
    first = next(site for site in blocks if site.depth == 0)
    gate = GateSpec("accumulated_change", {"probe": first.name, "threshold": 1e9})
    later = [site for site in sites_of(name, "attention", "feedforward") if site.depth > 0]
    for share in (1.0, 0.25):
        cells = tuple(grid("Ctttttttt", Partial(share, "norm")))
        gated, free = (
            Schedule(STEPS, tuple(Row(site.name, site.residual, cells, g) for site in later),
                     clock=calibrated(name).profile.clock)
            for g in (gate, None)
        )  # fmt: skip
        found = run(calibrated(name).cached(gated), name)
        assert torch.equal(found, run(calibrated(name).cached(free), name))
        assert torch.equal(found, computed_in_full(name)) == (share == 1.0)


def test_a_probe_in_the_middle_of_a_site_is_refused() -> None:
    blocks = sites_of("dit", "block")
    last, stack = next(site for site in blocks if site.depth == 1), sites_of("dit", "stack0")[0]
    gate = GateSpec("accumulated_change", {"probe": last.name, "threshold": 1e9})
    row = Row(stack.name, stack.residual, tuple(grid("Ctttttttt", Partial(0.5))), gate)
    denoiser = calibrated("dit").cached(Schedule(STEPS, (row,), clock=calibrated("dit").profile.clock))
    with pytest.raises(ValueError, match="in the middle of it"):
        generation("dit")(denoiser, 0)


# -- branches and samples ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["separate", "batched"])
def test_branches_of_guidance(mode: str) -> None:
    """The unconditional branch is left out at some steps; with all tokens nothing else changes."""
    left_out = Guidance("reuse", (0, 1, 3, 6))
    plain = branches.cached(mode, left_out)
    block = next(site for site in branches.found(mode).finder.everywhere() if site.role == "block")
    results = {}
    for share in (1.0, 0.25):
        cells = (COMPUTE, *[Partial(share, "toca", {"interval": 3})] * (generation_steps - 1))
        row = Row(block.name, block.residual, cells)
        denoiser = branches.found(mode).cached(replace(plain.schedule, rows=(row,)))
        first, second = (branches.guide(denoiser, Request(seed=3), mode) for _ in range(2))
        assert torch.equal(first, second)
        results[share] = first
    assert torch.equal(results[1.0], branches.guide(plain, Request(seed=3), mode))
    assert not torch.equal(results[0.25], results[1.0])


def test_each_sample_alone() -> None:
    """A sample of a batch computes its own tokens, bit for bit as if it were alone."""
    found = shared_calibration()
    block = next(site for site in found.finder.everywhere() if site.role == "block")
    cells = (COMPUTE, *[Partial(0.25, "toca", {"interval": 3})] * (generation_steps - 1))
    made = Schedule(generation_steps, (Row(block.name, block.residual, cells),), clock=found.profile.clock)
    denoiser = found.cached(replace(made, samples="alone"))
    together = sample(denoiser, Request(seed=3, prompt=3, batch=2))
    alone = [sample(denoiser, Request(seed=3 + i, prompt=3 + i)) for i in range(2)]
    assert torch.equal(together, torch.cat(alone))


# -- a rule of several values beside steps on some tokens --------------------------------------------------------------


def test_a_rule_runs_on_full_steps_and_goes_on_from_the_newest_value() -> None:
    """Taylor of order 1 through steps 0 and 3, and what steps 4 and 5 computed of some tokens: the slope is theirs."""
    rule = Online("taylor", 2, {"order": 1})
    found = forecast(rule, (5, 4, 3, 0), 7, (), partial={4, 5})
    assert found.steps == (5, 3, 0)
    assert found.weights == pytest.approx((1.0, 2 / 3, -2 / 3))
    assert forecast(rule, (6, 5, 4, 3, 0), 7, (), partial={4, 5}) == forecast(rule, (6, 3, 0), 7, ())
    assert forecast(Online("reuse", 1), (5, 4, 3, 0), 7, (), partial={4, 5}) == Forecast((5,), (1.0,))
    assert forecast(rule, (2, 0), 3, (), partial={2}) == Forecast((2,), (1.0,)), "one full step has no slope"


def test_full_steps_are_kept_for_it_and_counted() -> None:
    """The newest two values are of some tokens; the two newest full ones stay as well, and no more."""
    predictor = Predict("taylor", {"order": 1})
    tokens = Tokens(0.5, "norm")
    part = Part(sites=one("ff:blocks.0.ff"), when=lambda plan, site: (0, 1, 2), predictor=predictor, tokens=tokens)
    (row,) = Recipe(parts=(part,)).schedule(Plan(8, SITES)).rows
    assert (row.keeps, row.full_values) == (2, 2)
    assert kept_steps((5, 4, 3, 2, 1, 0), {3, 4, 5}, row.keeps, row.full_values) == {5, 4, 2, 1}
    plan = plan_memory(Schedule(8, (row,)), {row.site: 10, token_entry(row.site): 0})
    assert plan.entries[row.site] == 5, "four of before, and the one of now"
    reuse = replace(row, cells=tuple(grid("CCCttttt", Partial(0.5))))
    assert reuse.full_values == 0
    assert plan_memory(Schedule(8, (reuse,)), {row.site: 10, token_entry(row.site): 0}).entries[row.site] == 2


# -- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_recipes(name: str, method: str) -> None:
    """Each runs on every family: nothing falls back, some tokens are computed, less is spent, the result is near."""
    options = {"clusters": 3} if method == "clusca" else {}
    recipe: Recipe = getattr(recipes, method)(**options)
    denoiser = calibrated(name).cached(recipe.schedule(plan_of(calibrated(name))))
    result, expected = run(denoiser, name), computed_in_full(name)
    columns = denoiser.decisions[-1][1]
    assert any("t" in column for column in columns)
    assert denoiser.flops < 0.95 * denoiser.flops_in_full
    error = float((result - expected).norm() / expected.norm())
    assert 0 < error < 0.2


@pytest.mark.parametrize("method", ["toca", "duca", "clusca"])
def test_layers_of_a_unet_can_only_the_whole_cannot(method: str) -> None:
    name = "sdxl_unet"
    recipe: Recipe = getattr(recipes, method)()
    denoiser = calibrated(name).cached(recipe.schedule(plan_of(calibrated(name))))
    run(denoiser, name)
    assert any("t" in column for column in denoiser.decisions[-1][1])
    with pytest.raises(ValueError, match=r"no site that can run on a few tokens.*expected \[batch, tokens, channels\]"):
        recipes.ras().schedule(plan_of(calibrated(name)))


def test_compiled_by_recipe() -> None:
    """Through ``diffcache.compile``: the report counts what was computed."""
    name = "class_dit"
    denoiser = diffcache.compile(
        FAMILIES[name].make_model(), [0], sample=generation(name), recipe=recipes.toca(), verbose=False
    )
    assert denoiser.report.flops_speedup > 1.2
    assert denoiser.report.predicted_error is None
    assert "keys of" not in denoiser.report.memory, "self-attention is reused, so that nothing but values is kept"
    assert denoiser.schedule.origin == "toca()"


SITES = [
    SiteChoice(f"{role}:blocks.{depth}.{kind}", False, 0.1, role_name, depth, 2, "self" if role == "attn" else "")
    for depth in range(2)
    for role, role_name, kind in (("attn", "attention", "attn"), ("ff", "feedforward", "ff"))
]


def grid_of_recipe(recipe: Recipe, steps: int) -> dict[str, str]:
    lines = str(recipe.schedule(Plan(steps, SITES))).splitlines()[1:-1]
    return {line.split()[0]: line.split()[1] for line in lines}


def test_steps_of_the_recipes() -> None:
    assert grid_of_recipe(recipes.toca(interval=3), 8) == {
        "attn:blocks.0.attn": "CrrCrrCr",
        "attn:blocks.1.attn": "CrrCrrCr",
        "ff:blocks.0.ff": "CttCttCt",
        "ff:blocks.1.ff": "CttCttCt",
    }
    assert grid_of_recipe(recipes.duca(interval=5), 8)["ff:blocks.0.ff"] == "CrtrtCrt"
    assert grid_of_recipe(recipes.procache_tokens(), 8) == {
        "attn:blocks.0.attn": "CrrrCrrr",
        "ff:blocks.0.ff": "CrrrCrrr",
        "attn:blocks.1.attn": "CrtrCrtr",
        "ff:blocks.1.ff": "CrtrCrtr",
    }
    assert grid_of_recipe(recipes.clusca(), 9)["ff:blocks.0.ff"] == "CCCttttCt"


def test_tokens_are_chosen_by_an_attention_on_the_same_ones_only() -> None:
    """Where text and picture go through attention apart and through the feed-forward as one, by the own values."""
    counts = {site.name: {24} if site.role == "feedforward" else {16, 8} for site in SITES}
    joined = Plan(8, SITES, tokens_of=counts.__getitem__)
    alike = Plan(8, SITES, tokens_of={**counts, "attn:blocks.1.attn": {24}}.__getitem__)

    def beside(plan: Plan) -> set[str]:
        rows = recipes.toca().schedule(plan).rows
        return {cell.beside for row in rows for cell in row.cells if isinstance(cell, Partial)}

    assert beside(joined) == {""}
    assert beside(alike) == {"", "attn:blocks.1.attn"}
    with pytest.raises(ValueError, match="on the same tokens; take toca"):
        recipes.duca().schedule(joined)
    assert recipes.duca().schedule(alike)


def test_tocas_keep_ratio() -> None:
    """More in the first layers and at later steps; modules by their weight."""
    schedule = recipes.toca(interval=9, share=0.1).schedule(Plan(10, SITES))
    shares = {row.site: [cell.share for cell in row.cells if isinstance(cell, Partial)] for row in schedule.rows}
    assert shares["ff:blocks.0.ff"][0] == pytest.approx(0.1 * 2.5 * (0.6 + 0.8 * 0.1) * 1.8)
    assert shares["ff:blocks.1.ff"][4] == pytest.approx(0.1 * 2.5 * (0.6 + 0.8 * 0.5) * 0.2)
    assert shares["attn:blocks.0.attn"] == []
    often = recipes.toca(interval=4, interval_weight=0.4).schedule(Plan(50, SITES))
    gaps = [b - a for a, b in zip(often.computed_steps(), often.computed_steps()[1:], strict=False)]
    assert gaps == sorted(gaps)
    assert (gaps[0], gaps[-1]) == (3, 6)


def test_tokens_need_a_predictor_by_steps() -> None:
    part = Part(sites=one("attn:blocks.0.attn"), predictor=Predict("trend", probe="latent"), tokens=Tokens(0.5))
    with pytest.raises(ValueError, match="makes weights from values"):
        Recipe(parts=(part,)).schedule(Plan(4, SITES))
    with pytest.raises(ValueError, match="unknown token scores"):
        Recipe(parts=(Part(sites=one("attn:blocks.0.attn"), tokens=Tokens(0.5, "magic")),)).schedule(Plan(4, SITES))


def test_how_tokens_lie() -> None:
    assert grid_of((2, 4, 16, 16), 64) == (8, 8)
    assert grid_of((2, 4, 8, 16), 32) == (4, 8)
    assert grid_of((2, 4, 3, 8, 8), 48) == (12, 4)
    assert grid_of((2, 4, 4, 8, 8), 64) == (16, 4)
    assert grid_of((2, 16, 4), 16) is None
    assert grid_of((2, 4, 16, 16), 77) is None


# -- torch.compile ----------------------------------------------------------------------------------------------------


def test_inductor_compiles_one_program_for_each_structure() -> None:
    found = calibrated("class_dit")
    sites = [site for site in sites_of("class_dit", "attention", "feedforward") if site.depth == 1]
    cells = tuple(grid("CttttrCtt", Partial(0.25, "toca", {"interval": 3})))
    rows = tuple(Row(site.name, site.residual, cells) for site in sites)
    made = Schedule(STEPS, rows, clock=found.profile.clock)
    eager, compiled = found.cached(made), found.cached(made, backend="inductor")
    expected, result = run(eager, "class_dit"), run(compiled, "class_dit")
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    (programs,) = (programs for programs in compiled._programs.values() if programs.sites)
    # computed and kept, some tokens and kept, some tokens for a reuse, reused, and the last, which keeps nothing
    assert len(programs.made()) == 5
