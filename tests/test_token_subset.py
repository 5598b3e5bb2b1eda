"""A site on a few of its tokens: exact with all of them, the cache for the others, fresh rows that are right."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode

import diffcache
from diffcache.cost import measure_cost
from diffcache.graphs import count_ops
from diffcache.ops import extrapolate
from diffcache.passes.apply_schedule import apply_schedule
from diffcache.passes.eliminate_dead_code import eliminate_dead_code
from diffcache.passes.fuse_forecasts import fuse_forecasts
from diffcache.passes.subset_tokens import TokenRow, subset_tokens
from diffcache.pipeline import PREPARE, run_passes
from diffcache.schedule import COMPUTE, SKIP, Cell, Forecast
from diffcache.sites import Site, find_sites
from diffcache.token_region import TokenRegion, token_region
from diffcache.token_rows import take_rows
from diffcache.token_scores import TokenView, cluster_tokens, score_tokens, select_tokens
from diffcache.tracing import tree
from diffcache.tracing.bits import same_bits
from tests.denoisers import FAMILIES

TRANSFORMERS = ("dit", "skip_dit", "class_dit", "flux", "sd3", "pixart", "wan", "stable_audio")
ROLES = ("attention", "feedforward", "block", "stack", "stack0")
Entries = dict[tuple[int, int], torch.Tensor]


@dataclass
class Case:
    """A captured denoiser with its sites and regions."""

    captured: diffcache.Captured
    variant: Any
    body: fx.GraphModule
    sites: dict[str, Site]
    regions: dict[str, TokenRegion]
    refused: dict[str, str]
    inputs: Callable[[int], Any]
    text_first: bool

    def program(self, rows: Sequence[TokenRow], kept: bool, cells: dict[int, Cell] | None = None) -> fx.GraphModule:
        """The program of a column: every row computed and kept, or on selected tokens; ``cells`` say other things."""
        sites = [row.site for row in rows]
        decided = [(cells or {}).get(i, COMPUTE if kept else SKIP) for i in range(len(rows))]
        options = {
            "apply_schedule": {"sites": sites, "cells": decided},
            "subset_tokens": {"token_rows": [row for row in rows if row.row not in (cells or {})]},
        }
        passes = (apply_schedule, subset_tokens, eliminate_dead_code, fuse_forecasts)
        return run_passes(self.body, passes, options, title="test")[0]

    def leaves(self, step: int) -> tuple[list[Any], list[Any]]:
        """Inputs of a step, and what the prologue makes of them."""
        args, kwargs = self.inputs(step)
        bound = self.captured.bind(args, kwargs)
        leaves = [tree.follow(bound, path) for path in self.body.meta["inputs"]]
        prologue = self.body.meta.get("prologue")
        return leaves, list(prologue(*leaves)) if prologue is not None else []

    def run(
        self,
        program: fx.GraphModule,
        step: int,
        history: Entries,
        tokens: Entries | None = None,
        *,
        older: Entries | None = None,
        more: dict[str, torch.Tensor] | None = None,
    ) -> tuple[Any, Entries]:
        """The result and what the program keeps; ``history`` is the newest, ``older`` the one before."""
        leaves, hoisted = self.leaves(step)
        given = {f"hoisted_{i}": value for i, value in enumerate(hoisted)} | (more or {})
        given |= {f"tokens_{row}_{value}": numbers for (row, value), numbers in (tokens or {}).items()}
        for age, entries in enumerate((history, older or {})):
            given |= {f"history_{row}_{value}_{age}": entry for (row, value), entry in entries.items()}
        result, written = program(*leaves, *(given[name] for name in _extra(program)))
        return result, dict(zip(program.meta["writes"], written, strict=True))


def _extra(program: fx.GraphModule) -> list[str]:
    names = [str(node.target) for node in program.graph.nodes if node.op == "placeholder"]
    return names[len(program.meta["inputs"]) :]


@functools.cache
def case(name: str, batch: int = 2) -> Case:
    entry = FAMILIES[name]
    model = entry.make_model().requires_grad_(False)
    args, kwargs = entry.make_inputs(0, batch=batch)
    with torch.no_grad():
        captured = diffcache.capture(model, *args, **kwargs)
        variant = captured.variants[0]
        cost = measure_cost(variant.graph_module, args, kwargs)
    sites = find_sites(variant.graph_module, variant.trace.calls, cost)
    regions, refused = {}, {}
    for site in sites:
        try:
            regions[site.name] = token_region(variant.graph_module, site, cost.flops)
        except ValueError as error:
            refused[site.name] = str(error)
    first, second = (entry.make_inputs(step, batch=batch) for step in (0, 1))
    pairs = zip(*(tree.walk(captured.bind(*call)) for call in (first, second)), strict=True)
    fixed = frozenset(p for (p, a), (_, b) in pairs if isinstance(a, torch.Tensor) and torch.equal(a, b))
    body, _ = run_passes(variant.graph_module, PREPARE, {"hoist_step_invariant": {"invariant": fixed}}, title="body")
    return Case(captured, variant, body, {s.name: s for s in sites}, regions, refused,
                lambda step: entry.make_inputs(step, batch=batch), name == "flux")  # fmt: skip


# -- what is asked of every family and role ---------------------------------------------------------------------------


PLACES = [(name, role) for name in TRANSFORMERS for role in ROLES] + [("flux", "output"), ("skip_dit", "deepest")]
everywhere = pytest.mark.parametrize(("name", "role"), PLACES)


def of_role(this: Case, role: str) -> list[str]:
    """The sites of a role that differ in their streams or in what they keep, the middle one of each kind."""
    kinds: dict[tuple[tuple[int, ...], int], list[str]] = {}
    for site in this.sites.values():
        if site.role == role:
            region = this.regions[site.name]
            kinds.setdefault((region.tokens, len(region.kept)), []).append(site.name)
    assert kinds, f"no site of role {role}"
    return [names[len(names) // 2] for names in kinds.values()]


def computed(case: Case, site: str) -> fx.GraphModule:
    return case.program([TokenRow(0, case.sites[site], case.regions[site])], kept=True)


def partial(case: Case, site: str, counts: tuple[int | None, ...], **more: Any) -> fx.GraphModule:
    return case.program([TokenRow(0, case.sites[site], case.regions[site], counts, **more)], kept=False)


def draw(tokens: tuple[int, ...], counts: tuple[int | None, ...], batch: int = 2, row: int = 0) -> Entries:
    """Other tokens for each sample."""
    generator = torch.Generator().manual_seed(7)
    return {
        (row, i): torch.stack([torch.randperm(n, generator=generator)[:k].sort().values for _ in range(batch)])
        for i, (n, k) in enumerate(zip(tokens, counts, strict=True)) if k is not None
    }  # fmt: skip


def same(a: Any, b: Any) -> bool:
    return all(same_bits(x, y) if isinstance(x, torch.Tensor) else x == y
               for (_, x), (_, y) in zip(tree.walk(a), tree.walk(b), strict=True))  # fmt: skip


def quarter(tokens: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(max(1, n // 4) for n in tokens)


@everywhere
@torch.no_grad()
def test_all_tokens_are_the_computed_step(name: str, role: str) -> None:
    """Bit for bit: the result, and everything that history keeps, from stale history."""
    for site in of_role(case(name), role):
        check_all_tokens_are_the_computed_step(case(name), site)


def check_all_tokens_are_the_computed_step(this: Case, site: str) -> None:
    tokens = this.regions[site].tokens
    full = computed(this, site)
    _, old = this.run(full, 0, {})
    expected, new = this.run(full, 1, {})
    result, written = this.run(partial(this, site, tokens), 1, old, draw(tokens, tokens))
    assert same(result, expected)
    assert set(written) == set(new)
    assert all(same_bits(written[place], new[place]) for place in new)
    assert any(not torch.equal(old[place], new[place]) for place in new), "nothing moved between the steps"


@everywhere
@torch.no_grad()
def test_a_few_tokens_are_fresh_and_the_others_are_the_cache(name: str, role: str) -> None:
    for site in of_role(case(name), role):
        check_a_few_tokens_are_fresh_and_the_others_are_the_cache(case(name), site)


def check_a_few_tokens_are_fresh_and_the_others_are_the_cache(this: Case, site: str) -> None:
    region = this.regions[site]
    counts = quarter(region.tokens)
    chosen = draw(region.tokens, counts)
    _, old = this.run(computed(this, site), 0, {})
    program = partial(this, site, counts)
    _, written = this.run(program, 1, old, chosen)
    reference = Reference(this, site, old, chosen)
    values = reference.run(1)
    assert set(written) == set(old)
    for i in range(len(region.tokens)):
        entry, fresh, kept = written[0, i], values[i], old[0, i]
        for sample in range(len(entry)):
            rows = chosen[0, i][sample]
            others = torch.ones(region.tokens[i], dtype=torch.bool).index_fill(0, rows, False)
            assert same_bits(entry[sample, others], kept[sample, others])
            torch.testing.assert_close(entry[sample, rows], fresh[sample, rows], rtol=1e-5, atol=2e-6)
            assert not torch.equal(entry[sample, rows], kept[sample, rows])
    for i, node in enumerate(region.kept):
        mixed, mask = reference.mixed[node]
        entry = written[0, len(region.tokens) + i]
        assert same_bits(entry[~mask], old[0, len(region.tokens) + i][~mask])
        torch.testing.assert_close(entry, mixed, rtol=1e-5, atol=2e-6)


class Reference(torch.fx.Interpreter):
    """Every query of the denoiser as captured, on keys and values of which only the selected tokens' rows are new."""

    def __init__(self, this: Case, site: str, old: Entries, chosen: Entries) -> None:
        super().__init__(this.variant.graph_module)
        self.this, self.site, self.region = this, this.sites[site], this.regions[site]
        self.kept = {name: old[0, len(self.region.tokens) + i] for i, name in enumerate(self.region.kept)}
        self.chosen, self.mixed, self.values = chosen, {}, {}

    def run(self, step: int) -> list[torch.Tensor]:  # type: ignore[override]
        args, kwargs = self.this.inputs(step)
        bound = self.this.captured.bind(args, kwargs)
        names = [str(node.target) for node in self.module.graph.nodes if node.op == "placeholder"]
        super().run(*(bound[name] for name in names))
        return [self.values[v] - (self.values[a] if a is not None else 0)
                for v, a in zip(self.site.values, self.site.anchors, strict=True)]  # fmt: skip

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        if node.name in self.kept:
            mask = self.fresh_rows(result.shape)
            result = torch.where(mask, result, self.kept[node.name])
            self.mixed[node.name] = result, mask.expand(result.shape)
        if node.name in (*self.site.values, *self.site.anchors):
            self.values[node.name] = result.clone()
        return result

    def fresh_rows(self, shape: torch.Size) -> torch.Tensor:
        """Which rows [batch, 1, tokens, 1] of keys [batch, heads, tokens, channels] are new."""
        masks = [torch.zeros(2, n, dtype=torch.bool).scatter(1, self.chosen[0, i], True)
                 for i, n in enumerate(self.region.tokens)]  # fmt: skip
        length = shape[2]
        if len(masks) == 2:  # the two streams in the order in which these models join them
            image = max(range(2), key=lambda i: self.region.tokens[i])
            pair = [masks[1 - image], masks[image]]
            masks = [torch.cat(pair if self.this.text_first else pair[::-1], 1)]
        elif masks[0].shape[1] < length:  # all of the text is new
            text = torch.ones(2, length - masks[0].shape[1], dtype=torch.bool)
            masks = [torch.cat([text, masks[0]] if self.this.text_first else [masks[0], text], 1)]
        return masks[0][:, None, :, None]


