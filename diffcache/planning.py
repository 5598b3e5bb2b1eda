"""A calibrated denoiser as recipes see it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from diffcache.profiling import Calibration, Generate
from diffcache.recipes import Plan
from diffcache.report import relative_error
from diffcache.schedule import Schedule, SiteChoice
from diffcache.trajectories import trajectory


def plan_of(calibration: Calibration, generate: Generate | None = None, prompts: int = 1) -> Plan:
    """What recipes may know; with ``generate`` they may also try schedules out on the first ``prompts`` prompts."""
    sites = {site.name: site for site in site_choices(calibration)}

    def error(schedule: Schedule) -> float:
        assert generate is not None
        cached = calibration.cached(schedule)
        found = [relative_error(generate(cached, i), calibration.references[i]) for i in range(prompts)]
        return sum(found) / len(found)

    def values(name: str) -> NDArray[np.float32]:
        assert generate is not None
        return trajectory(calibration, generate, name, sites[name].residual)

    return Plan(
        calibration.profile.steps,
        tuple(sites.values()),
        calibration.profile.clock,
        calibration.profile,
        error_of=None if generate is None else error,
        trajectory_of=None if generate is None else values,
    )


def site_choices(calibration: Calibration) -> Sequence[SiteChoice]:
    """What recipes choose from: every site of the capture."""
    total = calibration.profile.total_flops
    return [SiteChoice(s.name, s.residual, s.flops_saved / total, s.role) for s in calibration.sites.values()]
