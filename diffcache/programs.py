"""Straight-line programs for the columns of a schedule, made on demand from one capture."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from diffcache.graphs import count_ops
from diffcache.lower import lower
from diffcache.memory import Kept, MemoryPlan, entry_bytes, plan_memory
from diffcache.options import RunOptions
from diffcache.pipeline import PREPARE, SPECIALISE, PassReport, run_passes
from diffcache.progress import waiting
from diffcache.schedule import COMPUTE, SKIP, Cell, Schedule
from diffcache.segments import Cuts, in_order, segment_numbers
from diffcache.sites import Site
from diffcache.tracing import tree
from diffcache.tracing.session import Bound
from diffcache.tracing.variant import Variant

Carried = dict[str, Any]  # what one segment hands to later ones, by name in the capture
History = dict[tuple[int, int, int], Kept]  # (row, value, step) -> what was kept


class Program:
    """One graph module with its calling convention: where each input comes from, what each write is."""

    def __init__(self, module: fx.GraphModule, backend: str = "eager", title: str = "denoiser", flops: float = 0.0):
        self.module, self.run, self.title, self.flops = module, lower(module, backend), title, flops
        self.cold = backend != "eager"  # compiled at its first call
        self.writes: list[tuple[int, int]] = module.meta["writes"]
        self.history: list[tuple[int, int, int]] = module.meta["history"]
        self.weights: list[int] = module.meta["weights"]
        self.carried_in: list[str] = module.meta["carried_in"]
        self.carried_out: list[str] = module.meta["carried_out"]
        self.probes: list[str] = module.meta["probes"]
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
        carried: Carried | None = None,
    ) -> tuple[Any, tuple[Kept, ...]]:
        """Returns (what the denoiser returns, the values to keep in the order of ``writes``).

        A segment adds to ``carried`` what it hands on, and returns its probes in the order of ``probes``; only the last
        returns the result.
        """
        device = next((leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor)), None)
        extra: list[Any] = []
        for name in self.order:
            kind, _, rest = name.partition("_")
            if kind == "hoisted":
                extra.append(hoisted[int(rest)])
            elif kind == "carried":
                assert carried is not None
                extra.append(carried[self.carried_in[int(rest)]])
            elif kind == "weights":
                extra.append(weights[int(rest)])
            else:
                row, value, age = map(int, rest.split("_"))
                kept = history[row, value, cells[row].steps[age]]  # type: ignore[union-attr]
                kept = kept[kind == "scale"] if isinstance(kept, tuple) else kept
                # what was offloaded comes back on the device's own queue
                extra.append(kept if kept.device == device else kept.to(device, non_blocking=True))
        result, kept = self._run_cold(*leaves, *extra) if self.cold else self.run(*leaves, *extra)
        if carried is not None and self.probes:
            count = len(self.carried_out)
            carried.update(zip(self.carried_out, result[:count], strict=True))
            result = result[count:]
        return result, kept

    def _run_cold(self, *inputs: Any) -> Any:
        with waiting(f"diffcache: compiling {self.title} (once)"):
            result = self.run(*inputs)
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
        probes: Sequence[Site] = (),
        flops: Mapping[str, float] | None = None,
        options: RunOptions = RunOptions(),  # noqa: B008  (frozen)
        title: str = "denoiser",
    ):
        self.variant, self.sites, self.options, self.title = variant, tuple(sites), options, title
        self._flops = flops or {}
        hoisting = {"hoist_step_invariant": {"invariant": frozenset(invariant)}}
        self.reports: list[PassReport]
        self.body, self.reports = run_passes(
            variant.graph_module, PREPARE, hoisting, title=f"{title}-prepare", disable=options.disable_passes
        )
        prologue = self.body.meta.get("prologue")
        self.prologue: Callable[..., Any] | None = None if prologue is None else lower(prologue, options.backend)
        self.prologue_module: fx.GraphModule | None = prologue
        self.paths: tuple[tree.Path, ...] = self.body.meta["inputs"]
        self.cuts = in_order(self.body.graph, probes)
        self.rows = self._rows()
        self._programs: dict[Any, Program] = {}
        self._owners = _owners(prologue) if prologue is not None else []

    def leaves(self, bound: Bound) -> list[Any]:
        return [tree.follow(bound, path) for path in self.paths]

    def program(self, schedule: Schedule, step: int, column: Sequence[Cell] | None = None, segment: int = 0) -> Program:
        """The program of one column, or of one segment of it; steps whose columns have the same structure share it.

        ``column`` is what was decided at run time; cells of rows that are not in the segment do not count.
        """
        rows = self.rows[segment]
        cells = blank(schedule.column(step) if column is None else column, rows)
        structure = schedule.structure(step, cells)
        writes = structure.writes & {schedule.rows[row].site for row in rows}
        found = self._programs.get((segment, structure.kinds, structure.reads, writes))
        if found is None:
            live = [row for row, site in enumerate(schedule.rows) if site.site in writes]
            part = f"segment{segment}-" if self.cuts else ""
            title = f"{self.title}-{part}column{len(self._programs):02d}"
            found = self._specialise(cells, live, title, self.cuts, segment)
            self._programs[segment, structure.kinds, structure.reads, writes] = found
        return found

    def _rows(self) -> list[list[int]]:
        """For each segment the rows with a value in it."""
        if not self.cuts:
            return [list(range(len(self.sites)))]
        numbers = segment_numbers(self.body.graph, self.cuts)
        at = {node.meta.get("captured_as", node.name): number for node, number in numbers.items()}
        found = range(len(self.cuts) + 1)
        return [[r for r, site in enumerate(self.sites) if any(at[v] == n for v in site.values)] for n in found]

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

    def _specialise(
        self, cells: Sequence[Cell], live: Sequence[int], title: str, cuts: Cuts = (), segment: int = 0
    ) -> Program:
        sites = self.sites if cells else ()
        options: dict[str, dict[str, Any]] = {
            "take_segment": {"cuts": cuts, "number": segment, "sites": sites},
            "apply_schedule": {"sites": sites, "cells": cells, "small": self.options.small},
            "drop_dead_writes": {"live": live},
        }
        module, reports = run_passes(self.body, SPECIALISE, options, title=title, disable=self.options.disable_passes)
        self.reports += reports
        names = [node.meta.get("captured_as", node.name) for node in module.graph.nodes if node.op != "placeholder"]
        return Program(module, self.options.backend, title, sum(self._flops.get(name, 0.0) for name in names))

    def _scheduled(self) -> list[tuple[Any, Program]]:
        return [(key, program) for key, program in self._programs.items() if isinstance(key, tuple)]

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
        if schedule.is_online and schedule.rows:  # what was decided so far
            parts = [[p for (n, *_), p in self._scheduled() if n == number] for number in range(len(self.cuts) + 1)]
            ops = [sum(min((count_ops(p.module.graph) for p in part), default=0) for part in parts)]
        else:
            steps = {schedule.structure(step): step for step in range(schedule.steps)}
            ops = [count_ops(self.program(schedule, step).module.graph) for step in steps.values()]
        hoisted = int(self.body.meta.get("hoisted", 0))
        return {"nodes": count_ops(self.variant.graph_module.graph), "hoisted": hoisted, "kept": min(ops)}


def _owners(module: fx.GraphModule) -> list[tuple[dict[str, Any], str]]:
    return [(table, name) for m in module.modules() for table in (m._parameters, m._buffers) for name in table]


def blank(column: Sequence[Cell], rows: Collection[int]) -> list[Cell]:
    """The column with the cells of all other rows left out."""
    return [cell if row in rows else SKIP for row, cell in enumerate(column)]
