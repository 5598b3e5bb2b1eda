"""What calibration's calls say about guidance: two branches or not, which is unconditional, what samples share."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

from diffcache.call_pattern import CallPattern, LoggedCall, TwoBranches
from diffcache.tracing import tree

Generations = Sequence[Sequence[LoggedCall]]

UNTOLD = (
    "calibrate with two or more different prompts, whose unconditional branch is the same, or name the branches with "
    'cache_context("cond") and cache_context("uncond")'
)


def with_branches(pattern: CallPattern, generations: Generations) -> CallPattern:
    """The pattern with what the logged calls (streams found) say about branches and batches."""
    return replace(pattern, branches=_branches(pattern, generations), shared=_shared(pattern, generations))


def _branches(pattern: CallPattern, generations: Generations) -> TwoBranches | None:
    if pattern.probe is None:
        return None
    if pattern.streams == 1:
        halves = [call.halves.get(pattern.probe) for calls in generations for call in calls]
        if not all(half is not None and half[1] for half in halves):
            return None
        found = [[_half_conditions(pattern, calls[0], half) for calls in generations] for half in (0, 1)]
        return _told(TwoBranches(batched=True), found)
    if pattern.streams != 2 or not all(_in_pairs(pattern, calls) for calls in generations):
        return None
    first = [next(call for call in generations[0] if call.stream == stream) for stream in (0, 1)]
    names = tuple(call.context for call in first)
    branches = TwoBranches(batched=False, names=names if all(names) and len(set(names)) == 2 else ())
    unconditional = [index for index, name in enumerate(branches.names) if says_unconditional(name)]
    if len(unconditional) == 1:
        return replace(branches, unconditional=unconditional[0])
    found = [[_conditions(pattern, calls, stream) for calls in generations] for stream in (0, 1)]
    return _told(branches, found)


def says_unconditional(name: str) -> bool:
    """Whether a context's name is that of an unconditional branch, by the words that pipelines use."""
    return "uncond" in name.lower() or "neg" in name.lower()


def _in_pairs(pattern: CallPattern, calls: Sequence[LoggedCall]) -> bool:
    """Whether each step calls one branch and then the other, with equal inputs but for the conditions."""
    streams = [[call for call in calls if call.stream == stream] for stream in (0, 1)]
    return len(streams[0]) == len(streams[1]) == len(calls) / 2 and all(
        {path: d for path, d in one.digests.items() if path not in pattern.invariant}
        == {path: d for path, d in other.digests.items() if path not in pattern.invariant}
        for one, other in zip(*streams, strict=True)
    )


def _told(branches: TwoBranches, conditions: Sequence[Sequence[Hashable]]) -> TwoBranches:
    """By convention: the unconditional branch is the one whose conditions are equal for different prompts."""
    constant = [len(set(found)) == 1 for found in conditions]
    if sum(constant) == 1:
        return replace(branches, unconditional=constant.index(True))
    both = "both branches have" if all(constant) else "neither branch has"
    return replace(branches, reason=f"{both} the same conditions in every calibration generation: {UNTOLD}")


def _conditions(pattern: CallPattern, calls: Sequence[LoggedCall], stream: int) -> Hashable:
    """Digests of a branch's conditions; of a batch its first sample's, for batches may differ in size."""
    call = next(call for call in calls if call.stream == stream)
    return tuple(
        call.rows[path][1] if _has_batch(pattern, call, path) else call.digests.get(path) for path in pattern.invariant
    )


def _half_conditions(pattern: CallPattern, call: LoggedCall, half: int) -> Hashable:
    """The same of either half of a batch, over the inputs that have two halves."""
    paths = [path for path in pattern.invariant if path in call.halves and _has_batch(pattern, call, path)]
    return tuple(call.halves[path][0] if half else call.rows[path][1] for path in paths)


def _has_batch(pattern: CallPattern, call: LoggedCall, path: tree.Path) -> bool:
    """Whether an input's first dimension is as long as the latent's."""
    assert pattern.probe is not None
    return path in call.rows and _length(call, path) == _length(call, pattern.probe)


def _length(call: LoggedCall, path: tree.Path) -> int:
    return call.rows[path][0] if path in call.rows else 0


def _shared(pattern: CallPattern, generations: Generations) -> tuple[tree.Path, ...]:
    """Tensors that were seen not to have the latent's batch dimension."""
    calls = [call for generation in generations for call in generation if pattern.probe in call.rows]
    paths = dict.fromkeys(path for call in calls for path in call.rows)
    return tuple(path for path in paths if any(path in c.rows and not _has_batch(pattern, c, path) for c in calls))
