"""A calibrated denoiser as recipes see it."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from diffcache.measuring import Array, measure_changes
from diffcache.profiling import Calibration, Generate
from diffcache.recipes import Plan
from diffcache.report import relative_error
from diffcache.schedule import Schedule, SiteChoice
from diffcache.sites import Site
from diffcache.token_region import token_region
from diffcache.tracing.spec import TensorSpec
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
        return trajectory(calibration, generate, name, calibration.finder.first(name).residual)

    @functools.cache
    def refusal(name: str) -> str:
        site, finder = calibration.finder.first(name), calibration.finder
        try:
            token_region(calibration.captured.variants[0].graph_module, site, finder.flops_by_node())
        except ValueError as error:
            return str(error)
        return ""

    @functools.cache
    def tokens(name: str) -> frozenset[int]:
        values = calibration.finder.first(name).values
        specs = [
            n.meta.get("val") for n in calibration.captured.variants[0].graph_module.graph.nodes if n.name in values
        ]
        return frozenset(spec.shape[1] for spec in specs if isinstance(spec, TensorSpec) and len(spec.shape) > 2)

    total = calibration.profile.total_flops
    run = generate or _nothing

    @functools.cache
    def measured(names: tuple[str, ...], how: str, gaps: int, raw: bool) -> dict[str, Array]:
        return measure_changes(calibration, run, prompts, names, how, gaps, raw)

    return Plan(
        calibration.profile.steps,
        tuple(sites.values()),
        calibration.profile.clock,
        calibration.profile,
        find=lambda names: [_choice(calibration.finder.first(name), total) for name in names],
        measure_with=None if generate is None else measured,
        error_of=None if generate is None else error,
        refusal_of=refusal,
        trajectory_of=None if generate is None else values,
        tokens_of=tokens,
    )


def site_choices(calibration: Calibration) -> Sequence[SiteChoice]:
    """What recipes choose from: every site of the capture."""
    total = calibration.profile.total_flops
    return [_choice(site, total) for site in calibration.finder.everywhere()]


def _choice(site: Site, total: float) -> SiteChoice:
    """What recipes need to know of a site; ``total`` is the FLOPs of one call."""
    return SiteChoice(
        site.name,
        site.residual,
        site.flops_saved / total,
        site.role,
        site.depth,
        site.blocks,
        site.kind,
        site.level,
        site.side,
    )


def _nothing(denoiser: nn.Module, index: int) -> Tensor:
    raise AssertionError("a plan without generations")