@everywhere
@torch.no_grad()
def test_any_tokens_are_right_when_nothing_changed(name: str, role: str) -> None:
    """Up to the rounding of products of another size."""
    for site in of_role(case(name), role):
        check_any_tokens_are_right_when_nothing_changed(case(name), site)


def check_any_tokens_are_right_when_nothing_changed(this: Case, site: str) -> None:
    region = this.regions[site]
    counts = quarter(region.tokens)
    expected, old = this.run(computed(this, site), 2, {})
    result, written = this.run(partial(this, site, counts), 2, old, draw(region.tokens, counts))
    for (_, ours), (_, theirs) in zip(tree.walk((result, written)), tree.walk((expected, old)), strict=True):
        if isinstance(ours, torch.Tensor):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


@everywhere
@torch.no_grad()
def test_fewer_tokens_are_less_work(name: str, role: str) -> None:
    """With a quarter of the tokens a good part of what the site costs is saved."""
    for site in of_role(case(name), role):
        check_fewer_tokens_are_less_work(case(name), site)


def check_fewer_tokens_are_less_work(this: Case, site: str) -> None:
    region = this.regions[site]
    full = computed(this, site)
    _, old = this.run(full, 0, {})
    counts = quarter(region.tokens)
    spent = []
    for program, tokens in ((full, {}), (partial(this, site, counts), draw(region.tokens, counts))):
        with FlopCounterMode(display=False) as counter:
            this.run(program, 1, old, tokens)
        spent.append(counter.get_total_flops())
    # products only are counted here, and text that is beside the selected image stays whole
    assert spent[0] - spent[1] > 0.25 * region.share * this.sites[site].flops_saved
    assert count_ops(partial(this, site, counts).graph) < 1.3 * count_ops(full.graph) + 8


