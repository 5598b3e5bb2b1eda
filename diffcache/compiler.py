"""``diffcache.compile``: capture, profile, search, rewrite, in a row and nothing else."""

from __future__ import annotations

import math
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffcache import searching
from diffcache.budget import Budget, Exact, Quality, Speedup
from diffcache.call_pattern import CallPattern
from diffcache.fingerprint import graph_fingerprint
from diffcache.memory import in_words
from diffcache.options import RunOptions
from diffcache.profile_record import Profile
from diffcache.profiling import Calibration, SiteFinder, calibrate
from diffcache.progress import Report, display
from diffcache.recipes import Recipe, evenly
from diffcache.report import CompileReport, relative_error
from diffcache.runtime import CachedDenoiser
from diffcache.saving import attach
from diffcache.schedule import Schedule, SiteChoice
from diffcache.sites import Site
from diffcache.targets import Sample, Target, find_targets
from diffcache.tracing.captured import Captured
from diffcache.tracing.errors import CaptureError


def profile(
    model: Any,
    calib_prompts: Sequence[Any],
    *,
    sample: Sample | None = None,
    seed: int = 0,
    verbose: bool | None = None,
    leaf_modules: Sequence[Any] = (),
    sensitivity_prompts: int = 1,
) -> Calibration:
    """Run the calibration prompts uncached and measure every site: the first half of ``compile``, usable alone.

    Returns:
        A ``Calibration``; its ``.profile`` holds per site the Gram matrix, cost and sensitivity, its ``.sites`` what
        was found in the graph. For a pipeline with several denoisers, the first one's.

    Raises:
        ValueError: nothing to calibrate on, or a sampler that never calls the denoiser.
        CaptureError: the denoiser cannot be captured exactly.
    """
    target = find_targets(model, calib_prompts, sample, seed)[0]
    with display(_watched(verbose)) as report:
        return calibrate(target.denoiser, target.generate, len(calib_prompts), name=target.name,
                         leaf_modules=leaf_modules, sensitivity_prompts=sensitivity_prompts, report=report)  # fmt: skip


def search(profiled: Calibration | Profile, budget: Budget, **options: Any) -> list[Schedule]:
    """Schedules within the budget, best predicted first (see ``diffcache.searching.search`` for the options)."""
    if isinstance(profiled, Calibration):
        options = {"sites": profiled.searchable or None, **options}
        return searching.search(profiled.profile, budget, **options)
    return searching.search(profiled, budget, **options)


