"""From a rule and the steps that were computed to a forecast: the one place where weights are asked for."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from diffcache import predictors
from diffcache.cells import Forecast, Online, Partial, View
from diffcache.schedule import Row


def forecast(
    cell: Online, made: Sequence[int], step: int, clock: Sequence[float], partial: Collection[int] = ()
) -> Forecast:
    """An online cell as a forecast from the newest of the computed steps ``made`` (newest first).

    At the steps ``partial`` only some tokens were computed: those are no points of a trajectory, for the other tokens
    are forecasts themselves. The rule runs on the full steps alone, ``R``, and the newest value, which has the fresh
    tokens, goes on as the rule does: ``F_p + R(step) - R(p)``. A token that was not computed at p is then at R(step).

    Raises:
        ValueError: the rule is unknown, or wants the sampler's times where there are none.
    """
    history = tuple(at for at in made if at not in partial)[: cell.history]
    if made[0] in partial:
        assert cell.view is None
        now, then = (_weights(cell, history, at, clock) for at in (step, made[0]))
        return used((made[0], *history), [1.0, *(a - b for a, b in zip(now, then, strict=True))])
    at, target = times(cell, history, step, clock)
    inside = [] if cell.view is None else [
        predictors.weights(rule["predictor"], at, target, **rule["options"]) for rule in cell.view.inside
    ]  # fmt: skip
    return used(history, _weights(cell, history, step, clock), cell.view, inside)


def _weights(cell: Online, history: Sequence[int], step: int, clock: Sequence[float]) -> Sequence[float]:
    """The rule's weights, for as many values of history as it reads."""
    return predictors.weights(cell.predictor, *times(cell, history, step, clock), **cell.options)


def times(cell: Online, history: Sequence[int], step: int, clock: Sequence[float]) -> tuple[list[float], float]:
    """When the values of ``history`` were computed and what time is to be forecast, as the rule counts them.

    Raises:
        ValueError: it wants the sampler's times where there are none.
    """
    if not cell.timed:
        return list(history), step
    if len(clock) <= step:
        raise ValueError(f"predictor '{cell.predictor}' works on the sampler's times, but this denoiser has no clock")
    return [clock[at] for at in history], clock[step]


def used(
    history: Sequence[int], weights: Sequence[float], view: View | None = None, inside: Sequence[Sequence[float]] = ()
) -> Forecast:
    """The forecast with these weights, without the zero ones: they would keep a tensor alive that adds nothing.

    ``inside`` are the weights of the parts that ``view`` tells apart.
    """
    table = [[*rule, *[0.0] * (len(history) - len(rule))] for rule in (weights, *inside)]
    chosen = [k for k in range(len(history)) if any(rule[k] != 0.0 for rule in table)]
    outside, *others = (tuple(rule[k] for k in chosen) for rule in table)
    parts = None if view is None else replace(view, inside=tuple(others))
    return Forecast(tuple(history[k] for k in chosen), outside, parts)


def check_rules(row: Row) -> None:
    """Raise ValueError for rules of a row that are unknown, lack the probe they look at, or look at none."""
    for cell in (cell.others if isinstance(cell, Partial) else cell for cell in row.cells):
        view = cell.view if isinstance(cell, Online | Forecast) else None
        if view is not None and view.projection not in ("channels", *predictors.PROJECTIONS):
            raise ValueError(
                f"site '{row.site}' has a view through the unknown projection '{view.projection}'; "
                f"known: {sorted(predictors.PROJECTIONS)} and channels"
            )
        if not isinstance(cell, Online):
            continue
        rules = [cell.predictor] if view is None else [cell.predictor, *(rule["predictor"] for rule in view.inside)]
        if view is not None and set(rules) & set(predictors.FROM_VALUES):
            raise ValueError(
                f"site '{row.site}' forecasts parts of its value by {rules}, but rules that make their weights from "
                f"values ({sorted(predictors.FROM_VALUES)}) are for whole values"
            )
        entry = predictors.FROM_VALUES.get(cell.predictor)
        if entry is None and cell.predictor not in predictors.PREDICTORS:
            known = sorted({*predictors.PREDICTORS, *predictors.FROM_VALUES})
            raise ValueError(f"site '{row.site}' has the unknown predictor '{cell.predictor}'; known: {known}")
        wanted = "" if entry is None else entry.probe
        if wanted and not cell.probe:
            raise ValueError(
                f"predictor '{cell.predictor}' of site '{row.site}' looks at {wanted}; name it with probe="
            )
        if cell.probe and not wanted:
            raise ValueError(
                f"predictor '{cell.predictor}' of site '{row.site}' looks at no probe, got probe='{cell.probe}'"
            )
