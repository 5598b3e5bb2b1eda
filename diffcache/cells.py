"""Cells of a reuse schedule: what one site does at one step. No torch here."""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class Action(enum.Enum):
    """What a cell says when it is no forecast; the value is the cell's character in the printed grid."""

    COMPUTE = "C"
    SKIP = "."


COMPUTE = Action.COMPUTE
SKIP = Action.SKIP


@dataclass(frozen=True, slots=True)
class Forecast:
    """The value of a site at this step is ``sum_k weights[k] * (its value computed at steps[k])``.

    ``steps`` are newest first. Every linear predictor of the literature is such a weight vector.
    """

    steps: tuple[int, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.steps:
            raise ValueError("a forecast has no steps to read; give at least one computed step, or use COMPUTE")
        if len(self.steps) != len(self.weights):
            raise ValueError(
                f"a forecast has {len(self.steps)} steps but {len(self.weights)} weights; give one per step"
            )
        if any(older >= newer for newer, older in zip(self.steps, self.steps[1:], strict=False)):
            raise ValueError(f"forecast steps {self.steps} must be newest first and without duplicates")
        if not all(math.isfinite(weight) for weight in self.weights):
            raise ValueError(f"forecast weights {self.weights} must be finite")

    @property
    def is_reuse(self) -> bool:
        """Whether this repeats one earlier value unchanged, which needs no arithmetic at all."""
        return self.weights == (1.0,)


@dataclass(frozen=True, slots=True)
class Online:
    """Decided at run time: where the row's gate follows, a forecast from the newest computed values; else computed.

    ``history`` is the most values it reads; ``predictor`` and ``options`` name the rule that makes its weights from
    their steps (see ``predictors``). ``timed`` hands the rule the sampler's time instead of step numbers.
    """

    predictor: str = "reuse"
    history: int = 1
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    timed: bool = False

    def __post_init__(self) -> None:
        if self.history < 1:
            raise ValueError(f"an online cell reads at least one value, got history={self.history}")
        check_plain(self.options, f"options of predictor '{self.predictor}'")


Cell = Action | Forecast | Online


@dataclass(frozen=True)
class GateSpec:
    """Name and options of a run-time gate (see ``gates``); options must survive JSON."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_plain(self.options, f"options of gate '{self.name}'")


def check_plain(options: Mapping[str, Any], what: str) -> None:
    """Raise ValueError for options that a schedule file could not hold."""
    try:
        survives = json.loads(json.dumps(dict(options), allow_nan=False)) == dict(options)
    except (TypeError, ValueError):
        survives = False
    if not survives:
        raise ValueError(f"{what} must be plain JSON values (numbers, strings, lists), got {options}")


def character(cell: Cell) -> str:
    """The cell in the printed grid."""
    if isinstance(cell, Action):
        return cell.value
    if isinstance(cell, Online):
        return "g"
    return "r" if cell.is_reuse else "f"


def cell_to_json(cell: Cell) -> str | dict[str, Any]:
    """Plain values that ``cell_from_json`` reads back to an equal cell."""
    if isinstance(cell, Action):
        return cell.value
    if isinstance(cell, Online):
        found = {"predictor": cell.predictor, "history": cell.history, "options": dict(cell.options)}
        return {**found, "timed": True} if cell.timed else found
    return {"steps": list(cell.steps), "weights": list(cell.weights)}


def cell_from_json(cell: Any) -> Cell:
    """Raises KeyError, TypeError or ValueError for anything that is no cell."""
    if isinstance(cell, str):
        return Action(cell)
    if "predictor" in cell:
        return Online(cell["predictor"], int(cell["history"]), cell["options"], bool(cell.get("timed", False)))
    return Forecast(tuple(int(step) for step in cell["steps"]), tuple(float(weight) for weight in cell["weights"]))
