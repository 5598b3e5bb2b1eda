"""Which of several schedules is kept: real generations under each of them decide."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from diffcache import searching
from diffcache.budget import Budget, Exact, Quality
from diffcache.profile_record import Profile
from diffcache.profiling import Calibration
from diffcache.progress import Report
from diffcache.recipes import Recipe
from diffcache.report import CompileReport, relative_error
from diffcache.runtime import CachedDenoiser
from diffcache.schedule import Forecast, Partial, Schedule
from diffcache.targets import Target


@dataclass(frozen=True)
class Effort:
    """What is asked for, and how much may be tried for it."""

    budget: Budget
    recipe: Recipe | None
    proposals: int
    judge_prompts: int
    sensitivity_prompts: int
    leaf_modules: tuple[Any, ...]
    sites: tuple[str, ...] | None = None

    @property
    def searches(self) -> bool:
        return self.recipe is None and not isinstance(self.budget, Exact)

    def prompts_to_judge(self, calibration: Calibration) -> int:
        return min(self.judge_prompts, len(calibration.references))

    @property
    def exact(self) -> bool:
        return self.recipe is None and isinstance(self.budget, Exact)


def judge(
    calibration: Calibration,
    target: Target,
    candidates: Sequence[Schedule],
    effort: Effort,
    options: dict[str, Any],
    report: Report,
) -> CachedDenoiser:
    """Real generations under each proposal.

    Kept is the one nearest to the uncached results, or under ``Quality`` the fastest of those that are near enough.
    """
    judged: list[tuple[float, CachedDenoiser]] = []
    prompts = effort.prompts_to_judge(calibration)
    base = calibration.cached(candidates[0], **options)
    considered = []
    for number, schedule in enumerate(candidates):
        denoiser, errors = base.with_schedule(schedule), []
        for prompt in range(prompts):
            report(f"judge schedules of {calibration.name}", number * prompts + prompt, len(candidates) * prompts)
            errors.append(relative_error(target.generate(denoiser, prompt), calibration.references[prompt]))
        error = sum(errors) / len(errors)
        if not error == error:
            raise ValueError(
                f"schedule {schedule.origin} gives NaN on calibration prompts; this is a defect, please report it"
            )
        if effort.recipe is not None:  # what it comes to is known only now
            denoiser.schedule = schedule = replace(schedule, flops_fraction=denoiser.flops / denoiser.flops_in_full)
        considered.append({"origin": schedule.origin, "flops_fraction": schedule.flops_fraction, "error": error})
        judged.append((error, denoiser))
    report(f"judge schedules of {calibration.name}", len(candidates) * prompts, len(candidates) * prompts)
    error, chosen = _best(judged, effort)
    if not chosen.schedule.is_exact and not chosen.steps_forecast:
        if chosen.schedule.is_online and chosen.decisions:
            raise ValueError(
                f"{chosen.schedule.origin} lets nothing pass on the calibration prompts of {calibration.name}: nothing "
                "would be cached; allow it a larger change"
            )
        raise ValueError(
            f"the schedule {chosen.schedule.origin} never applied to a call of {calibration.name}: nothing would be "
            "cached; do the sampler's calls differ from one generation to the next?"
        )
    chosen.report = _report(calibration, target, chosen, error, considered)
    object.__setattr__(chosen, "profile", calibration.profile)
    chosen.reset()
    return chosen


def _best(judged: Sequence[tuple[float, CachedDenoiser]], effort: Effort) -> tuple[float, CachedDenoiser]:
    nearest = min(judged, key=lambda pair: pair[0])
    if not effort.searches or not isinstance(effort.budget, Quality):
        return nearest
    allowed = effort.budget.squared_error() ** 0.5
    within = [pair for pair in judged if pair[0] <= allowed]
    if not within:
        warnings.warn(
            f"no schedule met {effort.budget} on the calibration prompts: the best has a relative L2 error of "
            f"{nearest[0]:.4f}, {allowed:.4f} was asked for",
            stacklevel=5,
        )
    return min(within, key=lambda pair: (pair[1].schedule.flops_fraction, pair[0]), default=nearest)


def _report(
    calibration: Calibration, target: Target, chosen: CachedDenoiser, error: float, considered: list[dict[str, Any]]
) -> CompileReport:
    schedule, record = chosen.schedule, calibration.profile
    names = tuple(row.site for row in schedule.rows)
    programs = [p for (_, sites, _), p in chosen._programs.items() if sites == names and len(p.sites) == len(names)]
    counts = programs[0].counts(schedule)
    computed, times = _computed(chosen), []
    for denoiser in (calibration.captured.denoiser, chosen):
        start = time.perf_counter()
        target.generate(denoiser, 0)
        times.append(time.perf_counter() - start)
    cached = counts["nodes"] - counts["hoisted"] - counts["kept"] if schedule.rows else 0
    return CompileReport(
        denoiser=calibration.name,
        origin=schedule.origin,
        steps=schedule.steps,
        computed=computed,
        nodes=counts["nodes"],
        hoisted=counts["hoisted"],
        cached=max(cached, 0),
        kept=counts["kept"],
        flops_speedup=1.0 / schedule.flops_fraction,
        predicted_error=_predicted(record, schedule),
        measured_error=error,
        wall_speedup=times[0] / times[1],
        sites=tuple(row.site for row in schedule.rows),
        memory=str(programs[0].memory(schedule, chosen.pattern)) if schedule.rows else None,
        considered=considered,
    )


def _computed(denoiser: CachedDenoiser) -> int:
    """Steps that were computed in full by the stream that computed most of them in the last generation."""
    if not denoiser.schedule.is_online:
        return len(denoiser.schedule.computed_steps())
    logs = [log for _, log in denoiser.decisions[-denoiser.pattern.streams :]]
    return max(sum(set(column) <= {"C", "."} for column in log) for log in logs)


def _predicted(record: Profile, schedule: Schedule) -> float | None:
    """What the calibration's Gram matrices say; None where they do not know what will be forecast, or how."""
    known = all(any(site.name == row.site for site in record.sites) for row in schedule.rows)
    cells = [cell for row in schedule.rows for cell in row.cells]
    # of parts and tokens that go their own way a Gram matrix of whole values knows nothing
    parts = any(isinstance(cell, Partial) or (isinstance(cell, Forecast) and cell.view) for cell in cells)
    if not schedule.rows or not known or parts or schedule.is_online or schedule.guidance is not None:
        return None
    return max(searching.predicted_error(record, schedule), 0.0) ** 0.5
