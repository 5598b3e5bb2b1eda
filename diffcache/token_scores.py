"""Which tokens of a site to compute: scores of tokens, the highest first, and the choice that follows from them.

A score is a pure function of a ``TokenView``: tensors in, float32 [batch, tokens] out, on the device of its inputs. It
waits for nothing, gives the same result at every run, and looks at no sample but its own.

To add one: write the function, decorate it with ``@token_score("name")``; tests over ``TOKEN_SCORES`` then cover it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

Score = Callable[..., torch.Tensor]

TOKEN_SCORES: dict[str, Score] = {}
_LOOKS_AT: dict[str, tuple[str, ...]] = {}


@dataclass(frozen=True)
class TokenView:
    """What a score may look at when tokens are chosen.

    Attributes:
        value: the site's newest value in history, [batch, tokens, channels].
        step: the step that tokens are chosen for.
        before: the value in history before that, or None.
        attended: the values that queries look at, [batch, heads, tokens, channels], or None.
        stale: for each token how many steps ago it was computed, [batch, tokens], or None.
        clusters: for each token the number of its cluster, from ``cluster_tokens``, [batch, tokens], or None.
        grid: (height, width) of the tokens where they are an image's in reading order, or None.
    """

    value: torch.Tensor
    step: int
    before: torch.Tensor | None = None
    attended: torch.Tensor | None = None
    stale: torch.Tensor | None = None
    clusters: torch.Tensor | None = None
    grid: tuple[int, int] | None = None


def token_score(name: str, looks_at: tuple[str, ...] = ()) -> Callable[[Score], Score]:
    """Register a score under ``name``. ``looks_at`` says that it needs "before" or "attended" of its view.

    Raises:
        ValueError: the name is taken.
    """

    def register(score: Score) -> Score:
        if name in TOKEN_SCORES:
            raise ValueError(f"token score '{name}' is registered already ({TOKEN_SCORES[name]}); choose another name")
        TOKEN_SCORES[name] = score
        _LOOKS_AT[name] = looks_at
        return score

    return register


def what_it_looks_at(name: str, options: Mapping[str, Any]) -> frozenset[str]:
    """What must be kept for a score: "before", "attended". Raises ValueError for an unknown name."""
    names = {name, options.get("base", name)}
    unknown = sorted(names - set(TOKEN_SCORES))
    if unknown:
        raise ValueError(f"unknown token scores {unknown}; known: {sorted(TOKEN_SCORES)}")
    return frozenset(what for each in names for what in _LOOKS_AT[each])


def score_tokens(name: str, view: TokenView, **options: Any) -> torch.Tensor:
    """Scores of the registered ``name``. Raises ValueError for an unknown name, unfit options, or a view without
    what the score looks at."""
    score = TOKEN_SCORES.get(name)
    if score is None:
        raise ValueError(f"unknown token score '{name}'; known: {sorted(TOKEN_SCORES)}. Register yours: @token_score")
    try:
        inspect.signature(score).bind(view, **options)
    except TypeError as error:
        raise ValueError(f"token score '{name}' takes {inspect.signature(score)}, got {options}: {error}") from None
    return score(view, **options)


def select_tokens(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` tokens of each sample with the highest scores, int64 [batch, count] in ascending order.

    Of equal scores the earlier token wins, on every device. Raises ValueError for a count that does not fit.
    """
    if not 1 <= count <= scores.shape[1]:
        raise ValueError(f"{count} of {scores.shape[1]} tokens are to be selected; expected one or more, and no more")
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return best.sort(dim=1).values