# -- several rows, forecasts and clusters -----------------------------------------------------------------------------


def children(this: Case) -> list[TokenRow]:
    """Every attention and feed-forward child as a row."""
    sites = [site for site in this.sites.values() if site.role in ("attention", "feedforward")]
    return [TokenRow(i, site, this.regions[site.name]) for i, site in enumerate(sites)]


def on_tokens(rows: Sequence[TokenRow], share: Callable[[tuple[int, ...]], tuple[int, ...]]) -> tuple[Any, Entries]:
    """The same rows on some of their tokens, and tokens for them."""
    chosen = [dataclasses.replace(row, counts=share(row.region.tokens)) for row in rows]
    tokens: Entries = {}
    for row in chosen:
        tokens |= draw(row.region.tokens, row.counts, row=row.row)
    return chosen, tokens


@pytest.mark.parametrize("name", ["dit", "flux", "wan"])
@torch.no_grad()
def test_every_child_on_tokens_of_its_own(name: str) -> None:
    this = case(name)
    rows = children(this)
    full = this.program(rows, kept=True)
    _, old = this.run(full, 0, {})
    expected, new = this.run(full, 1, {})
    chosen, tokens = on_tokens(rows, lambda n: n)
    result, written = this.run(this.program(chosen, kept=False), 1, old, tokens)
    assert same(result, expected)
    assert all(same_bits(written[place], new[place]) for place in new)
    chosen, tokens = on_tokens(rows, quarter)
    result, written = this.run(this.program(chosen, kept=False), 1, old, tokens)
    assert set(written) == set(old)
    for (row, value), numbers in tokens.items():
        other = torch.ones(written[row, value].shape[:2], dtype=torch.bool).scatter(1, numbers, False)
        assert same_bits(written[row, value][other], old[row, value][other])
        assert not torch.equal(written[row, value][~other], old[row, value][~other])
    # a second step goes on from what the first has mixed
    again, _ = this.run(this.program(chosen, kept=False), 2, written, tokens)
    assert not same(again, result)


