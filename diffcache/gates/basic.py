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
