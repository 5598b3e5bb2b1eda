"""Dynamic mode decomposition (HiCache++, 2026): a value as a sum of modes ``c_i lambda_i^s``, as weights on history.

The modes of a window of snapshots lie in the span of those snapshots, and all that decides their weights are the
snapshots' inner products: an isometry maps n snapshots of any size to n vectors of length n, on which the published
algorithm runs as it stands, in complex128.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffcache.predictors.from_values import from_values, inner, table_of, table_of_fixed, wide
from diffcache.predictors.registry import weights as fixed_weights

FEWEST_SNAPSHOTS = 4


@from_values("modes", newest=6)
def modes(
    history: Sequence[Tensor],
    steps: Sequence[float],
    target: float,
    *,
    cutoff: float = 1e-4,
    ridge: float = 1e-8,
    order: int = 1,
) -> Tensor:
    """HiCache++: ``F = Re Phi (lambda^(k / n) b)`` from the newest values with equal distances n, 4 to 6 of them.

    ``X' = A X`` in the space of the singular values above ``cutoff`` times the largest (``ridge`` times the largest is
    added to them before they are inverted); lambda and Phi are A's eigenvalues and modes, b the least-squares
    amplitudes of ``F_0``. With fewer than four such values: TaylorSeer of ``order``. A sample whose fit is not finite,
    or whose values do not change, is reused.

    Exact on sums of up to n - 1 modes. Its weights need not sum to one. The eigenvalues of small matrices are found on
    the host: for values on a GPU this is the one predictor that waits for the device, once a forecast.
    """
    count = _equally_spaced(steps)
    if count < FEWEST_SNAPSHOTS:
        return table_of_fixed(fixed_weights("taylor", steps, target, order=order), history[0])
    snapshots = list(history[:count])[::-1]
    rows = [[inner(a, b) for b in snapshots[: j + 1]] for j, a in enumerate(snapshots)]
    products = torch.stack([rows[max(i, j)][min(i, j)] for i in range(count) for j in range(count)], dim=-1)
    horizon = (target - steps[0]) / (steps[0] - steps[1])
    grams = products.reshape(-1, count, count).cpu().numpy()
    found = [modal_weights(G, horizon, cutoff=cutoff, ridge=ridge) for G in grams]
    table = torch.from_numpy(np.stack(found, axis=1)).to(device=history[0].device, dtype=wide(history[0]))
    return table_of(list(table), history[0])


def modal_weights(G: NDArray[np.float64], horizon: float, *, cutoff: float, ridge: float) -> NDArray[np.float64]:
    """Weights in difference form, newest first, ``[n - 1]``, from the inner products of n snapshots, oldest first.

    ``horizon`` is the distance ahead in snapshot distances.
    """
    count = len(G) - 1
    reuse = np.eye(count)[0]
    if not np.isfinite(G).all() or (G == G[-1, -1]).all():
        return reuse
    squares, directions = np.linalg.eigh(G)
    points = np.sqrt(squares.clip(0.0))[:, None] * directions.T  # column j stands for snapshot j
    before, after = points[:, :-1], points[:, 1:]
    try:
        left, sizes, right = np.linalg.svd(before, full_matrices=False)
        kept = max(int((sizes > cutoff * sizes[0]).sum()), 1)
        back = right[:kept].T / (sizes[:kept] + ridge * sizes[0])
        values, vectors = np.linalg.eig((left[:, :kept].T @ after @ back).astype(np.complex128))
        mixing = back @ vectors  # the modes as combinations of the snapshots `after`
        amplitudes = np.linalg.lstsq(after @ mixing, after[:, -1].astype(np.complex128), rcond=None)[0]
        weights = (mixing @ (values**horizon * amplitudes)).real[::-1]
    except np.linalg.LinAlgError:
        return reuse
    if not np.isfinite(weights).all():
        return reuse
    return np.array([weights.sum(), *weights[1:]])


def _equally_spaced(steps: Sequence[float]) -> int:
    """How many of the newest steps lie at the distance of the newest two."""
    count = min(len(steps), 2)
    while count < len(steps) and np.isclose(steps[count - 1] - steps[count], steps[0] - steps[1], rtol=1e-9):
        count += 1
    return count
