"""What compiling found and promises, in numbers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class CompileReport:
    """Predicted and measured error and speed of one compiled denoiser.

    Errors are relative L2 errors of the final result against the uncached one, on calibration prompts.
    ``flops_speedup`` is the ratio of denoiser FLOPs over a generation; ``wall_speedup`` the ratio of times of whole
    generations in one run (None if not measured).
    """

    denoiser: str
    origin: str
    steps: int
    computed: int
    nodes: int
    hoisted: int
    cached: int
    kept: int
    flops_speedup: float
    predicted_error: float | None = None
    measured_error: float | None = None
    wall_speedup: float | None = None
    sites: tuple[str, ...] = ()
    memory: str | None = None
    considered: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"diffcache: {self.denoiser}, {self.origin}",
            f"  {self.cached} of {self.nodes} nodes are cached on a forecast step, {self.hoisted} hoisted out of every "
            f"later step, {self.kept} kept",
            f"  {self.computed} of {self.steps} steps computed in full; {self.flops_speedup:.2f}x fewer FLOPs"
            + (f", {self.wall_speedup:.2f}x measured in time" if self.wall_speedup else ""),
        ]
        errors = [
            (label, e)
            for label, e in (("predicted", self.predicted_error), ("measured", self.measured_error))
            if e is not None
        ]
        if errors:
            text = ", ".join(f"{label} {error:.4f}" for label, error in errors)
            lines.append(f"  relative L2 error of the result on calibration prompts: {text}")
        if self.sites:
            lines.append(f"  sites: {', '.join(self.sites)}")
        if self.memory:
            lines += [f"  {line}" for line in self.memory.splitlines()]
        return "\n".join(lines)


def relative_error(result: Any, reference: Any) -> float:
    """``||result - reference|| / ||reference||`` of two flat tensors."""
    return float((result - reference).norm() / reference.norm().clamp_min(1e-12))


def psnr(result: Any, reference: Any, peak: float) -> float:
    """Peak signal-to-noise ratio in decibels; infinite for equal tensors."""
    mse = float((result - reference).square().mean())
    return math.inf if mse == 0 else 10 * math.log10(peak**2 / mse)
