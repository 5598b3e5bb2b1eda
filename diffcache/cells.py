"""Cells of a reuse schedule: what one site does at one step. No torch here."""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


class Action(enum.Enum):
    """What a cell says when it is no forecast; the value is the cell's character in the printed grid."""

    COMPUTE = "C"
    SKIP = "."


COMPUTE = Action.COMPUTE
SKIP = Action.SKIP


def check_plain(options: Mapping[str, Any], what: str) -> None:
    """Raise ValueError for options that a schedule file could not hold."""
    try:
        survives = json.loads(json.dumps(dict(options), allow_nan=False)) == dict(options)
    except (TypeError, ValueError):
        survives = False
    if not survives:
        raise ValueError(f"{what} must be plain JSON values (numbers, strings, lists), got {options}")


@dataclass(frozen=True, slots=True)
class View:
    """Parts of a value that are forecast otherwise than the rest of it, which goes by the cell itself.

    ``projection`` names the linear map that keeps the part (see ``predictors.views``): a frequency band, a subspace. Or
    it is "channels", with the option ``labels``: one whole number for each channel, where 0 is the rest and ``i`` the
    ``i``-th part. ``inside`` says for each part what it is forecast by: of an online cell a rule
    ``{"predictor": name, "options": {...}}``, of a forecast weights on its steps.
    """

    projection: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    inside: tuple[Any, ...] = field(default=(), hash=False)

    def __post_init__(self) -> None:
        check_plain(self.options, f"options of projection '{self.projection}'")
        count = len(self.inside)
        if self.projection != "channels" and count != 1:
            raise ValueError(f"a view through '{self.projection}' has {count} rules inside; expected one")
        labels = set(self.options.get("labels", ()))
        if self.projection == "channels" and not (labels and labels <= set(range(count + 1))):
            raise ValueError(
                f"a view of channels has {count} rules inside and the labels {sorted(labels)}; expected labels=, one "
                f"number for each channel, from 0 (the rest) to {count}"
            )

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> View:
        """A view from plain values: ``projection``, ``options``, and ``inside``, one rule or a list of them."""
        inside = given["inside"]
        rules = [inside] if isinstance(inside, Mapping) else list(inside)
        return cls(given["projection"], given.get("options", {}), tuple(map(_inside, rules)))

    def to_json(self) -> dict[str, Any]:
        inside = [rule if isinstance(rule, Mapping) else list(rule) for rule in self.inside]
        return {"projection": self.projection, "options": dict(self.options), "inside": inside}

    def __str__(self) -> str:
        """What tells programs apart: the projection, not what its part is forecast by; channels are in the weights."""
        options = {} if self.projection == "channels" else dict(self.options)
        return f"{self.projection} {json.dumps(options, sort_keys=True)}"


def _inside(given: Any) -> Any:
    if isinstance(given, Mapping):
        check_plain(given, "a rule inside a view")
        return {"predictor": str(given["predictor"]), "options": dict(given.get("options", {}))}
    return tuple(float(weight) for weight in given)


@dataclass(frozen=True, slots=True)
class Forecast:
    """The value of a site at this step is ``sum_k weights[k] * (its value computed at steps[k])``.

    ``steps`` are newest first. Every linear predictor of the literature is such a weight vector. With a ``view`` a part
    of the value has weights of its own.
    """

    steps: tuple[int, ...]
    weights: tuple[float, ...]
    view: View | None = None

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
        for inside in self.view.inside if self.view is not None else ():
            if len(inside) != len(self.steps) or not all(math.isfinite(weight) for weight in inside):
                raise ValueError(f"weights {inside} of a view: expected {len(self.steps)} finite ones, one per step")

    @property
    def reads(self) -> int:
        """How many tensors it is made from."""
        return len(self.steps)

    @property
    def is_reuse(self) -> bool:
        """Whether this repeats one earlier value unchanged, which needs no arithmetic at all."""
        return self.weights == (1.0,) and self.view is None


@dataclass(frozen=True, slots=True)
class Online:
    """Decided at run time: where the row's gate follows, a forecast from the newest computed values; else computed.

    ``history`` is the most values it reads; ``predictor`` and ``options`` name the rule that makes its weights from
    their steps (see ``predictors``). ``timed`` hands the rule the sampler's time instead of step numbers. ``probe`` is
    what a rule that makes its weights from values looks at beside them: "latent", or the name of a probe or site of the
    graph that is computed before the row's site. ``view`` is for parts of the value that have rules of their own.
    """

    predictor: str = "reuse"
    history: int = 1
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    timed: bool = False
    probe: str = ""
    view: View | None = None

    def __post_init__(self) -> None:
        if self.history < 1:
            raise ValueError(f"an online cell reads at least one value, got history={self.history}")
        check_plain(self.options, f"options of predictor '{self.predictor}'")


