"""What the user asks for: a speed, a quality, or exactness."""

from __future__ import annotations

import math
from dataclasses import dataclass

# A result whose values spread evenly over a range R around zero has mean square R^2 / 12.
RANGE_TO_POWER = 12.0


@dataclass(frozen=True, slots=True)
class Speedup:
    """The least error at this speed: FLOPs of the uncached generation divided by FLOPs of the cached one."""

    factor: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor > 1.0):
            raise ValueError(
                f"Speedup needs a factor greater than 1 (such as 2.0), got {self.factor}; see also Exact()"
            )


@dataclass(frozen=True, slots=True)
class Quality:
    """The most speed at this error of the final result against the uncached one: PSNR in dB, or relative L2."""

    psnr: float | None = None
    rel_l2: float | None = None

    def __post_init__(self) -> None:
        if (self.psnr is None) == (self.rel_l2 is None):
            raise ValueError(
                f"Quality needs exactly one of psnr (in dB) and rel_l2, got psnr={self.psnr}, rel_l2={self.rel_l2}"
            )
        if self.psnr is not None and not (math.isfinite(self.psnr) and self.psnr > 0):
            raise ValueError(f"Quality needs a finite psnr above 0 dB (such as 30), got {self.psnr}")
        if self.rel_l2 is not None and not 0 < self.rel_l2 < 1:
            raise ValueError(f"Quality needs a rel_l2 between 0 and 1 (such as 0.02), got {self.rel_l2}")

    def squared_error(self, range_to_power: float = RANGE_TO_POWER) -> float:
        """The allowed relative squared error ``||y - x||^2 / ||x||^2`` of the final result.

        A PSNR is relative to the range of the result, so it needs the ratio ``range^2 / mean(x^2)``; the default is
        that of values spread evenly around zero.
        """
        if self.rel_l2 is not None:
            return self.rel_l2**2
        assert self.psnr is not None
        return range_to_power * 10 ** (-self.psnr / 10)


@dataclass(frozen=True, slots=True)
class Exact:
    """No forecasting: only what is exact (hoisting, dead code)."""


Budget = Speedup | Quality | Exact
