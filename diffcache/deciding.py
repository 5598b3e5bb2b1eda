"""What a schedule comes to at run time: one stream's gates, what they decided, and which steps were computed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from diffcache import predictors
from diffcache.cells import COMPUTE, Action, Cell, Forecast, Online, character
from diffcache.forecasting import forecast
from diffcache.gates import Gate, Moment, make_gate
from diffcache.gates.base import Numbers
from diffcache.host_reads import HostRead
from diffcache.schedule import Schedule

BEFORE = ("", "latent")  # probes that are known before anything runs


class Deciding:
    """The decisions of one stream. A step goes ``begin``, ``decide`` for every gate, ``cells``, ``finish``.

    ``log`` holds the printed column of every step that was finished.
    """

    def __init__(self, schedule: Schedule):
        self.schedule = schedule
        self.gates: list[Gate] = [make_gate(spec.name, **spec.options) for spec in schedule.gates]
        self.gate_of = [None if row.gate is None else schedule.gates.index(row.gate) for row in schedule.rows]
        self.rows_of = [[r for r, g in enumerate(self.gate_of) if g == group] for group in range(len(self.gates))]
        self.made: list[list[int]] = [[] for _ in schedule.rows]  # computed steps of each row, newest first
        self.log: list[str] = []
        self.step = 0
        self._follows: dict[int, bool] = {}
        self._last: dict[int, int] = {}  # gate -> its last computed step
        self._coming: dict[int, HostRead] = {}
        self._before: tuple[list[Gate], dict[int, HostRead]] | None = None
        self._given: tuple[Cell, ...] | None = None
        self.column: tuple[Cell, ...] = ()  # of the step that was finished last

    def follow(self, column: Sequence[Cell] | None) -> None:
        """The step that begins next does what another branch decided, where this one has the history for it."""
        self._given = None if column is None else tuple(column)

    def begin(self, step: int, latent: Any) -> None:
        """A step begins; gates that need nothing of the graph decide."""
        self._before = (list(map(copy.copy, self.gates)), dict(self._coming))
        self.step, self._follows = step, {}
        for number, gate in enumerate(self.gates):
            if gate.probe in BEFORE and self._given is None:
                self.decide(number, latent if gate.probe else None)

    def undo(self) -> None:
        """The step has to start again: gates are as they were before it."""
        if self._before is not None:
            self.gates, self._coming = self._before

    def decide(self, number: int, probe: Any) -> None:
        """One gate sees its probe and decides for its rows."""
        if self._given is not None:
            return
        gate, moment = self.gates[number], self._moment(number)
        coming = self._coming.pop(number, None)
        if coming is not None:
            gate.learn(_numbers(coming.get()))
        found = gate.look(probe, moment) if isinstance(probe, Tensor) else None
        possible = any(self._possible(row) for row in self.rows_of[number])
        if not possible or (gate.probe and found is None):
            self._follows[number] = False
            return
        numbers = np.zeros((1, 0)) if found is None else _numbers(HostRead(found).get())
        self._follows[number] = bool(np.all(gate.follow(moment, numbers)))

    def cells(self, rows: Sequence[int]) -> dict[int, Cell]:
        """What these rows do at this step, now that their gates have decided."""
        return {row: self._settled(row) for row in rows}

    def finish(self, column: Sequence[Cell], seen: dict[int, list[Tensor]]) -> None:
        """The step ran with this column; ``seen`` is what the gates watch, by gate."""
        for row, cell in enumerate(column):
            if cell is COMPUTE:
                self.made[row].insert(0, self.step)
        for number, gate in enumerate(self.gates if self._given is None else ()):
            computed = not any(isinstance(column[row], Forecast) for row in self.rows_of[number])
            moment = self._moment(number)
            numbers = gate.see(seen[number], moment) if seen.get(number) else None
            if numbers is not None:
                self._coming[number] = HostRead(numbers)
            gate.done(moment, computed)
            if computed:
                self._last[number] = self.step
        self.log.append("".join(map(character, column)))
        self.column, self._given, self._before = tuple(column), None, None

    def adopt(self, other: Deciding) -> None:
        """Computed steps of another stream whose history this one has taken over."""
        self.made = [sorted({*a, *b}, reverse=True) for a, b in zip(self.made, other.made, strict=True)]
        for number, last in other._last.items():
            self._last[number] = max(last, self._last.get(number, last))

    def online(self, row: int) -> Online | None:
        """The rule of a row whose weights are made from values, where this step forecasts it so."""
        cell = self.schedule.rows[row].cells[self.step]
        return cell if isinstance(cell, Online) and cell.predictor in predictors.FROM_VALUES else None

    def _moment(self, number: int) -> Moment:
        last = self._last.get(number, self.step)
        return Moment(self.step, self.schedule.steps, self.step - last, self.schedule.clock)

    def _possible(self, row: int) -> bool:
        cell = self.schedule.rows[row].cells[self.step]
        if isinstance(cell, Forecast):  # of a branch that was left out there is nothing to read
            return set(cell.steps) <= set(self.made[row])
        return isinstance(cell, Online) and bool(self.made[row])

    def _settled(self, row: int) -> Cell:
        cell, gate = self.schedule.rows[row].cells[self.step], self.gate_of[row]
        if self._given is not None:
            given = self._given[row]
            return given if isinstance(given, Action) or set(given.steps) <= set(self.made[row]) else COMPUTE  # type: ignore[union-attr]
        if isinstance(cell, Action):
            return cell
        if not self._possible(row) or (gate is not None and not self._follows[gate]):
            return COMPUTE
        return cell if isinstance(cell, Forecast) else forecast(cell, self.made[row], self.step, self.schedule.clock)


def _numbers(found: Tensor) -> Numbers:
    return found.double().reshape(len(found), -1).numpy()
