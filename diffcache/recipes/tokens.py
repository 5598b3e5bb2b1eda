"""The token axis of recipes: at some of the steps that are not computed in full, a few tokens are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from diffcache import predictors
from diffcache.cells import Online, Partial
from diffcache.schedule import SiteChoice
from diffcache.token_scores import what_it_looks_at


class Steps(Protocol):
    """What the axis looks at of a plan."""

    @property
    def steps(self) -> int: ...


When = Callable[[Any, SiteChoice, Sequence[int]], Collection[int]]  # (plan, site, computed steps) -> steps
Share = Callable[[Any, SiteChoice, int], float]  # (plan, site, step) -> share of the tokens


@dataclass(frozen=True)
class Tokens:
    """Which tokens of a site are computed where it is not computed in full, and when.

    ``share`` of them, or a function of (plan, site, step); where that comes to nothing the step is a forecast like
    others. ``score`` with ``options`` says which (see ``token_scores``); ``when`` names the steps among those that are
    not computed, by default all. Tokens in ``clusters`` share what is fresh among them as far as ``blend`` says.
    ``beside`` finds the site whose values tell the tokens ("" for the site's own).
    """

    share: float | Share = 0.0
    score: str = "norm"
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    when: When | None = None
    clusters: int = 0
    blend: float = 0.0
    beside: Callable[[Any, SiteChoice], str] | None = None

    def cells(self, plan: Steps, site: SiteChoice, computed: Sequence[int], others: Online) -> dict[int, Partial]:
        """The cells of the steps at which some tokens are computed; ``others`` forecasts the rest.

        Raises:
            ValueError: the score is unknown, or the rest is to be forecast by weights that are made from values.
        """
        if others.predictor in predictors.FROM_VALUES or others.view is not None:
            raise ValueError(
                f"predictor '{others.predictor}' makes weights from values or for parts of them; beside computed "
                f"tokens only weights from step numbers are possible: {sorted(predictors.PREDICTORS)}"
            )
        looks_at = what_it_looks_at(self.score, self.options)
        steps = range(plan.steps) if self.when is None else self.when(plan, site, computed)
        beside = "" if self.beside is None else self.beside(plan, site)
        found = {}
        for step in sorted(set(steps) - set(computed)):
            share = self.share(plan, site, step) if callable(self.share) else self.share
            if share <= 0 and not self.clusters:
                continue
            found[step] = Partial(
                max(0.0, min(share, 1.0)), self.score, self.options, others, self.clusters, self.blend, beside,
                looks=2 if "before" in looks_at else 1, attended="attended" in looks_at,
            )  # fmt: skip
        return found


def every_second(plan: Any, site: SiteChoice, computed: Sequence[int]) -> Collection[int]:
    """Every second step of each run that is not computed: the second, the fourth and so on."""
    return {step for step in range(plan.steps) if (step - max(c for c in computed if c <= step)) % 2 == 0}
