"""When: which steps are computed, by plain rules over the number of steps.

Enters: the number of steps, and where a rule asks for it the sampler's times. Leaves: the computed steps, in order;
step 0 is always one of them. Rules that need measurements are in ``planners.py``, rules that try schedules out in
``direct_search.py``.

To add one: write the function, decorate it with ``@rule("name")``; the tests over ``RULES`` then cover it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from functools import wraps
from itertools import zip_longest
from typing import ParamSpec

import numpy as np

from diffcache.published_tables import TABLES

P = ParamSpec("P")

RULES: dict[str, Callable[..., list[int]]] = {}


def rule(name: str) -> Callable[[Callable[P, Collection[int]]], Callable[P, list[int]]]:
    """Register a rule under ``name``; its first argument is the number of steps.

    Its result is sorted and freed of duplicates. Raises ValueError when the name is taken; the rule does when its
    result lacks step 0 or has steps that do not exist.
    """

    def register(function: Callable[P, Collection[int]]) -> Callable[P, list[int]]:
        if name in RULES:
            raise ValueError(f"rule '{name}' is registered already ({RULES[name]}); choose another name")

        @wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> list[int]:
            steps = args[0] if args else kwargs.get("steps")
            if not isinstance(steps, int) or steps < 1:
                raise ValueError(f"rule '{name}' needs the number of steps, 1 or more, got {steps!r}")
            computed = sorted({int(step) for step in function(*args, **kwargs)})
            if not computed or computed[0] != 0 or computed[-1] >= steps:
                raise ValueError(
                    f"rule '{name}' computes steps {computed} of {steps}; expected step 0 and steps up to {steps - 1}"
                )
            return computed

        RULES[name] = checked
        return checked

    return register


# -- counting ------------------------------------------------------------------------------------------------------


@rule("every")
def every(steps: int, *, interval: int = 2, warm_up: int = 0, offset: int = 0, last: int = 0) -> Collection[int]:
    """Every ``interval``-th step after ``warm_up`` computed ones: ``(s - warm_up - offset) % interval == 0``.

    DeepCache (2023) and FORA (2024): no warm-up, so ``s % interval == 0``. TaylorSeer, HiCache, FoCa, FreqCa (2025),
    which count skipped steps: offset -1. The hook in diffusers: offset 1. ``last`` forces that many steps at the end.
    Published intervals 3 to 9, warm-up 3 for images, 2 for class-conditional models, 1 for videos.
    """
    if interval < 1 or warm_up < 0 or last < 0:
        raise ValueError(f"every needs interval >= 1, warm_up >= 0 and last >= 0, got {interval}, {warm_up}, {last}")
    regular = [s for s in range(warm_up, steps) if (s - warm_up - offset) % interval == 0]
    return [*range(min(warm_up, steps)), *regular, *range(max(steps - last, 0), steps)]


@rule("growing")
def growing(steps: int, *, warm_up: int = 5, window: float = 2.0, growth: float = 0.75) -> Collection[int]:
    """Spectrum (2026): compute when ``(skipped in a row + 1) % floor(window) == 0``, then ``window += growth``.

    Published for 50 steps: growth 0.75 gives 14 computed steps, 3.0 gives 10.
    """
    if warm_up < 1 or window < 1 or growth < 0:
        raise ValueError(f"growing needs warm_up >= 1, window >= 1 and growth >= 0, got {warm_up}, {window}, {growth}")
    computed, skipped = list(range(min(warm_up, steps))), 0
    for step in range(warm_up, steps):
        if (skipped + 1) % math.floor(window) == 0:
            computed.append(step)
            window += growth
            skipped = 0
        else:
            skipped += 1
    return computed


@rule("mask")
def mask(steps: int, *, bits: Sequence[int]) -> Collection[int]:
    """The steps whose bit is set: a schedule written as ones and zeros."""
    if len(bits) != steps:
        raise ValueError(f"mask has {len(bits)} bits for {steps} steps; give one per step")
    return [step for step, bit in enumerate(bits) if bit]


@rule("bins")
def bins(steps: int, *, compute: Sequence[int], cached: Sequence[int], last: bool = True) -> Collection[int]:
    """cache-dit's step mask: compute ``compute[0]`` steps, skip ``cached[0]``, compute ``compute[1]``, and so on.

    The last step is computed too, unless ``last`` is False. Raises ValueError when the bins do not add up to ``steps``
    or more.
    """
    if not compute or compute[0] < 1 or min([*compute, *cached]) < 0:
        raise ValueError(f"bins are numbers of steps, compute first; got {list(compute)} and {list(cached)}")
    bits: list[int] = []
    for on, off in zip_longest(compute, cached, fillvalue=0):
        bits += [1] * on + [0] * off
    if len(bits) < steps:
        raise ValueError(
            f"bins {list(compute)} and {list(cached)} cover {len(bits)} of {steps} steps; make them longer"
        )
    bits = bits[:steps]
    if last:
        bits[-1] = 1
    return [step for step, bit in enumerate(bits) if bit]


# Compute and cached bins for 28 steps (cache-dit 1.5, its defaults), and those it has for few steps.
PRESETS: dict[int, dict[str, tuple[tuple[int, ...], tuple[int, ...]]]] = {
    28: {
        "slow": ((8, 3, 3, 2, 1, 1), (1, 2, 2, 2, 3)),
        "medium": ((6, 2, 2, 2, 2, 1), (1, 3, 3, 3, 3)),
        "fast": ((6, 1, 1, 1, 1, 1), (1, 3, 4, 5, 4)),
        "ultra": ((4, 1, 1, 1, 1), (2, 5, 6, 7)),
    },
    15: {
        "slow": ((4, 2, 2, 2, 1), (1, 1, 1, 1)),
        "medium": ((4, 2, 1, 1, 1), (1, 1, 2, 2)),
        "fast": ((3, 1, 1, 1, 1), (1, 2, 2, 3)),
        "ultra": ((2, 1, 1, 1, 1), (1, 2, 3, 3)),
    },
    9: {
        "slow": ((5, 2, 1), (1,)),
        "medium": ((5, 1, 1), (1, 1)),
        "fast": ((4, 1, 1), (1, 2)),
        "ultra": ((3, 1, 1), (2, 2)),
    },
    8: {
        "slow": ((5, 1, 1), (1,)),
        "medium": ((4, 1, 1), (1, 1)),
        "fast": ((3, 1, 1), (1, 2)),
        "ultra": ((2, 1, 1), (2, 2)),
    },
    6: dict.fromkeys(("slow", "medium", "fast", "ultra"), ((3, 1), (2,))),
    4: dict.fromkeys(("slow", "medium", "fast", "ultra"), ((2, 1), (1,))),
}


@rule("preset")
def preset(steps: int, *, speed: str = "medium") -> Collection[int]:
    """cache-dit's named step masks: "slow", "medium", "fast", "ultra", for 4, 6, and 8 or more steps.

    Its bins for 28 steps serve 16 and more, its bins for 15 serve 10 to 15: cut off at the end for fewer steps,
    lengthened in proportion for more. The last step is always computed.
    """
    if speed not in PRESETS[28]:
        raise ValueError(f"unknown preset '{speed}'; choose from {sorted(PRESETS[28])}")
    if steps in (4, 6, 8, 9):
        base = steps
    elif steps < 8:
        raise ValueError(f"presets exist for 4, 6, and 8 or more steps, got {steps}; write your own bins")
    else:
        base = 28 if steps >= 16 else 15
    compute, cached = (list(part) for part in PRESETS[base][speed])
    _lengthen(compute, cached, steps)
    _shorten(compute, cached, steps)
    return bins(steps, compute=compute, cached=cached)


def _lengthen(compute: list[int], cached: list[int], steps: int) -> None:
    """Add to one bin after the other, in place, half of ``steps / 28`` of its first size, until all are covered."""
    first = list(compute), list(cached)
    while sum(compute) + sum(cached) < steps:
        for index in range(min(len(compute), len(cached))):
            for part, size in zip((compute, cached), first, strict=True):
                part[index] += max(int(size[index] * (steps / 28 * 0.5)), 1)
                if sum(compute) + sum(cached) >= steps:
                    return
        compute[-1] += 1


def _shorten(compute: list[int], cached: list[int], steps: int) -> None:
    """Take one from the last cached and the last compute bin in turn, in place, until they cover just ``steps``."""
    turn = 0
    while sum(compute) + sum(cached) > steps:
        part = (cached, compute)[turn % 2]
        turn += 1
        if part:
            part[-1] -= 1
            if part[-1] == 0:
                part.pop()


@rule("quadratic_centre")
def quadratic_centre(steps: int, *, computed: int, centre: int = 15, power: float = 1.4) -> Collection[int]:
    """DeepCache (2023), not uniform: ``centre + trunc(Re u^p)``, u evenly spaced, dense around the centre; and step 0.

    u runs from ``(-centre)^(1/p)`` to ``(steps - centre)^(1/p)`` in the complex plane, as in its code; p starts at
    ``power`` (published 1.2 to 1.4, centre 15 of 50) and falls by 0.02 until the steps are ``computed`` different ones.
    """
    if not 0 < centre < steps or not 1 <= computed <= steps or power <= 1:
        raise ValueError(
            f"quadratic_centre needs 0 < centre < {steps}, 1 <= computed <= {steps} and power > 1, "
            f"got {centre}, {computed}, {power}"
        )
    while power > 1:
        u = np.linspace(complex(-centre) ** (1 / power), complex(steps - centre) ** (1 / power), computed + 1)
        offsets = sorted({int(value) for value in (u**power).real})
        found = [0, *(centre + offset for offset in offsets[1:-1])]
        if len(found) == computed:
            return found
        power -= 0.02
    raise ValueError(
        f"no power down to 1 gives {computed} steps of {steps} around {centre}; compute fewer or move the centre"
    )


# -- windows -------------------------------------------------------------------------------------------------------


@rule("in_times")
def in_times(
    steps: int, *, times: Sequence[float], interval: int, low: float = 100.0, high: float = 800.0
) -> Collection[int]:
    """PAB (2024): skip while ``low < t < high`` unless ``s % interval == 0``; ``times`` are the timesteps t.

    Published intervals by kind of attention: spatial 2, temporal 3 or 4, cross 5 or 6; the window is 100 to 800
    of 1000.
    """
    if len(times) != steps or interval < 1:
        raise ValueError(f"in_times needs {steps} times and interval >= 1, got {len(times)} and {interval}")
    return [s for s, t in enumerate(times) if s == 0 or not low < t < high or s % interval == 0]


@rule("in_share")
def in_share(steps: int, *, interval: int = 2, start: float = 0.4, end: float = 0.95) -> Collection[int]:
    """BlockDance (2025): groups of ``interval`` steps, the first one computed, from 40 to 95 % of the steps."""
    if interval < 1 or not 0.0 <= start <= end <= 1.0:
        raise ValueError(f"in_share needs interval >= 1 and 0 <= start <= end <= 1, got {interval}, {start}, {end}")
    first, stop = math.floor(start * steps), math.floor(end * steps)
    return [s for s in range(steps) if not first <= s < stop or (s - first) % interval == 0]


@rule("first")
def first(steps: int, *, computed: int) -> Collection[int]:
    """The first ``computed`` steps: T-GATE's (2024) cross-attention, cached from its gate step on (10 of 25)."""
    return range(min(computed, steps))