@torch.no_grad()
def test_a_forecast_row_beside_rows_on_tokens() -> None:
    this = case("dit")
    rows = children(this)
    full = this.program(rows, kept=True)
    _, old = this.run(full, 0, {})
    chosen, tokens = on_tokens(rows, quarter)
    program = this.program(chosen, kept=False, cells={1: Forecast((0,), (1.0,))})
    names = _extra(program)
    assert "history_1_0_0" in names
    assert "tokens_1_0" not in names
    assert (1, 0) not in program.meta["writes"]
    this.run(program, 1, old, tokens)


@pytest.mark.parametrize(("name", "role"), [("dit", "feedforward"), ("pixart", "block"), ("flux", "stack")])
@torch.no_grad()
def test_the_other_tokens_may_be_forecast(name: str, role: str) -> None:
    """From two entries: where no token is selected the value is what a forecast of the whole site is, bit for bit."""
    this = case(name)
    site = next(site for site in this.sites.values() if site.role == role and site.name in this.regions)
    region = this.regions[site.name]
    counts = quarter(region.tokens)
    full = computed(this, site.name)
    (_, old), (_, new) = this.run(full, 0, {}), this.run(full, 1, {})
    weights = torch.tensor([2.0, -1.0])
    more, tokens = {"weights_0": weights}, draw(region.tokens, counts)
    _, written = this.run(partial(this, site.name, counts, history=2), 2, new, tokens, older=old, more=more)
    for value, numbers in enumerate(tokens.values()):
        expected = extrapolate(None, [new[0, value], old[0, value]], weights)
        other = torch.ones(expected.shape[:2], dtype=torch.bool).scatter(1, numbers, False)
        assert same_bits(written[0, value][other], expected[other])
    every = draw(region.tokens, region.tokens)
    result, _ = this.run(partial(this, site.name, region.tokens, history=2), 2, new, every, older=old, more=more)
    assert same(result, this.run(full, 2, {})[0])