def compile(
    model: Any,
    calib_prompts: Sequence[Any],
    *,
    budget: Budget = Speedup(2.0),  # noqa: B008  (frozen)
    sample: Sample | None = None,
    recipe: Recipe | None = None,
    backend: str | None = None,
    leaf_modules: Sequence[Any] = (),
    on_uncapturable: str = "raise",
    disable_passes: Sequence[str] = (),
    max_cache_bytes: int | None = None,
    history_dtype: str | None = None,
    offload_history: bool = False,
    sites: Sequence[str] | None = None,
    proposals: int = 6,
    judge_prompts: int = 2,
    sensitivity_prompts: int = 1,
    seed: int = 0,
    verbose: bool | None = None,
) -> Any:
    """Make a diffusion model faster by reusing work between its denoising steps.

    Args:
        model: a diffusers pipeline, or any ``torch.nn.Module`` denoiser.
        calib_prompts: strings, or dicts of pipeline arguments; for a bare denoiser, items for ``sample``.
        budget: ``Speedup(factor)``, ``Quality(...)`` or ``Exact()``.
        sample: for a bare denoiser, ``sample(denoiser, item)`` runs one whole generation by calling ``denoiser(...)``.
        recipe: a published rule instead of the search, e.g. ``diffcache.recipes.uniform(interval=2)``.
        backend: "eager", "inductor", or "cudagraphs" (inductor, recorded and replayed on a GPU); by default "inductor"
            for a denoiser that was compiled, whole or in part, else "eager".
        leaf_modules: module classes or paths to keep as single nodes.
        on_uncapturable: "raise", or "eager" to return a model that runs uncached what cannot be captured exactly.
        disable_passes: exact passes to leave out, by name.
        max_cache_bytes: the most history may take on the device, all branches of one generation together; schedules
            that need more are not considered, and a later call that needs more (a larger picture) is computed in full.
        history_dtype: None keeps history as it is; "int8" or "float8" keeps it in a half or a quarter of the bytes, one
            scale a row, at a loss of about 1 % or 3 % of each value.
        offload_history: keep history that waits in host memory (pinned, copied on the device's own queue).
        sites: search only these, given by name or role ("stack", "output", "deepest"); default: all measured ones.
        proposals, judge_prompts: how many of the search's best schedules are tried, on how many of the prompts.
        sensitivity_prompts: prompts used to measure how an error at each step reaches the result.
        seed: prompt ``i`` is generated from ``seed + i`` unless it brings its own generator.
        verbose: True shows progress, False says nothing; by default there are progress bars on a terminal, and
            the report (how many nodes of how many are cached, hoisted and kept) goes to stderr.

    Returns:
        A pipeline of the same class with the denoiser replaced, or a ``CachedDenoiser``; with ``.schedule``,
        ``.report`` and ``.save(folder)``. ``model`` is left as it was.

    Raises:
        ValueError: bad input, or a budget that cannot be met (nothing would be cached).
        CaptureError: the denoiser cannot be captured exactly.
    """
    if not isinstance(budget, Speedup | Quality | Exact):
        raise ValueError(f"budget must be Speedup(...), Quality(...) or Exact(), got {budget!r}")
    if on_uncapturable not in ("raise", "eager"):
        raise ValueError(f"on_uncapturable is {on_uncapturable!r}; expected 'raise' or 'eager'")
    if recipe is not None and not isinstance(recipe, Recipe):
        raise ValueError(f"recipe must be one of diffcache.recipes, such as uniform(interval=2), got {recipe!r}")
    for name, number in (("proposals", proposals), ("judge_prompts", judge_prompts)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    run_options = {
        "disable_passes": tuple(disable_passes),
        "max_cache_bytes": max_cache_bytes,
        "history_dtype": history_dtype,
        "offload_history": offload_history,
    }
    RunOptions(**({"backend": backend} if backend is not None else {}), **run_options)  # type: ignore[arg-type]
    effort = _Effort(
        budget,
        recipe,
        proposals,
        judge_prompts,
        sensitivity_prompts,
        tuple(leaf_modules),
        None if sites is None else tuple(sites),
    )
    cached: dict[str, CachedDenoiser] = {}
    with display(_watched(verbose)) as report:
        for target in find_targets(model, calib_prompts, sample, seed):
            by_itself = "inductor" if target.compiled else "eager"
            options = {"backend": backend or by_itself, **run_options}
            try:
                cached[target.name] = _compile_one(target, len(calib_prompts), effort, options, report)
            except CaptureError as error:
                if on_uncapturable == "raise":
                    raise
                warnings.warn(f"{target.name} runs uncached: {error}", stacklevel=2)
                cached[target.name] = _uncached(target, str(error))
    for denoiser in cached.values():
        if denoiser.report is not None:
            _tell(denoiser, verbose)
    return attach(model, cached)


@dataclass(frozen=True)
class _Effort:
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

    @property
    def exact(self) -> bool:
        return self.recipe is None and isinstance(self.budget, Exact)


def _compile_one(
    target: Target, prompts: int, effort: _Effort, options: dict[str, Any], report: Report
) -> CachedDenoiser:
    calibration = calibrate(
        target.denoiser,
        target.generate,
        1 if effort.exact else prompts,
        name=target.name,
        leaf_modules=effort.leaf_modules,
        sensitivity_prompts=min(effort.sensitivity_prompts, prompts) if effort.searches else 0,
        min_steps=1 if effort.exact else 4,
        report=report,
    )
    candidates = _candidates(calibration, effort, RunOptions(**options))
    return _judge(calibration, target, candidates, effort, options, report)


def _tell(denoiser: CachedDenoiser, verbose: bool | None) -> None:
    """Say in numbers what was done: on standard error, and in ``DIFFCACHE_DUMP``."""
    text = f"{denoiser.report}\n{denoiser.schedule}\n"
    if verbose is not False:
        print(text, end="", file=sys.stderr)
    if folder := os.environ.get("DIFFCACHE_DUMP"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, f"{denoiser.title}-captured.txt").write_text(f"{denoiser.captured}\n")
        Path(folder, f"{denoiser.title}-schedule.txt").write_text(text)


def _watched(verbose: bool | None) -> bool:
    return sys.stderr.isatty() if verbose is None else verbose


def site_choices(calibration: Calibration) -> list[SiteChoice]:
    """What recipes choose from: every site of the capture."""
    total = calibration.profile.total_flops
    return [site_choice(site, total) for site in calibration.sites.values()]


def site_choice(site: Site, total: float) -> SiteChoice:
    """What recipes need to know of a site; ``total`` is the FLOPs of one call."""
    return SiteChoice(site.name, site.residual, site.flops_saved / total, site.role,
                      site.depth, site.blocks, site.kind, site.level, site.side)  # fmt: skip


def _candidates(calibration: Calibration, effort: _Effort, options: RunOptions) -> list[Schedule]:
    """Schedules to judge. Raises ValueError if a budget that asked for reuse gets none."""
    record, budget = calibration.profile, effort.budget
    if effort.recipe is not None:
        found = [effort.recipe.schedule(record.steps, site_choices(calibration))]
    elif isinstance(budget, Exact):
        found = [Schedule.exact(record.steps)]
    else:
        found = _searched(calibration, effort, options)
        found += [s for s in _baselines(calibration, budget, found) if _excess(calibration, s, options) <= 0]
    if not found or (not effort.exact and all(s.flops_fraction >= 1.0 for s in found)):
        raise ValueError(
            f"{effort.recipe or budget} leaves nothing to reuse for {calibration.name}: every schedule within it "
            "computes all steps. Ask for less quality, or pass budget=diffcache.Exact() if only exact passes are "
            "wanted."
        )
    graph = graph_fingerprint(calibration.captured.graph_module.graph)
    return [replace(schedule, clock=record.clock, fingerprint=graph) for schedule in found]


def _searched(calibration: Calibration, effort: _Effort, options: RunOptions) -> list[Schedule]:
    """The search's proposals whose history fits, with as many history tensors as fit."""
    wanted = _named_sites(calibration, effort.sites)
    if options.max_cache_bytes is None:
        return search(calibration, effort.budget, proposals=effort.proposals, **wanted)
    least = math.inf
    for most in (3, 2, 1):
        found = search(calibration, effort.budget, proposals=4 * effort.proposals, max_history=most, **wanted)
        excess = [_excess(calibration, schedule, options) for schedule in found]
        if min(excess) <= 0:
            return [s for s, over in zip(found, excess, strict=True) if over <= 0][: effort.proposals]
        least = min(least, *excess)
    raise ValueError(
        f"no schedule within {effort.budget} keeps its history in max_cache_bytes={options.max_cache_bytes}: the "
        f"smallest needs {in_words(int(options.max_cache_bytes + least))}. Allow that, or pass history_dtype='int8' or "
        "offload_history=True"
    )


def _excess(calibration: Calibration, schedule: Schedule, options: RunOptions) -> float:
    """Bytes by which a schedule's history passes the limit."""
    if options.max_cache_bytes is None:
        return -math.inf
    return calibration.memory(schedule, options).device_bytes - options.max_cache_bytes


def _named_sites(calibration: Calibration, wanted: tuple[str, ...] | None) -> dict[str, Any]:
    """The ``sites`` option of the search. Raises ValueError for a name that is no site of this denoiser."""
    if wanted is None:
        return {}
    known = calibration.sites.values()
    unknown = [name for name in wanted if all(name not in (site.name, site.role) for site in known)]
    if unknown:
        raise ValueError(f"no sites {unknown} in {calibration.name}; it has {[site.name for site in known]}")
    return {"sites": [site.name for site in known if site.name in wanted or site.role in wanted]}


def _baselines(calibration: Calibration, budget: Budget, found: Sequence[Schedule]) -> list[Schedule]:
    """Evenly spaced forecasts at the cost of the best proposal: the search must beat them in real generations."""
    computing = [schedule for schedule in found if schedule.rows]
    if not computing or not isinstance(budget, Speedup):
        return []
    best, choices = computing[0], site_choices(calibration)
    site, computed = best.rows[0].site, len(best.computed_steps())
    ways = (("newton", 2), ("taylor", 1), ("taylor", 2))
    return [evenly(computed=computed, predictor=p, order=o, site=site).schedule(best.steps, choices) for p, o in ways]


def _judge(
    calibration: Calibration,
    target: Target,
    candidates: Sequence[Schedule],
    effort: _Effort,
    options: dict[str, Any],
    report: Report,
) -> CachedDenoiser:
    """Real generations under each proposal.

    Kept is the one nearest to the uncached results, or under ``Quality`` the fastest of those that are near enough.
    """
    judged: list[tuple[float, CachedDenoiser]] = []
    prompts = min(effort.judge_prompts, len(calibration.references))
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
        considered.append({"origin": schedule.origin, "flops_fraction": schedule.flops_fraction, "error": error})
        judged.append((error, denoiser))
    report(f"judge schedules of {calibration.name}", len(candidates) * prompts, len(candidates) * prompts)
    error, chosen = _best(judged, effort)
    if chosen.schedule.rows and not chosen.steps_forecast:
        raise ValueError(
            f"the schedule {chosen.schedule.origin} never applied to a call of {calibration.name}: nothing would be "
            "cached; do the sampler's calls differ from one generation to the next?"
        )
    chosen.report = _report(calibration, target, chosen, error, considered)
    object.__setattr__(chosen, "profile", calibration.profile)
    chosen.reset()
    return chosen


def _best(judged: Sequence[tuple[float, CachedDenoiser]], effort: _Effort) -> tuple[float, CachedDenoiser]:
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
    predicted = None
    if schedule.rows and all(any(s.name == row.site for s in record.sites) for row in schedule.rows):
        predicted = max(searching.predicted_error(record, schedule), 0.0) ** 0.5
    names = tuple(row.site for row in schedule.rows)
    programs = [p for (_, sites), p in chosen._programs.items() if sites == names and len(p.sites) == len(names)]
    counts = programs[0].counts(schedule)
    times = []
    for denoiser in (calibration.captured.denoiser, chosen):
        start = time.perf_counter()
        target.generate(denoiser, 0)
        times.append(time.perf_counter() - start)
    cached = counts["nodes"] - counts["hoisted"] - counts["kept"] if schedule.rows else 0
    return CompileReport(
        denoiser=calibration.name,
        origin=schedule.origin,
        steps=schedule.steps,
        computed=len(schedule.computed_steps()),
        nodes=counts["nodes"],
        hoisted=counts["hoisted"],
        cached=max(cached, 0),
        kept=counts["kept"],
        flops_speedup=1.0 / schedule.flops_fraction,
        predicted_error=predicted,
        measured_error=error,
        wall_speedup=times[0] / times[1],
        sites=tuple(row.site for row in schedule.rows),
        memory=str(programs[0].memory(schedule, chosen.pattern.streams)) if schedule.rows else None,
        considered=considered,
    )


def _uncached(target: Target, reason: str) -> CachedDenoiser:
    captured = Captured(target.denoiser, on_uncapturable="eager")
    captured.refused = reason
    schedule = Schedule.exact(1)
    return CachedDenoiser(captured, schedule, CallPattern((), None, None, 1), SiteFinder(captured), title=target.name)
