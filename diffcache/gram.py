"""Closed-form maths on Gram matrices: errors of linear predictors, fitted weights, similarity maps.

``G`` is float64 ``[P, T, T]``: for each of P calibration prompts (or prompt and branch) the inner products
``G[p, i, j] = <v_i, v_j>`` of a site's values at T steps. Squared errors are relative: each prompt is divided by its
own mean of ``||v_t||^2`` over the steps (``scale``), so that every prompt counts alike while errors of different steps
stay comparable and may be added up as vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Ridge, as a share of the mean squared length of the differences between history values.
SHRINK = 1e-3


def scale(G: Array) -> Array:
    """Mean squared norm over the steps, per prompt: ``[P]``. What squared errors of this site are divided by."""
    return np.einsum("ptt->p", _checked(G)) / G.shape[1]


def mean_gram(G: Array) -> Array:
    """The mean over prompts of ``G / scale``: ``[T, T]``, unit mean diagonal. Prompts that are all zero drop out."""
    scales = scale(G)
    safe = np.where(scales > 0, scales, 1.0)
    return np.asarray((G / safe[:, None, None]).mean(axis=0))


def forecast_error(G: Array, history: Sequence[int], target: int, weights: Sequence[float]) -> float:
    """Relative squared error of ``sum_k weights[k] v_{history[k]}`` for ``v_target``, mean over prompts.

    ``||v_t - sum_k w_k v_k||^2`` is the quadratic form ``c^T G c`` with ``c = e_t - sum_k w_k e_k``.
    """
    mean = mean_gram(G)
    c = np.zeros(len(mean))
    c[target] = 1.0
    np.subtract.at(c, list(history), np.asarray(weights, dtype=np.float64))
    # rounding can leave a tiny negative number where the forecast is exact
    return max(float(c @ mean @ c), 0.0)


def fit_weights(
    G: Array,
    history: Sequence[int],
    target: int,
    *,
    prior: Sequence[float],
    shrink: float = SHRINK,
    sum_to_one: bool = True,
) -> Array:
    """The weights of least mean error for this history and target: ``[K]``, shrunk towards ``prior``.

    With ``sum_to_one`` (and a prior that sums to one) the minimiser of ``||v_t - sum_k w_k v_k||^2 + ridge`` is sought
    among ``w = prior + z``, ``sum z = 0``. Written in the differences ``d_k = v_k - v_0`` this is unconstrained:
    ``z_{1..} = (D + lambda I)^-1 d^T r`` with ``D_kl = <d_k, d_l>``, ``r = v_t - sum_k prior_k v_k`` and
    ``lambda = shrink * trace(D) / (K - 1)``. Differences are small beside the values, so a ridge on their scale shrinks
    the bends of the curve and not its level. Free weights (``sum_to_one=False``) shrink the forecast itself over long
    gaps, a bias that adds up from step to step.

    Raises ValueError when history and prior differ in length.
    """
    if len(history) != len(prior) or not len(history):
        raise ValueError(f"prior has {len(prior)} weights for a history of {len(history)} steps; give one per step")
    if shrink < 0:
        raise ValueError(f"shrink must be 0 or more, got {shrink}")
    start = np.asarray(prior, dtype=np.float64)
    mean = mean_gram(G)
    shift = fit_shift(mean, np.asarray(history)[None], np.array([target]), start[None, None], shrink, sum_to_one)
    return start + shift[0, 0]


def fit_shift(
    mean: Array,
    histories: NDArray[np.intp],
    targets: NDArray[np.intp],
    priors: Array,
    shrink: float = SHRINK,
    sum_to_one: bool = True,
) -> Array:
    """``fit_weights`` for N histories and M targets at once: what to add to the priors, ``[N, M, K]``.

    ``mean`` is ``[T, T]`` (see ``mean_gram``), ``histories`` ``[N, K]``, ``targets`` ``[M]``, ``priors`` ``[N, M, K]``.
    """
    count = histories.shape[1]
    # rows of `basis` are the directions the weights may move in
    basis = np.eye(count)
    if sum_to_one:
        basis = basis[1:] - basis[0]
    if not len(basis):
        return np.zeros_like(priors)
    among = mean[histories[:, :, None], histories[:, None, :]]
    towards = mean[histories[:, None, :], targets[None, :, None]]
    directions = basis @ among @ basis.T
    residual = (towards - priors @ among) @ basis.T
    trace = np.trace(directions, axis1=1, axis2=2)
    # a history that does not move leaves nothing to fit: keep the prior rather than divide by rounding errors
    level = np.trace(among, axis1=1, axis2=2)
    still = ~(trace > 1e-12 * level)
    ridge = (shrink + 1e-12) * trace / len(basis)
    matrix = directions + np.where(still, 1.0, ridge)[:, None, None] * np.eye(len(basis))
    moved = np.linalg.solve(matrix[:, None], residual[..., None])[..., 0]
    return np.where(still[:, None, None], 0.0, moved @ basis)


def cosine(G: Array) -> Array:
    """Cosine similarity between any two steps, mean over prompts: ``[T, T]`` in [-1, 1]."""
    norms = np.sqrt(_diagonal(G))
    products = norms[:, :, None] * norms[:, None, :]
    return np.asarray((G / np.where(products > 0, products, 1.0)).mean(axis=0).clip(-1.0, 1.0))


def relative_l2(G: Array) -> Array:
    """``||v_i - v_j|| / ||v_i||``, mean over prompts: ``[T, T]``; row i: error of step j's value at step i."""
    squares = _diagonal(G)
    distance = np.sqrt(np.clip(squares[:, :, None] + squares[:, None, :] - 2.0 * G, 0.0, None))
    norms = np.sqrt(squares)[:, :, None]
    return np.asarray((distance / np.where(norms > 0, norms, 1.0)).mean(axis=0))


def _diagonal(G: Array) -> Array:
    return np.clip(np.einsum("ptt->pt", _checked(G)), 0.0, None)


def _checked(G: Array) -> Array:
    if G.ndim != 3 or G.shape[1] != G.shape[2] or not G.shape[0]:
        raise ValueError(f"expected a Gram matrix of shape [prompts, steps, steps], got {list(G.shape)}")
    return G
