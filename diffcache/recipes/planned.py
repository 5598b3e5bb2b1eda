"""Planned caching: the steps to compute are chosen by a path through calibration's errors, or by trying them out.

All take the share of steps to compute, a site and a predictor: the papers put their schedules under other methods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from diffcache import direct_search, planners, planning_tables, predictors
from diffcache.cells import COMPUTE, Forecast
from diffcache.profile_record import SiteProfile
from diffcache.recipes.base import Part, Plan, Predict, Recipe, When, method
from diffcache.recipes.picks import one
from diffcache.schedule import Row, SiteChoice

Planner = Callable[[Plan, SiteProfile, int], Sequence[int]]


def by(planner: Planner, share: float) -> When:
    """The steps that a planner chooses from what calibration measured of the site."""

    def computed(plan: Plan, site: SiteChoice) -> Sequence[int]:
        if plan.profile is None:
            raise ValueError("this recipe plans on what calibration measures; use diffcache.compile")
        return planner(plan, plan.profile.site(site.name), count_of(plan, share))

    return computed


def count_of(plan: Plan, share: float) -> int:
    """How many steps a share of them is. Raises ValueError for a share outside (0, 1]."""
    if not 0 < share <= 1:
        raise ValueError(f"a share of the steps lies in (0, 1], got {share}")
    return max(1, round(share * plan.steps))


def _planned(planner: Planner, share: float, site: str, predictor: Predict) -> Recipe:
    return Recipe(parts=(Part(sites=one(site), when=by(planner, share), predictor=predictor),))


@method("CEM", 2026, "hybrid", "ICLR 2026", "TaylorSeer on FLUX ImageReward .941 to .981")
def cem(share: float = 0.3, site: str = "stack", order: int = 1) -> Recipe:
    """The path with the least cumulative cosine distance, gaps near the even ones; forecast by TaylorSeer."""

    def plan_it(plan: Plan, record: SiteProfile, count: int) -> Sequence[int]:
        distances = planning_tables.cosine_distances(record.gram, longest=10)
        return planners.cem(distances, computed=count, spread=3)

    return _planned(plan_it, share, site, Predict("taylor", {"order": order}))


@method("DPCache", 2026, "hybrid", "arXiv 2602.22654", "FLUX 3.54x ImageReward 1.007")
def dpcache(share: float = 0.3, site: str = "stack", order: int = 1, first: int = 3) -> Recipe:
    """Dynamic programming over forecast errors; a gap's cost depends on the computed step before it too."""

    def plan_it(plan: Plan, record: SiteProfile, count: int) -> Sequence[int]:
        costs = planning_tables.forecast_costs(record.gram, "taylor", order=order)
        return planners.dp_cache(costs, computed=count, first=min(first, count))

    return _planned(plan_it, share, site, Predict("taylor", {"order": order}))


@method("LeMiCa", 2025, "static", "NeurIPS 2025", "Open-Sora 2.44x, CogVideoX 1.72x PSNR 35.9")
def lemica(share: float = 0.4, site: str = "stack") -> Recipe:
    """The path whose worst gap is least bad, then its second worst.

    A gap costs the error of the values reused in it, weighed by what an error at each step does to the result; the
    paper runs a generation for every gap instead.
    """

    def plan_it(plan: Plan, record: SiteProfile, count: int) -> Sequence[int]:
        return planners.lemica(planning_tables.reuse_costs(record.gram, list(record.sensitivity)), computed=count)

    return _planned(plan_it, share, site, Predict())


@method("CacheQuant", 2025, "static", "arXiv 2503.01323", "SD 5.18x with weights of a quarter")
def cachequant(share: float = 0.4, site: str = "stack") -> Recipe:
    """Steps grouped so that the squared error within groups is least. The part about quantisation is left out."""

    def plan_it(plan: Plan, record: SiteProfile, count: int) -> Sequence[int]:
        return planners.shortest_path(planning_tables.reuse_costs(record.gram), computed=count)

    return _planned(plan_it, share, site, Predict())


@method("OmniCache", 2025, "hybrid", "arXiv 2508.16212", "2 to 2.5x on Open-Sora, Latte")
def omnicache(share: float = 0.45, site: str = "stack") -> Recipe:
    """Compute where the sampling path bends most, seen in the output. Its noise filter is not published."""

    def plan_it(plan: Plan, record: SiteProfile, count: int) -> Sequence[int]:
        assert plan.profile is not None
        output = plan.profile.site(one("output")(plan)[0].name)
        return planners.omni_cache(list(planning_tables.path_curvature(output.gram)), computed=count)

    return _planned(plan_it, share, site, Predict())


@method("InvarDiff", 2025, "static", "arXiv 2512.05134", "2 to 3x on FLUX and DiT")
def invardiff(share: float = 0.5, site: str = "stack", longest: int = 4) -> Recipe:
    """Reuse where the change lies in the lowest ``1 - share`` of all changes."""

    def plan_it(plan: Plan, record: SiteProfile, count: int) -> Sequence[int]:
        return planners.below_quantile(planning_tables.reuse_errors(record.gram, longest=longest), share=1 - share)

    return _planned(plan_it, share, site, Predict())


@method("ERTACache", 2025, "static", "ICLR 2026", "Wan 2.17x PSNR 23.8")
def ertacache(limit: float = 0.1, max_skips: int = 3, site: str = "stack") -> Recipe:
    """Reuse where calibration found a change of at most ``limit``. Its correction of the step size is the sampler's."""

    def computed(plan: Plan, choice: SiteChoice) -> Sequence[int]:
        changes = plan.measure([choice.name], "l1")[choice.name][:, 1:, 0].mean(axis=0)
        return planners.below([0.0, *changes], limit=limit, max_skips=max_skips)

    return Recipe(parts=(Part(sites=one(site), when=computed),))


