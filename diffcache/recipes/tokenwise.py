"""Token-wise caching: between the steps that are computed in full, a few tokens of each layer are."""

from __future__ import annotations

from collections.abc import Sequence

from diffcache.recipes.base import Part, Plan, Predict, Recipe, When, method
from diffcache.recipes.picks import every_one, if_any, modules, one
from diffcache.recipes.static import at
from diffcache.recipes.tokens import Share, Tokens, every_second
from diffcache.schedule import SiteChoice

SELF = ("self", "joint", "spatial", "mixed", "")


def attention_beside(plan: Plan, site: SiteChoice) -> str:
    """The attention of a feed-forward's own block on the same tokens, by its place in the model; "" for none.

    Two streams may go through attention apart and through a feed-forward as one sequence.
    """
    if site.role != "feedforward":
        return ""
    block, tokens = _block(site), set(plan.tokens(site.name))
    beside = (other for other in plan.sites if other.role == "attention" and other.kind in SELF)
    alike = (other.name for other in beside if _block(other) == block and tokens <= set(plan.tokens(other.name)))
    return next(alike, "")


def _block(site: SiteChoice) -> str:
    """The path of the module that a child is in."""
    return site.name.partition(":")[2].rpartition(".")[0]


def _share(share: float, step_weight: float, layer_weight: float, module: float) -> Share:
    """ToCa's keep ratio: more at later steps, in the first layers, and in modules that count for more."""

    def at_step(plan: Plan, site: SiteChoice, step: int) -> float:
        late = 1.0 - step_weight + 2.0 * step_weight * step / plan.steps
        deep = max(site.depth, 0) / max(site.blocks - 1, 1)
        return share * module * late * (1.0 + layer_weight - 2.0 * layer_weight * deep)

    return at_step


def _shorter_later(interval: int, weight: float) -> When:
    """ToCa's interval: ``interval / f`` steps with ``f = 1 - weight + 2 weight t``, the time ``t`` from 1 to 0."""

    def computed(plan: Plan, site: SiteChoice) -> Sequence[int]:
        found = [0]
        for step in range(1, plan.steps):
            factor = 1.0 - weight + 2.0 * weight * (1.0 - step / plan.steps)
            if step - found[-1] >= max(1, round(interval / factor)):
                found.append(step)
        return found

    return computed


@method("ToCa", 2024, "hybrid", "arXiv 2410.05317", "PixArt 1.93x, Open-Sora 2.36x, DiT 2.3x")
def toca(
    interval: int = 4,
    share: float = 0.1,
    interval_weight: float = 0.0,
    step_weight: float = 0.4,
    layer_weight: float = 0.8,
    module_weight: float = 2.5,
    module_share: float = 0.6,
    staleness: float = 0.25,
    bonus: float = 0.6,
    cell: int = 2,
) -> Recipe:
    """At steps in between ``share`` of the tokens, where a layer, a step or a kind of module counts for more also more.

    Factors of the DiT release: self-attention ``1 - (1 - module_share) module_weight`` (none by default: it is
    reused), others ``1 + module_share module_weight``; where there is cross-attention, it takes the smaller one and
    self-attention is reused. Tokens are scored by staleness (s3), a bonus for the best of each ``cell`` x ``cell`` of
    them where the latent shows how they lie (s4), and by the norm of what the block's attention gives each. That norm
    stands in for the sums over attention maps (s1, s2), which fused attention does not show.
    """
    less, more = 1.0 - (1.0 - module_share) * module_weight, 1.0 + module_share * module_weight
    score = {"interval": interval, "weight": staleness, "bonus": bonus, "cell": cell}
    computed = _shorter_later(interval, interval_weight)

    def part(role: str, kinds: Sequence[str], module: float) -> Part:
        keep = _share(share, step_weight, layer_weight, module)
        tokens = Tokens(keep, "toca", score, beside=attention_beside) if module > 0 else None
        return Part(sites=if_any(every_one(role, kinds=kinds)), when=computed, tokens=tokens)

    return Recipe(
        parts=(
            part("attention", (*SELF, "temporal"), less),
            part("attention", ("cross",), 1.0 - (1.0 - module_share)),
            Part(
                sites=every_one("feedforward"),
                when=computed,
                tokens=Tokens(_share(share, step_weight, layer_weight, more), "toca", score, beside=attention_beside),
            ),
        )
    )


@method("DuCa", 2024, "hybrid", "arXiv 2412.18911", "FLUX 3.45x ImageReward .990, DiT 2.48x FID 2.88")
def duca(interval: int = 5, share: float = 0.1, attention: bool = False) -> Recipe:
    """Steps in between go by turns: everything is reused (aggressive), or some tokens are computed (conservative).

    Tokens whose values in the block's attention are small come first: they draw much attention, and fused kernels can
    be used. Self-attention is reused at both kinds of steps, or with ``attention`` runs on such tokens too.
    """
    computed = at("every", interval=interval, warm_up=1, offset=-1)

    def tokens() -> Tokens:
        return Tokens(share, "attended_norm", when=every_second, beside=attention_beside)

    own = tokens() if attention else None
    return Recipe(
        parts=(
            Part(sites=if_any(every_one("attention", kinds=(*SELF, "temporal"))), when=computed, tokens=own),
            Part(sites=if_any(every_one("attention", kinds=("cross",))), when=computed),
            Part(sites=_with_attention, when=computed, tokens=tokens()),
        )
    )


