"""Layer-adaptive caching: which layers run is told by a probe, by each layer for itself, or by a router."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from diffcache import planners, planning_tables
from diffcache.recipes.base import Array, GateSpec, Part, Plan, Predict, Recipe, method
from diffcache.recipes.picks import between, every_one, modules, profiled
from diffcache.recipes.static import at
from diffcache.recipes.timewise import forced
from diffcache.schedule import SiteChoice


@method("Block Caching", 2023, "layer-adaptive", "arXiv 2312.03209", "1.5 to 1.8x on LDM and EMU")
def block_caching(threshold: float = 0.3) -> Recipe:
    """Each block is computed again when its changes since then, ``|C_s - C_{s-1}|_1 / |C_s|_1``, add up to a threshold.

    The changes are measured in calibration, so the table is fixed. The learned scale and shift are left out.
    """
    blocks = every_one("block")

    def computed(plan: Plan, site: SiteChoice) -> Sequence[int]:
        changes = plan.measure([other.name for other in blocks(plan)], "l1_of_new", raw=True)[site.name][:, :, 0]
        return planners.block_caching([0.0, *np.mean(changes[:, 1:], axis=0)], threshold=threshold)

    return Recipe(parts=(Part(sites=blocks, when=computed),))


# the changes below which each interval holds, as published for that number of steps
CODEBOOKS = {
    100: ((0.03, 0.05, 0.07, 0.09, 0.11), (12, 10, 8, 6, 4), 3),
    30: ((0.08, 0.16, 0.24, 0.32, 0.40), (6, 5, 4, 3, 2), 1),
}


@method("AdaCache", 2024, "layer-adaptive", "arXiv 2411.02397", "Open-Sora 720p 4.7x")
def adacache() -> Recipe:
    """How much the modules changed per step looks up in a codebook how long they are kept.

    The nearer of the two published codebooks (30 and 100 steps) is taken; motion regularisation is left out.
    """

    def gate(plan: Plan, site: SiteChoice) -> GateSpec:
        limits, intervals, otherwise = CODEBOOKS[min(CODEBOOKS, key=lambda steps: abs(steps - plan.steps))]
        options = {"limits": list(limits), "intervals": list(intervals), "otherwise": otherwise}
        return GateSpec("codebook", options)

    return Recipe(parts=(Part(sites=modules(), when=forced(1), gate=gate),))


@method("FBCache, first-block cache", 2024, "layer-adaptive", "ParaAttention", "FLUX 1.55x")
def fbcache(threshold: float = 0.08, warm_up: int = 1) -> Recipe:
    """The blocks after the first are reused while its residual has changed by less than a threshold.

    Less than, as in ParaAttention, where it comes from; the hook in diffusers also reuses at equality.
    """
    return dbcache(front=1, back=0, threshold=threshold, warm_up=warm_up)


@method("DBCache", 2025, "layer-adaptive", "cache-dit", "FLUX 2.66x, with TaylorSeer 3.94x")
def dbcache(
    front: int = 8,
    back: int = 0,
    threshold: float = 0.08,
    warm_up: int = 8,
    max_skips: int = 0,
    max_cached: int = 0,
    max_total: float = 0.0,
    order: int = 0,
    mask: Sequence[int] | None = None,
    static: bool = False,
    warm_up_interval: int = 1,
) -> Recipe:
    """The blocks between the first ``front`` and last ``back`` are forecast while the front residual changes little.

    Computed: every ``warm_up_interval``-th of the first ``warm_up`` steps, or where a ``mask`` has a one for the step;
    with ``static`` nothing else. Limits of zero are none: forecasts in a row, forecasts of a generation, and the sum of
    all changes that were compared. ``order`` 1 and more forecasts by TaylorSeer in place of reuse.
    """
    if static and mask is None:
        raise ValueError("dbcache(static=True) follows a mask alone; give mask=[1, 1, 0, ...] with a number per step")
    limits = {"max_since": max_skips, "max_forecasts": max_cached, "max_total": max_total}
    gate = GateSpec("change", {"threshold": threshold, "probe": f"blocks[:{front}]", **limits})
    predictor = Predict("taylor", {"order": order}) if order else Predict()
    sites = between(front, -back or None)
    # a mask ends the warm-up at its first zero: until then it computes by itself
    when = forced(warm_up, interval=warm_up_interval) if mask is None else at("mask", bits=tuple(mask))
    return Recipe(parts=(Part(sites=sites, when=when, gate=None if static else gate, predictor=predictor),))


@method("DBPrune", 2025, "layer-adaptive", "cache-dit")
def dbprune(threshold: float = 0.05, warm_up: int = 1) -> Recipe:
    """Each block adds what it added last while its own input changes by less than a threshold since it was computed."""

    def gate(plan: Plan, site: SiteChoice) -> GateSpec:
        path = site.name.partition(":")[2]
        return GateSpec("change", {"threshold": threshold, "probe": f"input:{path}"})

    return Recipe(parts=(Part(sites=every_one("block"), when=forced(warm_up), gate=gate),))


@method("Foresight", 2025, "layer-adaptive", "arXiv 2506.00329", "CogVideoX 1.46x PSNR 34.8, Wan 2.23x")
def foresight(warm_up: float = 0.15, interval: int = 2, gamma: float = 0.5) -> Recipe:
    """Each block is reused every other step while its drift stays below a share of what it was in the warm-up."""

    def first(plan: Plan) -> int:
        return max(3, round(warm_up * plan.steps))

    def gate(plan: Plan, site: SiteChoice) -> GateSpec:
        options = {"warm_up": first(plan), "interval": interval, "gamma": gamma, "block": site.name}
        return GateSpec("drift", options)

    early = Part(sites=every_one("block"), when=lambda plan, site: range(first(plan)), gate=gate)
    return Recipe(parts=(early,))


@method("BWCache", 2025, "layer-adaptive", "arXiv 2509.13789", "Wan 2.0x PSNR 25.9, Hunyuan 2.6x")
def bwcache(threshold: float = 0.15, hold: float = 0.1) -> Recipe:
    """All blocks are reused for ``hold`` of the steps when their mean change is below a threshold."""

    def gate(plan: Plan, site: SiteChoice) -> GateSpec:
        return GateSpec("block_change", {"threshold": threshold, "hold": max(1, round(hold * plan.steps))})

    def ends(plan: Plan, site: SiteChoice) -> Collection[int]:
        return forced(2, max(1, round(hold * plan.steps / 2)))(plan, site)

    return Recipe(parts=(Part(sites=every_one("block"), when=ends, gate=gate),))


@method("Learning-to-Cache", 2024, "layer-adaptive", "arXiv 2406.01733", "U-ViT-H/2: 47 % of the work")
def learning_to_cache(share: float = 0.5) -> Recipe:
    """A fixed mask says which modules are reused at every second step, so that ``share`` of their FLOPs is left out.

    The paper trains a router for each module and step. Here the same mask follows from the calibration in closed form:
    the modules with the least squared error of the result for the FLOPs they save.
    """
    return _routed(share, sensitive=False)


@method("HarmoniCa", 2024, "layer-adaptive", "arXiv 2410.01723", "PixArt-alpha 2.07x")
def harmonica(share: float = 0.5) -> Recipe:
    """Learning-to-Cache whose errors are weighed by what they do to the final result, which calibration measures."""
    return _routed(share, sensitive=True)


def _routed(share: float, sensitive: bool) -> Recipe:
    pick = profiled(modules())

    def computed(plan: Plan, site: SiteChoice) -> Sequence[int]:
        assert plan.profile is not None
        sites = list(pick(plan))
        records = [plan.profile.site(other.name) for other in sites]
        weights = [list(record.sensitivity) for record in records] if sensitive else None
        errors = planning_tables.step_errors([record.gram for record in records], weights)
        mask = planners.routers(errors, [record.flops_saved for record in records], share=share)
        return [step for step, reused in enumerate(mask[sites.index(site)]) if not reused]

    return Recipe(parts=(Part(sites=pick, when=computed),))


@method("LazyDiT", 2024, "layer-adaptive", "AAAI 2025", "up to half of the modules left out")
def lazydit(laziness: float = 0.5, ridge: float = 1.0, max_skips: int = 1) -> Recipe:
    """Each module is reused where a linear function of its input, averaged over tokens, is positive.

    The paper trains that function with the model. Here it is a ridge regression on how much the module's output changed
    from step to step in calibration: positive where it changed less than in ``laziness`` of all modules and steps. Such
    a label speaks of one step, so there are at most ``max_skips`` in a row (0: any number).
    """
    pick = modules()

    def gate(plan: Plan, site: SiteChoice) -> GateSpec:
        names = [other.name for other in pick(plan)]
        probes = [f"input:{name.partition(':')[2]}" for name in names]
        changes = plan.measure(names, "l2", raw=True)
        limit = float(np.nanquantile([changes[name] for name in names], laziness))
        probe = probes[names.index(site.name)]
        inputs = plan.measure(probes, "pooled")[probe][:, 1:]  # nothing can be reused at the first step
        weights, bias = _fitted_plane(inputs, changes[site.name][:, 1:, 0], limit, ridge)
        return GateSpec("linear", {"weights": weights, "bias": bias, "probe": probe, "max_since": max_skips})

    return Recipe(parts=(Part(sites=pick, when=forced(1), gate=gate),))


def _fitted_plane(inputs: Array, changes: Array, limit: float, ridge: float) -> tuple[list[float], float]:
    """Weights and bias of ``log(limit / change)`` over inputs ``[streams, steps, channels]``."""
    flat = inputs.reshape(-1, inputs.shape[-1])
    target = np.log((limit + 1e-12) / (changes.ravel() + 1e-12))
    mean, spread = flat.mean(axis=0), flat.std(axis=0) + 1e-6
    scaled = (flat - mean) / spread
    inner = scaled @ scaled.T + ridge * flat.shape[1] * np.eye(len(flat))
    weights = scaled.T @ np.linalg.solve(inner, target - target.mean()) / spread
    return [float(weight) for weight in weights], float(target.mean() - weights @ mean)
