"""Gates that add up a change since the last computed step and compute when the sum reaches a threshold.

All compare as ``sum < threshold``: a threshold of zero never forecasts, and a NaN always computes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diffcache.direct import direct
from diffcache.gates.base import Decision, Gate, Moment, Numbers, gate
from diffcache.ops import relative_change


class Accumulating(Gate):
    """``sum += gain(numbers)`` at every step that may be forecast; follow while ``sum < threshold``."""

    threshold: float
    max_since: int = 0  # most forecasts in a row; 0 for no limit
    total: Numbers = np.zeros(1)

    def gain(self, moment: Moment, numbers: Numbers) -> Numbers:
        """What this step adds, ``[samples]``."""
        return numbers[:, 0]

    def follow(self, moment: Moment, numbers: Numbers) -> Decision:
        self.total = self.total + self.gain(moment, numbers)
        within = not self.max_since or moment.since <= self.max_since
        return (self.total < self.threshold) & np.full(len(numbers), within)

    def done(self, moment: Moment, computed: bool) -> None:
        super().done(moment, computed)
        if computed:
            self.total = np.zeros(1)


def checked(name: str, threshold: float) -> float:
    """Raises ValueError for a threshold that is no number of 0 or more."""
    if not threshold >= 0:
        raise ValueError(f"gate '{name}' needs a threshold of 0 or more, got {threshold}")
    return threshold


@gate("accumulated_change")
class AccumulatedChange(Accumulating):
    """The probe's relative L1 changes from step to step, added up (DiCache 2025 on its probe; TeaCache without fit)."""

    def __init__(self, *, threshold: float, max_since: int = 0, probe: str = "latent"):
        self.threshold, self.max_since, self.probe = checked("accumulated_change", threshold), max_since, probe


@gate("polynomial")
class Polynomial(Accumulating):
    """TeaCache (2024): ``sum += p(d)``, d the relative L1 change of the probe since the step before.

    ``coefficients`` of p come highest power first, as published.
    """

    def __init__(
        self, *, threshold: float, coefficients: Sequence[float], probe: str = "modulated", max_since: int = 0
    ):
        self.threshold, self.probe, self.max_since = checked("polynomial", threshold), probe, max_since
        self.coefficients = tuple(coefficients)

    def gain(self, moment: Moment, numbers: Numbers) -> Numbers:
        return np.asarray(np.polyval(self.coefficients, numbers[:, 0]))


@gate("spectral")
class Spectral(Accumulating):
    """SeaCache (2026): the relative L1 change of the probe after a Wiener filter that follows the noise level.

    ``G_s(f) = a S(f) / (a^2 S(f) + b^2)`` with ``S(f) = f^-power``, ``a = 1 - sigma`` and ``b = sigma`` of the step,
    scaled to a mean of one; the transform runs over the tokens, as a ``grid`` [height, width] where that is given.
    """

    def __init__(
        self,
        *,
        threshold: float,
        probe: str = "modulated",
        power: float = 2.0,
        grid: Sequence[int] = (),
        max_since: int = 0,
    ):
        self.threshold, self.probe, self.max_since = checked("spectral", threshold), probe, max_since
        self.power, self.grid = power, tuple(grid)

    def look(self, new: Tensor, moment: Moment) -> Tensor | None:
        return super().look(self._filtered(new, moment), moment)

    def _filtered(self, value: Tensor, moment: Moment) -> Tensor:
        """A value [samples, tokens, channels] filtered over its tokens, a picture over all but its channels."""
        wide = value.float()
        tokens_last = wide.movedim(1, -1) if wide.ndim == 3 else wide
        if self.grid and tokens_last.ndim == 3:
            tokens_last = tokens_last.unflatten(-1, self.grid)
        axes = tuple(range(2, tokens_last.ndim))
        spectrum = torch.fft.fftn(tokens_last, dim=axes)
        frequencies = [torch.fft.fftfreq(tokens_last.shape[axis], device=value.device) for axis in axes]
        radius = torch.stack(torch.meshgrid(*frequencies, indexing="ij")).norm(dim=0)
        lowest = 1.0 / max(tokens_last.shape[axis] for axis in axes)
        signal = radius.clamp_min(lowest) ** -self.power
        sigma = _noise_level(moment)
        gain = (1 - sigma) * signal / ((1 - sigma) ** 2 * signal + sigma**2 + 1e-12)
        return torch.fft.ifftn(spectrum * (gain / gain.mean().clamp_min(1e-12)), dim=axes).real