# -- by trying them out ----------------------------------------------------------------------------------------------


def _tried(search: Callable[..., Any], share: float, site: str, predictor: Predict, **options: Any) -> Recipe:
    def computed(plan: Plan, choice: SiteChoice) -> Sequence[int]:
        def loss(steps: Sequence[int]) -> float:
            part = Part(sites=lambda plan: [choice], when=lambda plan, site: steps, predictor=predictor)
            return plan.error(Recipe(parts=(part,)).schedule(plan)) ** 2

        return search(loss, steps=plan.steps, computed=count_of(plan, share), **options)

    return Recipe(parts=(Part(sites=one(site), when=computed, predictor=predictor),))


@method("BudCache", 2026, "static", "arXiv 2606.13496", "FLUX 2.51x LPIPS .176")
def budcache(share: float = 0.4, site: str = "stack", iterations: int = 60, max_trials: int = 120) -> Recipe:
    """Simulated annealing over which steps are computed, then hill climbing; every trial is a real generation."""
    options = {"iterations": iterations, "max_trials": max_trials}
    return _tried(direct_search.budcache, share, site, Predict(), **options)


@method("Golden path (GPH)", 2026, "static", "Golden-Path-Hypothesis", "one table within .5 dB of the best per prompt")
def golden_path(share: float = 0.4, site: str = "stack", iterations: int = 60, max_trials: int = 120) -> Recipe:
    """The same search from the temperature that its own first moves suggest; first steps and last always computed."""
    options = {"iterations": iterations, "max_trials": max_trials}
    return _tried(direct_search.golden_path, share, site, Predict(), **options)


@method("ECAD", 2025, "static", "arXiv 2506.15682")
def ecad(share: float = 0.4, site: str = "stack", population: int = 8, generations: int = 6) -> Recipe:
    """Evolution of tables for all budgets at once; the best with at most this share of computed steps is taken."""

    def evolved(loss: Callable[[Sequence[int]], float], steps: int, computed: int) -> Sequence[int]:
        front = direct_search.evolve(loss, steps, population=population, generations=generations)
        fitting = [found for size, found in front.items() if size <= computed] or [front[min(front)]]
        return min(fitting, key=lambda found: found[1])[0]

    return _tried(evolved, share, site, Predict())


@method("ProCache", 2025, "static", "arXiv 2512.17298", "DiT 2.90x FID 2.96")
def procache(share: float = 0.4, site: str = "stack", count: int = 5) -> Recipe:
    """The best of a few random patterns whose gaps never grow. Its selective tokens: ``procache_tokens``."""

    def sampled(loss: Callable[[Sequence[int]], float], steps: int, computed: int) -> Sequence[int]:
        patterns = direct_search.sample_patterns(steps, computed=computed, count=count)
        return min(patterns, key=lambda pattern: loss(tuple(pattern)))

    return _tried(sampled, share, site, Predict())


@method("OTCache", 2026, "static", "arXiv 2606.31026", "FLUX 4.5x, Qwen-Image 4.7x")
def otcache(share: float = 0.3, site: str = "stack", most: float = 0.6, least: float = 0.15) -> Recipe:
    """Between a plan for a large budget and one for a tiny one: computed steps interpolated as quantiles."""

    def plan_it(plan: Plan, record: SiteProfile, count: int) -> Sequence[int]:
        costs = planning_tables.reuse_costs(record.gram, list(record.sensitivity))
        large = planners.shortest_path(costs, computed=max(count, count_of(plan, most)))
        tiny = planners.shortest_path(costs, computed=min(count, count_of(plan, least)))
        return direct_search.interpolate(large, tiny, count, plan.steps)

    return _planned(plan_it, share, site, Predict())


@method("MeanCache", 2026, "predictive", "arXiv 2601.19961", "FLUX 2.91x LPIPS .142, Qwen-Image 3.60x LPIPS .113")
def meancache(share: float = 0.4, power: float = 4.0, first: int = 3) -> Recipe:
    """The output goes on with the mean velocity of a look-back whose length is chosen per gap.

    ``v = v_0 - JVP (sigma_{i+1} - sigma_i)`` on the sampler's clock; the steps are the shortest path of ``cost^power``.
    """

    def rows(plan: Plan) -> Sequence[SiteChoice]:
        return one("output")(plan)

    return Recipe(parts=(MeanVelocity(sites=rows, share=share, power=power, first=first),))


@dataclass(frozen=True, kw_only=True)
class MeanVelocity(Part):
    """A part whose weights build on one another over a gap, so that they are made for the whole schedule at once."""

    share: float
    power: float
    first: int

    def _row(self, plan: Plan, site: SiteChoice, title: str) -> Row:
        if plan.profile is None or len(plan.clock) != plan.steps:
            raise ValueError(f"{title} needs a calibrated denoiser with a clock; use diffcache.compile")
        # after the last step the sampler arrives at zero
        times = [*plan.clock, 0.0]
        count = max(self.first + 1, count_of(plan, self.share))
        costs = planning_tables.mean_velocity_costs(plan.profile.site(site.name).gram, times)
        computed, back = planners.mean_cache(costs, computed=count, power=self.power, first=self.first)
        made = predictors.mean_velocity_weights(computed, times, back)
        cells = [
            COMPUTE if s in computed else Forecast(tuple(made[s][0]), tuple(made[s][1])) for s in range(plan.steps)
        ]
        return Row(site.name, site.residual, tuple(cells))
