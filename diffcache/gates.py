"""Gates: at run time, may this step follow the schedule's forecast, or must it be computed in full?

A gate is a factory with keyword options that returns a pure predicate on ``StepInfo``. What the schedule computes is
computed whatever the gate says: a gate can only veto a forecast.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class StepInfo:
    """What a gate may look at.

    ``since_compute`` counts steps since the last computed one (1 for the step right after it). ``change`` is the
    probe's relative L1 change since the previous step, ``mean|p - p'| / mean|p'|``; ``accumulated`` the sum of the
    changes since the last computed step, this one included. Samples of one batch share the decision: both are those of
    the sample that moved most, so that company never makes a result worse.
    """

    step: int
    since_compute: int
    change: float
    accumulated: float


Gate = Callable[[StepInfo], bool]
GateFactory = Callable[..., Gate]

GATES: dict[str, GateFactory] = {}


def gate(name: str) -> Callable[[GateFactory], GateFactory]:
    """Register a gate factory under ``name``. Raises ValueError when the name is taken."""

    def register(factory: GateFactory) -> GateFactory:
        if name in GATES:
            raise ValueError(f"gate '{name}' is registered already ({GATES[name]}); choose another name")
        GATES[name] = factory
        return factory

    return register


def make_gate(name: str, **options: Any) -> Gate:
    """The predicate of the registered gate ``name``. Raises ValueError for an unknown name or unfit options."""
    factory = GATES.get(name)
    if factory is None:
        raise ValueError(f"unknown gate '{name}'; known: {sorted(GATES)}. Register yours with @gate")
    try:
        inspect.signature(factory).bind(**options)
    except TypeError as error:
        raise ValueError(f"gate '{name}' takes {inspect.signature(factory)}, got {options}: {error}") from None
    return factory(**options)


@gate("always")
def always() -> Gate:
    """Follow the schedule at every step."""
    return lambda info: True


@gate("accumulated_change")
def accumulated_change(*, budget: float, max_since: int = 8) -> Gate:
    """Follow the schedule while the probe's accumulated change stays under a budget (TeaCache, Liu et al. 2025).

    Compared as ``accumulated < budget``, so that a budget of zero never forecasts and a NaN always computes.
    """
    if not budget >= 0:
        raise ValueError(f"gate 'accumulated_change' needs budget >= 0 (a relative L1 change), got {budget}")
    return lambda info: info.accumulated < budget and info.since_compute <= max_since


@gate("max_gap")
def max_gap(*, limit: int) -> Gate:
    """Forecast at most ``limit`` steps in a row."""
    if limit < 0:
        raise ValueError(f"gate 'max_gap' needs limit >= 0 steps, got {limit}")
    return lambda info: info.since_compute <= limit
