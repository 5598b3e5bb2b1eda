"""A site on a few of its tokens: exact with all of them, the cache for the others, fresh rows that are right."""

from __future__ import annotations

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
    model = entry.make_model()
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
                lambda step: entry.make_inputs(step, batch=batch))  # fmt: skip
