"""Fixed predictors: times of the computed steps in, one weight per step out.

``history`` holds the times of the computed steps, newest first, as step indices or as sampler time (any strictly
monotonic clock); ``target`` is the time to forecast. A predictor may use only the newest few steps: it returns as many
weights as it uses. The weights sum to one, so that a value that does not change is forecast exactly.

To add one: write the function, decorate it with ``@predictor("name")``; the tests over ``PREDICTORS`` then cover it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from diffcache.predictors.registry import predictor


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
def foca(history: Sequence[float], target: float, *, heun: bool = False) -> list[float]:
    """FoCa (2025): one BDF2 step of the feature ODE, ``4/3 F_0 - 1/3 F_1 + 2/3 h F'_0``.

    The slope is that of the parabola through three values (first difference when there are two), and the coefficients
    are BDF2's for the step ratio ``r = k / (s_0 - s_1)``: ``(1+r)^2 / (1+2r), -r^2 / (1+2r), (1+r) / (1+2r)``. With
    equal gaps and r = 1 this is the published ``7/3, -5/3, 1/3``. The paper leaves the step open; ``heun`` is the other
    reading, which follows the forecast by Heun's corrector, ``F_0 + k/2 (F'_0 + F'_p)``. BDF2's slope at its own
    forecast is the slope it was given, so this is ``F_0 + k F'_0``: ``5/2, -2, 1/2``.
    """
    if len(history) == 1:
        return [1.0]
    k = target - history[0]
    slope = _slope(history[:3])
    if heun:
        return [1.0 + k * slope[0], *(k * weight for weight in slope[1:])]
    ratio = k / (history[0] - history[1])
    result = [scale * (1 + ratio) / (1 + 2 * ratio) * k for scale in slope]
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


@predictor("barycentric_chebyshev")
def barycentric_chebyshev(history: Sequence[float], target: float, *, order: int = 1) -> list[float]:
    """ResilPhase's other clock (2026): the history lies on Chebyshev nodes, the target is placed by the newest slope.

    ``xi_j = cos(pi (2j + 1) / 2n)`` for the j-th newest of n; ``xi(t) = xi_0 + (t - s_0) (xi_0 - xi_1) / (s_0 - s_1)``.
    With order 1 it equals ``newton``.
    """
    count = _points(history, order)
    if count == 1:
        return [1.0]
    phases = [math.cos(math.pi * (2 * j + 1) / (2 * count)) for j in range(count)]
    slope = (phases[0] - phases[1]) / (history[0] - history[1])
    return newton(phases, phases[0] + slope * (target - history[0]), order=order)


@predictor("spectrum", sums_to_one=False)
def spectrum(
    history: Sequence[float],
    target: float,
    *,
    degree: int = 4,
    ridge: float = 0.1,
    blend: float = 0.5,
    start: float = 0.0,
    end: float = 50.0,
    points: int = 100,
    centred: bool = True,
) -> list[float]:
    """Spectrum (2026): Chebyshev ridge regression over the newest ``points`` values, blended with a straight line.

    ``tau = 2 (t - start) / (end - start) - 1`` and ``h = phi(tau)^T (Phi^T Phi + ridge I)^-1 Phi^T H`` with
    ``phi_m = T_m(tau)``, m = 0 ... degree; ``F = blend h + (1 - blend) line``, published blend 0.5 to 1. The ridge
    pulls the level towards zero too, so the published weights (``centred=False``) do not sum to one; ``centred`` fits
    the differences from the newest value instead, and they do.
    """
    if degree < 0 or points < 1 or not ridge > 0 or end == start:
        raise ValueError(
            f"spectrum needs degree >= 0, points >= 1, ridge > 0 and end != start, got {degree}, {points}, {ridge}, "
            f"{start} to {end}"
        )
    times = np.array([*history[: int(points)], target], dtype=np.float64)
    basis = np.polynomial.chebyshev.chebvander(2.0 * (times - start) / (end - start) - 1.0, int(degree))
    normal = basis[:-1].T @ basis[:-1] + ridge * np.eye(int(degree) + 1)
    result = blend * (basis[:-1] @ np.linalg.solve(normal, basis[-1]))
    if centred:
        result[0] += blend - result.sum()
    line = newton(history[: len(result)], target, order=1)
    result[: len(line)] += (1.0 - blend) * np.array(line)
    return [float(weight) for weight in result]


@predictor("ramp")
def ramp(
    history: Sequence[float],
    target: float,
    *,
    start: float = 0.0,
    end: float = 50.0,
    low: float = 0.0,
    high: float = 1.0,
) -> list[float]:
    """FasterCache (2024): ``F_0 + w (F_0 - F_1)``, w growing from ``low`` at ``start`` to ``high`` at ``end``.

    Equal ``low`` and ``high`` give the fixed weight of its other configurations (0.3 to 0.5).
    """
    if end == start:
        raise ValueError(f"ramp needs start and end to differ, got {start} and {end}")
    if len(history) == 1:
        return [1.0]
    grown = low + (high - low) * min(max((target - start) / (end - start), 0.0), 1.0)
    return [1.0 + grown, -grown]


@predictor("ema")
def ema(history: Sequence[float], target: float, *, beta: float = 0.9) -> list[float]:
    """Exponential moving average ``m <- beta m + (1 - beta) F`` (SVD-Cache's principal part, 2026, beta 0.9)."""
    if not 0.0 <= beta < 1.0:
        raise ValueError(f"ema needs 0 <= beta < 1, got {beta}")
    result = [(1.0 - beta) * beta**j for j in range(len(history))]
    result[-1] = beta ** (len(history) - 1)
    return result


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
