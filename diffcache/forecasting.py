"""From a rule and the steps that were computed to a forecast: the one place where weights are asked for."""

from __future__ import annotations

from collections.abc import Sequence

from diffcache import predictors
from diffcache.cells import Forecast, Online


def forecast(cell: Online, made: Sequence[int], step: int, clock: Sequence[float]) -> Forecast:
    """An online cell as a forecast from the newest of the computed steps ``made`` (newest first).

    Of a rule that makes its weights from values only which steps it reads is known here: all weights are one.

    Raises:
        ValueError: the rule is unknown, or wants the sampler's times where there are none.
    """
    history = tuple(made[: cell.history])
    if cell.predictor in predictors.FROM_VALUES:
        return Forecast(history, (1.0,) * len(history))
    if cell.timed and len(clock) <= step:
        raise ValueError(f"predictor '{cell.predictor}' works on the sampler's times, but this denoiser has no clock")
    times = [clock[at] for at in history] if cell.timed else list(history)
    return used(history, predictors.weights(cell.predictor, times, clock[step] if cell.timed else step, **cell.options))


def used(history: Sequence[int], weights: Sequence[float]) -> Forecast:
    """The forecast with these weights, without the zero ones: they would keep a tensor alive that adds nothing."""
    pairs = [(at, weight) for at, weight in zip(history, weights, strict=False) if weight != 0.0]
    return Forecast(tuple(at for at, _ in pairs), tuple(weight for _, weight in pairs))
