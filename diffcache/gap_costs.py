"""What it costs to forecast a gap: for every recent history and every gap length, the predicted squared error.

Enters: one site's profile. Leaves: a table ``cost[s0, g1, ..., L]``, where ``s0`` is the newest computed step,
``g1, g2`` are the distances to the computed steps before it (0: there is none), and L the distance to the next one, so
that steps s0+1 ... s0+L-1 are forecast. The dynamic programme in ``searching.py`` walks through this table.

Two ways to add up the errors ``e_t`` inside a gap, with sensitivities ``S_t``:

* additive: ``sum_t S_t ||e_t||^2``, as if errors of different steps were independent;
* coherent: ``||sum_t sqrt(S_t) e_t||^2``, because errors of one gap mostly point the same way.

Both are quadratic forms in the Gram matrix, so no value is ever touched. Two things keep them honest:

* fitted weights are judged on prompts they were not fitted on (cross-validation over folds of the prompts);
* in a cached generation the history lies off the uncached trajectory, older values by what has drifted since. A
  forecast passes such noise of unit size on as ``sum_{k>=1} w_k^2`` (``noise`` below, added up in the same two ways).
  Without it the search picks steep weights that are exact on the calibration run and blow up in a real one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from diffcache import gram, predictors
from diffcache.profile_record import SiteProfile

Array = NDArray[np.float64]
Index = NDArray[np.intp]

# (mean Gram [T, T], histories [N, K] newest first, targets [M]) -> weights [N, M, K]
WeightRule = Callable[[Array, Index, Index], Array]

COUNTINGS = ("coherent", "additive")
# Weights fitted on all prompts but a fold's are judged on that fold; more folds cost time and change little.
MAX_FOLDS = 4
# Ridges to choose from, see gram.fit_weights.
SHRINKS = (1e-3, 1e-2, 1e-1)


@dataclass(frozen=True, eq=False)
class GapCosts:
    """Costs of all gaps of one site under each weight rule; infinite where a history or a gap is impossible.

    ``error[counting]`` and ``noise[counting]`` for "coherent" and "additive":
    ``[rules, T, (max_gap + 1,) * max(memory - 1, 1), max_gap + 1]``.
    """

    rules: tuple[str, ...]
    error: dict[str, Array]
    noise: dict[str, Array]


def weight_rules(site: SiteProfile, clock: Sequence[float], names: Sequence[str], memory: int) -> dict[str, WeightRule]:
    """The weight rules that ``names`` stand for, by label, for histories of up to ``memory`` steps.

    "newton" stands for polynomial extrapolation of each order up to ``memory - 1`` in the step index, and in the clock
    where that is strictly monotonic; "fitted" for weights fitted on the newest 2 ... ``memory`` steps, shrunk towards a
    straight line; any other name for the registered predictor with its default options, on times counted from the
    newest computed step. A rule that wants more history than there is uses what there is.
    """
    steps = len(site.sensitivity)
    index = np.arange(steps, dtype=np.float64)
    clocks = {"": index}
    if len(clock) == steps and (np.diff(clock) > 0).all() | (np.diff(clock) < 0).all():
        clocks["@clock"] = np.asarray(clock, dtype=np.float64)
    rules: dict[str, WeightRule] = {}
    for name in names:
        if name == "newton":
            for order, (label, times) in itertools.product(range(1, memory), clocks.items()):
                rules[f"newton{order}{label}"] = _polynomial(times, order)
        elif name == "fitted":
            for count, shrink in itertools.product(range(2, memory + 1), SHRINKS):
                rules[f"fitted{count}~{shrink:g}"] = _fitted(index, count, shrink)
        else:
            rules[name] = _registered(name)
    if not rules:
        raise ValueError(f"predictors {list(names)} give no rule with max_history={memory}; add 'reuse', or raise it")
    return rules


def gap_costs(site: SiteProfile, rules: dict[str, WeightRule], memory: int, max_gap: int) -> GapCosts:
    """The table for histories of up to ``memory`` steps with gaps of up to ``max_gap`` steps."""
    steps = len(site.sensitivity)
    everything = gram.mean_gram(site.gram)
    folds = _folds(site)
    amplitudes = np.sqrt(site.sensitivity)
    shape = (len(rules), steps, *(max_gap + 1,) * max(memory - 1, 1), max_gap + 1)
    error = {counting: np.full(shape, np.inf) for counting in COUNTINGS}
    noise = {counting: np.full(shape, np.inf) for counting in COUNTINGS}
    for newest in range(steps):
        targets = np.arange(newest + 1, min(newest + max_gap, steps))
        lengths = slice(1, len(targets) + 2)
        for gaps in _histories(newest, max(memory, 2), max_gap):
            histories = newest - np.cumsum(np.pad(gaps, ((0, 0), (1, 0))), axis=1)[:, : np.count_nonzero(gaps[0]) + 1]
            histories = histories[:, :memory]
            for number, (label, rule) in enumerate(rules.items()):
                pairs = folds if label.startswith("fitted") else [(everything, everything)]
                errors = np.zeros((len(gaps), len(targets), len(targets)))
                for fit, held in pairs:
                    errors += _error_gram(held, histories, targets, rule(fit, histories, targets)) / len(pairs)
                older = rule(everything, histories, targets)[:, :, 1:]
                place = (number, newest, *gaps.T, lengths)
                for counting, total in _totals(errors, amplitudes[targets]).items():
                    error[counting][place] = total
                for counting, total in _totals(older @ older.transpose(0, 2, 1), amplitudes[targets]).items():
                    noise[counting][place] = total
    return GapCosts(tuple(rules), error, noise)


def gap_error(site: SiteProfile, errors: Array) -> float:
    """Predicted squared error of one gap, coherent; ``errors`` ``[T, T]`` has ``e_t - sum_k w_k e_k`` as row t.

    Rows of steps that are not forecast are zero.
    """
    total = np.sqrt(site.sensitivity) @ errors
    return max(float(total @ gram.mean_gram(site.gram) @ total), 0.0)


def _folds(site: SiteProfile) -> list[tuple[Array, Array]]:
    """(mean Gram to fit on, mean Gram to judge on) for each fold of prompts; with one prompt both are the same."""
    count = min(len(site.gram), MAX_FOLDS)
    if count == 1:
        mean = gram.mean_gram(site.gram)
        return [(mean, mean)]
    # neighbours stay together: branches of one prompt are too alike to judge each other
    held = [np.arange(len(site.gram)) * count // len(site.gram) == fold for fold in range(count)]
    return [(gram.mean_gram(site.gram[~part]), gram.mean_gram(site.gram[part])) for part in held]


def _histories(newest: int, memory: int, max_gap: int) -> list[Index]:
    """All gap vectors ``[N, memory - 1]`` that may lie before step ``newest``, one array for each history length.

    A history is shorter than ``memory`` only when it begins with step 0, which is always computed.
    """
    groups = []
    for count in range(memory):
        gaps = np.array(list(itertools.product(range(1, max_gap + 1), repeat=count)), dtype=np.intp)
        gaps = gaps.reshape(max_gap**count, count)
        left = newest - gaps.sum(axis=1)
        gaps = gaps[(left >= 0) if count == memory - 1 else (left == 0)]
        if len(gaps):
            groups.append(np.pad(gaps, ((0, 0), (0, memory - 1 - count))))
    return groups


def _error_gram(mean: Array, histories: Index, targets: Index, weights: Array) -> Array:
    """Inner products of the forecast errors of the targets, ``[N, M, M]``."""
    among = mean[histories[:, :, None], histories[:, None, :]]
    towards = mean[histories[:, :, None], targets[None, None, :]]
    cross = weights @ towards
    inner = weights @ among @ weights.transpose(0, 2, 1)
    return np.asarray(mean[np.ix_(targets, targets)] - cross - cross.transpose(0, 2, 1) + inner)


def _totals(errors: Array, amplitudes: Array) -> dict[str, Array]:
    """Cost of forecasting the first 0, 1, ..., M targets, ``[N, M + 1]``, for each way of counting."""
    weighted = errors * amplitudes[:, None] * amplitudes[None, :]
    separate = np.einsum("nmm->nm", weighted).clip(0.0).cumsum(axis=1)
    together = np.einsum("nmm->nm", weighted.cumsum(axis=1).cumsum(axis=2)).clip(0.0)
    start = ((0, 0), (1, 0))
    return {"coherent": np.pad(together, start), "additive": np.pad(separate, start)}


def _polynomial(times: Array, order: int) -> WeightRule:
    """Lagrange extrapolation, ``w_j = prod_{i != j} (t - s_i) / (s_j - s_i)``, on the newest ``order + 1`` steps."""

    def rule(mean: Array, histories: Index, targets: Index) -> Array:
        weights = np.zeros((len(histories), len(targets), histories.shape[1]))
        used = times[histories[:, : order + 1]]
        for j in range(used.shape[1]):
            others = np.delete(used, j, axis=1)
            ratios = (times[targets][None, :, None] - others[:, None, :]) / (used[:, j : j + 1] - others)[:, None, :]
            weights[:, :, j] = ratios.prod(axis=2)
        return weights

    return rule


def _fitted(times: Array, count: int, shrink: float) -> WeightRule:
    line = _polynomial(times, 1)

    def rule(mean: Array, histories: Index, targets: Index) -> Array:
        weights = line(mean, histories, targets)
        shift = gram.fit_shift(mean, histories[:, :count], targets, weights[:, :, :count], shrink)
        weights[:, :, :count] += shift
        return weights

    return rule


def _registered(name: str) -> WeightRule:
    @cache
    def weights(ages: tuple[int, ...], ahead: int) -> list[float]:
        result = predictors.weights(name, [-float(age) for age in ages], float(ahead))
        return result + [0.0] * (len(ages) - len(result))

    def rule(mean: Array, histories: Index, targets: Index) -> Array:
        ages = [tuple(row) for row in (histories[:, :1] - histories).tolist()]
        return np.array(
            [
                [weights(age, int(target) - int(newest)) for target in targets]
                for age, newest in zip(ages, histories[:, 0], strict=True)
            ]
        ).reshape(len(histories), len(targets), histories.shape[1])

    return rule
