"""Branches of guidance that go together: shared decisions, and an unconditional branch that is left out.

Two calls a step are two streams, joined into one ``Generation`` by their equal latents at its first step (both branches
in one call: see ``halves``). A branch that is left out needs the conditional result of the same step: if the sampler
calls the unconditional branch first, the conditional call runs ahead and its result waits for the sampler to ask.
Whatever cannot be done as asked (a branch without its partner, another latent, no history) is computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffcache.batch import call_kind, refuse_effects
from diffcache.call_pattern import CallPattern, input_leaves
from diffcache.caller import Caller
from diffcache.gates import make_gate
from diffcache.generations import CONDITIONAL, UNCONDITIONAL, Generation, Held
from diffcache.guidance_rules import mean
from diffcache.halves import Halves
from diffcache.schedule import Schedule
from diffcache.streams import Stream, input_at
from diffcache.tracing import tree
from diffcache.tracing.session import Bound


class _Ahead:
    """A call that was run before the sampler made it."""

    def __init__(self, step: int, inputs: Mapping[tree.Path, Any], result: Any):
        self.step, self.result = step, result
        self.inputs = {path: Held(leaf) for path, leaf in inputs.items()}

    def answers(self, step: int, inputs: Mapping[tree.Path, Any]) -> bool:
        return (
            step == self.step
            and inputs.keys() == self.inputs.keys()
            and all(held.equals(inputs[path]) for path, held in self.inputs.items())
        )


class Branches:
    """Runs the calls of streams that go together.

    Raises:
        ValueError: the schedule has a guidance that this denoiser's calls do not allow.
    """

    def __init__(self, caller: Caller):
        self.caller, self.schedule, self.pattern = caller, caller.schedule, caller.pattern
        self.guidance = self.schedule.guidance
        if self.guidance is not None:
            _refuse(self.schedule, self.pattern)
        branches = self.pattern.branches
        batched = self.guidance is not None and branches is not None and branches.batched
        self.halves = Halves(caller) if batched else None
        self._checked: set[Any] = set()  # kinds of calls that may be left out

    def join(self, stream: Stream, others: Sequence[Stream]) -> None:
        """A stream begins: as another branch of a generation whose first step is going on, or as a new generation's."""
        if stream.generation is not None:
            return
        for other in reversed(others):
            generation = other.generation
            if other is not stream and generation is not None and self._belongs(stream, generation):
                break
        else:
            generation = Generation(self.schedule)
        generation.add(stream)

    def run(self, bound: Bound, stream: Stream, step: int) -> Any:
        """One call, as this step of this stream."""
        if self.halves is not None:
            return self.halves.run(bound, stream, step)
        generation: Generation = stream.generation
        if stream.ahead is not None:
            return self._ran_ahead(bound, stream, step)
        generation.enter(step, input_at(bound, self.pattern.probe))
        if self.guidance is not None and self._branch(stream) == UNCONDITIONAL:
            self._check(bound)
            found = self._left_out(bound, stream, step)
            if found is not None:
                return found
            if self.schedule.decide == "shared":
                self._conditional_first(bound, stream, step)
        return self._compute(bound, stream, step)

    def _belongs(self, stream: Stream, generation: Generation) -> bool:
        """Whether a new stream is the next branch of a generation: same latent, another condition."""
        members = generation.streams
        if len(members) >= self.pattern.streams or generation.broken:
            return False
        conditions = [leaf for leaf, _ in stream.invariants]
        names = self.pattern.branches.names if self.pattern.branches is not None else ()
        for member in members:
            if member is None or member.position != 0 or member.owner[1:] != stream.owner[1:]:
                return False
            same_name = stream.owner[0] == member.owner[0]
            if same_name if stream.owner[0] in names else member.serves(stream.owner, conditions):
                return False
        return members[0] is not None and Held(members[0].latent).equals(stream.latent)

    def _branch(self, stream: Stream) -> str:
        """Which branch a stream is: by the name of its context, else by the order of the calls."""
        branches = self.pattern.branches
        assert branches is not None
        name = stream.owner[0]
        index = branches.names.index(name) if name in branches.names else stream.generation.streams.index(stream)
        return UNCONDITIONAL if index == branches.unconditional else CONDITIONAL

    def _partner(self, stream: Stream) -> Stream | None:
        """The other of two branches; None if there is none, or none any more."""
        others = [other for other in stream.generation.streams if other is not stream]
        if stream.generation.broken or len(others) != 1 or others[0] is None:
            return None
        return others[0] if self._branch(others[0]) != self._branch(stream) else None

    def _compute(self, bound: Bound, stream: Stream, step: int) -> Any:
        """The call runs; the other branch may follow what it decides and use what it returns."""
        generation: Generation = stream.generation
        if self.schedule.decide == "shared" and step > 0:  # every branch has to see its first step
            stream.deciding.follow(generation.column(step))
        if self.guidance is not None and self._branch(stream) == CONDITIONAL:
            self._merge(stream, step)
        result = self.caller.perform(bound, stream, step)
        stream.has_run()
        if stream.deciding.column and stream.deciding.step == step:
            generation.decided(step, stream.deciding.column)
        if self.guidance is not None and (step == 0 or len(generation.streams) > 1):
            stream.bound = bound
            generation.note(self._branch(stream), step, result)
            both = [generation.result(branch, step) for branch in (CONDITIONAL, UNCONDITIONAL)]
            if None not in both and not generation.broken:
                generation.both_computed(step, *both)
        return result

    def _left_out(self, bound: Bound, stream: Stream, step: int) -> Any:
        """What stands for the unconditional result; None where it has to be computed."""
        guidance, generation, partner = self.guidance, stream.generation, self._partner(stream)
        assert guidance is not None
        if generation.broken or len(generation.streams) != 2:
            if step not in guidance.computed and generation.broken:
                self.caller.say_once("guidance: the two branches have different latents, so that both are computed")
            return None
        conditional, latent = generation.result(CONDITIONAL, step), input_at(bound, self.pattern.probe)
        to_come = partner is not None and partner.position == step - 1
        if (conditional is None and not to_come) or not generation.leaves_out(step, latent, conditional):
            return None
        if conditional is None and guidance.rule != "reuse":
            assert partner is not None
            conditional = self._run_ahead(bound, partner, step)
        result = generation.unconditional(step, conditional)
        if result is None:
            return None
        generation.leave_out(stream, step)
        self.caller.flops_in_full += stream.flops
        self.caller.steps_forecast += 1
        return result

    def _check(self, bound: Bound) -> None:
        """Once for each kind of call: nothing but a result is lost where it is left out."""
        kind = call_kind(bound)
        if kind not in self._checked:
            cannot = "the unconditional branch cannot be left out: "
            self.caller.captured.serve(bound, lambda variant: refuse_effects(variant, cannot, drawing=False))
            self._checked.add(kind)

    def _varying(self, bound: Bound) -> dict[tree.Path, Any]:
        """Inputs that are no conditions: both branches have them in common."""
        return {path: leaf for path, leaf in input_leaves(bound).items() if path not in self.pattern.invariant}

    def _run_ahead(self, bound: Bound, partner: Stream, step: int) -> Any:
        """The conditional call of this step before the sampler makes it: its conditions, the inputs of this call."""
        inputs = self._varying(bound)
        if partner.bound is None or self._varying(partner.bound).keys() != inputs.keys():
            return None
        result = self._compute(tree.with_leaves(partner.bound, inputs), partner, step)
        partner.position = step - 1  # the call itself is still to come
        partner.ahead = _Ahead(step, inputs, result)
        return partner.generation.result(CONDITIONAL, step)

    def _conditional_first(self, bound: Bound, stream: Stream, step: int) -> None:
        """Where one branch is left out at times, the one that never is decides for both."""
        partner = self._partner(stream)
        if partner is not None and partner.ahead is None and partner.position == step - 1 and step > 0:
            self._run_ahead(bound, partner, step)

    def _ran_ahead(self, bound: Bound, stream: Stream, step: int) -> Any:
        """The sampler makes a call that ran ahead of time."""
        ahead: _Ahead = stream.ahead
        stream.ahead, stream.position = None, step
        if ahead.answers(step, self._varying(bound)):
            return ahead.result
        stream.generation.broken = True
        stream.forget()
        self.caller.say_once(
            f"guidance: the conditional call of step {step} has other inputs than the unconditional one before it, so "
            "that both branches are computed from now on. Calibrate with the sampler that you generate with."
        )
        return self.caller.perform(bound, stream, None)

    def _merge(self, stream: Stream, step: int) -> None:
        """The first step after folding: what sites keep of both branches becomes one."""
        guidance, generation, partner = self.guidance, stream.generation, self._partner(stream)
        assert guidance is not None
        folds = generation.folded or (guidance.gate is None and step not in guidance.computed)
        if guidance.history != "mean" or not folds or generation.merged or partner is None:
            return
        generation.merged = True
        for key in stream.history.keys() & partner.history.keys():
            stream.history[key] = mean(stream.history[key], partner.history[key])


def _refuse(schedule: Schedule, pattern: CallPattern) -> None:
    """Raise ValueError for a guidance that calls of this pattern do not allow."""
    guidance, branches = schedule.guidance, pattern.branches
    assert guidance is not None
    leaves_out = f"{schedule.origin or 'the schedule'} leaves the unconditional branch of guidance out, but calibration"
    if branches is None:
        raise ValueError(
            f"{leaves_out} saw no two branches: {pattern.streams} streams, and no calls of two equal halves. Calibrate "
            "with guidance on at every step, or take a recipe without guidance"
        )
    if branches.unconditional is None:
        raise ValueError(f"{leaves_out} does not tell which it is: {branches.reason}")
    if guidance.gate is None:
        return
    gate = make_gate(guidance.gate.name, **guidance.gate.options)
    probes = ("", "latent") if branches.batched or branches.unconditional == 0 else ("", "latent", "output")
    if gate.probe not in probes or gate.watch not in ("", "branches"):
        raise ValueError(
            f"gate '{guidance.gate.name}' looks at '{gate.probe}' and watches '{gate.watch}'; a gate of guidance may "
            f"look at one of {list(probes)} here and watch 'branches' or nothing"
        )
