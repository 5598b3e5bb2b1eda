"""Static caching: which steps and sites are reused is fixed before the first picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from diffcache import planners, when
from diffcache.recipes.base import Array, Part, Plan, Predict, Recipe, When, method
from diffcache.recipes.picks import between, blocks_of, every_one, if_any, modules, one, requested
from diffcache.schedule import SiteChoice


def at(rule: str, **options: object) -> When:
    """The steps that a rule of ``diffcache.when`` computes."""
    return lambda plan, site: when.RULES[rule](plan.steps, **options)


@method("DeepCache", 2023, "static", "arXiv 2312.00858", "SD 1.5 2.3x at CLIP -0.05")
def deepcache(interval: int = 3, branch: int = 0, centre: int | None = None, power: float = 1.4) -> Recipe:
    """Keep the deep feature below skip ``branch`` of a U-Net; the shallow blocks above it run at every step.

    Computed every ``interval``-th step, or as many steps spread as ``centre +- u^power`` around a centre step.
    Elsewhere than in a U-Net the stack's residual stands for the deep feature.
    """
    site = requested(f"deep[{branch}]", "stack")
    if centre is None:
        return Recipe(parts=(Part(sites=site, when=at("every", interval=interval)),))

    def around(plan: Plan, site: SiteChoice) -> Sequence[int]:
        count = max(1, plan.steps // interval)
        middle = min(centre, plan.steps - 1)
        return when.quadratic_centre(plan.steps, computed=count, centre=middle, power=power)

    return Recipe(parts=(Part(sites=site, when=around),))


@method("FasterDiffusion", 2023, "static", "arXiv 2312.09608", "SD 1.8x with decoders in parallel")
def faster_diffusion() -> Recipe:
    """Keep the encoder of a U-Net (all skips and what the middle hands up) between fixed key steps.

    Key steps of 50: 0, 1, 2, 3, 5, 10, 15, 25, 35. The parallel decoding of several steps and the injected noise are
    the sampler's and left out.
    """
    return Recipe(parts=(Part(sites=requested("encoder", "stack"), when=at("table", name="fasterdiffusion")),))


@method("FORA", 2024, "static", "arXiv 2407.01425", "DiT-XL/2 2.77x FID 3.55 (2.32)")
def fora(interval: int = 3) -> Recipe:
    """Every attention and feed-forward output is kept for ``interval`` steps."""
    return Recipe(parts=(Part(sites=modules(), when=at("every", interval=interval)),))


@method("Delta-DiT", 2024, "static", "arXiv 2406.01125", "PixArt 1.6x in 20 steps")
def delta_dit(interval: int = 2, boundary: float = 0.5, share: float = 0.5) -> Recipe:
    """Keep what a range of blocks adds: the rear ``share`` until ``boundary`` of the steps, then the front."""

    def early(plan: Plan, site: SiteChoice) -> Sequence[int]:
        edge = round(boundary * plan.steps)
        return sorted({*when.every(plan.steps, interval=interval), *range(edge, plan.steps)})

    def late(plan: Plan, site: SiteChoice) -> Sequence[int]:
        edge = max(1, round(boundary * plan.steps))
        return sorted({*range(edge), *(edge + s for s in when.every(plan.steps - edge, interval=interval))})

    def span(rear: bool) -> Part:
        def pick(plan: Plan) -> Sequence[SiteChoice]:
            blocks = blocks_of(plan)
            count = max(1, min(round(share * blocks), blocks - 1))
            return between(blocks - count, blocks)(plan) if rear else between(0, count)(plan)

        return Part(sites=pick, when=early if rear else late)

    return Recipe(parts=(span(rear=True), span(rear=False)))


@method("PAB, pyramid attention broadcast", 2024, "static", "arXiv 2408.12588", "Open-Sora 1.3x on one GPU")
def pab(spatial: int = 2, temporal: int = 4, cross: int = 6, low: float = 100.0, high: float = 800.0) -> Recipe:
    """Attention outputs are kept for as many calls as their kind changes slowly, while ``low < t < high`` (of 1000).

    Self and joint attention count as spatial.
    """

    kinds = ((spatial, ("spatial", "self", "joint", "mixed", "")), (temporal, ("temporal",)), (cross, ("cross",)))
    return Recipe(
        parts=tuple(
            Part(sites=if_any(every_one("attention", kinds=kind)), when=_within(interval, low, high))
            for interval, kind in kinds
        )
    )


def _within(interval: int, low: float, high: float) -> When:
    """Every ``interval``-th step while ``low < t < high`` (of 1000), and all others."""

    def computed(plan: Plan, site: SiteChoice) -> Sequence[int]:
        return when.in_times(plan.steps, times=_of_a_thousand(plan), interval=interval, low=low, high=high)

    return computed


def _of_a_thousand(plan: Plan) -> Sequence[float]:
    """The sampler's times on the scale from 1000 to 0."""
    if not plan.clock:
        return [1000.0 * (1 - step / plan.steps) for step in range(plan.steps)]
    return [1000.0 * time if max(plan.clock) <= 1.0 else time for time in plan.clock]


