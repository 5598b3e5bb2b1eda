"""How a sampler calls its denoiser: which inputs stay the same over a generation, the clock, branches of guidance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from diffcache.tracing import tree
from diffcache.tracing.session import Bound


@dataclass(frozen=True)
class TwoBranches:
    """How the two branches of guidance are called: in two calls a step, or as the halves of one batch.

    ``unconditional``: which of the two it is, the one called first (or the first half) being 0; None where calibration
    does not tell, for the ``reason`` given. ``names``: of their contexts in the order of the calls, if they have any.
    """

    batched: bool
    unconditional: int | None = None
    names: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class CallPattern:
    """What calibration saw of one denoiser's calls.

    ``invariant``: paths of inputs equal at every call of one stream (a stream is the sequence of calls with one
    condition: conditional and unconditional guidance are two). ``clock``: the path of the timestep, if there is one.
    ``probe``: the path of the latent. ``steps``: calls per stream. ``streams``: streams per generation. ``branches``:
    how guidance is called, if there are two branches. ``shared``: inputs that all samples of a batch have in common.
    """

    invariant: tuple[tree.Path, ...]
    clock: tree.Path | None
    probe: tree.Path | None
    steps: int
    streams: int = 1
    clock_values: tuple[float, ...] = ()
    branches: TwoBranches | None = None
    shared: tuple[tree.Path, ...] = ()


def input_leaves(bound: Bound) -> dict[tree.Path, Any]:
    """Tensors and numbers among the arguments, by path."""
    found = {}
    for name, value in bound.items():
        for path, leaf in tree.walk(value, (("item", name),)):
            if isinstance(leaf, torch.Tensor) or type(leaf) in (int, float):
                found[path] = leaf
    return found


def host_value(leaf: Any) -> float | None:
    """A timestep's value if it can be read without waiting for a device.

    For a batch of equal ones that value; for others a number that tells them apart.
    """
    if isinstance(leaf, torch.Tensor):
        if leaf.device.type != "cpu" or not leaf.numel():
            return None
        first, spread = float(leaf.reshape(-1)[0]), 0.0
        if leaf.numel() > 1:
            offsets = leaf.detach().double() - first
            spread = float(offsets.mean() + offsets.std(correction=0))
        return first + spread
    return float(leaf) if isinstance(leaf, int | float) else None


@dataclass
class LoggedCall:
    """One call seen in calibration: its context name and a digest of each input leaf.

    Of tensors also ``rows``: how long the first dimension is, and a digest of the first row; and ``halves``: a digest
    of the first row of the second half, and whether the halves are equal.
    """

    context: str
    digests: dict[tree.Path, int]
    sizes: dict[tree.Path, int]
    clock: dict[tree.Path, float]
    stream: int = -1
    rows: dict[tree.Path, tuple[int, int]] = field(default_factory=dict)
    halves: dict[tree.Path, tuple[int, bool]] = field(default_factory=dict)


def log_call(bound: Bound, context: str) -> LoggedCall:
    leaves = input_leaves(bound)
    digests = {path: _digest(leaf) for path, leaf in leaves.items()}
    sizes = {path: leaf.numel() if isinstance(leaf, torch.Tensor) else 1 for path, leaf in leaves.items()}
    values = {
        path: host_value(leaf.cpu() if isinstance(leaf, torch.Tensor) else leaf)
        for path, leaf in leaves.items()
        if not _is_complex(leaf)
    }
    call = LoggedCall(context, digests, sizes, {path: value for path, value in values.items() if value is not None})
    for path, leaf in leaves.items():
        if isinstance(leaf, torch.Tensor) and leaf.ndim and len(leaf):
            call.rows[path] = (len(leaf), _digest(leaf[0]))
            if len(leaf) % 2 == 0:
                first, second = leaf.chunk(2)
                call.halves[path] = (_digest(second[0]), torch.equal(first, second))
    return call


def _is_complex(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_complex()


def _digest(leaf: Any) -> int:
    if not isinstance(leaf, torch.Tensor):
        return hash((type(leaf), leaf))
    # a copy has plain strides; a tensor of one element can pass for contiguous with any
    data = leaf.detach().to("cpu").clone(memory_format=torch.contiguous_format).reshape(-1)
    content = data.view(torch.uint8).numpy().tobytes() if data.numel() else b""
    return hash((tuple(leaf.shape), leaf.dtype, content))


def find_pattern(generations: Sequence[Sequence[LoggedCall]], min_steps: int = 4) -> CallPattern:
    """Tell streams, invariant inputs and the clock apart from the logged calls; sets ``LoggedCall.stream``.

    Raises:
        ValueError: the denoiser was called too few times to reuse anything.
    """
    calls = generations[0]
    paths = [path for path in calls[0].digests if all(path in call.digests for call in calls)]
    distinct = {path: len({call.digests[path] for call in calls}) for path in paths}
    invariant = tuple(path for path in paths if distinct[path] <= max(1, len(calls) // 4))
    for generation in generations:
        keys: dict[Any, int] = {}
        for call in generation:
            key = (call.context, *(call.digests.get(path) for path in invariant))
            call.stream = keys.setdefault(key, len(keys))
    lengths = [sum(call.stream == s for call in calls) for s in range(1 + max(call.stream for call in calls))]
    steps = max(lengths)
    if steps < min_steps:
        raise ValueError(
            f"the denoiser was called {len(calls)} times in {len(lengths)} streams of at most {steps} steps; "
            f"nothing can be reused in fewer than {min_steps} steps. Calibrate with the step count you generate with."
        )
    main = [call for call in calls if call.stream == lengths.index(steps)]
    varying = [path for path in paths if path not in invariant]
    clock = _find_clock(varying, main, generations, steps)
    others = [path for path in varying if path != clock]
    probe = max(others, key=lambda path: main[0].sizes[path], default=None)
    values = tuple(call.clock[clock] for call in main) if clock is not None else ()
    return CallPattern(invariant, clock, probe, steps, len(lengths), values)


def _find_clock(
    varying: Sequence[tree.Path], main: Sequence[LoggedCall], generations: Sequence[Sequence[LoggedCall]], steps: int
) -> tree.Path | None:
    """The smallest input that takes the same values in every generation; a latent does not, for the noise differs.

    With one generation to look at, the smallest that varies, if it is small.
    """

    def values(calls: Sequence[LoggedCall], path: tree.Path, stream: int) -> list[float | None]:
        return [call.clock.get(path) for call in calls if call.stream == stream]

    for path in sorted(varying, key=lambda path: main[0].sizes[path]):
        expected = [call.clock.get(path) for call in main]
        others = [
            values(calls, path, stream) for calls in generations[1:] for stream in {call.stream for call in calls}
        ]
        agree = all(found == expected for found in others if len(found) == steps)
        if None not in expected and len(set(expected)) > steps // 2 and agree:
            return path if others or main[0].sizes[path] <= 64 else None
        if not others:
            return None
    return None