@torch.no_grad()
def test_clusters_are_blended() -> None:
    this = case("dit")
    site = next(site for site in this.sites.values() if site.role == "feedforward")
    _, old = this.run(computed(this, site.name), 0, {})
    clusters = cluster_tokens(old[0, 0], 4)
    view = TokenView(old[0, 0], 1, clusters=clusters)
    tokens = {(0, 0): select_tokens(score_tokens("cluster", view), 4)}
    _, plain = this.run(partial(this, site.name, (4,)), 1, old, tokens)
    more = {"clusters_0_0": clusters}
    _, still = this.run(partial(this, site.name, (4,), blend=(0.0, 4)), 1, old, tokens, more=more)
    _, moved = this.run(partial(this, site.name, (4,), blend=(0.5, 4)), 1, old, tokens, more=more)
    assert same_bits(still[0, 0], plain[0, 0])
    own = take_rows(plain[0, 0], tokens[0, 0], 1)  # the fresh token of each cluster
    where = (clusters.gather(1, tokens[0, 0])[:, None] == clusters[..., None]).float()
    expected = 0.5 * plain[0, 0] + 0.5 * where @ own
    fresh = torch.zeros(2, 16, dtype=torch.bool).scatter(1, tokens[0, 0], True)
    torch.testing.assert_close(moved[0, 0][~fresh], expected[~fresh])
    assert same_bits(moved[0, 0][fresh], plain[0, 0][fresh])


@pytest.mark.parametrize("name", ["flux", "pixart"])
@torch.no_grad()
def test_one_sample_is_as_exact_as_two(name: str) -> None:
    this = case(name, 1)
    for site in ("stack0", "attention"):
        found = next(s for s in this.sites.values() if s.role == site)
        tokens = this.regions[found.name].tokens
        full = computed(this, found.name)
        _, old = this.run(full, 0, {})
        expected, new = this.run(full, 1, {})
        result, written = this.run(partial(this, found.name, tokens), 1, old, draw(tokens, tokens, 1))
        assert same(result, expected)
        assert all(same_bits(written[place], new[place]) for place in new)


def test_what_a_program_asks_for_is_listed() -> None:
    this = case("flux")
    site = next(s for s in this.sites.values() if s.role == "block" and len(s.values) == 2)
    program = partial(this, site.name, (None, 4))  # all of the text, four of the image
    assert program.meta["tokens"] == [(0, 1)]
    assert program.meta["history"] == [(0, 2, 0), (0, 3, 0), (0, 1, 0)]
    assert program.meta["writes"] == [(0, 0), (0, 1), (0, 2), (0, 3)]
