"""Different weights for different parts of one value: frequency bands, subspaces, clusters of channels.

A part is what a projection ``P`` keeps: ``F = P F + (F - P F)``. With weights w inside and u outside,
``sum w_k P F_k + sum u_k (F_k - P F_k) = sum u_k F_k + P (sum (w_k - u_k) F_k)``: one more weighted sum and one
projection of one tensor, however long the history is, and nothing but the plain history is stored. When the history
does not change the second sum is exactly zero, so that the value comes out bit for bit.

Clusters of channels need no projection: their weights are a table ``[K, channels]`` (``channel_table``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffcache import ops
from diffcache.cells import View
from diffcache.predictors.from_values import constant
from diffcache.predictors.registry import weights as fixed_weights

Projection = Callable[..., Tensor]

PROJECTIONS: dict[str, Projection] = {}
MEASURES: dict[str, Callable[..., Tensor]] = {}


def projection(name: str, measure: Callable[..., Tensor] | None = None) -> Callable[[Projection], Projection]:
    """Register a linear projection ``(value, **options) -> value`` under ``name``; ValueError when it is taken.

    With ``measure(value, **options) -> basis`` the projection is found anew in every generation: it is called as
    ``(value, basis=basis)`` with what was measured of the first value that is forecast from.
    """

    def register(rule: Projection) -> Projection:
        if name in PROJECTIONS:
            raise ValueError(f"projection '{name}' is registered already ({PROJECTIONS[name]}); choose another name")
        PROJECTIONS[name] = rule
        if measure is not None:
            MEASURES[name] = measure
        return rule

    return register


def forecast_through(
    project: Callable[[Tensor], Tensor],
    history: Sequence[Tensor],
    inside: Sequence[float],
    outside: Sequence[float],
    anchor: Tensor | None = None,
) -> Tensor:
    """Forecast with the weights ``inside`` for what ``project`` keeps and ``outside`` for the rest, plus the anchor.

    ``history`` is newest first; the shorter list of weights is filled up with zeros. The part added by the projection
    is made in float32 (float64 for float64).
    """
    count = max(len(inside), len(outside))
    if count > len(history) or not inside or not outside:
        raise ValueError(
            f"got {len(inside)} weights inside and {len(outside)} outside for {len(history)} history tensors; "
            "give at least one of each and no more than there is history"
        )
    base, more = _base_and_more(outside, inside)
    device, values = history[0].device, list(history[:count])
    dtype = torch.float64 if history[0].dtype == torch.float64 else torch.float32
    added = project(ops.extrapolate(None, values, constant(more, dtype, device), None, dtype))
    whole = ops.extrapolate(anchor, values, constant(base, dtype, device), None, dtype)
    return (whole + added).to(history[0].dtype)


def channel_table(rules: Sequence[Sequence[float]], labels: Sequence[int]) -> Tensor:
    """One list of weights for each cluster and every channel's cluster, as a table ``[K, channels]`` float32.

    In difference form, for ``ops.extrapolate`` on values whose last dimension is the channels.
    """
    if not rules or not len(labels) or not all(0 <= label < len(rules) for label in labels):
        raise ValueError(f"labels must name one of the {len(rules)} clusters for each channel, got {list(labels)[:8]}")
    count = max(map(len, rules))
    forms = torch.tensor([_filled(ops.difference_form(rule), count) for rule in rules], dtype=torch.float32)
    return forms[torch.as_tensor(labels, dtype=torch.long)].T.contiguous()


def _base_and_more(outside: Sequence[float], inside: Sequence[float]) -> tuple[list[float], list[float]]:
    """Difference forms of the weights outside, and of what is added to them inside."""
    count = max(len(inside), len(outside))
    base = _filled(ops.difference_form(outside), count)
    return base, [a - b for a, b in zip(_filled(ops.difference_form(inside), count), base, strict=True)]


def weight_table(weights: Sequence[float], view: View | None) -> Tensor:
    """The weights of a forecast as its program takes them, float32, in difference form.

    ``[K]``; of channels ``[K, channels]``; of a projection ``[2, K]``: the weights outside, and what is added inside.
    """
    if view is None:
        return torch.tensor(ops.difference_form(weights), dtype=torch.float32)
    if view.projection == "channels":
        return channel_table([weights, *view.inside], view.options["labels"])
    return torch.tensor(_base_and_more(weights, view.inside[0]), dtype=torch.float32)


@projection("low_band")
def low_band(value: Tensor, *, cutoff: float = 0.1, transform: str = "dct", dim: int = -2) -> Tensor:
    """The lowest ``cutoff`` of the frequencies along the tokens (FreqCa 2025: 0.1; "dct" or "fft", by model).

    The discrete cosine transform (second kind) is the Fourier transform of the sequence followed by its mirror image.
    The mean is always kept. Not for complex values.
    """
    if not 0.0 <= cutoff <= 1.0 or transform not in ("dct", "fft"):
        raise ValueError(
            f"low_band needs 0 <= cutoff <= 1 and transform 'dct' or 'fft', got {cutoff} and '{transform}'"
        )
    wide = value.to(torch.float64 if value.dtype == torch.float64 else torch.float32).movedim(dim, -1)
    size = wide.shape[-1]
    signal = torch.cat([wide, wide.flip(-1)], dim=-1) if transform == "dct" else wide
    bands = torch.fft.rfft(signal)
    # the dct has `size` frequencies; of the fft those up to half the sampling rate
    kept = max(int(np.ceil(cutoff * (size if transform == "dct" else size // 2 + 1))), 1)
    bands = torch.where(torch.arange(bands.shape[-1], device=value.device) < kept, bands, 0.0)
    result = torch.fft.irfft(bands, n=signal.shape[-1])[..., :size]
    return result.movedim(-1, dim).to(value.dtype)


def leading_basis(values: Tensor, *, rank: int = 16, rounds: int = 2) -> Tensor:
    """About the ``rank`` leading directions of each sample of ``values`` ``[batch, ..., channels]``, without a host.

    SVD-Cache's coarse variant: a randomised principal component analysis (Halko et al. 2011, ``rounds`` of subspace
    iteration) of the first residual, float32 ``[batch, channels, rank]``, orthonormal columns. The start is the same
    every time, and no sample sees another.
    """
    if rank < 1 or rounds < 0:
        raise ValueError(f"leading_basis needs rank >= 1 and rounds >= 0, got {rank} and {rounds}")
    rows = values.reshape(len(values), -1, values.shape[-1]).to(torch.float32)
    rank = min(rank, *rows.shape[1:])
    start = torch.randn(rows.shape[-1], rank, generator=torch.Generator().manual_seed(0)).to(rows.device)
    basis = torch.linalg.qr(rows.mT @ (rows @ start)).Q
    for _ in range(rounds):
        basis = torch.linalg.qr(rows.mT @ (rows @ basis)).Q
    return basis


@projection("subspace", measure=leading_basis)
def subspace(value: Tensor, *, basis: Tensor) -> Tensor:
    """The part of every token in the span of ``basis``, orthonormal columns (SVD-Cache 2026).

    ``basis`` is ``[channels, rank]``, or ``[batch, channels, rank]`` with one for each sample.
    """
    basis = basis.to(value.dtype)
    if basis.ndim == 2:
        return (value @ basis) @ basis.T
    tokens = value.reshape(len(value), -1, value.shape[-1])
    return ((tokens @ basis) @ basis.mT).reshape(value.shape)


def principal_basis(values: Tensor, *, energy: float = 0.85, max_rank: int | None = None) -> Tensor:
    """The fewest principal directions of ``values`` ``[..., channels]`` with this share of the energy, orthonormal.

    SVD-Cache: energy 0.85, from calibration features; a coarse variant takes the first computed residual and rank 16.
    """
    if not 0.0 < energy <= 1.0:
        raise ValueError(f"energy is a share in (0, 1], got {energy}")
    rows = values.reshape(-1, values.shape[-1]).to(torch.float64)
    squares, directions = torch.linalg.eigh(rows.T @ rows)
    squares, directions = squares.flip(0).clamp(min=0.0), directions.flip(1)
    share = squares.cumsum(0) / squares.sum()
    rank = int((share < energy - 1e-12).sum()) + 1
    return directions[:, : min(rank, max_rank or rank)].to(torch.float32)


# -- HyCa's clusters -----------------------------------------------------------------------------------------------


def describe_channels(trajectory: Tensor) -> Tensor:
    """HyCa's (2025) description of each channel over a short uncached run: ``[channels, 6]``, standardised columns.

    ``trajectory`` is ``[steps, ..., channels]`` with at least four steps. Columns: logarithms of the mean squares of
    the value and of its first, second and third difference, of the ratio of second to first, and the spectral flatness
    over the steps.
    """
    if len(trajectory) < 4:
        raise ValueError(f"describe_channels needs at least four steps, got {len(trajectory)}")
    values = trajectory.reshape(len(trajectory), -1, trajectory.shape[-1]).to(torch.float64)
    tiny = torch.finfo(torch.float64).tiny
    logs = [(values.diff(n=order, dim=0).square().mean((0, 1)) + tiny).log() for order in range(4)]
    power = torch.fft.rfft(values, dim=0).abs().square().mean(1) + tiny
    flatness = power.log().mean(0).exp() / power.mean(0)
    columns = torch.stack([*logs, logs[2] - logs[1], flatness], dim=1)
    return (columns - columns.mean(0)) / columns.std(0, correction=0).clamp(min=1e-12)


def k_means(points: Tensor, clusters: int, *, rounds: int = 50, seed: int = 0) -> Tensor:
    """Lloyd's algorithm from a seeded k-means++ start: the cluster of every row of ``points``, the same every time."""
    if not 1 <= clusters <= len(points):
        raise ValueError(f"k_means needs 1 to {len(points)} clusters for {len(points)} points, got {clusters}")
    random = np.random.default_rng(seed)
    centres = points[int(random.integers(len(points)))][None]
    for _ in range(1, clusters):
        away = torch.cdist(points, centres).amin(1).square().numpy()
        share = away / away.sum() if away.sum() > 0 else np.full(len(points), 1 / len(points))
        centres = torch.cat([centres, points[int(random.choice(len(points), p=share))][None]])
    labels = torch.cdist(points, centres).argmin(1)
    for _ in range(rounds):
        for cluster in labels.unique().tolist():
            centres[cluster] = points[labels == cluster].mean(0)
        moved = torch.cdist(points, centres).argmin(1)
        if torch.equal(moved, labels):
            break
        labels = moved
    return labels


