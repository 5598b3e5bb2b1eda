"""What a schedule comes to at run time: one stream's gates, what they decided, and which steps were computed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from diffcache.cells import (
    COMPUTE,
    SKIP,
    Action,
    Cell,
    Forecast,
    Forecasting,
    Given,
    Online,
    Partial,
    Selected,
    character,
)
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
    """The decisions of one stream. A step goes ``begin``, then ``columns`` and ``show`` for each segment, ``finish``.

    ``log`` holds the printed column of every step that was finished.
    """

    def __init__(self, schedule: Schedule):
        self.schedule = schedule
        self.gates: list[Gate] = [make_gate(spec.name, **spec.options) for spec in schedule.gates]
        self.gate_of = [None if row.gate is None else schedule.gates.index(row.gate) for row in schedule.rows]
        self.rows_of = [[r for r, g in enumerate(self.gate_of) if g == group] for group in range(len(self.gates))]
        self.made: list[list[int]] = [[] for _ in schedule.rows]  # computed steps of each row, newest first
        self.checks = {number: row for number, (row, _) in checks_of(schedule).items()}  # gate -> the row it checks
        self.probes = ProbeHistory(schedule)
        self.tokens = TokenChoice(schedule)
        self.log: list[str] = []
        self.step = 0
        self._follows: dict[int, bool] = {}
        self._fixed: dict[int, Cell] = {}  # rows of a forecast that was checked and accepted
        self._checking: tuple[int, Tensor] | None = None  # the gate, and what was forecast of its probe
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
        self.step, self._follows, self._fixed, self._checking = step, {}, {}, None
        self.probes.begin(latent.device if isinstance(latent, Tensor) else None)
        self.tokens.begin(latent)
        if self._given is not None:  # another branch has decided
            self._follows = dict.fromkeys(self.checks, False)
        for number in self.checks if self._given is None else ():
            foregone = self.gates[number].foregone(self._moment(number))
            if not all(self._possible(row) for row in self.rows_of[number]):
                foregone = False
            if foregone is not None:
                self._follows[number] = foregone
        self.show({"": None})
        looked_at = "latent" in self.probes.rows or any(gate.probe == "latent" for gate in self.gates)
        # it is kept beyond this call, and samplers write into it
        self.show({"latent": latent.detach().clone() if looked_at and isinstance(latent, Tensor) else None})

    def columns(
        self, column: list[Cell], rows: Sequence[int], history: History, regions: TokenRegions
    ) -> Iterator[bool]:
        """Settle the cells of a segment's ``rows``, in ``column``; the segment runs each time that this yields.

        True comes with a forecast that is to be checked: its probes are then shown, and if it is refused the segment
        runs again, with all its rows as they are without the forecast.
        """
        number = next((n for n, check in self.checks.items() if check in rows and n not in self._follows), None)
        if number is not None:
            check = self.checks[number]
            trial: dict[int, Cell] = dict.fromkeys(rows, SKIP)
            self._checking = (number, self.probes.value(check, self._as_forecast(check, history), history))
            trial |= {row: self._as_forecast(row, history) for row in self.rows_of[number] if row != check}
            for row, cell in trial.items():
                column[row] = cell
            yield True
            self._checking = None
            if self._follows[number]:
                self._fixed |= trial  # what is left of the rows in later segments is not computed either
                return
        for row in rows:
            column[row] = self._settled(row, history, regions)
        yield False

    def show(self, probes: Mapping[str, Any]) -> None:
        """Values of probes: the gates that look at them decide, and rules may make weights from them.

        After a forecast that is to be checked the check comes first: what nobody accepts is shown to no other gate.
        """
        if self._checking is not None:
            number, expected = self._checking
            gate, moment = self.gates[number], self._moment(number)
            numbers = _numbers(HostRead(gate.check(probes[gate.probe], expected, moment)).get())
            self._follows[number] = bool(np.all(gate.follow(moment, numbers)))
            if not self._follows[number]:
                return
        for name, probe in probes.items():
            for number, gate in enumerate(self.gates):
                if gate.probe == name and number not in self.checks and self._given is None:
                    self.decide(number, probe)
            if isinstance(probe, Tensor):
                self.probes.show(name, probe)

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

    def finish(self, column: Sequence[Cell], seen: dict[int, list[Tensor]]) -> None:
        """The step ran with this column; ``seen`` is what the gates watch, by gate."""
        for row, cell in enumerate(column):
            if cell is COMPUTE or isinstance(cell, Selected):
                self.made[row].insert(0, self.step)
        for number, gate in enumerate(self.gates if self._given is None else ()):
            computed = not any(
                isinstance(column[row], Forecasting) or row in self._fixed for row in self.rows_of[number]
            )
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
        self.column, self._given, self._before = tuple(column), None, None

    def adopt(self, other: Deciding) -> None:
        """Computed steps of another stream whose history this one has taken over."""
        self.made = [sorted({*a, *b}, reverse=True) for a, b in zip(self.made, other.made, strict=True)]
        self.tokens.adopt(other.tokens)
        for number, last in other._last.items():
            self._last[number] = max(last, self._last.get(number, last))

    def _moment(self, number: int) -> Moment:
        last = self._last.get(number, self.step)
        return Moment(self.step, self.schedule.steps, self.step - last, self.schedule.clock)

    def _possible(self, row: int) -> bool:
        cell = self.schedule.rows[row].cells[self.step]
        if isinstance(cell, Partial):
            return self.tokens.possible(row, cell, self.made)
        if isinstance(cell, Forecast):  # of a branch that was left out there is nothing to read
            return set(cell.steps) <= set(self.made[row])
        return isinstance(cell, Online) and bool(self.made[row])

    def _settled(self, row: int, history: History, regions: TokenRegions) -> Cell:
        cell, gate = self.schedule.rows[row].cells[self.step], self.gate_of[row]
        if self._given is not None:
            return self._adopted(row, self._given[row], history, regions)
        if row in self._fixed or isinstance(cell, Action):
            return self._fixed.get(row, cell)
        if not self._possible(row) or (gate is not None and not self._follows[gate]):
            return COMPUTE
        if isinstance(cell, Partial):
            return self.tokens.select(row, cell, self.made, self.step, history, regions)
        return self._as_forecast(row, history)

    def _adopted(self, row: int, given: Cell, history: History, regions: TokenRegions) -> Cell:
        """A cell that another branch decided on, where this one has the history; weights and tokens are its own."""
        if isinstance(given, Action):
            return given
        if isinstance(given, Forecast):
            return given if set(given.steps) <= set(self.made[row]) else COMPUTE
        cell = self.schedule.rows[row].cells[self.step]
        if not self._possible(row):
            return COMPUTE
        if isinstance(cell, Partial):
            return self.tokens.select(row, cell, self.made, self.step, history, regions)
        return self._as_forecast(row, history)

    def _as_forecast(self, row: int, history: History) -> Forecast | Given:
        """What a row that may be forecast comes to if it is."""
        cell = self.schedule.rows[row].cells[self.step]
        assert isinstance(cell, Online | Forecast)
        if isinstance(cell, Online) and cell.predictor in FROM_VALUES:
            return self.probes.given(row, cell, self.made[row], self.step, history)
        if isinstance(cell, Online):
            cell = forecast(cell, self.made[row], self.step, self.schedule.clock, self.tokens.partial[row])
        self.probes.basis(row, cell, history)
        return cell


def looked_at(schedule: Schedule) -> dict[str, set[str]]:
    """For each site of a schedule the probes of the graph that its gate and its rules look at before it is computed.

    Raises:
        ValueError: a gate or a rule is unknown, or not fit to be used so.
    """
    found: dict[str, set[str]] = {}
    for row in schedule.rows:
        check_rules(row)
        gate = None if row.gate is None else make_gate(row.gate.name, **row.gate.options)
        first = () if gate is None or gate.checks else (gate.probe,)
        found[row.site] = {*first, *row.probes} - set(BEFORE)
    return found


def checks_of(schedule: Schedule) -> dict[int, tuple[int, list[int]]]:
    """For each gate that checks forecasts: the row whose site is computed on them, and the rows that are forecast.

    Raises:
        ValueError: the site has no row with this gate, or no other row has it, or a view forecasts it.
    """
    found = {}
    for number, spec in enumerate(schedule.gates):
        gate = make_gate(spec.name, **spec.options)
        if not gate.checks:
            continue
        rows = {row.site: place for place, row in enumerate(schedule.rows) if row.gate == spec}
        check = rows.pop(gate.probe, None)
        if check is None or not rows:
            raise ValueError(
                f"gate '{spec.name}' checks '{gate.probe}' on forecasts of {sorted(rows)}: give this gate to a row of "
                "that site, and to rows of what is forecast before it"
            )
        if any(isinstance(cell, Online | Forecast) and cell.view for cell in schedule.rows[check].cells):
            raise ValueError(f"'{gate.probe}' is compared as a whole by gate '{spec.name}': forecast it without a view")
        if any(isinstance(cell, Partial) for row in schedule.rows if row.gate == spec for cell in row.cells):
            raise ValueError(f"gate '{spec.name}' checks forecasts of whole values: select tokens without it")
        found[number] = (check, list(rows.values()))
    return found


def _numbers(found: Tensor) -> Numbers:
    return found.double().reshape(len(found), -1).numpy()
