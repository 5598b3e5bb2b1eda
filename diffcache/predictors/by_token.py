"""Predictors from values that choose for each token: tables of weights ``[K, batch, ..., tokens, 1]``.

A token is what is left when the last dimension, the channels, is taken away.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffcache.predictors.from_values import constant, from_values, table_of_fixed, wide
from diffcache.predictors.registry import weights as fixed_weights


@from_values("token_choice", newest=3, probe="the modulated input of the first block, with the tokens of the value")
def token_choice(
    history: Sequence[Tensor],
    steps: Sequence[float],
    target: float,
    *,
    probe_history: Sequence[Tensor],
    probe_now: Tensor,
    max_order: int = 2,
    shifts: int = 4,
) -> Tensor:
    """TAP (2026): each token takes the rule that would have forecast its probe best.

    Candidates are TaylorSeer's forecasts of order 0 to ``max_order`` for the distances ``k - shifts ... k``; the best
    is the one whose forecast of the probe has the least cosine distance to the probe now. Written in the changes
    ``e_j = p_j - p``, a candidate's forecast is ``p + sum w_j e_j``, so that inner products of the changes decide, and
    small angles are not lost in rounding. Ties go to reuse.
    """
    if probe_now.shape[:-1] != history[0].shape[:-1]:
        raise ValueError(
            f"token_choice needs a probe with the tokens of the value: got {list(probe_now.shape)} for a value of "
            f"{list(history[0].shape)} (the last dimension may differ)"
        )
    candidates = _candidates(steps, target, max_order, shifts)
    dtype, device = wide(history[0]), history[0].device
    count = len(candidates[0])
    rules = constant(candidates, dtype, device)  # [candidates, K]
    p = probe_now.to(dtype)
    changes = [value.to(dtype) - p for value in probe_history[:count]]
    along = torch.stack([(p * change).sum(-1) for change in changes], dim=-1)  # [..., K]
    among = torch.stack([torch.stack([(a * b).sum(-1) for b in changes], dim=-1) for a in changes], dim=-2)
    level = (p * p).sum(-1, keepdim=True)  # [..., 1]
    # of e = sum_j w_j e_j for each candidate: <p, e> and ||e||^2, [..., candidates]
    towards = along @ rules.T
    size = torch.einsum("mj,...jk,mk->...m", rules, among, rules)
    squared_sine = (level * size - towards * towards).clamp(min=0.0)
    lengths = level * (level + 2.0 * towards + size).clamp(min=0.0)
    cosine = (level + towards) / lengths.sqrt()
    # 1 - cos = sin^2 / (1 + cos), without the cancellation; a candidate at 180 degrees or of no length is no choice
    cosine_distance = squared_sine / (lengths * (1.0 + cosine))
    cosine_distance = torch.where(torch.isfinite(cosine_distance), cosine_distance, torch.inf)
    best = cosine_distance.argmin(dim=-1)  # the first of equals; the first candidate is reuse
    table = rules[best].movedim(-1, 0).unsqueeze(-1).contiguous()  # [K, ..., tokens, 1]
    table[0] = 1.0
    return table


@from_values("curvature", newest=3)
def curvature(
    history: Sequence[Tensor],
    steps: Sequence[float],
    target: float,
    *,
    low: float = 0.2,
    high: float = 0.8,
    max_skips: float = 2.0,
) -> Tensor:
    """WorldCache (2026): calm tokens are reused, straight ones extrapolated, bending ones damped.

    ``v = (F_0 - F_1) / N_0``, ``v_1 = (F_1 - F_2) / N_1``, ``c = ||(v - v_1) / N_0|| / ||v||^2`` for each token. Below
    the quantile ``low`` of the sample's tokens: ``F_0``; up to ``high``: ``F_0 + k v``; above:
    ``F_0 + k ((1 - x) v + x v_1)`` with ``x = 3 y^2 - 2 y^3``, ``y = min(k / max_skips, 1)``. Published quantiles: 0.2
    and 0.8, or 0.3 and 0.7; ``max_skips`` 2 and 6. With two values every token is straight, with one it is reused.
    """
    if not 0.0 <= low <= high <= 1.0:
        raise ValueError(f"curvature needs quantiles 0 <= low <= high <= 1, got {low} and {high}")
    k = abs(target - steps[0])
    if len(history) < 3:
        order = len(history) - 1
        return table_of_fixed(fixed_weights("newton", steps, target, order=order), history[0])
    gap, gap_before = abs(steps[0] - steps[1]), abs(steps[1] - steps[2])
    newest, middle, oldest = (value.to(wide(value)) for value in history)
    speed = (newest - middle) / gap
    bend = ((speed - (middle - oldest) / gap_before) / gap).norm(dim=-1)
    curved = torch.nan_to_num(bend / (speed * speed).sum(-1), nan=0.0)  # [batch, ..., tokens], infinite: the largest
    calm = curved <= _quantile(curved, low) if low > 0 else torch.zeros_like(curved, dtype=torch.bool)
    bending = curved > _quantile(curved, high)
    y = min(k / max_skips, 1.0)
    mixed = 3.0 * y**2 - 2.0 * y**3
    straight = [-k / gap, 0.0]
    damped = [-k * (1.0 - mixed) / gap + k * mixed / gap_before, -k * mixed / gap_before]
    rows = [torch.ones_like(curved)]
    for on_line, on_bend in zip(straight, damped, strict=True):
        row = torch.where(bending, on_bend, on_line)
        rows.append(torch.where(calm, 0.0, row).to(curved.dtype))
    return torch.stack(rows).unsqueeze(-1)


def _quantile(values: Tensor, share: float) -> Tensor:
    """The quantile of each sample, linear between neighbours, in a shape that broadcasts to ``values``."""
    ordered = values.reshape(len(values), -1).sort(dim=1).values
    place = share * (ordered.shape[1] - 1)
    below, above = ordered[:, math.floor(place)], ordered[:, math.ceil(place)]
    found = torch.lerp(below, above, place - math.floor(place))
    return found.reshape(len(values), *[1] * (values.ndim - 1))


def _candidates(steps: Sequence[float], target: float, max_order: int, shifts: int) -> list[list[float]]:
    """Weights of all candidates, each as long as the history read; reuse first, then low orders and short distances."""
    if max_order < 0 or shifts < 0:
        raise ValueError(f"token_choice needs max_order >= 0 and shifts >= 0, got {max_order} and {shifts}")
    count = min(max_order + 1, len(steps))
    found = [[1.0, *[0.0] * (count - 1)]]
    forward = 1.0 if target > steps[0] else -1.0
    for order, shift in itertools.product(range(1, count), range(shifts + 1)):
        rule = fixed_weights("taylor", steps, target - forward * shift, order=order)
        found.append(rule + [0.0] * (count - len(rule)))
    return found
