"""Straight-line programs for the columns of a schedule, made on demand from one capture."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from diffcache.call_pattern import CallPattern
from diffcache.cells import Given, Selected
from diffcache.graphs import count_ops
from diffcache.lower import lower
from diffcache.memory import Kept, MemoryPlan, entry_bytes, plan_memory, probe_entry, spec_bytes
from diffcache.options import RunOptions
from diffcache.pipeline import PREPARE, SPECIALISE, PassReport, run_passes
from diffcache.progress import waiting
from diffcache.schedule import COMPUTE, SKIP, Cell, Schedule
from diffcache.segments import Cuts, before_check, in_order, segment_numbers
from diffcache.sites import Site
from diffcache.token_programs import NEWEST, TokenRegions, part_flops, without_tokens
from diffcache.tracing import tree
from diffcache.tracing.session import Bound
from diffcache.tracing.variant import Variant

Carried = dict[str, Any]  # what one segment hands to later ones, by name in the capture
History = dict[tuple[int, int, int], Kept]  # (row, value, step) -> what was kept
BASIS = -1  # in the place of a step: what a projection was found to be in this generation


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

    @functools.cached_property
    def effect(self) -> str:
        """The first node that would change something for a program that runs after this one; empty for none."""
        nodes = self.module.graph.nodes
        given = {node.meta.get("storage") for node in nodes if node.op in ("placeholder", "get_attr")} - {None}
        for node in nodes:
            in_place = node.op == "call_method" and str(node.target).endswith("_")
            written = node.all_input_nodes[:1] if in_place else node.all_input_nodes
            lasting = node.meta.get("writes") and any(source.meta.get("storage") in given for source in written)
            if node.meta.get("random") or node.meta.get("persistent") or lasting:
                return str(node.name)
        return ""

    def refuse_effects(self) -> None:
        """Raise ValueError if it cannot be run before another program of the same segment as if it had not been."""
        if self.effect:
            raise ValueError(
                f"{self.title} checks a forecast and may have to run again, but '{self.effect}' draws random numbers "
                "or writes into what was there before; use a gate that decides before the step"
            )

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
            elif kind == "weights" and "_" not in rest:
                extra.append(weights[int(rest)])
            else:
                kept = self._of_row(kind, [int(number) for number in rest.split("_")], history, cells)
                # what was offloaded comes back on the device's own queue
                extra.append(kept if kept.device == device else kept.to(device, non_blocking=True))
        result, kept = self._run_cold(*leaves, *extra) if self.cold else self.run(*leaves, *extra)
        if carried is not None and self.probes:
            count = len(self.carried_out)
            carried.update(zip(self.carried_out, result[:count], strict=True))
            result = result[count:]
        return result, kept

    def _of_row(self, kind: str, place: list[int], history: History, cells: Sequence[Cell]) -> torch.Tensor:
        """One tensor that a forecast is made from, or the weights of one value of a site."""
        row, value, *age = place
        cell = cells[row]
        if isinstance(cell, Selected):
            if not age:
                return (cell.tokens if kind == "tokens" else cell.clusters)[value]
            kept = history[row, value, NEWEST if value >= len(cell.counts) else cell.forecast.steps[age[0]]]
            assert isinstance(kept, torch.Tensor)
            return kept
        if isinstance(cell, Given):
            tensors, table = cell.made[value]
            return tensors[age[0]] if age else table
        kept = history[row, value, cell.steps[age[0]] if age else BASIS]  # type: ignore[union-attr]
        return kept[kind == "scale"] if isinstance(kept, tuple) else kept

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
        checks: Mapping[str, Sequence[int]] | None = None,
        flops: Mapping[str, float] | None = None,
        options: RunOptions = RunOptions(),  # noqa: B008  (frozen)
        title: str = "denoiser",
    ):
        self.variant, self.sites, self.probes = variant, tuple(sites), tuple(probes)
        self.options, self.title = options, title
        self._flops = flops or {}
        self.regions = TokenRegions(variant.graph_module, self.sites, self._flops)
        named = frozenset(name for site in (*sites, *probes) for name in (*site.values, *site.anchors) if name)
        hoisting = {"hoist_step_invariant": {"invariant": frozenset(invariant), "named": named}}
        self.reports: list[PassReport]
        self.body, self.reports = run_passes(
            variant.graph_module, PREPARE, hoisting, title=f"{title}-prepare", disable=options.disable_passes
        )
        prologue = self.body.meta.get("prologue")
        self.prologue: Callable[..., Any] | None = None if prologue is None else lower(prologue, options.backend)
        self.prologue_module: fx.GraphModule | None = prologue
        self.paths: tuple[tree.Path, ...] = self.body.meta["inputs"]
        self.checks = dict(checks or {}) if self.sites else {}
        self.cuts = self._cuts()
        self.rows = self._rows()
        self._refuse_scattered_checks()
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
        key = (segment, structure.kinds, structure.reads, writes, structure.views, structure.tokens)
        found = self._programs.get(key)
        if found is None:
            live = [row for row, site in enumerate(schedule.rows) if site.site in writes]
            part = f"segment{segment}-" if self.cuts else ""
            title = f"{self.title}-{part}column{len(self._programs):02d}"
            keeping = [n for n, row in enumerate(schedule.rows) if schedule.keeps_tokens(row, step)]
            found = self._specialise(cells, live, title, self.cuts, segment, keeping)
            self._programs[key] = found
        return found

    def _cuts(self) -> list[list[Site]]:
        """A cut for each place in the graph with a probe, and one before each check that is made on a forecast."""
        cuts: list[list[Site]] = []
        for cut in in_order(self.body.graph, self.probes):
            for probe in cut:
                forecast = [self.sites[row] for row in self.checks.get(probe.name, ())]
                before = before_check(self.body.graph, probe, forecast) if forecast else None
                cuts += [[before]] if before is not None else []
            cuts.append(cut)
        return cuts

    def _refuse_scattered_checks(self) -> None:
        """Raise ValueError where a check and what it is made on do not run as one segment of their own."""
        of_cut = {probe.name: number for number, cut in enumerate(self.cuts) for probe in cut}
        for name, rows in self.checks.items():
            here = of_cut[name]
            all_rows = [*rows, *(row for row, site in enumerate(self.sites) if site.name == name)]
            segments = {row: [n for n, part in enumerate(self.rows) if row in part] for row in all_rows}
            away = [self.sites[row].name for row in all_rows if segments[row] != [here]]
            others = [other for other in self.checks if other != name and of_cut[other] == here]
            if away or others:
                raise ValueError(
                    f"'{name}' cannot be checked on forecasts of {away or others}: these are to be computed after all "
                    "other probes and before it; check the block that reads what is forecast"
                )

    def kept_as(self, row: int, value: int, step: int) -> tuple[int, int, int]:
        """Where in history a written value stands; of keys and values only the newest are kept."""
        return row, value, step if value < len(self.sites[row].values) else NEWEST

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
        self,
        cells: Sequence[Cell],
        live: Sequence[int],
        title: str,
        cuts: Cuts = (),
        segment: int = 0,
        keeping: Collection[int] = (),
    ) -> Program:
        sites = self.sites if cells else ()
        first = {row: len(site.values) for row, site in enumerate(sites) if row not in keeping}
        options: dict[str, dict[str, Any]] = {
            "take_segment": {"cuts": cuts, "number": segment, "sites": sites},
            "apply_schedule": {"sites": sites, "cells": without_tokens(cells), "small": self.options.small},
            "subset_tokens": {"token_rows": self.regions.token_rows(cells, keeping)},
            "drop_dead_writes": {"live": live, "first": first},
        }
        module, reports = run_passes(self.body, SPECIALISE, options, title=title, disable=self.options.disable_passes)
        self.reports += reports
        nodes = [node for node in module.graph.nodes if node.op != "placeholder"]
        return Program(module, self.options.backend, title, sum(part_flops(node, self._flops) for node in nodes))

    def made(self) -> list[Program]:
        """The programs of columns that were needed so far."""
        return [program for _, program in self._scheduled()]

    def _scheduled(self) -> list[tuple[Any, Program]]:
        return [(key, program) for key, program in self._programs.items() if isinstance(key, tuple)]

    def hoisted_state(self) -> tuple[Any, ...]:
        """Identity and version of every parameter that the prologue reads: changed weights mean running it again."""
        tensors = [owner.get(name) for owner, name in self._owners]
        return tuple((id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors if t is not None)

    def memory(self, schedule: Schedule, pattern: CallPattern) -> MemoryPlan:
        """What history costs at this call's shapes, and the probes that are kept with it."""
        graph = self.variant.graph_module.graph
        sizes = entry_bytes(graph, self.sites, self.options.small)
        first = [replace(probe, values=probe.values[:1]) for probe in self.probes]
        sizes |= {probe_entry(name): size for name, size in entry_bytes(graph, first).items()}
        inputs = [node for node in self.body.graph.nodes if node.op == "placeholder"]
        latent = [node for node, path in zip(inputs, self.paths, strict=False) if path == pattern.probe]
        sizes |= {probe_entry("latent"): spec_bytes(node.meta.get("val")) for node in latent}
        sizes |= self.regions.sizes(schedule)
        return plan_memory(schedule, sizes, streams=pattern.streams, offload=self.options.offload_history)

    def check_order(self, schedule: Schedule, looks: Mapping[str, Collection[str]]) -> None:
        """Raise ValueError where what is looked at (by site) is not computed before the site, or some tokens cannot."""
        cut_of = {probe.name: number for number, cut in enumerate(self.cuts) for probe in cut}
        for row, site in enumerate(self.sites):
            first = min(number for number, rows in enumerate(self.rows) if row in rows)
            late = sorted(name for name in looks.get(site.name, ()) if cut_of[name] >= first)
            if late:
                raise ValueError(
                    f"site '{site.name}' is computed no later than {late}, which decide about it; "
                    "look at something that lies before the site"
                )
        if self.sites:
            places: dict[int, set[str]] = {}
            for node, number in segment_numbers(self.body.graph, self.cuts).items():
                places.setdefault(number, set()).add(node.meta.get("captured_as", node.name))
            self.regions.check(schedule, list(places.values()))

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
