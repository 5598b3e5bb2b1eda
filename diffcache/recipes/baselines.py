"""Baselines: one site, fixed steps, any predictor. What every published method has to beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffcache.recipes.base import Part, Predict, Recipe, method
from diffcache.recipes.picks import one


def _predict(predictor: str, order: int | None, options: Mapping[str, Any] | None) -> Predict:
    given = dict(options or {}) if order is None else {**(options or {}), "order": order}
    return Predict(predictor, given, history=None if order is not None else 4)


@method("Every N-th step", 2024, "baseline")
def uniform(
    interval: int = 2,
    start: int = 1,
    predictor: str = "reuse",
    order: int | None = None,
    site: str = "stack",
    options: Mapping[str, Any] | None = None,
) -> Recipe:
    """Compute the first ``start`` steps, then every ``interval``-th.

    That is ``s < start`` or ``(s - start + 1) mod interval == 0``.
    """
    if interval < 1 or start < 1:
        raise ValueError(f"uniform needs interval >= 1 and start >= 1, got {interval} and {start}")

    def when(plan: Any, site: Any) -> Sequence[int]:
        return [*range(min(start, plan.steps)), *range(start - 1, plan.steps, interval)]

    return Recipe(parts=(Part(sites=one(site), when=when, predictor=_predict(predictor, order, options)),))


@method("Evenly spaced steps", 2024, "baseline")
def evenly(
    computed: int = 8,
    predictor: str = "reuse",
    order: int | None = None,
    site: str = "stack",
    options: Mapping[str, Any] | None = None,
) -> Recipe:
    """Compute ``computed`` steps, spaced as evenly as whole steps allow, the first one included."""

    def when(plan: Any, site: Any) -> Sequence[int]:
        if not 1 <= computed <= plan.steps:
            raise ValueError(f"evenly(computed={computed}) needs 1 to {plan.steps} computed steps of {plan.steps}")
        return [i * plan.steps // computed for i in range(computed)]

    return Recipe(parts=(Part(sites=one(site), when=when, predictor=_predict(predictor, order, options)),))


@method("Chosen steps", 2024, "baseline")
def steps(
    computed: Sequence[int],
    predictor: str = "reuse",
    order: int | None = None,
    site: str = "stack",
    options: Mapping[str, Any] | None = None,
) -> Recipe:
    """Compute exactly these steps: for schedules that a paper prints as a list."""
    return Recipe(
        parts=(
            Part(
                sites=one(site),
                when=lambda plan, site: tuple(computed),
                predictor=_predict(predictor, order, options),
            ),
        )
    )
