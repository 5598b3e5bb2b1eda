"""What forecasts look at beside history: probes of this step and of the computed ones, and bases of subspaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffcache import predictors
from diffcache.cells import COMPUTE, Cell, Forecast, Given, Online, Selected
from diffcache.forecasting import times
from diffcache.memory import in_full
from diffcache.ops import difference_form, extrapolate
from diffcache.predictors.from_values import constant
from diffcache.programs import BASIS, History
from diffcache.schedule import Schedule


class ProbeHistory:
    """The probes of one stream. A value is kept for as long as what a row computed at the same step."""

    def __init__(self, schedule: Schedule):
        self.schedule = schedule
        self.rows = {
            probe: [number for number, row in enumerate(schedule.rows) if probe in row.probes]
            for probe in dict.fromkeys(probe for row in schedule.rows for probe in row.probes)
        }
        self.kept: dict[str, dict[int, Tensor]] = {probe: {} for probe in self.rows}
        self._now: dict[str, Tensor] = {}
        self._device: torch.device | None = None

    def begin(self, device: torch.device | None) -> None:
        """A step begins, on a device if that is known."""
        self._now, self._device = {}, device

    def show(self, name: str, value: Tensor) -> None:
        """A probe's value at this step: memory that nobody writes into."""
        if name in self.rows:
            self._now[name] = value

    def finish(self, step: int, column: Sequence[Cell], made: Sequence[Sequence[int]]) -> None:
        """The step ran: keep its probes where a row was computed, forget those that no forecast reads any more."""
        for name, rows in self.rows.items():
            if any(column[row] is COMPUTE or isinstance(column[row], Selected) for row in rows) and name in self._now:
                self.kept[name][step] = self._now[name]
            waiting = [row for row in rows if self.schedule.rows[row].last_online > step]
            wanted = {at for row in waiting for at in made[row][: self.schedule.rows[row].keeps]}
            self.kept[name] = {at: value for at, value in self.kept[name].items() if at in wanted}
        self._now = {}

    def basis(self, row: int, cell: Forecast, history: History) -> None:
        """Add to history what the view of a forecast projects on, unless this generation has found it already.

        It is found from the newest value that the forecast reads, for each sample.
        """
        measure = None if cell.view is None else predictors.MEASURES.get(cell.view.projection)
        if cell.view is None or measure is None:
            return
        parts = [part for number, part, known in history if (number, known) == (row, cell.steps[0])]
        for part in parts:
            if (row, part, BASIS) not in history:
                value = in_full(history[row, part, cell.steps[0]])
                history[row, part, BASIS] = measure(value.to(self._device or value.device), **cell.view.options)

    def value(self, row: int, cell: Forecast | Given, history: History) -> Tensor:
        """What a forecast gives for the first value of a row, less its anchor where it is kept so."""
        if isinstance(cell, Given):
            return extrapolate(None, *cell.made[0])
        values = [in_full(history[row, 0, step]) for step in cell.steps]
        values = [value.to(self._device or value.device, non_blocking=True) for value in values]
        wide = torch.float64 if values[0].dtype == torch.float64 else torch.float32
        return extrapolate(None, values, constant(difference_form(cell.weights), wide, values[0].device))

    def given(self, row: int, cell: Online, made: Sequence[int], step: int, history: History) -> Given:
        """The forecast of a row from the values of its newest computed steps ``made``, and from the probe now.

        Raises:
            ValueError: the rule wants what there is not: a probe, the sampler's times, other shapes.
        """
        steps = list(made[: min(cell.history, predictors.FROM_VALUES[cell.predictor].newest)])
        at, target = times(cell, steps, step, self.schedule.clock)
        probes: dict[str, Any] = {}
        if cell.probe:
            if cell.probe not in self._now:
                raise ValueError(
                    f"predictor '{cell.predictor}' of site '{self.schedule.rows[row].site}' looks at '{cell.probe}', "
                    "which this call does not show; give it another probe"
                )
            now, before = self._now[cell.probe], self.kept[cell.probe]
            probes = {"probe_now": now, "probe_history": [before[known] for known in steps]}
        parts = sorted(part for number, part, known in history if (number, known) == (row, steps[0]))
        found = []
        for part in parts:
            values = [in_full(history[row, part, known]) for known in steps]
            # what was offloaded comes back
            values = [value.to(self._device or value.device, non_blocking=True) for value in values]
            tensors, table = predictors.weights_from_values(
                cell.predictor, values, at, target, **probes, **cell.options
            )
            found.append(([tensor.to(values[0].dtype) for tensor in tensors], table))
        assert found, f"row {row} is forecast from step {steps[0]}, of which nothing is kept"
        return Given(len(found[0][0]), tuple(found))
