"""From a rule and the steps that were computed to a forecast: the one place where weights are asked for."""

from __future__ import annotations

from collections.abc import Sequence

from diffcache import predictors
from diffcache.cells import Forecast, Online
from diffcache.schedule import Row


def forecast(cell: Online, made: Sequence[int], step: int, clock: Sequence[float]) -> Forecast:
    """An online cell as a forecast from the newest of the computed steps ``made`` (newest first).

    Raises:
        ValueError: the rule is unknown, or wants the sampler's times where there are none.
    """
    history = tuple(made[: cell.history])
    return used(history, predictors.weights(cell.predictor, *times(cell, history, step, clock), **cell.options))


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


def used(history: Sequence[int], weights: Sequence[float]) -> Forecast:
    """The forecast with these weights, without the zero ones: they would keep a tensor alive that adds nothing."""
    pairs = [(at, weight) for at, weight in zip(history, weights, strict=False) if weight != 0.0]
    return Forecast(tuple(at for at, _ in pairs), tuple(weight for _, weight in pairs))


def check_rules(row: Row) -> None:
    """Raise ValueError for rules of a row that are unknown, lack the probe they look at, or look at none."""
    for cell in row.cells:
        if not isinstance(cell, Online):
            continue
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
