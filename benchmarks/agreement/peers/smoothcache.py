"""dit-smoothcache 0.1.1 on a DiT."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence

from benchmarks.agreement.peers.watching import Run, Watch, observe
from benchmarks.agreement.subjects import Subject


class Helped:
    """A transformer under ``SmoothCacheHelper``, for one or several generations."""

    def __init__(self, subject: Subject, schedule: Mapping[str, Sequence[int]]):
        with contextlib.redirect_stdout(io.StringIO()):
            from SmoothCache import SmoothCacheHelper
        from diffusers.models.attention import BasicTransformerBlock

        self.subject, self.model = subject, subject.make()
        parts = sorted({name.partition("-")[0] for name in schedule})
        self.watch = Watch(self.model, [f"{path}.{part}" for path in subject.block_paths(self.model) for part in parts])
        self.helper = SmoothCacheHelper(
            model=self.model,
            block_classes=[BasicTransformerBlock],
            components_to_wrap=parts,
            schedule={name: list(steps) for name, steps in schedule.items()},
        )
        self.helper.enable()

    def generate(self, seed: int = 0) -> Run:
        with contextlib.redirect_stdout(io.StringIO()):  # the library prints a line per module and step
            return observe(self.model, self.subject, seed, self.watch)


def smoothcache(subject: Subject, schedule: Mapping[str, Sequence[int]], seed: int = 0) -> Run:
    """``SmoothCacheHelper(model, BasicTransformerBlock, parts, schedule)``; ``DiffuserCacheHelper`` takes only attn1.

    ``schedule``: name of a child ("attn1", "ff"), or "attn1-3" for that of block 3 alone -> 1 (compute) or 0 for every
    step. Per module: skipped iff the list has 0 at its own call count and something is cached; beyond the list's end it
    computes. Reused: what the child returned when it last ran, before gate and residual.

    Calibration is not in the registry's package (neither wheel nor source holds ``SmoothCache.calibration``, and the
    import says so by printing). In the repository (edeb4ed) it is, one run uncached: E_g(i) = ||a_i - a_{i+g}||_1 /
    ||a_{i+g}||_1 over the whole batch for g = 1..lookahead, averaged over the blocks of one kind of child. Then from
    i = 0: the largest g with E_g(i) <= threshold: compute i, skip the g steps after it, go on at i + g + 1; if none,
    compute i and go on at i + 1. Only E at the far end is asked, not the steps between. First and last step are forced
    to compute. ``rules.smoothcache_schedule`` is that rule.

    Faults: counters are never set back: from the second generation on nothing is cached, silently.
    """
    return Helped(subject, schedule).generate(seed)
