"""Recipes: schedules by rule, without a profile; the published fixed schedules and the baselines.

Enters: the number of steps and the sites of the denoiser. Leaves: a Schedule. A recipe says which steps are computed;
the rest is shared. They are named in lower case because they are read as calls: ``recipes.uniform(interval=3)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from diffcache import predictors
from diffcache.schedule import COMPUTE, Cell, Forecast, Row, Schedule, SiteChoice


@dataclass(frozen=True, kw_only=True, repr=False)
class Recipe:
    """Which steps are computed is a subclass's rule; the others are forecast by one predictor at one site.

    ``site`` is the name of a site or a role ("stack", "output", "deepest"). ``order`` and ``options`` go to
    the predictor.
    """

    predictor: str = "reuse"
    order: int | None = None
    site: str = "stack"
    options: Mapping[str, float] = field(default_factory=dict, hash=False)

    def computed_steps(self, steps: int) -> Sequence[int]:
        """The steps to compute, of ``steps``; must contain step 0."""
        raise NotImplementedError

    def schedule(self, steps: int, sites: Sequence[SiteChoice]) -> Schedule:
        """The schedule for ``steps`` steps. Raises ValueError for a site or a step that does not exist."""
        site = _resolve(self.site, sites)
        computed = sorted(set(self.computed_steps(steps)))
        if not computed or computed[0] != 0 or computed[-1] >= steps:
            raise ValueError(
                f"{self} computes steps {computed} of {steps}; expected step 0 and steps up to {steps - 1}"
            )
        options = dict(self.options) if self.order is None else {**self.options, "order": self.order}
        cells: list[Cell] = []
        for step in range(steps):
            history = [made for made in reversed(computed) if made < step]
            cells.append(COMPUTE if step in computed else _forecast(self.predictor, history, step, options))
        row = Row(site.name, site.residual, tuple(cells))
        saved = site.flops_fraction_saved * (steps - len(computed)) / steps
        return Schedule(steps, (row,), origin=str(self), flops_fraction=1.0 - saved)

    def __repr__(self) -> str:
        """The call that makes this recipe, without what is left at its default."""
        given = [f"{item.name}={getattr(self, item.name)!r}" for item in fields(self) if self._is_set(item.name)]
        return f"{type(self).__name__}({', '.join(given)})"

    def _is_set(self, name: str) -> bool:
        # the fields of the rule itself are always worth saying
        shared: dict[str, object] = {"predictor": "reuse", "order": None, "site": "stack", "options": {}}
        return name not in shared or getattr(self, name) != shared[name]


@dataclass(frozen=True, kw_only=True, repr=False)
class uniform(Recipe):
    """Compute the first ``start`` steps, then every ``interval``-th (FORA, TaylorSeer, HiCache: the counter form)."""

    interval: int = 2
    start: int = 1

    def __post_init__(self) -> None:
        if self.interval < 1 or self.start < 1:
            raise ValueError(f"uniform needs interval >= 1 and start >= 1, got {self.interval} and {self.start}")

    def computed_steps(self, steps: int) -> Sequence[int]:
        """``s < start`` or ``(s - start + 1) mod interval == 0``."""
        return [*range(min(self.start, steps)), *range(self.start - 1, steps, self.interval)]


@dataclass(frozen=True, kw_only=True, repr=False)
class evenly(Recipe):
    """Compute ``computed`` steps, spaced as evenly as whole steps allow, the first one included."""

    computed: int = 8

    def computed_steps(self, steps: int) -> Sequence[int]:
        """``floor(i * steps / computed)``."""
        if not 1 <= self.computed <= steps:
            raise ValueError(f"evenly(computed={self.computed}) needs 1 to {steps} computed steps of {steps}")
        return [i * steps // self.computed for i in range(self.computed)]


@dataclass(frozen=True, kw_only=True, repr=False)
class steps(Recipe):
    """Compute exactly these steps: for schedules that a paper prints as a list."""

    computed: Sequence[int]

    def __post_init__(self) -> None:
        # a tuple keeps the recipe hashable whatever the caller wrote
        object.__setattr__(self, "computed", tuple(self.computed))

    def computed_steps(self, steps: int) -> Sequence[int]:
        """The list itself."""
        return self.computed


def _forecast(predictor: str, history: Sequence[int], step: int, options: Mapping[str, float]) -> Forecast:
    weights = predictors.weights(predictor, history, step, **options)
    # a zero weight would keep a tensor alive that adds nothing
    used = [(made, weight) for made, weight in zip(history, weights, strict=False) if weight != 0.0]
    return Forecast(tuple(made for made, _ in used), tuple(weight for _, weight in used))


# A denoiser without repeated blocks in a row (a U-Net) has no stack; its deep features are what published rules cache.
_ROLES = {"stack": ("stack", "deepest", "output"), "deepest": ("deepest",), "output": ("output",)}


def _resolve(wanted: str, sites: Sequence[SiteChoice]) -> SiteChoice:
    for site in sites:
        if site.name == wanted:
            return site
    for role in _ROLES.get(wanted, ()):
        for site in sites:
            if site.role == role:
                return site
    known = [f"{site.name} ({site.role})" if site.role else site.name for site in sites]
    raise ValueError(
        f"no site is named '{wanted}' or has that role; the sites and roles here are: {', '.join(known) or 'none'}"
    )
