"""Straight-line programs for the columns of a schedule, made on demand from one capture."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import fx

from diffcache.graphs import count_ops
from diffcache.lower import lower
from diffcache.memory import Kept, MemoryPlan, entry_bytes, plan_memory
from diffcache.options import RunOptions
from diffcache.pipeline import PREPARE, SPECIALISE, PassReport, run_passes
from diffcache.progress import waiting
from diffcache.schedule import COMPUTE, Cell, Schedule
from diffcache.sites import Site
from diffcache.tracing import tree
from diffcache.tracing.session import Bound
from diffcache.tracing.variant import Variant

History = dict[tuple[int, int, int], Kept]  # (row, value, step) -> what was kept


class Program:
    """One graph module with its calling convention: where each input comes from, what each write is."""

    def __init__(self, module: fx.GraphModule, backend: str = "eager", title: str = "denoiser"):
        self.module, self.run, self.title = module, lower(module, backend), title
        self.cold = backend != "eager"  # compiled at its first call
        self.writes: list[tuple[int, int]] = module.meta["writes"]
        self.history: list[tuple[int, int, int]] = module.meta["history"]
        self.weights: list[int] = module.meta["weights"]
        self.order = [str(node.target) for node in module.graph.nodes if node.op == "placeholder"][
            len(module.meta["inputs"]) :
        ]

    def __call__(
        self,
        leaves: Sequence[Any],
        hoisted: Sequence[Any],
        history: History,
        cells: Sequence[Cell],
        weights: dict[int, torch.Tensor],
    ) -> tuple[Any, tuple[Kept, ...]]:
        """Returns (what the denoiser returns, the values to keep in the order of ``writes``)."""
        device = next((leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor)), None)
        extra: list[Any] = []
        for name in self.order:
            kind, _, rest = name.partition("_")
            if kind == "hoisted":
                extra.append(hoisted[int(rest)])
            elif kind == "weights":
                extra.append(weights[int(rest)])
            else:
                row, value, age = map(int, rest.split("_"))
                kept = history[row, value, cells[row].steps[age]]  # type: ignore[union-attr]
                kept = kept[kind == "scale"] if isinstance(kept, tuple) else kept
                # what was offloaded comes back on the device's own queue
                extra.append(kept if kept.device == device else kept.to(device, non_blocking=True))
        if not self.cold:
            return self.run(*leaves, *extra)
        with waiting(f"diffcache: compiling {self.title} (once)"):
            result = self.run(*leaves, *extra)
        self.cold = False
        return result


class Programs:
    """All programs of one captured variant: the prologue, and one program for each distinct column."""

    def __init__(
        self,
        variant: Variant,
        invariant: Collection[tree.Path],
        sites: Sequence[Site],
        *,
        options: RunOptions = RunOptions(),  # noqa: B008  (frozen)
        title: str = "denoiser",
    ):
        self.variant, self.sites, self.options, self.title = variant, tuple(sites), options, title
        hoisting = {"hoist_step_invariant": {"invariant": frozenset(invariant)}}
        self.reports: list[PassReport]
        self.body, self.reports = run_passes(
            variant.graph_module, PREPARE, hoisting, title=f"{title}-prepare", disable=options.disable_passes
        )
        prologue = self.body.meta.get("prologue")
        self.prologue: Callable[..., Any] | None = None if prologue is None else lower(prologue, options.backend)
        self.prologue_module: fx.GraphModule | None = prologue
        self.paths: tuple[tree.Path, ...] = self.body.meta["inputs"]
        self._programs: dict[Any, Program] = {}
        self._owners = _owners(prologue) if prologue is not None else []

    def leaves(self, bound: Bound) -> list[Any]:
        return [tree.follow(bound, path) for path in self.paths]

    def program(self, schedule: Schedule, step: int) -> Program:
        """The program of one column; steps whose columns have the same structure share it."""
        structure = schedule.structure(step)
        found = self._programs.get(structure)
        if found is None:
            live = [row for row, site in enumerate(schedule.rows) if site.site in structure.writes]
            found = self._specialise(schedule.column(step), live, f"{self.title}-column{len(self._programs):02d}")
            self._programs[structure] = found
        return found

    def observing(self) -> Program:
        """The program that computes everything and keeps every site's value."""
        found = self._programs.get("observing")
        if found is None:
            rows = range(len(self.sites))
            found = self._specialise((COMPUTE,) * len(rows), rows, f"{self.title}-observing")
            self._programs["observing"] = found
        return found

    def full(self) -> Program:
        """The program that computes everything and keeps nothing."""
        found = self._programs.get("full")
        if found is None:
            found = self._programs["full"] = self._specialise((), (), f"{self.title}-full")
        return found

    def _specialise(self, cells: Sequence[Cell], live: Sequence[int], title: str) -> Program:
        sites = self.sites if cells else ()
        options: dict[str, dict[str, Any]] = {
            "apply_schedule": {"sites": sites, "cells": cells, "small": self.options.small},
            "drop_dead_writes": {"live": live},
        }
        module, reports = run_passes(self.body, SPECIALISE, options, title=title, disable=self.options.disable_passes)
        self.reports += reports
        return Program(module, self.options.backend, title)

    def hoisted_state(self) -> tuple[Any, ...]:
        """Identity and version of every parameter that the prologue reads: changed weights mean running it again."""
        tensors = [owner.get(name) for owner, name in self._owners]
        return tuple((id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors if t is not None)

    def memory(self, schedule: Schedule, streams: int) -> MemoryPlan:
        """What history costs at this call's shapes."""
        sizes = entry_bytes(self.variant.graph_module.graph, self.sites, self.options.small)
        return plan_memory(schedule, sizes, streams=streams, offload=self.options.offload_history)

    def counts(self, schedule: Schedule) -> dict[str, int]:
        """Ops of the capture, hoisted, and left in the cheapest column."""
        steps = {schedule.structure(step): step for step in range(schedule.steps)}
        ops = [count_ops(self.program(schedule, step).module.graph) for step in steps.values()]
        hoisted = int(self.body.meta.get("hoisted", 0))
        return {"nodes": count_ops(self.variant.graph_module.graph), "hoisted": hoisted, "kept": min(ops)}


def _owners(module: fx.GraphModule) -> list[tuple[dict[str, Any], str]]:
    return [(table, name) for m in module.modules() for table in (m._parameters, m._buffers) for name in table]
