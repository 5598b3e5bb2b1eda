"""Methods about guidance: the unconditional branch is guessed from the conditional one, or folded into it.

They need a denoiser whose calibration shows two branches, in two calls a step or as the halves of one.
"""

from __future__ import annotations

from collections.abc import Sequence

from diffcache import when
from diffcache.cells import GateSpec
from diffcache.guidance import Guidance
from diffcache.recipes.base import Part, Plan, Recipe, method
from diffcache.recipes.picks import every_one, if_any
from diffcache.recipes.static import fastercache
from diffcache.schedule import SiteChoice


@method("T-GATE", 2024, "static", "arXiv 2404.02747", "SDXL 53.2 to 31.6 s, PixArt-alpha 61.5 to 36.7 s")
def t_gate(gate: float = 0.4, warm_up: int = 2, before: int = 5, after: int = 1, fold: bool = True) -> Recipe:
    """Cross-attention is kept from the gate step on, as the mean of both branches; self-attention pauses before it.

    After ``gate`` of the steps guidance is folded to the conditional branch. Until then self-attention is computed in
    the first ``warm_up`` steps and every ``before``-th, afterwards every ``after``-th. ``fold=False`` is for denoisers
    without guidance.
    """

    def step(plan: Plan) -> int:
        return max(1, round(gate * plan.steps))

    def early(plan: Plan, site: SiteChoice) -> Sequence[int]:
        return range(step(plan))

    def phases(plan: Plan, site: SiteChoice) -> Sequence[int]:
        return when.two_phases(plan.steps, gate=step(plan), warm_up=warm_up, before=before, after=after)

    cross = Part(sites=every_one("attention", kinds=("cross",)), when=early)
    own = Part(sites=if_any(every_one("attention", kinds=("self", "spatial", "temporal"))), when=phases)

    def folded(plan: Plan) -> Guidance:
        return Guidance("fold", tuple(range(step(plan))), history="mean")

    return Recipe(parts=(cross, own), guidance=folded if fold else None)


@method("FasterCache", 2024, "static", "arXiv 2410.19355", "Vchitect-2.0 1.67x")
def fastercache_guided(
    interval: int = 2,
    guidance_interval: int = 5,
    guidance_start: float = 0.35,
    boost: float = 1.1,
    split: float = 0.9,
    bands: bool = True,
) -> Recipe:
    """Attention as ``fastercache``, and the unconditional branch from the conditional one plus their last difference.

    From ``guidance_start`` of the steps on, both run only at multiples of ``guidance_interval``. The difference's low
    frequencies count ``boost`` times until ``split`` of the steps, then its high ones; ``bands=False`` leaves them
    alone, which sequences of tokens need.
    """

    def guessed(plan: Plan) -> Guidance:
        start = max(1, round(guidance_start * plan.steps))
        computed = [step for step in range(plan.steps) if step < start or step % guidance_interval == 0]
        pairs = [(boost, 1.0) if step < split * plan.steps else (1.0, boost) for step in range(plan.steps)]
        return Guidance("difference", tuple(computed), bands=tuple(pairs) if bands else ())

    return Recipe(parts=fastercache(interval).parts, guidance=guessed)


@method("DynCFGCache (PromptTea)", 2025, "timestep-adaptive", "arXiv 2507.06739", "Wan2.1 2.79x with its other parts")
def dyncfgcache(threshold: float = 0.1, max_skips: int = 5) -> Recipe:
    """The unconditional branch is guessed while its difference to the conditional one changes little in a step."""
    gate = GateSpec("guidance_change", {"budget": threshold, "max_since": max_skips})
    return Recipe(guidance=Guidance("difference", (0,), gate))


@method("Adaptive Guidance", 2023, "timestep-adaptive", "arXiv 2312.12487", "25 % fewer evaluations")
def adaptive_guidance(similarity: float = 0.99) -> Recipe:
    """Guidance ends for good at the first step after which both branches point the same way."""
    gate = GateSpec("guidance_agreement", {"similarity": similarity})
    return Recipe(guidance=Guidance("fold", (0,), gate))
