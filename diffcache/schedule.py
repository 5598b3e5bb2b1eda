"""A reuse schedule: for every site and every step, compute the value or forecast it from history.

Enters: decisions (made by search, by a recipe, or by hand). Leaves: frozen data that can be checked, printed, compared,
stored as JSON and rewritten into programs. No torch here, so that a schedule can be read anywhere.

Steps count from 0 in the order of execution, whatever the sampler's time does.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from diffcache.cells import (
    COMPUTE,
    SKIP,
    Action,
    Cell,
    Deferred,
    Forecast,
    Forecasting,
    GateSpec,
    Online,
    Partial,
    Selected,
    cell_from_json,
    cell_to_json,
    character,
)
from diffcache.documents import read_document
from diffcache.guidance import DECIDE, SAMPLES, Guidance, guidance_from_json
from diffcache.token_reads import Lookers, full_values, keeps_tokens, lookers, token_structure

FORMAT = "diffcache.schedule"
VERSION = 1


@dataclass(frozen=True)
class Row:
    """All decisions about one site; ``residual`` says that ``value - anchor`` is cached instead of the value.

    ``gate`` may veto a forecast at run time; rows with equal gates share its decisions.
    """

    site: str
    residual: bool
    cells: tuple[Cell, ...]
    gate: GateSpec | None = None

    @property
    def keeps(self) -> int:
        """How many of the newest computed values its online and partial cells read."""
        return max((cell.history for cell in self.cells if isinstance(cell, Deferred)), default=0)

    @property
    def probes(self) -> tuple[str, ...]:
        """What the rules of its online cells look at."""
        return tuple(dict.fromkeys(cell.probe for cell in self.cells if isinstance(cell, Online) and cell.probe))

    @cached_property
    def last_online(self) -> int:
        """The last step that is decided, or runs on some tokens, at run time; -1 for none."""
        return max((step for step, cell in enumerate(self.cells) if isinstance(cell, Deferred)), default=-1)

    @cached_property
    def last_partial(self) -> int:
        """The last step at which only some tokens are computed; -1 for none."""
        return max((step for step, cell in enumerate(self.cells) if isinstance(cell, Partial)), default=-1)

    @cached_property
    def full_values(self) -> int:
        """How many values of steps that are computed in full its rules read, where others are for some tokens."""
        return full_values(self)

    def last_reads(self) -> dict[int, int]:
        """Computed step -> the last step whose forecast reads it; steps that nobody reads are missing."""
        reads: dict[int, int] = {}
        for step, cell in enumerate(self.cells):
            if isinstance(cell, Forecast):
                reads.update(dict.fromkeys(cell.steps, step))
        return reads


@dataclass(frozen=True, slots=True)
class SiteChoice:
    """What a recipe needs to know about a site: the share of one call's FLOPs it saves, and its role in the denoiser.

    ``role`` is "stack" (the residual of the repeated blocks), "output" (the result of the denoiser), "deepest" (the
    cheapest cut by bytes, such as the deep features of a U-Net), or empty. ``depth``, ``blocks``, ``kind``, ``level``
    and ``side`` are those of ``sites.Site``: which block of how many, what an attention looks at, and the place in a U.
    """

    name: str
    residual: bool
    flops_fraction_saved: float
    role: str = ""
    depth: int = -1
    blocks: int = 0
    kind: str = ""
    level: int = -1
    side: str = ""


@dataclass(frozen=True, slots=True)
class Structure:
    """What decides which program a step needs: two steps with equal structure share one.

    ``kinds`` is the step's column of the printed grid, one character a row; ``reads`` the history tensors each row
    reads; ``writes`` the sites whose value is kept; ``views`` the part of each row that is forecast otherwise;
    ``tokens`` how many tokens of a row are computed, and whether its keys and values are kept. Weights are inputs of a
    program, so they do not count, except that plain reuse (``r``) is told apart from a forecast (``f``): it needs no
    operation.
    """

    kinds: str
    reads: tuple[int, ...]
    writes: frozenset[str]
    views: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()


@dataclass(frozen=True)
class Schedule:
    """Decisions for a whole generation of ``steps`` steps; rows that are missing are computed at every step.

    ``clock`` holds the timestep values it was calibrated at, ``origin`` says how it was made, and ``flops_fraction`` is
    the share of the uncached generation's FLOPs that is still computed. ``guidance`` says what becomes of the
    unconditional branch; without it both branches follow the rows. The branches of a generation decide each for itself
    (``decide="separate"``) or all follow the one called first ("shared"); the samples of a batch decide together, or
    each for itself (``samples="alone"``). Raises ValueError for anything inconsistent.
    """

    steps: int
    rows: tuple[Row, ...] = ()
    fingerprint: str = ""
    clock: tuple[float, ...] = ()
    origin: str = ""
    flops_fraction: float = 1.0
    guidance: Guidance | None = None
    decide: str = "separate"
    samples: str = "together"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"a schedule needs at least one step, got steps={self.steps}")
        if self.clock and len(self.clock) != self.steps:
            raise ValueError(f"schedule has {self.steps} steps but {len(self.clock)} clock values; give one per step")
        if not 0.0 < self.flops_fraction <= 1.0:
            raise ValueError(f"flops_fraction is a share of the uncached FLOPs in (0, 1], got {self.flops_fraction}")
        sites = [row.site for row in self.rows]
        if len(set(sites)) != len(sites):
            twice = sorted({site for site in sites if sites.count(site) > 1})
            raise ValueError(f"sites {twice} have more than one row; merge their cells into one row each")
        for row in self.rows:
            _check_row(row, self.steps)
        self._lookers  # noqa: B018  (checks them)
        for step in range(self.steps):
            _check_column(self.rows, step)
        if self.decide not in DECIDE or self.samples not in SAMPLES:
            raise ValueError(
                f"decide is {self.decide!r} and samples {self.samples!r}; expected {' or '.join(DECIDE)}, and "
                f"{' or '.join(SAMPLES)}"
            )
        if self.guidance is not None:
            self.guidance.check(self.steps)

    @classmethod
    def exact(cls, steps: int) -> Schedule:
        """The schedule that computes everything."""
        return cls(steps, origin="exact")

    def column(self, step: int) -> tuple[Cell, ...]:
        """The cells of one step, in the order of the rows."""
        self._checked(step)
        return tuple(row.cells[step] for row in self.rows)

    def computed_steps(self) -> tuple[int, ...]:
        """Steps at which no site is or may be forecast, and no branch left out: the denoiser runs in full."""
        forecast = {step for row in self.rows for step, cell in enumerate(row.cells) if not isinstance(cell, Action)}
        if self.guidance is not None:
            forecast.update(self.guidance.left_out(self.steps))
        return tuple(step for step in range(self.steps) if step not in forecast)

    @cached_property
    def gates(self) -> tuple[GateSpec, ...]:
        """The different gates of the rows, in their order."""
        found: list[GateSpec] = []
        for row in self.rows:
            if row.gate is not None and row.gate not in found:
                found.append(row.gate)
        return tuple(found)

    @property
    def is_online(self) -> bool:
        """Whether anything is decided at run time."""
        gated = bool(self.gates) or (self.guidance is not None and self.guidance.gate is not None)
        return gated or any(row.keeps for row in self.rows)

    @property
    def is_exact(self) -> bool:
        """Whether everything is computed at every step."""
        return len(self.computed_steps()) == self.steps

    def writes(self, step: int, column: Sequence[Cell] | None = None) -> frozenset[str]:
        """Sites whose value computed at this step is (or may be) read by a later forecast; no other need be kept.

        ``column`` is what was decided at run time; by default online cells count as computed.
        """
        self._checked(step)
        decided = self.column(step) if column is None else column
        return frozenset(
            row.site
            for row, reads, cell in zip(self.rows, self._last_reads, decided, strict=True)
            if step in reads
            or (self.newest_after(row, step) and (cell is COMPUTE or isinstance(cell, Deferred | Selected)))
        )

    def newest_after(self, row: Row, step: int) -> int:
        """How many of the newest values of a row are kept after a step for what is decided at run time."""
        looked_at = max((looks for last, looks, _ in self._lookers[row.site] if last > step), default=0)
        return max(row.keeps if row.last_online > step else 0, looked_at)

    def full_after(self, row: Row, step: int) -> int:
        """How many of a row's newest values that were computed in full are kept after a step beside those."""
        return row.full_values if row.last_online > step else 0

    def keeps_tokens(self, row: Row, step: int) -> bool:
        """Whether a later step on some tokens looks at the keys and values that are known of a row after this one."""
        looked_at = [last for last, _, attended in self._lookers[row.site] if attended]
        return keeps_tokens(row, step, looked_at)

    def live_after(self, step: int) -> dict[str, tuple[int, ...]]:
        """Site -> the computed steps (newest first) whose values a forecast after ``step`` still reads."""
        self._checked(step)
        live = {
            row.site: tuple(sorted((made for made, last in reads.items() if made <= step < last), reverse=True))
            for row, reads in zip(self.rows, self._last_reads, strict=True)
        }
        return {site: steps for site, steps in live.items() if steps}

    def structure(self, step: int, column: Sequence[Cell] | None = None) -> Structure:
        """What the program of this step depends on; ``column`` is what was decided at run time."""
        cells = self.column(step) if column is None else tuple(column)
        reads = tuple(cell.reads if isinstance(cell, Forecasting | Partial) else 0 for cell in cells)
        views = tuple(str(cell.view) if isinstance(cell, Forecast) and cell.view else "" for cell in cells)
        tokens = tuple(
            token_structure(cell, self.keeps_tokens(row, step)) for row, cell in zip(self.rows, cells, strict=True)
        )
        kinds = "".join(map(character, cells))
        return Structure(kinds, reads, self.writes(step, cells), *(p if any(p) else () for p in (views, tokens)))

    def distinct_columns(self) -> dict[Structure, tuple[int, ...]]:
        """Structure -> the steps that share it, in the order of first appearance: one program is needed for each."""
        groups: dict[Structure, tuple[int, ...]] = {}
        for step in range(self.steps):
            structure = self.structure(step)
            groups[structure] = (*groups.get(structure, ()), step)
        return groups

    def only(self, sites: Collection[str]) -> Schedule:
        """Keep the forecasts of these sites and compute all others: the move for bisecting a bad result.

        ``flops_fraction`` is kept, and is then only a lower bound. Cells skipped because they lay inside a site that is
        computed again are computed too, and so are both branches of guidance.
        """
        known = [row.site for row in self.rows]
        unknown = sorted(set(sites) - set(known))
        if unknown:
            raise ValueError(f"schedule has no rows for sites {unknown}; its sites are {known}")
        kept = [row for row in self.rows if row.site in sites]
        covered = {step for row in kept for step, cell in enumerate(row.cells) if isinstance(cell, Forecast)}
        rows = []
        for row in self.rows:
            cells: Iterable[Cell] = (COMPUTE,) * self.steps
            if row.site in sites:
                cells = (COMPUTE if c is SKIP and t not in covered else c for t, c in enumerate(row.cells))
            rows.append(replace(row, cells=tuple(cells)))
        return replace(self, rows=tuple(rows), guidance=None, origin=f"{self.origin} only {sorted(sites)}".strip())

    def to_json(self) -> str:
        """Text that ``from_json`` reads back to an equal schedule."""
        document = {
            "format": FORMAT,
            "version": VERSION,
            "steps": self.steps,
            "origin": self.origin,
            "fingerprint": self.fingerprint,
            "flops_fraction": self.flops_fraction,
            "clock": list(self.clock),
            "rows": [
                {
                    "site": row.site,
                    "residual": row.residual,
                    "gate": None if row.gate is None else {"name": row.gate.name, "options": dict(row.gate.options)},
                    "cells": [cell_to_json(cell) for cell in row.cells],
                }
                for row in self.rows
            ],
            "guidance": None if self.guidance is None else self.guidance.to_json(),
            "decide": self.decide,
            "samples": self.samples,
        }
        return json.dumps(document, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """Read what ``to_json`` wrote. Raises ValueError for anything else, and for files of a newer version."""
        document = read_document(text, FORMAT, VERSION)
        try:
            return cls(
                steps=document["steps"],
                rows=tuple(_row_from_json(row) for row in document["rows"]),
                fingerprint=document["fingerprint"],
                clock=tuple(float(value) for value in document["clock"]),
                origin=document["origin"],
                flops_fraction=float(document["flops_fraction"]),
                guidance=guidance_from_json(document.get("guidance")),
                decide=document.get("decide", "separate"),
                samples=document.get("samples", "together"),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"this schedule file is damaged ({type(error).__name__}: {error}); write it again with to_json()"
            ) from error

    def __str__(self) -> str:
        """The readable grid: C compute, r reuse, f forecast, g gated, t computed for some tokens, . skipped in another
        site's forecast, - left out.

        In the columns that a run comes to (``CachedDenoiser.decisions``) v is a forecast whose weights were made from
        values.
        """
        programs = len(self.distinct_columns())
        lines = [
            f"schedule: {len(self.rows)} sites x {self.steps} steps, "
            f"{100 * self.flops_fraction:.0f} % of FLOPs computed, {programs} programs"
        ]
        grid = [(row.site, "".join(map(character, row.cells))) for row in self.rows]
        if self.guidance is not None:
            grid.append((f"unconditional ({self.guidance.rule})", self.guidance.printed(self.steps)))
        width = max((len(name) for name, _ in grid), default=4)
        lines += [f"  {name:<{width}}  {cells}" for name, cells in grid]
        ruler = "".join(f"{step:<5}" for step in range(0, self.steps, 5)).rstrip()
        return "\n".join([*lines, f"  {'step':<{width}}  {ruler}"])

    @cached_property
    def _last_reads(self) -> tuple[dict[int, int], ...]:
        return tuple(row.last_reads() for row in self.rows)

    @cached_property
    def _lookers(self) -> Lookers:
        return lookers(self.rows)

    def _checked(self, step: int) -> None:
        if not 0 <= step < self.steps:
            raise ValueError(f"step {step} is outside this schedule of {self.steps} steps (0 to {self.steps - 1})")


def _check_row(row: Row, steps: int) -> None:
    if len(row.cells) != steps:
        raise ValueError(f"site '{row.site}' has {len(row.cells)} cells but the schedule has {steps} steps")
    for step, cell in enumerate(row.cells):
        if isinstance(cell, Action | Online):
            continue
        if not isinstance(cell, Forecast | Partial):
            raise ValueError(
                f"site '{row.site}' has {cell!r} at step {step}; expected COMPUTE, SKIP, a Forecast, Online or Partial"
            )
        if not any(earlier is COMPUTE for earlier in row.cells[:step]):
            raise ValueError(f"site '{row.site}' forecasts step {step}, but nothing is cached yet; compute it earlier")
        for read in cell.steps if isinstance(cell, Forecast) else ():
            if not 0 <= read < step:
                raise ValueError(
                    f"site '{row.site}' at step {step} reads step {read}; a forecast may read only earlier steps"
                )
            if row.cells[read] is not COMPUTE and not isinstance(row.cells[read], Partial):
                raise ValueError(
                    f"site '{row.site}' at step {step} reads step {read}, where it is not computed; "
                    f"it is computed at {[t for t, c in enumerate(row.cells[:step]) if c is COMPUTE]}"
                )


def _check_column(rows: tuple[Row, ...], step: int) -> None:
    skipped = [row.site for row in rows if row.cells[step] is SKIP]
    if skipped and all(isinstance(row.cells[step], Action) for row in rows):
        raise ValueError(
            f"sites {skipped} are skipped at step {step}, but no site is forecast there that could contain them; "
            "compute them, or forecast the site around them"
        )


def _row_from_json(row: dict[str, Any]) -> Row:
    gate = row.get("gate")
    spec = None if gate is None else GateSpec(gate["name"], gate["options"])
    return Row(str(row["site"]), bool(row["residual"]), tuple(map(cell_from_json, row["cells"])), spec)
