"""A site's values over one uncached generation, for what is fitted to channels and not to whole values."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from diffcache.cells import COMPUTE, GateSpec, Online
from diffcache.memory import in_full
from diffcache.profiling import Calibration, Generate
from diffcache.programs import History
from diffcache.runtime import CachedDenoiser
from diffcache.schedule import Row, Schedule
from diffcache.streams import Stream

TOKENS = 256  # rows of a value that are kept


def trajectory(calibration: Calibration, generate: Generate, name: str, residual: bool) -> NDArray[np.float32]:
    """What history keeps of a site's first value over an uncached generation, ``[steps, tokens, channels]``.

    Of the first stream (one branch of guidance); the last step is missing, since nothing reads what it would keep. Of
    more than ``TOKENS`` rows that many are kept, evenly spaced.
    """
    steps = calibration.profile.steps
    never = GateSpec("max_gap", {"limit": 0})
    row = Row(name, residual, (COMPUTE, *[Online()] * (steps - 1)), never)
    watched = _Watched(
        calibration.captured, Schedule(steps, (row,), clock=calibration.profile.clock), calibration.pattern,
        calibration.finder, title="trajectory",
    )  # fmt: skip
    generate(watched, 0)
    first = next(iter(watched.seen.values()), [])
    if len(first) < steps - 1:
        raise ValueError(f"a generation of {steps} steps shows only {len(first)} values of site '{name}'")
    return np.stack([value.numpy() for value in first])


class _Watched(CachedDenoiser):
    """Computes everything and copies what is kept."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.seen: dict[int, list[torch.Tensor]] = {}
        self._of: list[Stream] = []

    def _advance(self, stream: Stream, step: Any, column: Any, written: History, result: Any) -> None:
        if all(stream is not known for known in self._of):
            self._of.append(stream)
        number = next(k for k, known in enumerate(self._of) if known is stream)
        for (_, part, _), kept in written.items():
            if part == 0:
                rows = in_full(kept).detach()
                rows = rows.reshape(-1, rows.shape[-1])
                rows = rows[:: -(-len(rows) // TOKENS)]
                self.seen.setdefault(number, []).append(rows.to("cpu", torch.float32))
        super()._advance(stream, step, column, written, result)
