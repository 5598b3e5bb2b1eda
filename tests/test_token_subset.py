"""A site on a few of its tokens: exact with all of them, the cache for the others, fresh rows that are right."""

from __future__ import annotations

import functools
import importlib.util
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
from diffcache.passes.apply_schedule import apply_schedule
from diffcache.passes.eliminate_dead_code import eliminate_dead_code
from diffcache.passes.subset_tokens import TokenRow, subset_tokens
from diffcache.pipeline import PREPARE, run_passes
from diffcache.schedule import COMPUTE, SKIP
from diffcache.sites import Site, find_sites
from diffcache.token_region import TokenRegion, token_region
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

    def program(self, rows: Sequence[TokenRow], kept: bool) -> fx.GraphModule:
        """The program of a column: every row computed and kept, or on selected tokens."""
        sites = [row.site for row in rows]
        options = {
            "apply_schedule": {"sites": sites, "cells": [COMPUTE if kept else SKIP] * len(sites)},
            "subset_tokens": {"token_rows": rows},
        }
        passes = (apply_schedule, subset_tokens, eliminate_dead_code)
        return run_passes(self.body, passes, options, title="test")[0]

    def leaves(self, step: int) -> tuple[list[Any], list[Any]]:
        """Inputs of a step, and what the prologue makes of them."""
        args, kwargs = self.inputs(step)
        bound = self.captured.bind(args, kwargs)
        leaves = [tree.follow(bound, path) for path in self.body.meta["inputs"]]
        prologue = self.body.meta.get("prologue")
        return leaves, list(prologue(*leaves)) if prologue is not None else []

    def run(
        self, program: fx.GraphModule, step: int, history: Entries, tokens: dict[tuple[int, int], torch.Tensor] | None = None
    ) -> tuple[Any, Entries]:
        leaves, hoisted = self.leaves(step)
        extra: list[Any] = []
        for name in _extra(program):
            kind, *numbers = name.split("_")
            place = tuple(map(int, numbers))
            extra.append({"hoisted": lambda p=place: hoisted[p[0]], "history": lambda p=place: history[p[0], p[1]],
                          "tokens": lambda p=place: (tokens or {})[p[0], p[1]]}[kind]())  # fmt: skip
        result, written = program(*leaves, *extra)
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


# -- what is asked of every family and role -----------------------------------------------------------------------------


def places() -> list[tuple[str, str]]:
    """One site of each role of each family, the middle one; blocks of two kinds count as two roles."""
    found: dict[tuple[str, str, tuple[int, ...], int], list[str]] = {}
    for name in TRANSFORMERS:
        if FAMILIES[name].requires and not _installed(FAMILIES[name].requires):
            continue
        for site in case(name).sites.values():
            region = case(name).regions.get(site.name)
            if region is not None:
                found.setdefault((name, site.role, region.tokens, len(region.kept)), []).append(site.name)
    return [(name, sites[len(sites) // 2]) for (name, *_), sites in found.items()]


def _installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


PLACES = places()


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


@pytest.mark.parametrize(("name", "site"), PLACES)
@torch.no_grad()
def test_all_tokens_are_the_computed_step(name: str, site: str) -> None:
    """Bit for bit: the result, and everything that history keeps, from stale history."""
    this = case(name)
    tokens = this.regions[site].tokens
    full = computed(this, site)
    _, old = this.run(full, 0, {})
    expected, new = this.run(full, 1, {})
    result, written = this.run(partial(this, site, tokens), 1, old, draw(tokens, tokens))
    assert same(result, expected)
    assert set(written) == set(new) and all(same_bits(written[place], new[place]) for place in new)
    assert any(not torch.equal(old[place], new[place]) for place in new), "nothing moved between the steps"


@pytest.mark.parametrize(("name", "site"), PLACES)
@torch.no_grad()
def test_a_few_tokens_are_fresh_and_the_others_are_the_cache(name: str, site: str) -> None:
    this, region = case(name), case(name).regions[site]
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


@pytest.mark.parametrize(("name", "site"), PLACES)
@torch.no_grad()
def test_any_tokens_are_right_when_nothing_changed(name: str, site: str) -> None:
    """Up to the rounding of products of another size."""
    this, region = case(name), case(name).regions[site]
    counts = quarter(region.tokens)
    expected, old = this.run(computed(this, site), 2, {})
    result, written = this.run(partial(this, site, counts), 2, old, draw(region.tokens, counts))
    for (_, ours), (_, theirs) in zip(tree.walk((result, written)), tree.walk((expected, old)), strict=True):
        if isinstance(ours, torch.Tensor):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("name", "site"), PLACES)
@torch.no_grad()
def test_fewer_tokens_are_less_work(name: str, site: str) -> None:
    """With a quarter of the tokens a good part of what the site costs is saved."""
    this, region = case(name), case(name).regions[site]
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
