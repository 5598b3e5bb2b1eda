"""Predictive caching that treats parts of a value apart: frequency bands, a subspace, clusters of channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from diffcache.predictors.views import channel_view
from diffcache.recipes.base import Part, Plan, Predict, Recipe, method
from diffcache.recipes.picks import one
from diffcache.recipes.static import at
from diffcache.schedule import SiteChoice


def _viewed(interval: int, warm_up: int, predictor: Predict) -> Recipe:
    when = at("every", interval=interval, warm_up=warm_up, offset=-1)
    return Recipe(parts=(Part(sites=one("stack"), when=when, predictor=predictor),))


@method("FreqCa", 2025, "hybrid", "arXiv 2510.08669", "FLUX 4.99x, Qwen-Image 5.00x")
def freqca(
    interval: int = 6, warm_up: int = 3, cutoff: float = 0.1, transform: str = "dct", sigma: float = 0.5
) -> Recipe:
    """The stack's residual in two bands over the tokens: the low one is reused, the high one goes on by Hermite.

    ``transform`` is "dct" or "fft"; one residual is all that is kept, whatever the depth.
    """
    view = {
        "projection": "low_band",
        "options": {"cutoff": cutoff, "transform": transform},
        "inside": {"predictor": "reuse"},
    }
    return _viewed(interval, warm_up, Predict("hermite", {"order": 2, "sigma": sigma}, view=view))


@method("SVD-Cache", 2026, "predictive", "arXiv 2601.07396", "FLUX 5.55x, Hunyuan 5.00x")
def svdcache(interval: int = 5, warm_up: int = 3, rank: int = 16, order: int = 1) -> Recipe:
    """Within the leading subspace of the features a Taylor series, outside it reuse.

    The paper's basis is found offline; here it comes from the first computed value of each generation.
    """
    inside = {"predictor": "taylor", "options": {"order": order}}
    view = {"projection": "subspace", "options": {"rank": rank}, "inside": inside}
    return _viewed(interval, warm_up, Predict(view=view))


# what a cluster of channels may be forecast by; the first is that of the cell itself
RULES: tuple[Mapping[str, Any], ...] = (
    {"predictor": "reuse", "options": {}},
    {"predictor": "taylor", "options": {"order": 1}},
    {"predictor": "taylor", "options": {"order": 2}},
    {"predictor": "adams_bashforth", "options": {"order": 2}},
    {"predictor": "foca", "options": {}},
)


@method("HyCa", 2025, "hybrid", "arXiv 2510.04188", "FLUX 5.00x, Hunyuan 5.56x, Qwen-Image 6.24x")
def hyca(interval: int = 5, warm_up: int = 3, clusters: int = 8) -> Recipe:
    """Channels that move alike form clusters, and each is forecast by the rule that errs least on calibration."""

    def view(plan: Plan, site: SiteChoice) -> Any:
        return channel_view(torch.from_numpy(plan.trajectory(site.name)), RULES, clusters=clusters)

    return _viewed(interval, warm_up, Predict(view=view))