@rule("two_phases")
def two_phases(steps: int, *, gate: int = 10, warm_up: int = 2, before: int = 5, after: int = 1) -> Collection[int]:
    """T-GATE's (2024) self-attention: every ``before``-th step after ``warm_up``, from ``gate`` on every ``after``-th.

    Published: gate 10 of 25, warm-up 2, 5 before, 1 (always) after.
    """
    if min(gate, warm_up, before, after) < 1:
        raise ValueError(f"two_phases needs positive numbers, got {gate}, {warm_up}, {before}, {after}")
    early = [s for s in range(min(gate, steps)) if s < warm_up or (s - warm_up) % before == 0]
    return [*early, *range(gate, steps, after)]


# -- tables --------------------------------------------------------------------------------------------------------


@rule("table")
def table(steps: int, *, name: str) -> Collection[int]:
    """A published list (``published_tables.TABLES``), resampled where it was made for another number of steps."""
    if name not in TABLES:
        raise ValueError(f"unknown table '{name}'; known: {sorted(TABLES)}")
    made = TABLES[name]
    return resample(made.computed, made.steps, steps)


def resample(computed: Sequence[int], steps: int, wanted: int) -> list[int]:
    """Carry computed steps over to another number of steps: to the nearest position, the first and last on each other.

    ``round(s (wanted - 1) / (steps - 1))``. Steps that fall together count once, so that there may be fewer of them;
    this is a guess, as no paper says that its steps move like this.
    """
    if steps < 1 or wanted < 1 or not all(0 <= step < steps for step in computed):
        raise ValueError(f"computed steps {list(computed)} must lie in 0 to {steps - 1}; got {wanted} steps to fill")
    if steps == wanted or steps == 1:
        return sorted(set(computed))
    return sorted({math.floor(step * (wanted - 1) / (steps - 1) + 0.5) for step in computed})
