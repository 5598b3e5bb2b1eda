"""Gates that decide after a forecast, on what a cheap part of the denoiser makes of it."""

from __future__ import annotations

import torch
from torch import Tensor

from diffcache.gates.accumulating import checked
from diffcache.gates.base import Decision, Gate, Moment, Numbers, gate

TINY = 1e-10


def relative(computed: Tensor, forecast: Tensor) -> Tensor:
    """``mean(|forecast - computed| / (|computed| + 1e-10))``, SpeCa's."""
    return ((forecast - computed).abs() / (computed.abs() + TINY)).mean(1)


def l2(computed: Tensor, forecast: Tensor) -> Tensor:
    """``|forecast - computed|_2 / |computed|_2``."""
    return (forecast - computed).norm(dim=1) / (computed.norm(dim=1) + TINY)


def cosine(computed: Tensor, forecast: Tensor) -> Tensor:
    """``1 - cos(forecast, computed)``."""
    return 1.0 - torch.cosine_similarity(forecast, computed, dim=1)


ERRORS = {"relative": relative, "l2": l2, "cosine": cosine}


@gate("verify")
class Verify(Gate):
    """SpeCa (2025): accept a forecast if a block that is run on it gives what was forecast of the block itself.

    Accepted is an error of at most ``max(threshold * decay ** (step / steps), floor)``. After a computed step the first
    ``unchecked`` forecasts pass as they are, at most ``longest`` come in a row (0: any number). ``measure`` is
    "relative", "l2" or "cosine". Published floor: 0.1 for FLUX, 0.01 for DiT.
    """

    checks = True

    def __init__(
        self,
        *,
        probe: str,
        threshold: float,
        decay: float = 1.0,
        floor: float = 0.0,
        unchecked: int = 0,
        longest: int = 0,
        measure: str = "relative",
    ):
        self.probe, self.threshold, self.measure_name = probe, checked("verify", threshold), measure
        if measure not in ERRORS or not 0.0 < decay or not floor >= 0.0 or unchecked < 0 or longest < 0:
            raise ValueError(
                f"gate 'verify' needs a measure of {sorted(ERRORS)}, decay > 0, floor >= 0 and whole numbers unchecked "
                f"and longest, got '{measure}', {decay}, {floor}, {unchecked} and {longest}"
            )
        self.decay, self.floor, self.unchecked, self.longest = decay, floor, unchecked, longest

    def foregone(self, moment: Moment) -> bool | None:
        run = moment.since - 1  # forecasts so far
        if self.longest and run >= self.longest:
            return False
        return True if run < self.unchecked else None

    def check(self, computed: Tensor, forecast: Tensor, moment: Moment) -> Tensor:
        wide = torch.float64 if computed.dtype == torch.float64 else torch.float32
        flat = (value.reshape(len(value), -1).to(wide) for value in (computed, forecast))
        return ERRORS[self.measure_name](*flat)

    def follow(self, moment: Moment, numbers: Numbers) -> Decision:
        allowed = max(self.threshold * self.decay ** (moment.step / moment.steps), self.floor)
        return numbers[:, 0] <= allowed
