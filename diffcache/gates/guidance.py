"""Gates on guidance: at run time, may the unconditional branch be left out?

They watch "branches": after a step at which both were computed they see ``[conditional, unconditional]``. Since nothing
is seen while the branch is left out, they go by what was measured before and by how long ago that was.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from diffcache.gates.base import Decision, Gate, Moment, Numbers, gate
from diffcache.ops import relative_change


@gate("guidance_change")
class GuidanceChange(Gate):
    """Leave out while (unconditional - conditional) can be trusted to have changed by less than ``budget``.

    The relative L1 change a step is measured between the last two steps at which both were computed, and grows with
    every step that is left out (PromptTea's DynCFGCache, arXiv 2507.06739, leaves out where it changed little).
    Compared as ``change < budget``, so that a budget of zero always computes.
    """

    probe = ""
    watch = "branches"
    change: Numbers | None = None
    _difference: Tensor | None = None

    def __init__(self, *, budget: float, max_since: int = 5):
        if not budget >= 0 or max_since < 0:
            raise ValueError(f"gate 'guidance_change' needs budget >= 0 and max_since >= 0, got {budget}, {max_since}")
        self.budget, self.max_since = budget, max_since

    def see(self, values: Sequence[Tensor], moment: Moment, computed: bool) -> Tensor | None:
        conditional, unconditional = values
        old, self._difference = self._difference, unconditional - conditional
        if old is None or old.shape != self._difference.shape:
            return None
        return relative_change(self._difference, old) / max(moment.since, 1)

    def learn(self, numbers: Numbers) -> None:
        self.change = numbers[:, 0]

    def follow(self, moment: Moment, numbers: Numbers) -> Decision:
        if self.change is None:
            return np.array([False])
        return (self.change * moment.since < self.budget) & (moment.since <= self.max_since)


@gate("guidance_agreement")
class GuidanceAgreement(Gate):
    """Leave out once both branches point the same way: their cosine similarity has reached ``similarity``.

    With rule "fold" this is Adaptive Guidance (arXiv 2312.12487).
    """

    probe = ""
    watch = "branches"
    cosine: Numbers | None = None

    def __init__(self, *, similarity: float):
        if not -1 <= similarity:
            raise ValueError(f"gate 'guidance_agreement' needs a cosine similarity, got {similarity}")
        self.similarity = similarity

    def see(self, values: Sequence[Tensor], moment: Moment, computed: bool) -> Tensor:
        conditional, unconditional = (value.reshape(len(value), -1).float() for value in values)
        return F.cosine_similarity(conditional, unconditional, dim=1)

    def learn(self, numbers: Numbers) -> None:
        self.cosine = numbers[:, 0]

    def follow(self, moment: Moment, numbers: Numbers) -> Decision:
        return np.array([False]) if self.cosine is None else self.cosine >= self.similarity
