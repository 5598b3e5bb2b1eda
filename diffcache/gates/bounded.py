"""Gates that let a step pass while one number of it stays within a bound."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diffcache.gates.accumulating import checked
from diffcache.gates.base import Decision, Gate, Moment, Numbers, gate


@gate("change")
class Change(Gate):
    """FBCache (2024) and DBCache (2025): relative L1 change of the probe since the last computed step.

    On the residual of the first block or blocks; DBPrune uses it on the input of every block. ``max_since`` bounds the
    forecasts in a row and ``max_forecasts`` those of a generation. Once the changes that were compared, followed or
    not, have added up to ``max_total``, nothing is forecast any more: cache-dit never sets that sum back. Limits come
    first: a step that they forbid adds nothing.
    """

    against = "computed"
    total: Numbers = np.zeros(1)
    forecasts: int = 0

    def __init__(
        self,
        *,
        threshold: float,
        probe: str = "first_block",
        max_since: int = 0,
        max_forecasts: int = 0,
        max_total: float = 0.0,
    ):
        self.threshold, self.probe = checked("change", threshold), probe
        self.max_since, self.max_forecasts, self.max_total = max_since, max_forecasts, max_total

    def follow(self, moment: Moment, numbers: Numbers) -> Decision:
        change = numbers[:, 0]
        allowed = np.full(len(change), not self.max_total) | (self.total < self.max_total)
        if self.max_since and moment.since > self.max_since:
            allowed = np.full(len(change), False)
        if self.max_forecasts and self.forecasts >= self.max_forecasts:
            allowed = np.full(len(change), False)
        self.total = self.total + np.where(allowed, change, 0.0)
        return (change < self.threshold) & allowed

    def done(self, moment: Moment, computed: bool) -> None:
        super().done(moment, computed)
        self.forecasts += not computed


@gate("sensitivity")
class Sensitivity(Gate):
    """SenCache (2026): ``a(t) |x_s - x_0|_2 + b(t) |t_s - t_0| <= limit``, x_0 and t_0 of the last computed step.

    ``by_latent`` and ``by_time`` hold a and b for every step, ``limits`` the bound for every step: all are measured or
    resampled in calibration.
    """

    against = "computed"
    last: int = 0

    def __init__(
        self, *, by_latent: Sequence[float], by_time: Sequence[float], limits: Sequence[float], max_since: int = 3
    ):
        self.by_latent, self.by_time, self.limits = tuple(by_latent), tuple(by_time), tuple(limits)
        self.max_since = max_since

    def measure(self, new: Tensor, old: Tensor, moment: Moment) -> Tensor:
        return (new - old).reshape(len(new), -1).float().norm(dim=1)

    def follow(self, moment: Moment, numbers: Numbers) -> Decision:
        step = moment.step
        times = moment.clock or tuple(1.0 - s / moment.steps for s in range(moment.steps))
        passed = abs(times[step] - times[step - moment.since])
        score = self.by_latent[step] * numbers[:, 0] + self.by_time[step] * passed
        return (score <= self.limits[step]) & np.full(len(score), moment.since <= self.max_since)


@gate("third_difference")
class ThirdDifference(Gate):
    """AdaptiveDiffusion (2024): follow while the latent moves evenly.

    With ``d_s = |z_s - z_{s-1}|_2``: ``|(d_s + d_{s-2}) / 2 - d_{s-1}| <= theta d_{s-1}``.
    """

    _distances: tuple[Tensor, ...] = ()

    def __init__(self, *, theta: float = 0.01, max_since: int = 4):
        self.theta, self.max_since = checked("third_difference", theta), max_since

    def measure(self, new: Tensor, old: Tensor, moment: Moment) -> Tensor:
        distance = (new - old).reshape(len(new), -1).float().norm(dim=1)
        self._distances = (distance, *self._distances)[:3]
        return torch.stack(self._distances, dim=1)

    def follow(self, moment: Moment, numbers: Numbers) -> Decision:
        if numbers.shape[1] < 3:
            return np.full(len(numbers), False)
        newest, before, older = numbers.T
        even = abs((newest + older) / 2 - before) <= before * self.theta
        return even & np.full(len(even), moment.since <= self.max_since)


@gate("linear")
class Linear(Gate):
    """LazyDiT (2024): ``sigmoid(mean over tokens of w z + bias) > 1/2``, z a module's input, w fitted to it.

    At most ``max_since`` forecasts in a row; 0 for no limit.
    """

    def __init__(self, *, weights: Sequence[float], bias: float, probe: str, max_since: int = 0):
        self.weights, self.bias, self.probe, self.max_since = tuple(weights), bias, probe, max_since
        self._row: Tensor | None = None

    def look(self, new: Tensor, moment: Moment) -> Tensor | None:
        if self._row is None or self._row.device != new.device:
            self._row = torch.tensor(self.weights, device=new.device)
        return new.float().reshape(len(new), -1, new.shape[-1]).mean(1) @ self._row + self.bias

    def follow(self, moment: Moment, numbers: Numbers) -> Decision:
        return (numbers[:, 0] > 0) & (not self.max_since or moment.since <= self.max_since)

    def done(self, moment: Moment, computed: bool) -> None:
        """Nothing of an earlier step counts."""


@gate("chi_square")
class ChiSquare(Gate):
    """FastCache (2025): the squared relative change of the probe is below a quantile of chi-square over its degrees.

    ``chi^2_{n, confidence} / n`` for n numbers of a sample is ``1 + z sqrt(2 / n)``; ``scale`` is the variance that
    counts as no change.
    """

    def __init__(self, *, scale: float = 0.01, quantile: float = 1.645, probe: str = "stack_input"):
        self.scale, self.quantile, self.probe = checked("chi_square", scale), quantile, probe
        self._count = 1

    def measure(self, new: Tensor, old: Tensor, moment: Moment) -> Tensor:
        flat, before = new.reshape(len(new), -1).float(), old.reshape(len(old), -1).float()
        self._count = flat.shape[1]
        return (flat - before).square().sum(1) / before.square().sum(1).clamp_min(1e-12)

    def follow(self, moment: Moment, numbers: Numbers) -> Decision:
        return numbers[:, 0] <= self.scale * (1 + self.quantile * (2 / self._count) ** 0.5)
