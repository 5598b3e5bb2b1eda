"""A reuse schedule: for every site and every step, compute the value or forecast it from history.

Enters: decisions (made by search, by a recipe, or by hand). Leaves: frozen data that can be checked, printed, compared,
stored as JSON and rewritten into programs. No torch here, so that a schedule can be read anywhere.

Steps count from 0 in the order of execution, whatever the sampler's time does.
"""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

FORMAT = "diffcache.schedule"
VERSION = 1


class Action(enum.Enum):
    """What a cell says when it is no forecast; the value is the cell's character in the printed grid."""

    COMPUTE = "C"
    SKIP = "."


COMPUTE = Action.COMPUTE
SKIP = Action.SKIP


@dataclass(frozen=True, slots=True)
class Forecast:
    """The value of a site at this step is ``sum_k weights[k] * (its value computed at steps[k])``.

    ``steps`` are newest first. Every linear predictor of the literature is such a weight vector.
    """

    steps: tuple[int, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.steps:
            raise ValueError("a forecast has no steps to read; give at least one computed step, or use COMPUTE")
        if len(self.steps) != len(self.weights):
            raise ValueError(
                f"a forecast has {len(self.steps)} steps but {len(self.weights)} weights; give one per step"
            )
        if any(older >= newer for newer, older in zip(self.steps, self.steps[1:], strict=False)):
            raise ValueError(f"forecast steps {self.steps} must be newest first and without duplicates")
        if not all(math.isfinite(weight) for weight in self.weights):
            raise ValueError(f"forecast weights {self.weights} must be finite")

    @property
    def is_reuse(self) -> bool:
        """Whether this repeats one earlier value unchanged, which needs no arithmetic at all."""
        return self.weights == (1.0,)


Cell = Action | Forecast


@dataclass(frozen=True)
class Row:
    """All decisions about one site; ``residual`` says that ``value - anchor`` is cached instead of the value."""

    site: str
    residual: bool
    cells: tuple[Cell, ...]

    def last_reads(self) -> dict[int, int]:
        """Computed step -> the last step whose forecast reads it; steps that nobody reads are missing."""
        reads: dict[int, int] = {}
        for step, cell in enumerate(self.cells):
            if isinstance(cell, Forecast):
                reads.update(dict.fromkeys(cell.steps, step))
        return reads


@dataclass(frozen=True)
class GateSpec:
    """Name and options of a run-time gate (see ``gates.py``); options must survive JSON."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        try:
            survives = json.loads(json.dumps(dict(self.options), allow_nan=False)) == dict(self.options)
        except (TypeError, ValueError):
            survives = False
        if not survives:
            raise ValueError(
                f"options of gate '{self.name}' must be plain JSON values (numbers, strings, lists), got {self.options}"
            )


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
    reads; ``writes`` the sites whose value is kept. Weights are inputs of a program, so they do not count, except that
    plain reuse (``r``) is told apart from a forecast (``f``): it needs no operation.
    """

    kinds: str
    reads: tuple[int, ...]
    writes: frozenset[str]


@dataclass(frozen=True)
class Schedule:
    """Decisions for a whole generation of ``steps`` steps; rows that are missing are computed at every step.

    ``clock`` holds the timestep values it was calibrated at, ``origin`` says how it was made, and ``flops_fraction`` is
    the share of the uncached generation's FLOPs that is still computed. Raises ValueError for anything inconsistent.
    """

    steps: int
    rows: tuple[Row, ...] = ()
    fingerprint: str = ""
    clock: tuple[float, ...] = ()
    gate: GateSpec | None = None
    origin: str = ""
    flops_fraction: float = 1.0

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
        for step in range(self.steps):
            _check_column(self.rows, step)

    @classmethod
    def exact(cls, steps: int) -> Schedule:
        """The schedule that computes everything."""
        return cls(steps, origin="exact")

    def column(self, step: int) -> tuple[Cell, ...]:
        """The cells of one step, in the order of the rows."""
        self._checked(step)
        return tuple(row.cells[step] for row in self.rows)

    def computed_steps(self) -> tuple[int, ...]:
        """Steps at which no site is forecast: the denoiser runs in full."""
        forecast = {step for row in self.rows for step, cell in enumerate(row.cells) if isinstance(cell, Forecast)}
        return tuple(step for step in range(self.steps) if step not in forecast)

    def writes(self, step: int) -> frozenset[str]:
        """Sites whose value computed at this step is read by a later forecast; no other value need be kept."""
        self._checked(step)
        return frozenset(row.site for row, reads in zip(self.rows, self._last_reads, strict=True) if step in reads)

    def live_after(self, step: int) -> dict[str, tuple[int, ...]]:
        """Site -> the computed steps (newest first) whose values a forecast after ``step`` still reads."""
        self._checked(step)
        live = {
            row.site: tuple(sorted((made for made, last in reads.items() if made <= step < last), reverse=True))
            for row, reads in zip(self.rows, self._last_reads, strict=True)
        }
        return {site: steps for site, steps in live.items() if steps}

    def structure(self, step: int) -> Structure:
        """What the program of this step depends on."""
        column = self.column(step)
        reads = tuple(len(cell.steps) if isinstance(cell, Forecast) else 0 for cell in column)
        return Structure("".join(map(_character, column)), reads, self.writes(step))

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
        computed again are computed too.
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
        return replace(self, rows=tuple(rows), origin=f"{self.origin} only {sorted(sites)}".strip())

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
            "gate": None if self.gate is None else {"name": self.gate.name, "options": dict(self.gate.options)},
            "rows": [
                {"site": row.site, "residual": row.residual, "cells": [_cell_to_json(c) for c in row.cells]}
                for row in self.rows
            ],
        }
        return json.dumps(document, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """Read what ``to_json`` wrote. Raises ValueError for anything else, and for files of a newer version."""
        document = _read_document(text)
        try:
            gate = document["gate"]
            return cls(
                steps=document["steps"],
                rows=tuple(
                    Row(str(row["site"]), bool(row["residual"]), tuple(_cell_from_json(c) for c in row["cells"]))
                    for row in document["rows"]
                ),
                fingerprint=document["fingerprint"],
                clock=tuple(float(value) for value in document["clock"]),
                gate=None if gate is None else GateSpec(gate["name"], gate["options"]),
                origin=document["origin"],
                flops_fraction=float(document["flops_fraction"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"this schedule file is damaged ({type(error).__name__}: {error}); write it again with to_json()"
            ) from error

    def __str__(self) -> str:
        """The readable grid: C compute, r reuse, f forecast, . skipped inside another site's forecast."""
        programs = len(self.distinct_columns())
        lines = [
            f"schedule: {len(self.rows)} sites x {self.steps} steps, "
            f"{100 * self.flops_fraction:.0f} % of FLOPs computed, {programs} programs"
        ]
        width = max((len(row.site) for row in self.rows), default=4)
        lines += [f"  {row.site:<{width}}  {''.join(map(_character, row.cells))}" for row in self.rows]
        ruler = "".join(f"{step:<5}" for step in range(0, self.steps, 5)).rstrip()
        return "\n".join([*lines, f"  {'step':<{width}}  {ruler}"])

    @cached_property
    def _last_reads(self) -> tuple[dict[int, int], ...]:
        return tuple(row.last_reads() for row in self.rows)

    def _checked(self, step: int) -> None:
        if not 0 <= step < self.steps:
            raise ValueError(f"step {step} is outside this schedule of {self.steps} steps (0 to {self.steps - 1})")


def _check_row(row: Row, steps: int) -> None:
    if len(row.cells) != steps:
        raise ValueError(f"site '{row.site}' has {len(row.cells)} cells but the schedule has {steps} steps")
    for step, cell in enumerate(row.cells):
        if isinstance(cell, Action):
            continue
        if not isinstance(cell, Forecast):
            raise ValueError(f"site '{row.site}' has {cell!r} at step {step}; expected COMPUTE, SKIP or a Forecast")
        if not any(earlier is COMPUTE for earlier in row.cells[:step]):
            raise ValueError(f"site '{row.site}' forecasts step {step}, but nothing is cached yet; compute it earlier")
        for read in cell.steps:
            if not 0 <= read < step:
                raise ValueError(
                    f"site '{row.site}' at step {step} reads step {read}; a forecast may read only earlier steps"
                )
            if row.cells[read] is not COMPUTE:
                raise ValueError(
                    f"site '{row.site}' at step {step} reads step {read}, where it is not computed; "
                    f"it is computed at {[t for t, c in enumerate(row.cells[:step]) if c is COMPUTE]}"
                )


def _check_column(rows: tuple[Row, ...], step: int) -> None:
    skipped = [row.site for row in rows if row.cells[step] is SKIP]
    if skipped and not any(isinstance(row.cells[step], Forecast) for row in rows):
        raise ValueError(
            f"sites {skipped} are skipped at step {step}, but no site is forecast there that could contain them; "
            "compute them, or forecast the site around them"
        )


def _character(cell: Cell) -> str:
    if isinstance(cell, Action):
        return cell.value
    return "r" if cell.is_reuse else "f"


def _cell_to_json(cell: Cell) -> str | dict[str, list[int] | list[float]]:
    if isinstance(cell, Action):
        return cell.value
    return {"steps": list(cell.steps), "weights": list(cell.weights)}


def _cell_from_json(cell: Any) -> Cell:
    if isinstance(cell, str):
        return Action(cell)
    return Forecast(tuple(int(step) for step in cell["steps"]), tuple(float(weight) for weight in cell["weights"]))


def _read_document(text: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"this is no schedule file: it is not JSON ({error}); expected the output of to_json()"
        ) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"this is JSON but no schedule file: it lacks 'format': '{FORMAT}'")
    version = document.get("version")
    if not isinstance(version, int) or version < 1:
        raise ValueError(f"this schedule file has no usable version number (got {version!r}, expected 1 to {VERSION})")
    if version > VERSION:
        raise ValueError(
            f"this schedule file has version {version}, this diffcache reads up to {VERSION}; upgrade diffcache"
        )
    return document
