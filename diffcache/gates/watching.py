"""Gates that watch what their rows compute, and decide about the next steps from how much it changed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diffcache.direct import direct
from diffcache.gates.accumulating import checked
from diffcache.gates.base import Decision, Gate, Moment, Numbers, gate
from diffcache.ops import relative_change


class Watching(Gate):
    """Keeps what its rows computed last; the next computed step gives a number for each, ``[samples, rows]``."""

    probe = ""
    watch = "rows"
    _values: tuple[Tensor, ...] = ()
    _at: int = -1
    _gap: int = 1

    def see(self, values: Sequence[Tensor], moment: Moment, computed: bool) -> Tensor | None:
        if not computed:
            return None
        before, self._values = self._values, tuple(values)
        self._gap, self._at = moment.step - self._at if self._at >= 0 else 1, moment.step
        if len(before) != len(values):
            return None
        numbers = [self.compare(new, old) for new, old in zip(values, before, strict=True)]
        return torch.stack(numbers, dim=1)

    def compare(self, new: Tensor, old: Tensor) -> Tensor:
        """A number for each sample from a row's value and the one computed before."""
        return direct(relative_change)(new, old)


@gate("codebook")
class Codebook(Watching):
    """AdaCache (2024): the change of a reference module per step looks up how long its modules are kept.

    ``c = |R_s - R_p|_1 / |R_p|_1 / (s - p)``, averaged over the gate's rows; ``limits`` and ``intervals`` are read as
    "while c is below ``limits[i]`` compute every ``intervals[i]``-th step", and ``otherwise``. The published codebooks
    are for 30 and 100 steps; motion regularisation (MoReg) is left out.
    """

    change: Numbers | None = None

    def __init__(self, *, limits: Sequence[float], intervals: Sequence[int], otherwise: int = 1):
        if len(limits) != len(intervals):
            raise ValueError(f"codebook has {len(limits)} limits and {len(intervals)} intervals; give one for each")
        self.limits, self.intervals, self.otherwise = tuple(limits), tuple(intervals), otherwise

    def learn(self, numbers: Numbers) -> None:
        self.change = numbers.mean(axis=1) / self._gap

    def follow(self, moment: Moment, numbers: Numbers) -> Decision:
        if self.change is None:
            return np.array([False])
        place = np.searchsorted(self.limits, self.change, side="right")
        intervals = np.array([*self.intervals, self.otherwise])[place]
        return moment.since < intervals


@gate("drift")
class Drift(Watching):
    """Foresight (2025): a block is reused while its drift stays below a share of what it was in the warm-up.

    ``lambda = sum over the last three warm-up steps of 10^-(W-s) mse(x_s, x_{s-1})``; at every ``interval``-th step all
    are computed and ``delta = mse(x, kept)``; between them a block is reused while ``delta <= gamma lambda``.
    """

    scale: Numbers | None = None
    drift: Numbers | None = None

    def __init__(self, *, warm_up: int, interval: int = 2, gamma: float = 0.5, block: str = ""):
        self.warm_up, self.interval, self.gamma, self.block = warm_up, interval, checked("drift", gamma), block

    def compare(self, new: Tensor, old: Tensor) -> Tensor:
        return (new.float() - old.float()).square().reshape(len(new), -1).mean(1)

    def learn(self, numbers: Numbers) -> None:
        found = numbers.mean(axis=1)
        if self._at < self.warm_up:
            if self._at >= self.warm_up - 3:
                part = found * 10.0 ** -(self.warm_up - 1 - self._at)
                self.scale = part if self.scale is None else self.scale + part
            self.drift = found
        else:
            self.drift = found

    def follow(self, moment: Moment, numbers: Numbers) -> Decision:
        if self.scale is None or self.drift is None or (moment.step - self.warm_up) % self.interval == 0:
            return np.array([False])
        return self.drift <= self.gamma * self.scale


@gate("block_change")
class BlockChange(Watching):
    """BWCache (2025): when the mean relative L1 change of all blocks is below a threshold, reuse all of them.

    For ``hold`` steps; with ``per_step`` the change is divided by the steps between the two computed ones.
    """

    change: Numbers | None = None

    def __init__(self, *, threshold: float = 0.15, hold: int = 5, per_step: bool = False):
        self.threshold, self.hold, self.per_step = checked("block_change", threshold), hold, per_step

    def learn(self, numbers: Numbers) -> None:
        self.change = numbers.mean(axis=1) / (self._gap if self.per_step else 1)

    def follow(self, moment: Moment, numbers: Numbers) -> Decision:
        if self.change is None:
            return np.array([False])
        return (self.change < self.threshold) & np.full(len(self.change), moment.since <= self.hold)


@gate("accumulated_drift")
class AccumulatedDrift(Watching):
    """ScalingCache (2025): mean relative L1 change of the modules, added up since the last computed step.

    The allowance is the mean of the sums that the first ``warm_up`` steps saw. A forecast step counts with the change
    per step that was measured last, which is that of its straight line.
    """

    total: Numbers = np.zeros(1)
    change: Numbers | None = None
    seen: tuple[Numbers, ...] = ()

    def __init__(self, *, warm_up: int = 14, scale: float = 1.0):
        self.warm_up, self.scale = warm_up, checked("accumulated_drift", scale)

    def learn(self, numbers: Numbers) -> None:
        self.change = numbers.mean(axis=1) / self._gap
        if self._at < self.warm_up:
            self.seen = (*self.seen, self.change)

    def follow(self, moment: Moment, numbers: Numbers) -> Decision:
        if self.change is None or not self.seen:
            return np.array([False])
        self.total = self.total + self.change
        allowance = self.scale * np.cumsum(self.seen, axis=0).mean(axis=0)
        return self.total < allowance

    def done(self, moment: Moment, computed: bool) -> None:
        super().done(moment, computed)
        if computed:
            self.total = np.zeros(1)