@dataclass(frozen=True, slots=True)
class Given:
    """What an online cell comes to whose weights are made from values: a forecast whose weights only the device knows.

    It exists for the duration of one step and is never stored. ``reads`` is the number of tensors it is made from;
    ``made`` holds, for each value of the site, these tensors and their table of weights in difference form.
    """

    reads: int
    made: tuple[tuple[Sequence[Any], Any], ...] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Partial:
    """A few tokens of each of the site's values are computed, the others come from history.

    Computed are the tokens of which ``score`` (see ``token_scores``, with its ``options``) is highest: ``share`` of
    them, or one for each of ``clusters`` if that is more. The others are forecast as ``others`` says. Of tokens in
    clusters those that are not computed move by ``blend`` towards what is fresh in their cluster. What a partial step
    comes to enters history as a computed value does.

    The score looks at the ``looks`` newest values of the site, or of the site ``beside`` it that has as many tokens;
    ``attended`` says that it looks at what attention takes from each token there.
    """

    share: float
    score: str = "norm"
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    others: Online = Online()
    clusters: int = 0
    blend: float = 0.0
    beside: str = ""
    looks: int = 1
    attended: bool = False

    def __post_init__(self) -> None:
        check_plain(self.options, f"options of token score '{self.score}'")
        least = 0.0 if self.clusters else math.ulp(0.0)
        if not least <= self.share <= 1.0 or self.clusters < 0 or not 0.0 <= self.blend <= 1.0:
            raise ValueError(
                f"a partial step computes share={self.share} of the tokens with clusters={self.clusters} and "
                f"blend={self.blend}; expected a share in (0, 1], or clusters, and a blend between 0 and 1"
            )
        if self.others.probe or self.others.view is not None or self.looks not in (1, 2):
            raise ValueError(
                "the tokens that are not computed are forecast by weights on whole values, without probe or view, and "
                f"a score looks at one or two values; got {self.others} and looks={self.looks}"
            )

    @property
    def history(self) -> int:
        """The most values of its own that it reads."""
        return max(self.others.history, 1 if self.beside else self.looks)

    @property
    def reads(self) -> int:
        """The most values that the others are forecast from: the newest, and what a rule of several reads beside it."""
        return self.others.history + (self.others.history > 1)

    def count(self, tokens: int) -> int:
        """How many of so many tokens are computed."""
        return min(tokens, max(1, self.clusters, round(self.share * tokens)))


@dataclass(frozen=True, slots=True)
class Selected:
    """What a partial cell comes to: its tokens, how many of each value, and the forecast of the others.

    It exists for the duration of one step and is never stored. ``tokens`` and ``clusters`` are tensors, one for each
    value of the site.
    """

    forecast: Forecast
    counts: tuple[int, ...]
    blend: tuple[float, int] | None = None
    tokens: tuple[Any, ...] = field(default=(), repr=False, compare=False)
    clusters: tuple[Any, ...] = field(default=(), repr=False, compare=False)

    @property
    def reads(self) -> int:
        """How many tensors of each value it is made from."""
        return self.forecast.reads

    def __str__(self) -> str:
        """What tells programs apart, besides ``reads``."""
        return f"{self.counts} blended {self.blend}"


Cell = Action | Forecast | Online | Given | Partial | Selected
Forecasting = Forecast | Given | Selected  # what takes the place of a value, or of most of it
Deferred = Online | Partial  # decided, or made in full, at run time


@dataclass(frozen=True)
class GateSpec:
    """Name and options of a run-time gate (see ``gates``); options must survive JSON."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_plain(self.options, f"options of gate '{self.name}'")


def character(cell: Cell) -> str:
    """The cell in the printed grid."""
    if isinstance(cell, Action):
        return cell.value
    if isinstance(cell, Online):
        return "g"
    if isinstance(cell, Given):
        return "v"
    if isinstance(cell, Partial | Selected):
        return "t"
    return "r" if cell.is_reuse else "f"


def cell_to_json(cell: Cell) -> str | dict[str, Any]:
    """Plain values that ``cell_from_json`` reads back to an equal cell."""
    if isinstance(cell, Action):
        return cell.value
    if isinstance(cell, Partial):
        named = {name: getattr(cell, name) for name in Partial.__dataclass_fields__}
        return named | {"options": dict(cell.options), "others": cell_to_json(cell.others)}
    if isinstance(cell, Online):
        found: dict[str, Any] = {"predictor": cell.predictor, "history": cell.history, "options": dict(cell.options)}
        more = {"timed": cell.timed, "probe": cell.probe}
        found |= {name: value for name, value in more.items() if value}
    else:
        assert isinstance(cell, Forecast), f"{cell} is settled anew at every step and is never stored"
        found = {"steps": list(cell.steps), "weights": list(cell.weights)}
    return found if cell.view is None else {**found, "view": cell.view.to_json()}


def cell_from_json(cell: Any) -> Cell:
    """Raises KeyError, TypeError or ValueError for anything that is no cell."""
    if isinstance(cell, str):
        return Action(cell)
    if "share" in cell:
        others = cell_from_json(cell["others"])
        if not isinstance(others, Online):
            raise ValueError(f"the other tokens of a partial step are forecast by a rule, got {others}")
        return Partial(**{**cell, "others": others})
    view = View.of(cell["view"]) if "view" in cell else None
    if "predictor" in cell:
        timed, probe = bool(cell.get("timed", False)), str(cell.get("probe", ""))
        return Online(cell["predictor"], int(cell["history"]), cell["options"], timed, probe, view)
    return Forecast(tuple(int(step) for step in cell["steps"]), tuple(float(w) for w in cell["weights"]), view)
