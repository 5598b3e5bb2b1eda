"""Every sample of a batch decides for itself: a call is cut into samples, and each is a stream of its own.

They run one by one, so that a sample gives bit for bit what it gives alone, whatever shares its batch. Where guidance
is called as the halves of one batch and its unconditional branch may be left out, a sample is a pair of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from diffcache.batch import Rows, batch_size, call_kind, check_equal, cut, joined
from diffcache.branches import Branches
from diffcache.caller import Caller, observed
from diffcache.generations import Generation
from diffcache.memory import in_words
from diffcache.streams import Stream
from diffcache.tracing.session import Bound


class EachSample:
    """Runs the calls of streams whose samples decide for themselves. Raises ValueError like ``Branches``."""

    def __init__(self, caller: Caller):
        self.caller, self.branches = caller, Branches(caller)
        self._checked: set[Any] = set()

    def join(self, stream: Stream, others: Sequence[Stream]) -> None:
        self.branches.join(stream, others)

    def run(self, bound: Bound, stream: Stream, step: int) -> Any:
        """One call, sample by sample.

        Raises:
            ValueError: its samples cannot be told apart, or depend on one another.
        """
        pattern, samples = self.caller.pattern, batch_size(bound, self.caller.pattern)
        rows = self._rows(samples)
        calls = [cut(bound, pattern, part, samples) for part in rows]
        if not self._fits(calls):
            stream.position = step
            return self.caller.perform(bound, stream, None)
        if len(stream.parts) != len(rows):
            self._divide(stream, len(rows))
        expected = self._expected(bound) if step == 0 and len(rows) > 1 else None
        results = [self.branches.run(call, part, step) for call, part in zip(calls, stream.parts, strict=True)]
        stream.position = step
        whole = results[0] if len(rows) == 1 else joined(results, rows)
        if expected is not None:
            check_equal(expected, whole, "the result")
            self._checked.add(call_kind(bound))
        return whole

    def _rows(self, samples: int) -> list[Rows]:
        if samples == 0:
            raise ValueError(
                "samples cannot decide each for itself: calibration found no latent whose first dimension could be the "
                "batch; let samples decide together"
            )
        if self.branches.halves is None:
            return [[row] for row in range(samples)]
        if samples % 2:
            raise ValueError(
                f"guidance was calibrated as the halves of one batch, but this call has {samples} samples; generate "
                "with guidance, or take a recipe without each_sample()"
            )
        return [[row, samples // 2 + row] for row in range(samples // 2)]

    def _fits(self, calls: Sequence[Bound]) -> bool:
        """Whether the history of all samples stays within ``max_cache_bytes``."""
        caller, allowed = self.caller, self.caller.options.max_cache_bytes
        if allowed is None:
            return True
        pattern = replace(caller.pattern, streams=caller.pattern.streams * len(calls))
        programs = caller.captured.serve(calls[0], lambda variant: caller.programs(variant, calls[0]))
        needed = programs.memory(caller.schedule, pattern).device_bytes
        if needed > allowed:
            caller.say_once(
                f"history of {len(calls)} samples would take {in_words(needed)}, max_cache_bytes allows "
                f"{in_words(allowed)}: they are computed in full. Raise the limit, or generate fewer at a time"
            )
        return bool(needed <= allowed)

    def _divide(self, stream: Stream, count: int) -> None:
        """A stream for each sample, joined with the same sample of the branch that was called first."""
        first = stream.generation.streams[0]
        stream.parts = [Stream(stream.owner, [], self.caller.schedule) for _ in range(count)]
        for index, part in enumerate(stream.parts):
            together = first is not None and first is not stream and len(first.parts) == count
            generation = first.parts[index].generation if together else Generation(self.caller.schedule)
            generation.add(part)
            self.caller.logs.append((f"{stream.owner[0]}[{index}]", part.deciding.log))

    def _expected(self, bound: Bound) -> Any:
        """What the whole batch gives, all computed; once for each kind of call."""
        return None if call_kind(bound) in self._checked else observed(self.caller, bound)[0]


def several(caller: Caller) -> Branches | EachSample | None:
    """What runs the calls of a denoiser that are not simply one step of one stream each; None where all are."""
    schedule = caller.schedule
    if schedule.samples == "alone":
        return EachSample(caller)
    leaves_out = schedule.guidance is not None and bool(schedule.guidance.left_out(schedule.steps))
    shares = schedule.decide == "shared" and schedule.is_online and caller.pattern.streams > 1
    return Branches(caller) if leaves_out or shares else None
