"""Predictors as weight rules: times of the computed steps in, one weight per step out.

``history`` holds the times of the computed steps, newest first, as step indices or as sampler time (any strictly
monotonic clock); ``target`` is the time to forecast. A predictor may use only the newest few steps: it returns as many
weights as it uses. The weights sum to one, so that a value that does not change is forecast exactly.

To add one: write the function, decorate it with ``@predictor("name")``; the tests over ``PREDICTORS`` then cover it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence

Predictor = Callable[..., list[float]]

PREDICTORS: dict[str, Predictor] = {}
FROM_VALUES: dict[str, Callable[..., object]] = {}


def predictor(name: str) -> Callable[[Predictor], Predictor]:
    """Register a weight rule under ``name``. Raises ValueError when the name is taken."""

    def register(rule: Predictor) -> Predictor:
        if name in PREDICTORS:
            raise ValueError(f"predictor '{name}' is registered already ({PREDICTORS[name]}); choose another name")
        PREDICTORS[name] = rule
        return rule

    return register


def weights(name: str, history: Sequence[float], target: float, **options: float) -> list[float]:
    """Weights of the registered predictor ``name`` for the newest ``len(result)`` steps of ``history``.

    Raises ValueError for an unknown name or option, for an empty history or one with equal times, and for a rule whose
    weights do not sum to one.
    """
    rule = PREDICTORS.get(name)
    if rule is None:
        raise ValueError(f"unknown predictor '{name}'; known: {sorted(PREDICTORS)}. Register yours with @predictor")
    accepted = list(inspect.signature(rule).parameters)[2:]
    if not set(options) <= set(accepted):
        raise ValueError(
            f"predictor '{name}' has no options {sorted(set(options) - set(accepted))}; it takes {accepted}"
        )
    if not history:
        raise ValueError(f"predictor '{name}' has no history to forecast from; compute at least one earlier step")
    if len(set(history)) != len(history):
        raise ValueError(f"predictor '{name}' got a history with equal times {list(history)}; give each step its own")
    result = rule(history, target, **options)
    size = sum(map(abs, result))
    if len(result) > len(history) or not math.isfinite(size) or abs(sum(result) - 1.0) > 1e-6 * max(size, 1.0):
        raise ValueError(
            f"predictor '{name}' gave the weights {result} for history {list(history)}: expected at most "
            f"{len(history)} finite weights that sum to one"
        )
    return result


@predictor("reuse")
def reuse(history: Sequence[float], target: float) -> list[float]:
    """Repeat the newest value: ``F = F_0`` (FORA, Selvaraju et al. 2024; DeepCache, Ma et al. 2024)."""
    return [1.0]


@predictor("taylor")
def taylor(history: Sequence[float], target: float, *, order: int = 1) -> list[float]:
    """TaylorSeer (Liu et al. 2025): ``F = sum_i D_i k^i / i!`` with ``k = target - history[0]``.

    ``D_0 = F_0`` and ``D_i = (D_{i-1} - D_{i-1} of the previous computed step) / (s_0 - s_1)``, each divided by the gap
    that was current when it was made, as published. Exact on straight lines; for order 2 and more not on polynomials.
    """
    k = target - history[0]
    return _series(history, [k**i / math.factorial(i) for i in range(_points(history, order))])


@predictor("hermite")
def hermite(history: Sequence[float], target: float, *, order: int = 2, sigma: float = 0.5) -> list[float]:
    """HiCache (2025): Taylor's powers ``k^i`` replaced by ``sigma^i H_i(sigma k)``, H physicists' Hermite.

    ``H_0 = 1, H_1 = 2x, H_{n+1} = 2x H_n - 2n H_{n-1}``. sigma = 0.5 halves the slope, sqrt(1/2) keeps it.
    """
    x = sigma * (target - history[0])
    polynomials = [1.0, 2.0 * x]
    for n in range(1, order):
        polynomials.append(2.0 * x * polynomials[n] - 2.0 * n * polynomials[n - 1])
    terms = [sigma**i * polynomials[i] / math.factorial(i) for i in range(_points(history, order))]
    return _series(history, terms)


@predictor("newton")
def newton(history: Sequence[float], target: float, *, order: int = 2) -> list[float]:
    """The polynomial through the newest ``order + 1`` values (Newton, Lagrange): exact on that degree, any gaps.

    ``w_j = prod_{i != j} (t - s_i) / (s_j - s_i)``. With order 1 it equals TaylorSeer's.
    """
    times = history[: _points(history, order)]
    return [
        math.prod((target - other) / (time - other) for i, other in enumerate(times) if i != j)
        for j, time in enumerate(times)
    ]


@predictor("adams_bashforth")
def adams_bashforth(history: Sequence[float], target: float, *, order: int = 2) -> list[float]:
    """AB-Cache (2025): ``2 F_0 - F_1`` for order 2, ``3 F_0 - 3 F_1 + F_2`` for order 3 and so on.

    As published the weights ``(-1)^j C(order, j + 1)`` do not depend on how far the target lies ahead; ``newton`` of
    one order less is the form that does.
    """
    order = _points(history, order - 1)
    return [float((-1) ** j * math.comb(order, j + 1)) for j in range(order)]


@predictor("foca")
def foca(history: Sequence[float], target: float) -> list[float]:
    """FoCa (2025): one BDF2 step of the feature ODE, ``4/3 F_0 - 1/3 F_1 + 2/3 h F'_0``.

    The slope is that of the parabola through three values (first difference when there are two), and the coefficients
    are BDF2's for the step ratio ``r = k / (s_0 - s_1)``: ``(1+r)^2 / (1+2r), -r^2 / (1+2r), (1+r) / (1+2r)``. With
    equal gaps and r = 1 this is the published ``7/3, -5/3, 1/3``.
    """
    if len(history) == 1:
        return [1.0]
    k = target - history[0]
    ratio = k / (history[0] - history[1])
    result = [scale * (1 + ratio) / (1 + 2 * ratio) * k for scale in _slope(history[:3])]
    result[0] += (1 + ratio) ** 2 / (1 + 2 * ratio)
    result[1] -= ratio**2 / (1 + 2 * ratio)
    return result


@predictor("barycentric")
def barycentric(history: Sequence[float], target: float, *, order: int = 1, alpha: float = 0.55) -> list[float]:
    """ResilPhase (2026): Lagrange extrapolation on the clock ``xi = tanh(alpha (s - mean) / max|s_j - mean|)``.

    The tanh damps long horizons; as alpha goes to zero it becomes ``newton``.
    """
    times = history[: _points(history, order)]
    mean = sum(times) / len(times)
    spread = max(abs(time - mean) for time in times) or 1.0
    phases = [math.tanh(alpha * (time - mean) / spread) for time in times]
    return newton(phases, math.tanh(alpha * (target - mean) / spread), order=order)


@predictor("goc")
def goc(history: Sequence[float], target: float, *, eta: float = 1.2) -> list[float]:
    """GOC, gradient-optimised cache (2025): ``F_0 + eta (F_0 - F_1)``, whatever the distance."""
    return [1.0] if len(history) == 1 else [1.0 + eta, -eta]


def _points(history: Sequence[float], order: int) -> int:
    """How many of the newest steps a rule of this order uses; fewer while the history is still short."""
    if order < 0:
        raise ValueError(f"order must be 0 or more, got {order}")
    return min(int(order) + 1, len(history))


def _series(history: Sequence[float], terms: Sequence[float]) -> list[float]:
    """``sum_i terms[i] D_i`` as weights on the history, with the finite differences ``D_i`` of ``taylor``."""
    count = len(terms)
    # rows[j] holds the weights of D_i as it stood at computed step j
    rows = [[float(i == j) for i in range(count)] for j in range(count)]
    result = [terms[0] * weight for weight in rows[0]]
    for order in range(1, count):
        rows = [
            [(now - before) / (history[j] - history[j + 1]) for now, before in zip(rows[j], rows[j + 1], strict=True)]
            for j in range(count - order)
        ]
        result = [total + terms[order] * weight for total, weight in zip(result, rows[0], strict=True)]
    return result


def _slope(times: Sequence[float]) -> list[float]:
    """Weights of the derivative at ``times[0]`` of the polynomial through two or three points."""
    gap = times[0] - times[1]
    if len(times) == 2:
        return [1 / gap, -1 / gap]
    far = times[0] - times[2]
    return [1 / gap + 1 / far, -far / (gap * (far - gap)), gap / (far * (far - gap))]
