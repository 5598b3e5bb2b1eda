"""The registry of fixed weight rules, and the one function that calls them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence

Predictor = Callable[..., list[float]]

PREDICTORS: dict[str, Predictor] = {}
# Rules that may be asked for weights that do not sum to one, because the paper's do not.
FREE: set[str] = set()


def predictor(name: str, *, sums_to_one: bool = True) -> Callable[[Predictor], Predictor]:
    """Register a weight rule under ``name``. Raises ValueError when the name is taken.

    ``sums_to_one=False`` is for a rule with an option under which its weights do not sum to one; with its default
    options they must, or a value that does not change would be forecast wrongly.
    """

    def register(rule: Predictor) -> Predictor:
        if name in PREDICTORS:
            raise ValueError(f"predictor '{name}' is registered already ({PREDICTORS[name]}); choose another name")
        PREDICTORS[name] = rule
        if not sums_to_one:
            FREE.add(name)
        return rule

    return register


def weights(name: str, history: Sequence[float], target: float, **options: float) -> list[float]:
    """Weights of the registered predictor ``name`` for the newest ``len(result)`` steps of ``history``.

    Raises ValueError for an unknown name or option, for an empty history or one with equal times, and for a rule whose
    weights do not sum to one.
    """
    rule = PREDICTORS.get(name)
    if rule is None:
        raise ValueError(f"unknown predictor '{name}'; known: {sorted(PREDICTORS)}. Register yours with @predictor")
    accepted = list(inspect.signature(rule).parameters)[2:]
    if not set(options) <= set(accepted):
        raise ValueError(
            f"predictor '{name}' has no options {sorted(set(options) - set(accepted))}; it takes {accepted}"
        )
    if not history:
        raise ValueError(f"predictor '{name}' has no history to forecast from; compute at least one earlier step")
    if len(set(history)) != len(history):
        raise ValueError(f"predictor '{name}' got a history with equal times {list(history)}; give each step its own")
    result = rule(history, target, **options)
    size = sum(map(abs, result))
    consistent = name in FREE or abs(sum(result) - 1.0) <= 1e-6 * max(size, 1.0)
    if not result or len(result) > len(history) or not math.isfinite(size) or not consistent:
        raise ValueError(
            f"predictor '{name}' gave the weights {result} for history {list(history)}: expected at most "
            f"{len(history)} finite weights that sum to one"
        )
    return result