def best_rules(
    trajectory: Tensor, labels: Tensor, history: Sequence[int], target: int, rules: Sequence[Sequence[float]]
) -> list[int]:
    """For each cluster, the number of the rule whose forecast of ``target`` has the least squared error (HyCa).

    ``trajectory`` is ``[steps, ..., channels]``, ``history`` its computed steps, newest first.
    """
    by_channel = channel_errors(trajectory, history, target, rules)
    return [int(by_channel[:, labels == cluster].sum(1).argmin()) for cluster in range(int(labels.max()) + 1)]


def channel_errors(trajectory: Tensor, history: Sequence[int], target: int, rules: Sequence[Sequence[float]]) -> Tensor:
    """Mean squared error ``[rules, channels]`` of each rule's forecast of ``target``."""
    values = trajectory.reshape(len(trajectory), -1, trajectory.shape[-1]).to(torch.float64)
    errors = []
    for rule in rules:
        forecast = sum(weight * values[made] for weight, made in zip(rule, history, strict=False))
        errors.append((values[target] - forecast).square().mean(0))
    return torch.stack(errors)


def channel_view(
    trajectory: Tensor, rules: Sequence[Mapping[str, Any]], *, clusters: int = 8, history: int = 3
) -> View:
    """HyCa: every cluster of channels goes by the rule that forecasts it best, found once for a model.

    ``trajectory`` is ``[steps, ..., channels]`` of an uncached run; ``rules`` are candidates
    ``{"predictor": name, "options": {...}}`` for the next step from the ``history`` before it. The first rule is the
    one that the cell itself is to have; channels that go by it have label 0.
    """
    labels = k_means(describe_channels(trajectory), clusters)
    steps = len(trajectory)
    errors = torch.zeros(len(rules), trajectory.shape[-1], dtype=torch.float64)
    for target in range(history, steps):
        made = list(range(target - 1, target - 1 - history, -1))
        found = [fixed_weights(rule["predictor"], made, target, **rule.get("options", {})) for rule in rules]
        errors += channel_errors(trajectory, made, target, found)
    best = [int(errors[:, labels == cluster].sum(1).argmin()) for cluster in range(clusters)]
    chosen = {"labels": [best[label] for label in labels.tolist()]}
    return View.of({"projection": "channels", "options": chosen, "inside": list(rules[1:])})


def _filled(form: Sequence[float], count: int) -> list[float]:
    return [*form, *[0.0] * (count - len(form))]


def split(value: Tensor, name: str, **options: Any) -> tuple[Tensor, Tensor]:
    """A value as the part that the named projection keeps and the rest; they add up to the value but for rounding."""
    if name not in PROJECTIONS:
        raise ValueError(f"unknown projection '{name}'; known: {sorted(PROJECTIONS)}. Register yours with @projection")
    part = PROJECTIONS[name](value, **options)
    return part, value - part
