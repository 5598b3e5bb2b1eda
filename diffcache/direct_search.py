"""Direct search: schedules tried out one by one with a loss function that the caller gives.

Enters: ``loss(computed steps) -> float``, any measure of a rolled-out schedule, and the sizes to search. Leaves: the
best computed steps found. Everything is seeded and the same every time; no schedule is tried twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

Steps = tuple[int, ...]
Loss = Callable[[Steps], float]


@dataclass(eq=False)
class Trials:
    """A loss function that remembers: ``tried`` holds every schedule it was asked for, in order."""

    loss: Loss
    tried: dict[Steps, float] = field(default_factory=dict)

    def __call__(self, computed: Sequence[int]) -> float:
        """The loss of these steps. Raises ValueError when it is not a number."""
        steps = tuple(sorted(computed))
        if steps not in self.tried:
            value = float(self.loss(steps))
            if math.isnan(value):
                raise ValueError(f"the loss of the computed steps {list(steps)} is not a number")
            self.tried[steps] = value
        return self.tried[steps]

    def best(self) -> Steps:
        """The first of those with the least loss."""
        return min(self.tried, key=self.tried.__getitem__)


def neighbours(computed: Sequence[int], steps: int, *, fixed: Sequence[int] = (0,), radius: int = 3) -> Iterator[Steps]:
    """Schedules one move away: a free computed step shifted by up to ``radius``, or swapped for any skipped step.

    A shift is a swap for a near step, so that all swaps are the whole neighbourhood; shifts come first.
    """
    kept = set(computed)
    free = sorted(kept - set(fixed))
    skipped = [step for step in range(steps) if step not in kept]
    moves = [(step, other) for step in free for other in skipped]
    for step, other in sorted(moves, key=lambda move: (abs(move[0] - move[1]) > radius, move)):
        yield tuple(sorted(kept - {step} | {other}))


def hill_climb(
    loss: Loss, start: Sequence[int], steps: int, *, fixed: Sequence[int] = (0,), max_trials: int = 10_000
) -> list[int]:
    """Go to the best neighbour until none is better (the second half of BudCache, 2026; the Golden Path search, 2026).

    The result is a local optimum among all swaps, unless ``max_trials`` roll-outs end the search before.
    """
    trials = loss if isinstance(loss, Trials) else Trials(loss)
    here = tuple(sorted(start))
    _check(here, steps, fixed)
    trials(here)
    while True:
        better, least = here, trials(here)
        for other in neighbours(here, steps, fixed=fixed):
            if other not in trials.tried and len(trials.tried) >= max_trials:
                break
            if trials(other) < least:
                better, least = other, trials(other)
        if better == here:
            return list(here)
        here = better


def anneal(
    loss: Loss,
    start: Sequence[int],
    steps: int,
    *,
    fixed: Sequence[int] = (0,),
    iterations: int = 200,
    hot: float | None = 0.05,
    cold: float | None = 1e-5,
    radius: int = 3,
    seed: int = 0,
) -> list[int]:
    """Simulated annealing with swaps and shifts of up to ``radius``; the best schedule met.

    BudCache (2026): 200 iterations, temperatures 0.05 to 1e-5 in equal ratios, loss the mean squared error of the final
    latent. ``hot=None`` measures the scale instead (Golden Path, 2026): 10 times the median change of the loss over a
    few random moves from the start, down to a hundredth of the median.
    """
    trials = loss if isinstance(loss, Trials) else Trials(loss)
    here = tuple(sorted(start))
    _check(here, steps, fixed)
    random = np.random.default_rng(seed)
    trials(here)
    if not set(here) - set(fixed) or len(here) == steps:
        return list(here)
    if hot is None or cold is None:
        changes = [abs(trials(_random_move(random, here, steps, fixed, radius)) - trials(here)) for _ in range(12)]
        median = float(np.median(changes)) or 1e-12
        hot, cold = 10.0 * median, median / 100.0
    for iteration in range(iterations):
        temperature = hot * (cold / hot) ** (iteration / max(iterations - 1, 1))
        other = _random_move(random, here, steps, fixed, radius)
        worse = trials(other) - trials(here)
        if worse <= 0 or random.random() < math.exp(-worse / temperature):
            here = other
    return list(trials.best())


def budcache(
    loss: Loss,
    steps: int,
    *,
    computed: int,
    iterations: int = 200,
    hot: float | None = 0.05,
    cold: float | None = 1e-5,
    seed: int = 0,
    max_trials: int = 10_000,
) -> list[int]:
    """BudCache (2026): the first quarter of the budget is computed at the start; anneal the rest, then climb.

    The temperatures are for its loss, a mean squared error of latents; for losses of another scale give ``hot=None``.
    """
    if not 1 <= computed <= steps:
        raise ValueError(f"budcache needs 1 to {steps} computed steps, got {computed}")
    fixed = range(max(computed // 4, 1))
    rest = np.linspace(len(fixed), steps - 1, computed - len(fixed)).round().astype(int)
    start = _filled({*fixed, *rest.tolist()}, computed, steps)
    trials = Trials(loss)
    found = anneal(trials, start, steps, fixed=fixed, iterations=iterations, hot=hot, cold=cold, seed=seed)
    return hill_climb(trials, found, steps, fixed=fixed, max_trials=max_trials)


def golden_path(
    loss: Loss, steps: int, *, computed: int, iterations: int = 200, seed: int = 0, max_trials: int = 10_000
) -> list[int]:
    """The Golden Path search (2026): steps 0, 1, 2 and the last are computed; anneal at a measured scale, then climb.

    Its losses are negative PSNR or LPIPS of decoded images, over 8 prompts and seeds.
    """
    fixed = sorted({step for step in (0, 1, 2, steps - 1) if 0 <= step < steps})
    if not len(fixed) <= computed <= steps:
        raise ValueError(f"golden_path computes {fixed} in any case, so {len(fixed)} to {steps} steps, got {computed}")
    spread = np.linspace(0, steps - 1, computed).round().astype(int).tolist()
    start = _filled({*fixed, *spread}, computed, steps, fixed)
    trials = Trials(loss)
    found = anneal(trials, start, steps, fixed=fixed, iterations=iterations, hot=None, seed=seed)
    return hill_climb(trials, found, steps, fixed=fixed, max_trials=max_trials)


def evolve(
    loss: Loss,
    steps: int,
    *,
    population: int = 24,
    generations: int = 20,
    mutation: float | None = None,
    seed: int = 0,
) -> dict[int, tuple[list[int], float]]:
    """ECAD (2025), in small: evolve tables of bits for two aims, few computed steps and little loss.

    Each generation crosses and mutates tables (each bit with probability ``mutation``, 1 / steps by default) and keeps
    the best ``population`` by rank of dominance, wide gaps on the front first (NSGA-II). Returns the Pareto front:
    number of computed steps -> (steps, loss), losses falling as the number grows.
    """
    if population < 4 or generations < 0:
        raise ValueError(f"evolve needs population >= 4 and generations >= 0, got {population} and {generations}")
    random = np.random.default_rng(seed)
    trials = Trials(loss)
    rate = 1.0 / steps if mutation is None else mutation
    tables = [_bits(steps, range(0, steps, 1 + k % max(steps, 1))) for k in range(min(population, steps))]
    while len(tables) < population:
        tables.append(random.random(steps) < random.random())
    for _ in range(generations):
        children = []
        for _ in range(population):
            mother, father = (tables[int(random.integers(len(tables)))] for _ in range(2))
            child = np.where(random.random(steps) < 0.5, mother, father)
            children.append(child ^ (random.random(steps) < rate))
        tables = _survivors([*tables, *children], trials, population)
    for table in tables:
        trials(_steps(table))
    front: dict[int, tuple[list[int], float]] = {}
    least = math.inf
    for computed in sorted(trials.tried, key=lambda made: (len(made), trials.tried[made])):
        if trials.tried[computed] < least:
            least = trials.tried[computed]
            front[len(computed)] = (list(computed), least)
    return front


def interpolate(reference: Sequence[int], anchor: Sequence[int], computed: int, steps: int) -> list[int]:
    """OTCache (2026): a schedule between two, along the straight line of their quantile functions (optimal transport).

    ``reference`` is a good schedule of many steps, ``anchor`` a good one of few. Each is a function from the share
    u in [0, 1] of its computed steps to the step; the two are mixed in proportion to where ``computed`` lies between
    their sizes, and read at ``computed`` even places. Details inferred from the abstract.
    """
    large, small = sorted(set(reference)), sorted(set(anchor))
    if not len(small) <= computed <= len(large) or len(small) < 2 or large[-1] >= steps or small[-1] >= steps:
        raise ValueError(
            f"interpolate needs {len(small)} (the anchor's) to {len(large)} (the reference's) computed steps, at least "
            f"two in the anchor and all below {steps}; got {computed}"
        )
    share = 0.0 if len(large) == len(small) else (computed - len(small)) / (len(large) - len(small))
    u = np.linspace(0.0, 1.0, computed)
    quantiles = [np.interp(u, np.linspace(0.0, 1.0, len(made)), made) for made in (small, large)]
    places = (1.0 - share) * quantiles[0] + share * quantiles[1]
    found = np.floor(places + 0.5).astype(int)
    # rounding may let neighbours fall together: push them on, then back from the end
    for i in range(1, computed):
        found[i] = max(found[i], found[i - 1] + 1)
    found[-1] = min(found[-1], steps - 1)
    for i in range(computed - 2, -1, -1):
        found[i] = min(found[i], found[i + 1] - 1)
    return [int(step) for step in found]


def sample_patterns(
    steps: int, *, computed: int, shortest: int = 1, longest: int = 10, count: int = 5, seed: int = 0
) -> list[list[int]]:
    """ProCache (2026): ``count`` random schedules whose gaps, in ``shortest ... longest``, never grow.

    Every such schedule is equally likely; they are different while there are enough of them. The paper keeps the one
    with the best proxy metric of 5. Raises ValueError when there is none.
    """
    ways: dict[tuple[int, int, int], int] = {}

    def number(parts: int, total: int, most: int) -> int:
        """How many never growing lists of ``parts`` gaps up to ``most`` add up to ``total``."""
        if parts == 0:
            return int(total == 0)
        if not parts * shortest <= total <= parts * most:
            return 0
        key = (parts, total, most)
        if key not in ways:
            ways[key] = sum(number(parts - 1, total - gap, gap) for gap in range(shortest, most + 1))
        return ways[key]

    if shortest < 1 or longest < shortest or computed < 1 or number(computed, steps, longest) == 0:
        raise ValueError(
            f"no schedule of {computed} steps fills {steps} with gaps of {shortest} to {longest}; widen the gaps"
        )
    random = np.random.default_rng(seed)
    found: list[list[int]] = []
    wanted = min(count, number(computed, steps, longest))
    while len(found) < wanted:
        gaps, left, most = [], steps, longest
        for parts in range(computed, 0, -1):
            choices = [gap for gap in range(shortest, most + 1) if number(parts - 1, left - gap, gap)]
            sizes = [number(parts - 1, left - gap, gap) for gap in choices]
            most = choices[int(random.choice(len(choices), p=np.array(sizes, dtype=float) / sum(sizes)))]
            gaps.append(most)
            left -= most
        pattern = [0, *np.cumsum(gaps[:-1]).tolist()]
        if pattern not in found:
            found.append(pattern)
    return found


def _check(computed: Steps, steps: int, fixed: Sequence[int]) -> None:
    if not computed or 0 not in fixed or not set(fixed) <= set(computed) or computed[-1] >= steps:
        raise ValueError(
            f"a search starts from steps below {steps} that contain the fixed ones, step 0 among them; "
            f"got {list(computed)} and fixed {list(fixed)}"
        )


def _random_move(random: np.random.Generator, here: Steps, steps: int, fixed: Sequence[int], radius: int) -> Steps:
    """Half the time a shift by up to ``radius``, else a swap for any skipped step."""
    free = sorted(set(here) - set(fixed))
    step = free[int(random.integers(len(free)))]
    skipped = [other for other in range(steps) if other not in here]
    near = [other for other in skipped if abs(other - step) <= radius]
    choices = near if near and random.random() < 0.5 else skipped
    return tuple(sorted(set(here) - {step} | {choices[int(random.integers(len(choices)))]}))


def _filled(chosen: set[int], computed: int, steps: int, fixed: Sequence[int] = ()) -> list[int]:
    """Exactly ``computed`` steps: the first skipped ones are added, or the last free ones left out."""
    result = sorted(chosen)
    for step in range(steps):
        if len(result) < computed and step not in result:
            result.append(step)
    free = [step for step in sorted(result) if step not in fixed]
    drop = set(free[len(free) - max(len(result) - computed, 0) :])
    return sorted(set(result) - drop)


def _bits(steps: int, computed: Sequence[int]) -> np.ndarray:
    result = np.zeros(steps, dtype=bool)
    result[list(computed)] = True
    return result


def _steps(table: np.ndarray) -> Steps:
    return (0, *(int(step) for step in np.flatnonzero(table) if step))


def _survivors(tables: list[np.ndarray], trials: Trials, population: int) -> list[np.ndarray]:
    """The best by front, within a front the most alone; each schedule once."""
    unique = list(dict.fromkeys(_steps(table) for table in tables))
    left = {computed: (len(computed), trials(computed)) for computed in unique}
    kept: list[Steps] = []
    while left and len(kept) < population:
        front = [
            made
            for made, (size, value) in left.items()
            if not any(s <= size and v <= value and (s, v) != (size, value) for s, v in left.values())
        ]
        front.sort(key=lambda made: left[made])
        alone = {made: math.inf for made in front}
        for before, made, after in zip(front, front[1:], front[2:], strict=False):
            alone[made] = float(left[after][0] - left[before][0])
        kept += sorted(front, key=lambda made: -alone[made])[: population - len(kept)]
        for made in front:
            del left[made]
    steps = len(tables[0])
    return [_bits(steps, made) for made in kept]
