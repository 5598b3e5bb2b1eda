"""How kernels are timed: on a GPU by replaying a recording of many calls over buffers that do not fit in its cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

MB = 1 << 20
FOOTPRINT = 384 * MB  # of all buffers that take turns: several times the largest L2
CALLS = 32  # of one recording, at least, so that the gap between two replays does not count

Call = Callable[[], object]


def turns(set_bytes: int) -> int:
    """How many sets of buffers take turns."""
    return max(4, -(-FOOTPRINT // set_bytes))


def replayed(calls: Sequence[Call], repeats: int = 5) -> float:
    """Seconds of device work of one call: the median over ``repeats`` of a replayed recording of all of them.

    Results stay alive inside the recording, so that every call writes into memory of its own.
    """
    rounds = max(1, -(-CALLS // len(calls))) if len(calls) > 4 else 2
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:  # compiles, loads libraries
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for _ in range(rounds) for call in calls]
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(4):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / (4 * rounds * len(calls)))
    del kept
    graph.reset()
    torch.cuda.empty_cache()
    return statistics.median(times)


def wall(calls: Sequence[Call], device: str, count: int = 64, repeats: int = 5) -> float:
    """Seconds of one call by the host's clock: many calls back to back, then one synchronisation."""
    for call in calls[:2]:
        call()
    times = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for number in range(count):
            calls[number % len(calls)]()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / count)
    return statistics.median(times)


def seconds(calls: Sequence[Call], device: str, count: int = 8) -> float:
    """Of one call: device work on a GPU, time by the clock elsewhere."""
    return replayed(calls) if device == "cuda" else wall(calls, device, count=count, repeats=3)


def check(name: str, result: Tensor, expected: Tensor, tolerance: float) -> None:
    """A red check prints no speed. Raises ArithmeticError."""
    error = ((result.double() - expected.double()).norm() / expected.double().norm()).item()
    if not error <= tolerance:
        raise ArithmeticError(f"{name} is wrong: relative error {error:.2e}, allowed {tolerance:.0e}")
