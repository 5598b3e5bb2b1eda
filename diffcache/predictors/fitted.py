"""Fitted predictors: weights from a site's Gram matrix over calibration steps.

Enters: ``G`` ``[prompts, steps, steps]`` (see ``gram.py``), the computed steps to read, newest first, and the step to
forecast, all as step numbers of the calibration. Leaves: one weight per step read. Unlike fixed weights these need not
sum to one; a rule whose weights do says so.

To add one: write the function, decorate it with ``@fitted("name")``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import numpy as np

from diffcache import gram
from diffcache.gram import Array
from diffcache.predictors.fixed import newton

Fitted = Callable[..., list[float]]

FITTED: dict[str, Fitted] = {}


def fitted(name: str) -> Callable[[Fitted], Fitted]:
    """Register a fitted rule under ``name``. Raises ValueError when the name is taken."""

    def register(rule: Fitted) -> Fitted:
        if name in FITTED:
            raise ValueError(f"fitted predictor '{name}' is registered already ({FITTED[name]}); choose another name")
        FITTED[name] = rule
        return rule

    return register


def fitted_weights(name: str, G: Array, history: Sequence[int], target: int, **options: float) -> list[float]:
    """Weights of the fitted predictor ``name`` for the newest ``len(result)`` steps of ``history``.

    Raises ValueError for an unknown name or option, and for steps that the Gram matrix does not have.
    """
    rule = FITTED.get(name)
    if rule is None:
        raise ValueError(f"unknown fitted predictor '{name}'; known: {sorted(FITTED)}. Register yours with @fitted")
    accepted = list(inspect.signature(rule).parameters)[3:]
    if not set(options) <= set(accepted):
        unknown = sorted(set(options) - set(accepted))
        raise ValueError(f"fitted predictor '{name}' has no options {unknown}; it takes {accepted}")
    steps = len(gram.mean_gram(G))
    read = list(history)
    if not read or sorted(set(read), reverse=True) != read or read[-1] < 0 or not read[0] < target < steps:
        raise ValueError(
            f"fitted predictor '{name}' got history {read} for step {target}; expected earlier steps, newest first, "
            f"without duplicates, and a step below {steps}, the steps of the calibration"
        )
    return [float(weight) for weight in rule(G, read, target, **options)]


@fitted("least_squares")
def least_squares(
    G: Array, history: Sequence[int], target: int, *, count: int = 3, order: int = 1, shrink: float = gram.SHRINK
) -> list[float]:
    """Least mean error among weights that sum to one, on ``count`` steps, shrunk towards a polynomial of ``order``."""
    read = history[: int(count)]
    prior = newton(read, target, order=order)
    prior = prior + [0.0] * (len(read) - len(prior))
    return list(gram.fit_weights(G, read, target, prior=prior, shrink=shrink))


@fitted("l2p")
def l2p(G: Array, history: Sequence[int], target: int, *, ridge: float = 1e-5, count: int = 0) -> list[float]:
    """L2P (2026) in closed form: ``(G_AA + ridge mean(diag G_AA) I) w = G_At`` on all computed steps A, sum free.

    Solved for the history of the deployed schedule. ``count`` keeps the newest steps only; 0 reads all.
    """
    read = history[: int(count)] if count else history
    return list(gram.fit_weights(G, read, target, prior=[0.0] * len(read), shrink=ridge, sum_to_one=False))


@fitted("scaling")
def scaling(
    G: Array, history: Sequence[int], target: int, *, momentum: float = 0.97, deployed: bool = False
) -> list[float]:
    """ScalingCache (2026): ``F_0 + alpha_t k (F_0 - F_1) / (s_0 - s_1)``, one fitted scalar for each step.

    ``alpha_t = <v_t - v_{t-1}, d> / <d, d>`` with ``d = v_{t-1} - v_{t-2}``, averaged over prompts with the published
    moving average ``a <- momentum a + (1 - momentum) a_p``. ``deployed`` fits the same scalar for the history and the
    distance that are used, with every prompt counting alike. Sums to one.
    """
    if len(history) == 1:
        return [1.0]
    ratio = (target - history[0]) / (history[0] - history[1])
    if deployed:
        # the best alpha on the line through the two newest values
        mean, d = gram.mean_gram(G), _difference(G, history[0], history[1])
        square = float(d @ mean @ d)
        alpha = float(_difference(G, target, history[0]) @ mean @ d) / (square * ratio) if square > 0 else 1.0
    else:
        d, step = _difference(G, target - 1, target - 2), _difference(G, target, target - 1)
        squares = np.einsum("i,pij,j->p", d, G, d)
        products = np.einsum("i,pij,j->p", step, G, d)
        alphas = np.where(squares > 0, products / np.where(squares > 0, squares, 1.0), 1.0)
        alpha = float(alphas[0])
        for seen in alphas[1:]:
            alpha = momentum * alpha + (1.0 - momentum) * float(seen)
    return [1.0 + alpha * ratio, -alpha * ratio]


@fitted("tao")
def tao(G: Array, history: Sequence[int], target: int) -> list[float]:
    """TaoCache (2025), form inferred: the next change has a calibrated length and angle to the last change.

    With ``d = F_0 - F_1``, ``rho`` the mean of ``||v_t - F_0|| / ||d||`` and c the mean of their cosine:
    ``F_0 + rho (c d + sqrt(1 - c^2) ||d|| n)``. The unit vector n is the part of the change before, ``F_1 - F_2``, that
    is orthogonal to d, turned to the side the calibration goes; without a third value it is left out. Sums to one.
    """
    if len(history) == 1:
        return [1.0]
    d, ahead = _difference(G, history[0], history[1]), _difference(G, target, history[0])
    lengths = np.sqrt(np.clip(np.einsum("i,pij,j->p", d, G, d), 0.0, None))
    reach = np.sqrt(np.clip(np.einsum("i,pij,j->p", ahead, G, ahead), 0.0, None))
    moving = (lengths > 0) & (reach > 0)
    if not moving.any():
        return [1.0]
    products = np.einsum("i,pij,j->p", ahead, G, d)
    rho = float((reach[moving] / lengths[moving]).mean())
    c = float(np.clip(products[moving] / (lengths[moving] * reach[moving]), -1.0, 1.0).mean())
    change = rho * c * d
    if len(history) > 2:
        mean = gram.mean_gram(G)
        square = float(d @ mean @ d)
        before = _difference(G, history[1], history[2])
        across = before - d * float(before @ mean @ d) / square
        height = float(across @ mean @ across)
        if height > 1e-12 * square:
            side = -1.0 if ahead @ mean @ across < 0 else 1.0
            change = change + side * rho * np.sqrt(max(1.0 - c * c, 0.0) * square / height) * across
    result = [float(change[step]) for step in history[:3]]
    result[0] += 1.0
    return result


@fitted("norm_ratio")
def norm_ratio(G: Array, history: Sequence[int], target: int) -> list[float]:
    """The newest value scaled to the norm it should have: ``mean_p ||v_t|| / ||F_0||``; one weight, sum free.

    MagCache (2025) observes that this ratio hardly depends on the prompt.
    """
    diagonal = np.clip(np.einsum("ptt->pt", G), 0.0, None)
    newest, wanted = diagonal[:, history[0]], diagonal[:, target]
    known = newest > 0
    return [float(np.sqrt(wanted[known] / newest[known]).mean()) if known.any() else 1.0]


def _difference(G: Array, later: int, earlier: int) -> Array:
    """``e_later - e_earlier``: the coefficients of a change between two steps."""
    result = np.zeros(G.shape[1])
    result[later] += 1.0
    result[earlier] -= 1.0
    return result