def _with_attention(plan: Plan) -> Sequence[SiteChoice]:
    """Feed-forwards in whose block there is an attention on their tokens, to choose them by."""
    found = [site for site in every_one("feedforward")(plan) if attention_beside(plan, site)]
    if not found:
        raise ValueError(
            "no block here has an attention and a feed-forward on the same tokens; take toca, which then chooses by "
            f"the feed-forward's own values. The sites are: {plan.known()}"
        )
    return found


@method("ClusCa", 2025, "hybrid", "arXiv 2509.10312", "FLUX 4.5x ImageReward .995")
def clusca(
    interval: int = 5, warm_up: int = 3, clusters: int = 16, blend: float = 0.005, order: int = 1, seed: int = 0
) -> Recipe:
    """One token of each of K clusters is computed at steps in between, another each time; the others follow it.

    They are a Taylor series over what history holds, moved by ``blend`` (the paper's gamma) towards the mean of what is
    fresh in their cluster. K-means runs after each step that is computed in full.
    """
    predictor = Predict("taylor", {"order": order}) if order else Predict()
    tokens = Tokens(0.0, "cluster", {"seed": seed}, clusters=clusters, blend=blend)
    computed = at("every", interval=interval, warm_up=warm_up, offset=-1)
    return Recipe(parts=(Part(sites=modules(), when=computed, predictor=predictor, tokens=tokens),))


@method("ProCache, selective tokens", 2025, "hybrid", "arXiv 2512.17298", "DiT 2.90x FID 2.96, PixArt 1.96x")
def procache_tokens(interval: int = 4, share: float = 0.3, deepest: float = 0.25) -> Recipe:
    """Every second step of a run that is not computed, the last layers compute the tokens that attention makes largest.

    ``deepest`` is the share of the layers that do. Steps in between are regular here; ``procache`` samples them.
    """
    computed = at("every", interval=interval, warm_up=1, offset=-1)

    def is_deep(site: SiteChoice) -> bool:
        return site.depth >= site.blocks - max(1, round(deepest * site.blocks))

    def split(deep: bool, role: str) -> Part:
        def pick(plan: Plan) -> Sequence[SiteChoice]:
            return [site for site in every_one(role)(plan) if is_deep(site) == deep]

        tokens = Tokens(share, "norm", when=every_second, beside=attention_beside) if deep else None
        return Part(sites=if_any(pick), when=computed, tokens=tokens)

    return Recipe(parts=tuple(split(deep, role) for role in ("attention", "feedforward") for deep in (False, True)))


@method("RAS, region-adaptive sampling", 2025, "hybrid", "arXiv 2502.10389", "SD3 2.36x, Lumina 2.51x")
def ras(
    share: float = 0.5, first: int = 4, resets: Sequence[int] = (12, 22), starvation: float = 0.1, site: str = "stack"
) -> Recipe:
    """All blocks run on the tokens whose prediction varies most; the others keep theirs, and stale keys and values.

    Scored is the deviation over channels of what the blocks add (``site``), not of the predicted noise itself, times
    ``exp(starvation * steps waited)``. The ``first`` steps and the ``resets`` (of 28 steps) are computed in full. Left
    out is what RAS does in the sampler: here every token takes the sampler's step with the noise that it has.
    """

    def computed(plan: Plan, choice: SiteChoice) -> Sequence[int]:
        again = {round(step * plan.steps / 28) for step in resets}
        return sorted({0, *range(min(first, plan.steps)), *(step for step in again if step < plan.steps)})

    tokens = Tokens(share, "deviation", {"starvation": starvation})
    return Recipe(parts=(Part(sites=one(site), when=computed, tokens=tokens),))


@method("FastCache, token reduction", 2025, "hybrid", "arXiv 2505.20353")
def fastcache_tokens(interval: int = 3, share: float = 0.3, staleness: float = 0.25, site: str = "stack") -> Recipe:
    """The blocks run on the tokens that moved most, ``|x_s - x_{s-1}|^2``, between the two newest values.

    A fixed share of the tokens in the place of a threshold, since a program has fixed shapes. Tokens that were not
    computed have not moved; what they have waited counts for them. The learned map for the others is left out.
    """
    score = {"interval": interval, "weight": staleness, "base": "change", "bonus": 0.0}
    computed = at("every", interval=interval, warm_up=2)
    return Recipe(parts=(Part(sites=one(site), when=computed, tokens=Tokens(share, "toca", score)),))
