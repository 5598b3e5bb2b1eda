"""The denoiser as those see it who make several calls of one."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, Protocol

from diffcache.batch import refuse_effects
from diffcache.call_pattern import CallPattern
from diffcache.cells import COMPUTE
from diffcache.memory import Kept
from diffcache.options import RunOptions
from diffcache.programs import Programs
from diffcache.schedule import Schedule
from diffcache.streams import Stream
from diffcache.tracing.captured import Captured
from diffcache.tracing.session import Bound
from diffcache.tracing.variant import Variant


class Caller(Protocol):
    """What is needed of it: above all, to run a call as a step of a stream, or in full."""

    captured: Captured
    schedule: Schedule
    pattern: CallPattern
    options: RunOptions
    logs: deque[tuple[str, list[str]]]
    flops_in_full: float
    steps_forecast: int

    def perform(self, bound: Bound, stream: Stream, step: int | None) -> Any: ...

    def programs(self, variant: Variant, bound: Bound) -> Programs: ...

    def say_once(self, message: str) -> None: ...


def observed(caller: Caller, bound: Bound) -> tuple[Any, Mapping[tuple[int, int], Kept]]:
    """A full run that no stream and no count knows of: the result, and what is kept of every row's site.

    Raises:
        ValueError: the denoiser does more than return a result.
    """

    def run(variant: Variant) -> tuple[Any, Mapping[tuple[int, int], Kept]]:
        refuse_effects(variant)
        programs = caller.programs(variant, bound)
        program = programs.observing() if programs.sites else programs.full()
        leaves = programs.leaves(bound)
        with variant.restoring(leaves):
            hoisted = programs.prologue(*leaves) if programs.prologue is not None else ()
            result, kept = program(leaves, hoisted, {}, (COMPUTE,) * len(programs.sites), {})
        return result, dict(zip(program.writes, kept, strict=True))

    return caller.captured.serve(bound, run)  # type: ignore[no-any-return]
