"""What a gate is: state of one stream that looks at a probe and lets forecasts pass or not.

A gate can only veto a forecast: what the schedule computes is computed whatever it says. It decides for every sample of
a batch; where samples share a program, the one that must be computed decides for all, so that company never makes a
result worse.

At every step, in this order:

1. ``look(probe, moment)``: the probe's value, on its device, before anything is decided. What it returns (numbers
   ``[samples]`` or ``[samples, k]``) is read on the host, if this step may be forecast.
2. ``follow(moment, numbers)``: the decision, ``[samples]`` of bool. Only where a forecast is possible.
3. ``see(values, moment, computed)``: what the gate watches (``watch``), after the step ran; the numbers it returns are
   handed to ``learn`` before the next decision, so that nothing waits for them.
4. ``done(moment, computed)``: what came of it.

A gate with ``checks`` decides after a forecast: its probe is the site of one of its rows, and is computed on the
forecast of its other rows. Then ``foregone`` stands in the place of ``look``, and ``check`` makes the numbers for
``follow``.

State may be replaced but not changed in place: a step that has to start again puts back a shallow copy.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diffcache.direct import direct
from diffcache.ops import relative_change

Numbers = NDArray[np.float64]
Decision = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Moment:
    """Where a generation stands.

    ``since`` counts steps since the last computed one: 1 for the step right after it, and 0 before any was computed.
    ``clock`` holds the sampler's times of all steps, or nothing.
    """

    step: int
    steps: int
    since: int
    clock: tuple[float, ...] = ()


class Gate:
    """The base of all gates: compares the probe with its value at an earlier step by the relative L1 change.

    Class attributes, which an option may overwrite on the instance:
        probe: what it looks at: "latent", the name of a probe or site of the graph, or "" for nothing.
        against: "previous" compares with the step before, "computed" with the last computed step.
        watch: what ``see`` gets after a step: "output" (what the denoiser returned), "rows" (the values that this
            gate's rows computed, whatever they keep of them), or "" for nothing.
    """

    checks: ClassVar[bool] = False
    probe: str = "latent"
    against: ClassVar[str] = "previous"
    watch: ClassVar[str] = ""
    _latest: Tensor | None = None
    _old: Tensor | None = None

    def look(self, new: Tensor, moment: Moment) -> Tensor | None:
        """Numbers for ``follow``; None where there is nothing to compare with."""
        old, self._latest = self._old, new
        return None if old is None or old.shape != new.shape else self.measure(new, old, moment)

    def measure(self, new: Tensor, old: Tensor, moment: Moment) -> Tensor:
        """Numbers ``[samples]`` or ``[samples, k]`` that say how much the probe has changed."""
        return direct(relative_change)(new, old)

    def foregone(self, moment: Moment) -> bool | None:
        """Of a gate that checks: pass the forecast unchecked (True), compute (False), or check it (None)."""
        return None

    def check(self, computed: Tensor, forecast: Tensor, moment: Moment) -> Tensor:
        """Of a gate that checks: how far the probe, computed on a forecast, is from its own forecast, ``[samples]``."""
        return relative_change(forecast, computed)

    def follow(self, moment: Moment, numbers: Numbers) -> Decision:
        """Which samples may be forecast. ``numbers`` is ``[samples, k]``; k is 0 where ``look`` returned None."""
        raise NotImplementedError

    def see(self, values: Sequence[Tensor], moment: Moment, computed: bool) -> Tensor | None:
        """Numbers for ``learn`` from what it watches."""
        return None

    def learn(self, numbers: Numbers) -> None:
        """The numbers that ``see`` made at the step before, ``[samples, k]``."""

    def done(self, moment: Moment, computed: bool) -> None:
        """After the step: keep the probe to compare with."""
        if self.against == "previous" or computed:
            self._old = self._latest


Kind = TypeVar("Kind", bound=Callable[..., Gate])
GATES: dict[str, Callable[..., Gate]] = {}


def gate(name: str) -> Callable[[Kind], Kind]:
    """Register a gate under ``name``. Raises ValueError when the name is taken."""

    def register(kind: Kind) -> Kind:
        if name in GATES:
            raise ValueError(f"gate '{name}' is registered already ({GATES[name]}); choose another name")
        GATES[name] = kind
        return kind

    return register


def make_gate(name: str, **options: Any) -> Gate:
    """A new gate for one stream. Raises ValueError for an unknown name or unfit options."""
    kind = GATES.get(name)
    if kind is None:
        raise ValueError(f"unknown gate '{name}'; known: {sorted(GATES)}. Register yours with @gate")
    try:
        inspect.signature(kind).bind(**options)
    except TypeError as error:
        raise ValueError(f"gate '{name}' takes {inspect.signature(kind)}, got {options}: {error}") from None
    return kind(**options)
