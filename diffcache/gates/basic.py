"""Gates without a paper: what others are made of and compared with."""

from __future__ import annotations

import numpy as np

from diffcache.gates.base import Decision, Gate, Moment, Numbers, gate


@gate("always")
class Always(Gate):
    """Follow the schedule at every step."""

    probe = ""

    def follow(self, moment: Moment, numbers: Numbers) -> Decision:
        return np.full(max(len(numbers), 1), True)


@gate("accumulated_change")
class AccumulatedChange(Gate):
    """Follow while the probe's relative L1 changes, added up since the last computed step, stay below a budget.

    Compared as ``total < budget``, so that a budget of zero never forecasts and a NaN always computes.
    """

    total: Numbers = np.zeros(1)

    def __init__(self, *, budget: float, max_since: int = 8, probe: str = "latent"):
        if not budget >= 0:
            raise ValueError(f"gate 'accumulated_change' needs budget >= 0 (a relative L1 change), got {budget}")
        self.budget, self.max_since, self.probe = budget, max_since, probe

    def follow(self, moment: Moment, numbers: Numbers) -> Decision:
        self.total = self.total + numbers.sum(axis=1)
        return (self.total < self.budget) & np.full(len(numbers), moment.since <= self.max_since)

    def done(self, moment: Moment, computed: bool) -> None:
        super().done(moment, computed)
        if computed:
            self.total = np.zeros(1)


@gate("max_gap")
class MaxGap(Gate):
    """Forecast at most ``limit`` steps in a row."""

    probe = ""

    def __init__(self, *, limit: int):
        if limit < 0:
            raise ValueError(f"gate 'max_gap' needs limit >= 0 steps, got {limit}")
        self.limit = limit

    def follow(self, moment: Moment, numbers: Numbers) -> Decision:
        return np.full(max(len(numbers), 1), moment.since <= self.limit)