def aged(stale: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Staleness [batch, tokens] after a step that computed the ``tokens`` [batch, k]: zero for those, else one more."""
    return (stale + 1).scatter(1, tokens, 0)


def _needs(name: str, what: str, value: Any) -> Any:
    if value is None:
        raise ValueError(f"token score '{name}' looks at '{what}', which this view lacks; keep it for the site")
    return value


# -- scores -----------------------------------------------------------------------------------------------------------


@token_score("norm")
def norm(view: TokenView, *, largest: bool = True) -> torch.Tensor:
    """The norm of a token's value: tokens whose output is largest matter most (ProCache, 2025)."""
    size = view.value.float().norm(dim=-1)
    return size if largest else -size


@token_score("attended_norm", looks_at=("attended",))
def attended_norm(view: TokenView) -> torch.Tensor:
    """``1 - |v|`` of what attention takes from a token: small where it attracts much attention (DuCa, 2024).

    ``|v|`` is relative to the sample's largest. Needs no attention map, so fused attention kernels can be used.
    """
    size = _needs("attended_norm", "attended", view.attended).float().norm(dim=-1).mean(1)
    return 1 - size / size.amax(1, keepdim=True).clamp(min=1e-12)


@token_score("change", looks_at=("before",))
def change(view: TokenView) -> torch.Tensor:
    """``|x_s - x_{s-1}|^2``: tokens that moved most between the two newest values (FastCache, 2025)."""
    return (view.value - _needs("change", "before", view.before)).float().square().sum(-1)


@token_score("deviation")
def deviation(view: TokenView, *, starvation: float = 0.1) -> torch.Tensor:
    """How much a token's value varies over its channels, times ``exp(starvation * stale)`` (RAS, Liu et al. 2025)."""
    return view.value.float().std(dim=-1) * (starvation * _needs("deviation", "stale", view.stale)).exp()


@token_score("random")
def random(view: TokenView, *, seed: int = 0) -> torch.Tensor:
    """Tokens drawn anew at every step, the same for all samples: the baseline that a score has to beat."""
    batch, tokens = view.value.shape[:2]
    return _hashed(tokens, view.step, seed, view.value.device).float().div(2**32).expand(batch, tokens)


@token_score("cluster")
def cluster(view: TokenView, *, seed: int = 0) -> torch.Tensor:
    """One token of each cluster, another at every step; then a second of each, and so on (ClusCa, Zheng et al. 2025).

    Select as many as there are clusters, and blend with ``blend_clusters``.
    """
    clusters = _needs("cluster", "clusters", view.clusters)
    batch, tokens = clusters.shape
    drawn = _hashed(tokens, view.step, seed, clusters.device)
    order = drawn.sort(stable=True).indices.expand(batch, tokens)
    inside = clusters.gather(1, order)
    # a token's place among those of its cluster, in the drawn order: how often its number came before
    by_cluster = inside.sort(dim=1, stable=True)
    first = torch.searchsorted(by_cluster.values, by_cluster.values.contiguous())
    place = torch.arange(tokens, device=clusters.device) - first
    places = torch.empty_like(place).scatter(1, order.gather(1, by_cluster.indices), place)
    return -(places + drawn.double() / 2**32).float()


@token_score("toca")
def toca(
    view: TokenView, *, interval: int, weight: float = 0.25, bonus: float = 0.6, cell: int = 2, base: str = "norm"
) -> torch.Tensor:
    """A base score, more for what has waited long and for the best of its neighbours (ToCa, Zou et al. 2025).

    ``s3``: ``weight`` for each ``interval`` steps of staleness. ``s4``: ``bonus`` for the highest of each ``cell`` x
    ``cell`` tokens, where the view has a grid. The attention maps of ``s1`` and ``s2`` are not at hand in fused
    kernels; ``base`` stands in for them, scaled to unit length over the tokens.
    """
    scores = F.normalize(score_tokens(base, view), dim=-1)
    scores = with_staleness(scores, _needs("toca", "stale", view.stale), weight=weight, interval=interval)
    return scores if view.grid is None else with_spatial_bonus(scores, view.grid, cell=cell, bonus=bonus)


def with_staleness(scores: torch.Tensor, stale: torch.Tensor, *, weight: float, interval: int) -> torch.Tensor:
    """ToCa's ``s3``: scores and ``weight * stale / interval``."""
    if interval < 1:
        raise ValueError(f"staleness is counted in intervals of steps, got {interval}; expected one or more")
    return scores + weight * stale / interval


def with_spatial_bonus(
    scores: torch.Tensor, grid: tuple[int, int], *, cell: int = 2, bonus: float = 0.6
) -> torch.Tensor:
    """ToCa's ``s4``: ``bonus`` for the highest score of each ``cell`` x ``cell`` tokens, so that they spread out.

    Raises:
        ValueError: the grid has another number of tokens.
    """
    (height, width), (batch, tokens) = grid, scores.shape
    if height * width != tokens or cell < 1:
        raise ValueError(
            f"a grid of {grid} in cells of {cell} does not hold {tokens} tokens; give the tokens' own grid"
        )
    image = scores.reshape(batch, 1, height, width)
    right, below = -width % cell, -height % cell
    padded = F.pad(image, (0, right, 0, below), value=-torch.inf)
    _, where = F.max_pool2d(padded, cell, return_indices=True)
    wide = width + right
    marks = torch.zeros_like(padded).flatten(1).scatter(1, where.flatten(1), 1.0)
    marks = marks.reshape(batch, height + below, wide)[:, :height, :width].reshape(batch, tokens)
    return scores + bonus * marks


# -- clusters ---------------------------------------------------------------------------------------------------------


def cluster_tokens(
    value: torch.Tensor, count: int, *, iterations: int = 10, start: torch.Tensor | None = None
) -> torch.Tensor:
    """K-means over each sample's tokens: int64 [batch, tokens], numbers below ``count``.

    Made at computed steps (ClusCa, Zheng et al. 2025). A fixed number of iterations from tokens spread evenly, or from
    the clusters ``start`` of an earlier step; sums are matrix products, so that every run gives the same.

    Raises:
        ValueError: there are fewer tokens than clusters.
    """
    _batch, tokens, _ = value.shape
    if not 1 <= count <= tokens:
        raise ValueError(f"{tokens} tokens cannot be {count} clusters; expected one or more, and no more than tokens")
    points = value.float()
    spread = torch.arange(count, device=value.device) * tokens // count
    centres = points[:, spread]
    found = start if start is not None else _nearest(points, centres)
    for _ in range(iterations):
        members = F.one_hot(found, count).to(points.dtype).transpose(1, 2)  # [batch, count, tokens]
        size = members.sum(-1, keepdim=True)
        centres = torch.where(size > 0, members @ points / size.clamp(min=1), centres)
        found = _nearest(points, centres)
    return found


def _nearest(points: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """The nearest centre of each point, the first of equals."""
    distance = centres.square().sum(-1)[:, None] - 2 * points @ centres.transpose(1, 2)
    return distance.argmin(-1)


def _hashed(count: int, step: int, seed: int, device: torch.device) -> torch.Tensor:
    """Numbers below 2**32 that look drawn: integers only, so that every device gives the same."""
    low = 0xFFFFFFFF
    x = torch.arange(1, count + 1, device=device) * 0x9E3779B1 + ((step * 0x85EBCA77 + seed * 0xC2B2AE3D) & low)
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39), (15, 1)):
        x = x & low
        x = (x ^ (x >> shift)) * factor
    return x & low
