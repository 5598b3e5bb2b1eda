"""What a schedule comes to at run time: one stream's gates, what they decided, and which steps were computed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from diffcache.cells import COMPUTE, Action, Cell, Forecast, Forecasting, Online, Partial, Selected, character
from diffcache.forecasting import check_rules, forecast
from diffcache.gates import Gate, Moment, make_gate
from diffcache.gates.base import Numbers
from diffcache.host_reads import HostRead
from diffcache.predictors import FROM_VALUES
from diffcache.probe_history import ProbeHistory
from diffcache.programs import History
from diffcache.schedule import Schedule
from diffcache.token_choice import TokenChoice
from diffcache.token_programs import TokenRegions

BEFORE = ("", "latent")  # probes that are known before anything runs


class Deciding:
    """The decisions of one stream. A step goes ``begin``, ``show`` for every probe, ``cells``, ``finish``.

    ``log`` holds the printed column of every step that was finished.
    """

    def __init__(self, schedule: Schedule):
        self.schedule = schedule
        self.gates: list[Gate] = [make_gate(spec.name, **spec.options) for spec in schedule.gates]
        self.gate_of = [None if row.gate is None else schedule.gates.index(row.gate) for row in schedule.rows]
        self.rows_of = [[r for r, g in enumerate(self.gate_of) if g == group] for group in range(len(self.gates))]
        self.made: list[list[int]] = [[] for _ in schedule.rows]  # computed steps of each row, newest first
        self.probes = ProbeHistory(schedule)
        self.tokens = TokenChoice(schedule)
        self.log: list[str] = []
        self.step = 0
        self._follows: dict[int, bool] = {}
        self._last: dict[int, int] = {}  # gate -> its last computed step
        self._coming: dict[int, HostRead] = {}
        self._before: tuple[list[Gate], dict[int, HostRead]] | None = None

    def begin(self, step: int, latent: Any) -> None:
        """A step begins; gates that need nothing of the graph decide."""
        self._before = (list(map(copy.copy, self.gates)), dict(self._coming))
        self.step, self._follows = step, {}
        self.probes.begin(latent.device if isinstance(latent, Tensor) else None)
        self.tokens.begin(latent)
        self.show("", None)
        looked_at = "latent" in self.probes.rows or any(gate.probe == "latent" for gate in self.gates)
        # it is kept beyond this call, and samplers write into it
        self.show("latent", latent.detach().clone() if looked_at and isinstance(latent, Tensor) else None)

    def show(self, name: str, probe: Any) -> None:
        """A probe's value: the gates that look at it decide, and rules may make weights from it."""
        for number, gate in enumerate(self.gates):
            if gate.probe == name:
                self.decide(number, probe)
        if isinstance(probe, Tensor):
            self.probes.show(name, probe)

    def undo(self) -> None:
        """The step has to start again: gates are as they were before it."""
        if self._before is not None:
            self.gates, self._coming = self._before

    def decide(self, number: int, probe: Any) -> None:
        """One gate sees its probe and decides for its rows."""
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

    def cells(self, rows: Sequence[int], history: History, regions: TokenRegions) -> dict[int, Cell]:
        """What these rows do at this step, now that their gates have decided."""
        return {row: self._settled(row, history, regions) for row in rows}

    def finish(self, column: Sequence[Cell], seen: dict[int, list[Tensor]]) -> None:
        """The step ran with this column; ``seen`` is what the gates watch, by gate."""
        for row, cell in enumerate(column):
            if cell is COMPUTE or isinstance(cell, Selected):
                self.made[row].insert(0, self.step)
        for number, gate in enumerate(self.gates):
            computed = not any(isinstance(column[row], Forecasting) for row in self.rows_of[number])
            moment = self._moment(number)
            numbers = gate.see(seen[number], moment, computed) if seen.get(number) else None
            if numbers is not None:
                self._coming[number] = HostRead(numbers)
            gate.done(moment, computed)
            if computed:
                self._last[number] = self.step
        self.probes.finish(self.step, column, self.made)
        self.tokens.finish(self.step, column)
        self.log.append("".join(map(character, column)))
        self._before = None

    def _moment(self, number: int) -> Moment:
        last = self._last.get(number, self.step)
        return Moment(self.step, self.schedule.steps, self.step - last, self.schedule.clock)

    def _possible(self, row: int) -> bool:
        cell = self.schedule.rows[row].cells[self.step]
        if isinstance(cell, Partial):
            return self.tokens.possible(row, cell, self.made)
        return not isinstance(cell, Action) and (isinstance(cell, Forecast) or bool(self.made[row]))

    def _settled(self, row: int, history: History, regions: TokenRegions) -> Cell:
        cell, gate = self.schedule.rows[row].cells[self.step], self.gate_of[row]
        if isinstance(cell, Action):
            return cell
        if not self._possible(row) or (gate is not None and not self._follows[gate]):
            return COMPUTE
        if isinstance(cell, Partial):
            return self.tokens.select(row, cell, self.made, self.step, history, regions)
        assert isinstance(cell, Online | Forecast)
        if isinstance(cell, Online) and cell.predictor in FROM_VALUES:
            return self.probes.given(row, cell, self.made[row], self.step, history)
        if isinstance(cell, Online):
            cell = forecast(cell, self.made[row], self.step, self.schedule.clock)
        self.probes.basis(row, cell, history)
        return cell


def looked_at(schedule: Schedule) -> dict[str, set[str]]:
    """For each site of a schedule the probes of the graph that its gate and its rules look at.

    Raises:
        ValueError: a gate or a rule is unknown, or not fit to be used so.
    """
    found: dict[str, set[str]] = {}
    for row in schedule.rows:
        check_rules(row)
        gate = () if row.gate is None else (make_gate(row.gate.name, **row.gate.options).probe,)
        found[row.site] = {*gate, *row.probes} - set(BEFORE)
    return found


def _numbers(found: Tensor) -> Numbers:
    return found.double().reshape(len(found), -1).numpy()
