"""Guidance as one call of both branches, the halves of a batch: the unconditional half may be left out.

Where it is, the conditional half runs as a stream of its own, with its half of what history keeps of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from diffcache.batch import Rows, batch_size, call_kind, check_equal, cut, joined, part_of, taken
from diffcache.caller import Caller, observed
from diffcache.generations import CONDITIONAL, UNCONDITIONAL, Generation
from diffcache.guidance_rules import mean
from diffcache.memory import Kept, in_full
from diffcache.streams import Stream, input_at
from diffcache.token_programs import NEWEST
from diffcache.tracing.session import Bound


class Halves:
    """Runs such calls; those whose batch cannot be two branches are computed.

    Raises:
        ValueError: at a first step, where half of the batch alone does not give what it gives in company.
    """

    def __init__(self, caller: Caller):
        assert caller.schedule.guidance is not None
        self.caller, self.schedule, self.pattern = caller, caller.schedule, caller.pattern
        self.guidance = caller.schedule.guidance
        self._checked: set[Any] = set()

    def run(self, bound: Bound, stream: Stream, step: int) -> Any:
        """One call, as this step of this stream."""
        generation: Generation = stream.generation
        samples, latent = batch_size(bound, self.pattern), input_at(bound, self.pattern.probe)
        if samples == 0 or samples % 2:
            return self.caller.perform(bound, stream, step)
        rows = self._rows(samples)
        if step == 0:
            self._check(bound, rows, samples)
        elif not generation.broken and generation.leaves_out(step, latent, None):
            if generation.half is not None or self._are_branches(latent, rows):
                return self._half(bound, stream, step, rows)
            generation.broken = True
            self.caller.say_once("guidance: a batch was calibrated as two branches, but is not: it is computed in full")
        result = self.caller.perform(bound, stream, step)
        stream.has_run()
        if not generation.broken:
            conditional, unconditional = (
                part_of(result, rows[branch], samples) for branch in (CONDITIONAL, UNCONDITIONAL)
            )
            generation.results[UNCONDITIONAL] = (step, unconditional)
            generation.both_computed(step, conditional, unconditional)
        return result

    def _rows(self, samples: int) -> dict[str, Rows]:
        """The rows of either branch."""
        branches = self.pattern.branches
        assert branches is not None
        halves = [range(samples // 2), range(samples // 2, samples)]
        first = branches.unconditional or 0
        return {UNCONDITIONAL: halves[first], CONDITIONAL: halves[1 - first]}

    def _are_branches(self, latent: Any, rows: Mapping[str, Rows]) -> bool:
        """Whether a generation is guided: two samples of other kinds have gone apart after their first step."""
        return torch.equal(taken(latent, rows[CONDITIONAL]), taken(latent, rows[UNCONDITIONAL]))

    def _half(self, bound: Bound, stream: Stream, step: int, rows: Mapping[str, Rows]) -> Any:
        """The conditional half runs, with the conditional half of history."""
        generation, half = stream.generation, stream.generation.half
        if half is None:
            half = generation.half = Stream(stream.owner, [], self.schedule)
            half.partial = True
        if half.position < stream.deciding.step:  # both halves have run since
            for key, kept in stream.history.items():
                if key not in half.history or key[2] == NEWEST:
                    half.history[key] = _half_of(kept, rows, self.guidance.history == "mean")
            half.deciding.adopt(stream.deciding)
        samples = len(rows[CONDITIONAL]) + len(rows[UNCONDITIONAL])
        result = self.caller.perform(cut(bound, self.pattern, rows[CONDITIONAL], samples), half, step)
        half.has_run()
        other = generation.unconditional(step, result)
        assert other is not None
        generation.leave_out(stream, step, "-" + "".join(half.deciding.log[-1:]))
        self.caller.flops_in_full += stream.flops - half.flops
        return joined([result, other], [rows[CONDITIONAL], rows[UNCONDITIONAL]])

    def _check(self, bound: Bound, rows: Mapping[str, Rows], samples: int) -> None:
        """Once for each kind of call: the conditional half alone gives what it gives in company, in every site."""
        kind = call_kind(bound)
        if kind in self._checked:
            return
        part = rows[CONDITIONAL]
        whole, kept = observed(self.caller, bound)
        half, kept_half = observed(self.caller, cut(bound, self.pattern, part, samples))
        check_equal(part_of(whole, part, samples), half, "the result")
        for (row, value), tensor in kept.items():
            if (row, value) in kept_half:
                alone, site = in_full(kept_half[row, value]), self.schedule.rows[row].site
                in_company = in_full(_half_of(tensor, rows, False))
                # a residual in half precision is mostly rounding, and so is what is kept in 8 bits; rows of another
                # kind (frames before samples, say) would be off by about the size of the values
                coarse = isinstance(tensor, tuple) or tensor.dtype in (torch.float16, torch.bfloat16)
                check_equal(in_company, alone, f"the value of site '{site}'", 0.25 if coarse else None)
        self._checked.add(kind)


def _half_of(kept: Kept, rows: Mapping[str, Rows], as_mean: bool) -> Kept:
    """What history keeps of the conditional half, or of the mean of both; the batch leads the first dimension."""
    halves: list[Kept]
    if isinstance(kept, tuple):
        halves = list(zip(kept[0].chunk(2), kept[1].chunk(2), strict=True))
    else:
        halves = list(kept.chunk(2))
    return mean(*halves) if as_mean else halves[0 if rows[CONDITIONAL][0] == 0 else 1]
