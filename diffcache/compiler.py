"""``diffcache.compile``: capture, profile, search, rewrite, in a row and nothing else."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from diffcache import searching
from diffcache.budget import Budget, Exact, Quality, Speedup
from diffcache.call_pattern import CallPattern
from diffcache.fingerprint import graph_fingerprint
from diffcache.integrations import diffusers as pipelines
from diffcache.lower import check_backend
from diffcache.pipeline import disabled_passes
from diffcache.profile_record import Profile
from diffcache.profiling import Calibration, Generate, SiteFinder, calibrate
from diffcache.progress import Report, display
from diffcache.recipes import Recipe
from diffcache.report import CompileReport, relative_error
from diffcache.runtime import CachedDenoiser
from diffcache.saving import attach
from diffcache.schedule import Schedule, SiteChoice
from diffcache.tracing.captured import Captured
from diffcache.tracing.errors import CaptureError

Sample = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class Target:
    """One denoiser of a model, and how to run a whole generation with something else in its place."""

    name: str
    denoiser: nn.Module
    generate: Generate


def find_targets(model: Any, calib_prompts: Sequence[Any], sample: Sample | None, seed: int) -> list[Target]:
    """The denoisers of a pipeline, or the bare denoiser itself.

    Raises:
        ValueError: no prompts; a bare module without ``sample``; nothing in the pipeline denoises.
    """
    if isinstance(calib_prompts, str) or not isinstance(calib_prompts, Sequence) or not calib_prompts:
        raise ValueError(
            f"calib_prompts must be a non-empty list of strings or dicts of pipeline arguments, got {calib_prompts!r}"
        )
    if pipelines.is_pipeline(model):
        quiet = pipelines.quiet(model)

        def run(name: str) -> Generate:
            return lambda denoiser, index: pipelines.generate(
                pipelines.with_components(quiet, {name: denoiser}), calib_prompts[index], seed + index
            )

        found = pipelines.find_denoisers(model, calib_prompts[0], seed)
        return [Target(name, module, run(name)) for name, module in found.items()]
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a diffusers pipeline or a torch.nn.Module, got {type(model).__name__}")
    if sample is None:
        raise ValueError(
            "a bare denoiser needs sample=: a function sample(denoiser, item) that runs one whole generation for one "
            "calibration item by calling denoiser(...), and returns the result"
        )
    return [Target("denoiser", model, _sampler(sample, calib_prompts, seed))]


def _sampler(sample: Sample, items: Sequence[Any], seed: int) -> Generate:
    def generate(denoiser: nn.Module, index: int) -> torch.Tensor:
        last: list[torch.Tensor] = []
        hook = denoiser.register_forward_hook(lambda module, args, out: last.append(pipelines.flat(out)))
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(seed + index)
                result = pipelines.flat(sample(denoiser, items[index]))
        finally:
            hook.remove()
        return result if result.numel() or not last else last[-1]

    return generate


def profile(
    model: Any, calib_prompts: Sequence[Any], *, sample: Sample | None = None, seed: int = 0, verbose: bool | None = None,
    leaf_modules: Sequence[Any] = (), sensitivity_prompts: int = 1,
) -> Calibration:  # fmt: skip
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
    record = profiled.profile if isinstance(profiled, Calibration) else profiled
    return searching.search(record, budget, **options)


def compile(  # noqa: A001  (torch's own word for it)
    model: Any,
    calib_prompts: Sequence[Any],
    *,
    budget: Budget = Speedup(2.0),  # noqa: B008  (frozen)
    sample: Sample | None = None,
    recipe: Recipe | None = None,
    backend: str = "eager",
    leaf_modules: Sequence[Any] = (),
    on_uncapturable: str = "raise",
    disable_passes: Sequence[str] = (),
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
        backend: "eager" or "inductor".
        leaf_modules: module classes or paths to keep as single nodes.
        on_uncapturable: "raise", or "eager" to return a model that runs uncached what cannot be captured exactly.
        disable_passes: exact passes to leave out, by name.
        proposals, judge_prompts: how many of the search's best schedules are tried, on how many of the prompts.
        sensitivity_prompts: prompts used to measure how an error at each step reaches the result.
        seed: prompt ``i`` is generated from ``seed + i`` unless it brings its own generator.
        verbose: show progress and the report; default: on a terminal.

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
    check_backend(backend)
    disabled_passes(disable_passes)
    cached: dict[str, CachedDenoiser] = {}
    options = {"backend": backend, "disable_passes": tuple(disable_passes)}
    with display(_watched(verbose)) as report:
        for target in find_targets(model, calib_prompts, sample, seed):
            exact = isinstance(budget, Exact) and recipe is None
            measured = 0 if exact or recipe is not None else min(sensitivity_prompts, len(calib_prompts))
            try:
                calibration = calibrate(
                    target.denoiser, target.generate, 1 if exact else len(calib_prompts), name=target.name,
                    leaf_modules=leaf_modules, sensitivity_prompts=measured, report=report,
                )  # fmt: skip
            except CaptureError as error:
                if on_uncapturable == "raise":
                    raise
                warnings.warn(f"{target.name} runs uncached: {error}", stacklevel=2)
                cached[target.name] = _uncached(target, str(error))
                continue
            candidates = _candidates(calibration, budget, recipe, proposals)
            cached[target.name] = _judge(calibration, target, candidates, min(judge_prompts, len(calib_prompts)), options, report)
    for denoiser in cached.values():
        if _watched(verbose) and denoiser.report is not None:
            print(denoiser.report, denoiser.schedule, sep="\n", file=sys.stderr)
    return attach(model, cached)


def _watched(verbose: bool | None) -> bool:
    return sys.stderr.isatty() if verbose is None else verbose


def site_choices(calibration: Calibration) -> list[SiteChoice]:
    """What recipes choose from: every site of the capture."""
    total = calibration.profile.total_flops
    return [SiteChoice(s.name, s.residual, s.flops_saved / total, s.role) for s in calibration.sites.values()]


def _candidates(calibration: Calibration, budget: Budget, recipe: Recipe | None, proposals: int) -> list[Schedule]:
    record = calibration.profile
    if recipe is not None:
        found = [recipe.schedule(record.steps, site_choices(calibration))]
    elif isinstance(budget, Exact):
        found = [Schedule.exact(record.steps)]
    else:
        found = searching.search(record, budget, proposals=proposals)
    if not found or (not isinstance(budget, Exact) and all(s.flops_fraction >= 1.0 for s in found)):
        raise ValueError(
            f"{budget} leaves nothing to reuse for {calibration.name}: every schedule within it computes all steps. Ask for "
            "less quality, or pass budget=diffcache.Exact() if only exact passes are wanted."
        )
    graph = graph_fingerprint(calibration.captured.graph_module.graph)
    return [replace(schedule, clock=record.clock, fingerprint=graph) for schedule in found]


def _judge(
    calibration: Calibration, target: Target, candidates: Sequence[Schedule], prompts: int, options: dict[str, Any], report: Report
) -> CachedDenoiser:
    """Real generations under each proposal; the one nearest to the uncached results is kept."""
    best: tuple[float, CachedDenoiser] | None = None
    base = calibration.cached(candidates[0], **options)
    considered = []
    for number, schedule in enumerate(candidates):
        denoiser, errors = base.with_schedule(schedule), []
        for prompt in range(prompts):
            report(f"judge schedules of {calibration.name}", number * prompts + prompt, len(candidates) * prompts)
            errors.append(relative_error(target.generate(denoiser, prompt), calibration.references[prompt]))
        error = sum(errors) / len(errors)
        if not error == error:
            raise ValueError(f"schedule {schedule.origin} gives NaN on calibration prompts; this is a defect, please report it")
        considered.append({"origin": schedule.origin, "flops_fraction": schedule.flops_fraction, "error": error})
        if best is None or error < best[0]:
            best = (error, denoiser)
    report(f"judge schedules of {calibration.name}", len(candidates) * prompts, len(candidates) * prompts)
    assert best is not None
    error, chosen = best
    chosen.report = _report(calibration, target, chosen, error, considered)
    object.__setattr__(chosen, "profile", calibration.profile)
    return chosen


def _report(
    calibration: Calibration, target: Target, chosen: CachedDenoiser, error: float, considered: list[dict[str, Any]]
) -> CompileReport:
    schedule, record = chosen.schedule, calibration.profile
    predicted = None
    if schedule.rows and all(any(s.name == row.site for s in record.sites) for row in schedule.rows):
        predicted = max(searching.predicted_error(record, schedule), 0.0) ** 0.5
    counts = next(iter(chosen._programs.values())).counts(schedule)
    times = []
    for denoiser in (calibration.captured.denoiser, chosen):
        start = time.perf_counter()
        target.generate(denoiser, 0)
        times.append(time.perf_counter() - start)
    return CompileReport(
        calibration.name, schedule.origin, schedule.steps, len(schedule.computed_steps()), counts["nodes"], counts["hoisted"],
        max(counts["nodes"] - counts["hoisted"] - counts["kept"], 0) if schedule.rows else 0, counts["kept"],
        1.0 / schedule.flops_fraction, predicted, error, times[0] / times[1],
        tuple(row.site for row in schedule.rows), considered,
    )  # fmt: skip


def _uncached(target: Target, reason: str) -> CachedDenoiser:
    captured = Captured(target.denoiser, on_uncapturable="eager")
    captured.refused = reason
    schedule = Schedule.exact(1)
    return CachedDenoiser(captured, schedule, CallPattern((), None, None, 1), SiteFinder(captured), title=target.name)