def _noise_level(moment: Moment) -> float:
    """Of this step, 1 for pure noise: from the sampler's times where it has them, else by counting."""
    if not moment.clock:
        return 1.0 - moment.step / moment.steps
    largest = max(abs(time) for time in moment.clock)
    # times run from one, or from about a thousand
    return min(abs(moment.clock[moment.step]) / (1.0 if largest <= 1.0 else max(largest, 1000.0)), 1.0)


@gate("transform_rate")
class TransformRate(Accumulating):
    """EasyCache (2025): ``sum += k |x_s - x_{s-1}| / |v|``, x the latent, v the last output, all mean absolute values.

    The rate ``k = |v_s - v_p| / |x_s - x_p|`` is measured at a computed step against the computed one before it.
    """

    watch = "output"
    rate: Numbers | None = None
    size: Numbers | None = None
    _full: tuple[Tensor, Tensor] | None = None  # latent and output of the last computed step

    def __init__(self, *, threshold: float, max_since: int = 0):
        self.threshold, self.max_since = checked("transform_rate", threshold), max_since

    def measure(self, new: Tensor, old: Tensor, moment: Moment) -> Tensor:
        return _mean(new - old)

    def gain(self, moment: Moment, numbers: Numbers) -> Numbers:
        if self.rate is None or self.size is None:
            return np.full(len(numbers), np.inf)
        return self.rate * numbers[:, 0] / self.size

    def see(self, values: Sequence[Tensor], moment: Moment, computed: bool) -> Tensor | None:
        output, latent = values[0], self._latest
        assert latent is not None
        found = [_mean(output)]
        if computed:
            if self._full is not None:
                found += [_mean(output - self._full[1]), _mean(latent - self._full[0])]
            self._full = (latent, output.clone())
        return torch.stack(found, dim=1)

    def learn(self, numbers: Numbers) -> None:
        self.size = numbers[:, 0] + 1e-12
        if numbers.shape[1] == 3:
            self.rate = numbers[:, 1] / (numbers[:, 2] + 1e-12)


@gate("input_error")
class InputError(Accumulating):
    """RFC (2025), its gate: how far the probe has left the straight line through its last two computed values.

    ``sum += |I_s - I^_s|_1 / |I_s|_1`` with ``I^_s = I_0 + (I_0 - I_1) (s - s_0) / (s_0 - s_1)``.
    """

    _computed: tuple[tuple[int, Tensor], ...] = ()

    def __init__(self, *, threshold: float, probe: str = "stack_input", max_since: int = 0):
        self.threshold, self.probe, self.max_since = checked("input_error", threshold), probe, max_since

    def look(self, new: Tensor, moment: Moment) -> Tensor | None:
        self._latest = new
        if not self._computed or self._computed[0][1].shape != new.shape:
            return None
        step, newest = self._computed[0]
        expected = newest
        if len(self._computed) > 1:
            before, older = self._computed[1]
            expected = newest + (newest - older) * ((moment.step - step) / (step - before))
        return direct(relative_change)(expected.to(new.dtype), new)

    def done(self, moment: Moment, computed: bool) -> None:
        super().done(moment, computed)
        if computed and self._latest is not None:
            self._computed = ((moment.step, self._latest), *self._computed)[:2]


def _mean(value: Tensor) -> Tensor:
    """Mean absolute value of each sample."""
    return value.abs().reshape(len(value), -1).float().mean(1)
