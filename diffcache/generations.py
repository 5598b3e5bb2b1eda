"""The branches of one generation: what each gave at a step, and whether the unconditional one is left out."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffcache.batch import mapped
from diffcache.cells import Cell
from diffcache.gates import Gate, Moment, make_gate
from diffcache.guidance import Guidance
from diffcache.guidance_rules import stand_in
from diffcache.host_reads import HostRead
from diffcache.schedule import Schedule
from diffcache.streams import Stream, version
from diffcache.tracing import tree

CONDITIONAL, UNCONDITIONAL = "conditional", "unconditional"


class Held:
    """An input as it was at one call, to compare with that of another.

    Numbers are read from a device only where identity does not tell.
    """

    def __init__(self, leaf: Any):
        self.leaf, self.version = leaf, version(leaf)

    def equals(self, new: Any) -> bool:
        old = self.leaf
        if not isinstance(old, Tensor) or not isinstance(new, Tensor):
            return type(old) is type(new) and bool(old == new)
        if old.shape != new.shape or old.dtype != new.dtype or old.device != new.device:
            return False
        if isinstance(self.version, Tensor):  # no writes can be seen on it: a copy was kept
            return torch.equal(self.version, new)
        if (old._version, old.data_ptr()) != self.version:
            return False
        same_memory = new.data_ptr() == old.data_ptr() and new.stride() == old.stride()
        return new is old or (same_memory and new._version == old._version) or torch.equal(old, new)


class Generation:
    """Streams of one generation (or of one of its samples) in the order of their first calls, and what joins them."""

    def __init__(self, schedule: Schedule):
        self.schedule, self.guidance = schedule, schedule.guidance
        self._members: list[weakref.ref[Stream]] = []  # weakly: one that has ended takes its tensors along at once
        self.half: Stream | None = None  # of a batched call with its unconditional half left out
        self.broken = False  # these are not the branches of one generation after all
        self.merged = False  # history of both branches has become one
        self.results: dict[str, tuple[int, Any]] = {}  # branch -> the step and what it returned, as copies of its own
        self.difference: dict[tree.Path, Tensor] | None = None
        self._latent: tuple[int, Held] | None = None
        self._column: tuple[int, Sequence[Cell]] | None = None
        spec = None if self.guidance is None else self.guidance.gate
        self._gate: Gate | None = None if spec is None else make_gate(spec.name, **spec.options)
        self._left_out: tuple[int, bool] = (-1, False)
        self._last = 0  # the last step at which both were computed
        self._coming: HostRead | None = None
        self.folded = False

    @property
    def streams(self) -> list[Stream | None]:
        """Its streams in the order of their first calls; None for one that has ended."""
        return [member() for member in self._members]

    def add(self, stream: Stream) -> None:
        self._members.append(weakref.ref(stream))
        stream.generation = self

    def enter(self, step: int, latent: Any) -> None:
        """A branch is called: all that are called at one step have one latent, or they do not belong together."""
        if self._latent is None or self._latent[0] != step:
            self._latent = (step, Held(latent))
        elif not self._latent[1].equals(latent):
            self.broken = True

    def column(self, step: int) -> Sequence[Cell] | None:
        """What another branch decided at this step."""
        return self._column[1] if self._column is not None and self._column[0] == step and not self.broken else None

    def decided(self, step: int, column: Sequence[Cell]) -> None:
        if self._column is None or self._column[0] != step:
            self._column = (step, tuple(column))

    def result(self, branch: str, step: int) -> Any:
        """What a branch returned at this step; None where it has not run."""
        found = self.results.get(branch)
        return found[1] if found is not None and found[0] == step else None

    def note(self, branch: str, step: int, result: Any) -> None:
        """A branch has run; the sampler may write into what it got, so that a copy is kept."""
        self.results[branch] = (step, mapped(result, Tensor.clone))

    def both_computed(self, step: int, conditional: Any, unconditional: Any) -> None:
        """Both branches have run at this step."""
        assert self.guidance is not None
        pairs = list(zip(tree.walk(conditional), tree.walk(unconditional), strict=True))
        tensors = [(path, c, u) for (path, c), (_, u) in pairs if isinstance(c, Tensor)]
        if self.guidance.rule == "difference":
            self.difference = {path: (u - c).detach() for path, c, u in tensors}
            if step == 0 and self.guidance.bands:  # says at once what it cannot split
                self.unconditional(step, conditional)
        if self._gate is not None:
            moment = self._moment(step)
            numbers = self._gate.see([tensors[0][1].detach(), tensors[0][2].detach()], moment, True)
            self._coming = None if numbers is None else HostRead(numbers)
            self._gate.done(moment, True)
        self._last = step

    def leaves_out(self, step: int, latent: Any, conditional: Any) -> bool:
        """Whether the unconditional branch is left out at this step; its gate is asked once a step."""
        assert self.guidance is not None
        if self._left_out[0] != step:
            self._left_out = (step, self._decide(self.guidance, step, latent, conditional))
        return self._left_out[1]

    def unconditional(self, step: int, conditional: Any) -> Any:
        """What stands for the unconditional result; None where it cannot be told."""
        assert self.guidance is not None
        if self.guidance.rule == "reuse":
            found = self.results.get(UNCONDITIONAL)
            return None if found is None else mapped(found[1], Tensor.clone)
        return None if conditional is None else stand_in(self.guidance, step, conditional, self.difference)

    def leave_out(self, stream: Stream, step: int, printed: str = "-") -> None:
        """The unconditional branch of this step is left out of a stream; what that kept is of no use after folding."""
        assert self.guidance is not None
        stream.leave_out(step, printed)
        if self.guidance.rule == "fold":
            self.folded = True
            stream.history.clear()
        if self._gate is not None:
            self._gate.done(self._moment(step), False)

    def _decide(self, guidance: Guidance, step: int, latent: Any, conditional: Any) -> bool:
        gate, moment = self._gate, self._moment(step)
        if gate is None or self.folded:
            return step not in guidance.computed
        if self._coming is not None:
            gate.learn(_numbers(self._coming.get()))
            self._coming = None
        if gate.probe == "output":
            latent = next((leaf for _, leaf in tree.walk(conditional) if isinstance(leaf, Tensor)), None)
        found = gate.look(latent.detach(), moment) if gate.probe and isinstance(latent, Tensor) else None
        if step in guidance.computed or (gate.probe and found is None):
            return False
        numbers = np.zeros((1, 0)) if found is None else _numbers(HostRead(found).get())
        return bool(np.all(gate.follow(moment, numbers)))

    def _moment(self, step: int) -> Moment:
        return Moment(step, self.schedule.steps, step - self._last, self.schedule.clock)


def _numbers(found: Tensor) -> np.ndarray:
    return found.double().reshape(len(found), -1).numpy()