@method("SmoothCache", 2024, "static", "arXiv 2411.10510", "8 to 71 % faster on DiT, Open-Sora, Stable Audio")
def smoothcache(
    threshold: float = 0.15, longest: int = 3, far_end: bool = True, steps: Mapping[str, Sequence[int]] | None = None
) -> Recipe:
    """Each type of layer is kept while its error stays within a threshold: ``|F_s - F_{s-g}|_1 / |F_s|_1``.

    Calibration measures that table for gaps g up to ``longest``, averaged over the layers of a type and the prompts. As
    published only the ``far_end`` of a gap is asked, not the steps on the way. ``steps`` gives the computed steps of
    each type in place of all that: of a kind of attention ("self", "cross", ...), "attention" or "feedforward".
    """

    def computed(plan: Plan, site: SiteChoice) -> Sequence[int]:
        if steps is not None:
            return steps.get(site.kind, steps.get(site.role, range(plan.steps)))
        return planners.smooth_cache(layer_errors(plan, site, longest), threshold=threshold, far_end=far_end)

    return Recipe(parts=(Part(sites=modules(), when=computed),))


def layer_errors(plan: Plan, site: SiteChoice, longest: int) -> Array:
    """``[steps, longest + 1]``: SmoothCache's table of a site's type; infinite where there is no step s - g."""
    alike = [other.name for other in plan.sites if (other.role, other.kind) == (site.role, site.kind)]
    tables = plan.measure(alike, "l1_of_new", gaps=longest, raw=True)
    mean = np.mean([np.mean(table, axis=0) for table in tables.values()], axis=0)
    return np.pad(np.nan_to_num(mean, nan=np.inf), ((0, 0), (1, 0)))  # gaps count from 1


@method("FasterCache (attention)", 2024, "static", "arXiv 2410.19355", "Vchitect-2.0 1.67x with guidance")
def fastercache(interval: int = 2, weight: float = 0.5, low: float = -1.0, high: float = 681.0) -> Recipe:
    """Self-attention goes on from its last two computed values, ``F_0 + w (F_0 - F_1)``, while ``low < t < high``.

    Times are of 1000. Its other half, which guesses the unconditional branch, is no part of this.
    """
    predictor = Predict("ramp", {"low": weight, "high": weight}, history=2)
    kinds = ("spatial", "temporal", "self", "joint", "mixed", "")
    part = Part(sites=every_one("attention", kinds=kinds), when=_within(interval, low, high), predictor=predictor)
    return Recipe(parts=(part,))


@method("BlockDance", 2025, "static", "arXiv 2503.15927", "25 to 50 % faster")
def blockdance(interval: int = 2, start: float = 0.4, end: float = 0.95, share: float = 0.5) -> Recipe:
    """Keep the stream behind the shallow ``share`` of the blocks and run only the deeper ones."""

    def pick(plan: Plan) -> Sequence[SiteChoice]:
        blocks = blocks_of(plan)
        block = max(0, min(round(share * blocks), blocks - 1) - 1)
        return requested(f"prefix[{block}]")(plan)

    return Recipe(parts=(Part(sites=pick, when=at("in_share", interval=interval, start=start, end=end)),))


@method("FRDiff", 2023, "static", "arXiv 2312.03517", "1.76x")
def frdiff(interval: int = 2) -> Recipe:
    """Residual blocks keep their features for ``interval`` steps. The mixing of scores is left out."""
    return Recipe(parts=(Part(sites=every_one("block"), when=at("every", interval=interval)),))


@method("Step mask (cache-dit's SCM)", 2025, "static", "cache-dit")
def step_mask(
    bits: Sequence[int] | None = None, speed: str = "medium", front: int = 1, back: int = 0, order: int = 0
) -> Recipe:
    """Compute where the mask, or a preset ("slow", "medium", "fast", "ultra"), says so; else forecast."""
    computed = at("preset", speed=speed) if bits is None else at("mask", bits=tuple(bits))
    predictor = Predict("taylor", {"order": order}) if order else Predict()
    return Recipe(parts=(Part(sites=between(front, -back or None), when=computed, predictor=predictor),))


@method("Published step tables", 2026, "static", "methods of GPH, MeanCache, BudCache, DPCache, SeaCache")
def published_table(name: str, site: str = "stack", predictor: str = "reuse", order: int | None = None) -> Recipe:
    """Exactly the computed steps of a table in ``published_tables.TABLES``, resampled to another number of steps."""
    options = {} if order is None else {"order": order}
    return Recipe(parts=(Part(sites=one(site), when=at("table", name=name), predictor=Predict(predictor, options)),))


@method("ProfilingDiT", 2025, "hybrid", "arXiv 2504.03140", "Hunyuan 1.87x, Wan 2.01x")
def profiling_dit(share: float = 0.5) -> Recipe:
    """Runs of background blocks keep what they add between fixed key steps.

    The paper tells background blocks by attention masks; here they are the ``share`` of blocks whose residual changes
    least from step to step, measured in calibration.
    """

    def pick(plan: Plan) -> Sequence[SiteChoice]:
        blocks_of(plan)
        blocks = [site for site in every_one("block")(plan) if site.depth >= 0 and site.residual]
        changes = plan.measure([site.name for site in blocks], "l1")
        order = sorted(blocks, key=lambda site: float(np.nanmean(changes[site.name])))
        calm = sorted(site.depth for site in order[: max(1, round(share * len(order)))])
        runs = np.split(calm, np.flatnonzero(np.diff(calm) > 1) + 1)
        return [site for run in runs for site in between(int(run[0]), int(run[-1]) + 1)(plan)]

    return Recipe(parts=(Part(sites=pick, when=at("table", name="profilingdit")),))
