"""Guidance in a reuse schedule: at which steps the unconditional branch is computed, and what stands for it else.

Classifier-free guidance evaluates a denoiser twice a step, with the condition and without. Here the branches are told
apart by what they are; in which order they come, and whether in one call or two, is the call pattern's business.
No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffcache.cells import GateSpec

RULES = ("difference", "fold", "reuse")
HISTORIES = ("conditional", "mean")
DECIDE = ("separate", "shared")
SAMPLES = ("together", "alone")


@dataclass(frozen=True)
class Guidance:
    """What becomes of the unconditional branch; whatever is left out does not run at all.

    ``rule`` says what its result is at a step where it is left out:

    * "difference": the conditional result plus (unconditional - conditional) of the last step at which both were
      computed. With ``bands``, one pair of weights a step, the low and the high frequencies of that difference over the
      last two dimensions are weighted apart (FasterCache); low is what lies within ``radius * min(height, width)``.
    * "fold": the conditional result, from some step to the end (T-GATE). ``history`` says what sites keep of both
      branches then: the conditional value, or the mean of the two.
    * "reuse": its own last computed result.

    It is computed at the steps in ``computed``; at the others it is left out, or with a ``gate`` where that follows.

    Raises:
        ValueError: an unknown rule; step 0 is not computed; options that do not go with the rule.
    """

    rule: str = "difference"
    computed: tuple[int, ...] = (0,)
    gate: GateSpec | None = None
    bands: tuple[tuple[float, float], ...] = ()
    radius: float = 0.2
    history: str = "conditional"

    def __post_init__(self) -> None:
        object.__setattr__(self, "computed", tuple(sorted(set(self.computed))))
        object.__setattr__(self, "bands", tuple((float(low), float(high)) for low, high in self.bands))
        if self.rule not in RULES:
            raise ValueError(f"unknown rule of guidance {self.rule!r}; expected one of {list(RULES)}")
        if self.history not in HISTORIES:
            raise ValueError(f"history of guidance is {self.history!r}; expected one of {list(HISTORIES)}")
        if not self.computed or self.computed[0] != 0:
            raise ValueError(f"guidance computes both branches at steps {list(self.computed)}; expected step 0 first")
        if self.rule == "fold" and self.computed != tuple(range(len(self.computed))):
            raise ValueError(f"rule 'fold' computes both branches at steps 0 to m - 1, got {list(self.computed)}")
        if self.history == "mean" and self.rule != "fold":
            raise ValueError(f"history='mean' goes with rule 'fold' only, got rule {self.rule!r}")
        if self.bands and self.rule != "difference":
            raise ValueError(f"bands go with rule 'difference' only, got rule {self.rule!r}")
        if not all(map(math.isfinite, (weight for pair in self.bands for weight in pair))):
            raise ValueError(f"weights of bands must be finite, got {self.bands}")
        if not 0.0 < self.radius < 1.0:
            raise ValueError(f"radius is a share of the smaller side in (0, 1), got {self.radius}")

    def check(self, steps: int) -> None:
        """Raise ValueError if it does not fit a schedule of this many steps."""
        if self.computed[-1] >= steps:
            raise ValueError(f"guidance computes both branches at step {self.computed[-1]} of a schedule of {steps}")
        if self.bands and len(self.bands) != steps:
            raise ValueError(f"guidance has {len(self.bands)} pairs of bands for {steps} steps; give one pair a step")

    def left_out(self, steps: int) -> tuple[int, ...]:
        """Steps at which the unconditional branch is, or with a gate may be, left out."""
        return tuple(step for step in range(steps) if step not in self.computed)

    def printed(self, steps: int) -> str:
        """One character a step: C computed, ``-`` left out, g gated."""
        return "".join("C" if step in self.computed else "-" if self.gate is None else "g" for step in range(steps))

    def to_json(self) -> dict[str, Any]:
        """Plain values that ``guidance_from_json`` reads back to an equal one."""
        return {
            "rule": self.rule,
            "computed": list(self.computed),
            "gate": None if self.gate is None else {"name": self.gate.name, "options": dict(self.gate.options)},
            "bands": [list(pair) for pair in self.bands],
            "radius": self.radius,
            "history": self.history,
        }


def guidance_from_json(data: Mapping[str, Any] | None) -> Guidance | None:
    """Raises KeyError, TypeError or ValueError for anything that is no guidance."""
    if data is None:
        return None
    gate = data["gate"]
    return Guidance(
        data["rule"],
        tuple(int(step) for step in data["computed"]),
        None if gate is None else GateSpec(gate["name"], gate["options"]),
        tuple((float(low), float(high)) for low, high in data["bands"]),
        float(data["radius"]),
        data["history"],
    )
