"""Predictors whose weights are made at run time from the values themselves, for each sample, on the device.

Enters: history tensors (newest first, the first dimension is the batch), the times they were computed at, the time to
forecast, and where a method looks at one, a probe: a cheap value known at those times and now. Leaves: what
``ops.extrapolate`` takes, a list of tensors and a table of weights in difference form, ``[K, batch, 1, ...]``, float32
(float64 for float64 history). Nothing waits for the device and nothing depends on the other samples of the batch
(``modal.py`` says where it must wait).

Three properties hold for every rule here, and the tests over ``FROM_VALUES`` check them:

* the first row, the sum of the weights, is exactly one wherever the method reproduces a value that does not change;
* when nothing changes, neither history nor probe, the newest value comes out bit for bit;
* the weights are finite whatever the values: where a method divides by zero its weights become those of reuse.

To add one: write the function, decorate it with ``@from_values("name", newest=...)``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffcache.predictors.registry import weights as fixed_weights

Rule = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class ValueRule:
    """A registered rule and what it needs.

    ``newest``: how many history tensors it reads at most. ``probe``: what the probe is, in words, for those who choose
    a site; empty when there is none. ``companion``: the probe has the shape of the value and is itself part of the
    forecast, whose operands then are ``[value_0, probe now, probe_0]`` instead of the history.
    """

    weights: Rule
    newest: int
    probe: str = ""
    companion: bool = False

    def operands(
        self, history: Sequence[Tensor], probe_history: Sequence[Tensor] | None, probe_now: Tensor | None, count: int
    ) -> list[Tensor]:
        """The tensors that ``count`` rows of weights belong to."""
        if not self.companion:
            return list(history[:count])
        assert probe_history is not None
        assert probe_now is not None
        return [history[0], probe_now, probe_history[0]][:count]


FROM_VALUES: dict[str, ValueRule] = {}


def from_values(name: str, *, newest: int, probe: str = "", companion: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule under ``name``. Raises ValueError when the name is taken."""

    def register(rule: Rule) -> Rule:
        if name in FROM_VALUES:
            raise ValueError(f"predictor from values '{name}' is registered already; choose another name")
        FROM_VALUES[name] = ValueRule(rule, newest, probe, companion)
        return rule

    return register


def weights_from_values(
    name: str,
    history: Sequence[Tensor],
    steps: Sequence[float],
    target: float,
    *,
    probe_history: Sequence[Tensor] | None = None,
    probe_now: Tensor | None = None,
    **options: Any,
) -> tuple[list[Tensor], Tensor]:
    """Tensors and their table of weights, to be given to ``ops.extrapolate`` as they are.

    ``history[k]`` was computed at ``steps[k]``, newest first; ``probe_history[k]`` is the probe at the same time. More
    history than the rule reads is left out. Raises ValueError for an unknown name or option, for history and steps that
    do not match, and for a probe that is missing or does not match.
    """
    entry = FROM_VALUES.get(name)
    if entry is None:
        raise ValueError(
            f"unknown predictor from values '{name}'; known: {sorted(FROM_VALUES)}. Register yours with @from_values"
        )
    accepted = [key for key, it in inspect.signature(entry.weights).parameters.items() if it.kind is it.KEYWORD_ONLY]
    accepted = [key for key in accepted if key not in ("probe_history", "probe_now")]
    if not set(options) <= set(accepted):
        unknown = sorted(set(options) - set(accepted))
        raise ValueError(f"predictor '{name}' has no options {unknown}; it takes {accepted}")
    if not history or len(history) != len(steps) or len(set(steps)) != len(steps):
        raise ValueError(
            f"predictor '{name}' got {len(history)} history tensors for steps {list(steps)}; "
            "give at least one, and each its own time"
        )
    probes: dict[str, Any] = {}
    if entry.probe:
        if probe_now is None or probe_history is None or len(probe_history) != len(history):
            found = "none" if probe_history is None else len(probe_history)
            raise ValueError(
                f"predictor '{name}' looks at {entry.probe}: give probe_now, and probe_history with one value for each "
                f"of the {len(history)} history tensors (got {found})"
            )
        if entry.companion and probe_now.shape != history[0].shape:
            raise ValueError(
                f"predictor '{name}' forecasts from {entry.probe} itself, which must have the shape of the value; got "
                f"{list(probe_now.shape)} and {list(history[0].shape)}"
            )
        probes = {"probe_history": list(probe_history[: entry.newest]), "probe_now": probe_now}
    table = entry.weights(list(history[: entry.newest]), list(steps[: entry.newest]), target, **probes, **options)
    return entry.operands(history, probe_history, probe_now, len(table)), table


# -- what the rules are made of ------------------------------------------------------------------------------------


def wide(value: Tensor) -> torch.dtype:
    """The dtype that sums run in: float64 for float64, else float32."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each sample, float64 ``[batch]``: products in ``wide``, added up in float64."""
    product = a.to(wide(a)) * b.to(wide(a))
    return product.reshape(len(product), -1).sum(dim=1, dtype=torch.float64)


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Sum of ``|a - b|`` of each sample, float64 ``[batch]``."""
    change = (a.to(wide(a)) - b.to(wide(a))).abs()
    return change.reshape(len(change), -1).sum(dim=1, dtype=torch.float64)


def ratio(above: Tensor, below: Tensor, otherwise: float) -> Tensor:
    """``above / below``, and ``otherwise`` where that is not a finite number."""
    result = above / below
    return torch.where(torch.isfinite(result), result, otherwise)


def constant(numbers: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Host numbers as a tensor on the device, without waiting for it."""
    return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)


def table_of(rows: Sequence[Tensor | float], like: Tensor) -> Tensor:
    """Rows ``[batch]`` or numbers as a table that broadcasts to ``like``: ``[K, batch, 1, ...]``."""
    batch = len(like)
    columns = [
        row.to(wide(like))
        if isinstance(row, Tensor)
        else torch.full((batch,), row, dtype=wide(like), device=like.device)
        for row in rows
    ]
    return torch.stack(columns).reshape(len(columns), batch, *[1] * (like.ndim - 1))


def table_of_fixed(weights: Sequence[float], like: Tensor) -> Tensor:
    """Fixed weights that sum to one, the same for every sample, as such a table."""
    return table_of([1.0, *weights[1:]], like)


# -- rules with one or two numbers for each sample -----------------------------------------------------------------


@from_values("trend", newest=2, probe="the value after the first blocks (DiCache: their residual)")
def trend(
    history: Sequence[Tensor],
    steps: Sequence[float],
    target: float,
    *,
    probe_history: Sequence[Tensor],
    probe_now: Tensor,
    low: float = 1.0,
    high: float = 1.5,
) -> Tensor:
    """DiCache's trend alignment (2025): ``F_1 + g (F_0 - F_1)``, g read off the probe.

    ``g = clip(mean|p - p_1| / mean|p_0 - p_1|, low, high)``; published ``high``: 1.5 for images, 2 for videos. A probe
    that has not moved between the two computed steps says nothing: g is then ``low``.
    """
    if len(history) == 1:
        return table_of_fixed([1.0], history[0])
    newer, older = probe_history[:2]
    moved = ratio(distance(probe_now, older), distance(newer, older), low).clamp(low, high)
    return table_of([1.0, 1.0 - moved], history[0])


@from_values("relation", newest=4, probe="the input of what is forecast")
def relation(
    history: Sequence[Tensor],
    steps: Sequence[float],
    target: float,
    *,
    probe_history: Sequence[Tensor],
    probe_now: Tensor,
    order: int = 1,
) -> Tensor:
    """RFC (2026): the direction of TaylorSeer's forecast, as long as the input's change says.

    ``F_0 + ||F_0 - F_1|| / ||I_0 - I_1|| ||I - I_0|| D / ||D||`` with ``D = sum_{i=1}^{order} D_i k^i / i!``, published
    orders 1 and 2. Exact where the output is linear in an input that moves along one direction. ``D`` is a combination
    of ``F_k - F_0``, so its length follows from their inner products.
    """
    if len(history) == 1:
        return table_of_fixed([1.0], history[0])
    straight = fixed_weights("taylor", steps, target, order=order)[1:]
    changes = [older.to(wide(older)) - history[0].to(wide(older)) for older in history[1 : len(straight) + 1]]
    squared = torch.zeros(len(history[0]), dtype=torch.float64, device=history[0].device)
    for j, a in enumerate(changes):
        for k, b in enumerate(changes[: j + 1]):
            squared = squared + (1 if j == k else 2) * straight[j] * straight[k] * inner(a, b)
    length = squared.clamp(min=0.0).sqrt()
    made = inner(changes[0], changes[0]).sqrt()
    input_made = _norm_of_change(probe_history[0], probe_history[1])
    wanted = made * _norm_of_change(probe_now, probe_history[0])
    # zero where the output or the input stood still: reuse
    scale = ratio(wanted, input_made * length, 0.0)
    return table_of([1.0, *(scale * weight for weight in straight)], history[0])


@from_values("decomposed", newest=2, probe="the latent that the denoiser is given", companion=True)
def decomposed(
    history: Sequence[Tensor],
    steps: Sequence[float],
    target: float,
    *,
    probe_history: Sequence[Tensor],
    probe_now: Tensor,
) -> Tensor:
    """VDE (2026): the velocity as ``v = a z + b ||z|| u``, a and b forecast on a line in time, u kept.

    At a computed step ``a = <v, z> / ||z||^2``, ``b = ||v - a z|| / ||z||``, ``u = (v - a z) / ||v - a z||``. With
    ``B = b ||z|| / ||v_0 - a_0 z_0||`` the forecast is ``B v_0 + a z - B a_0 z_0``: weights for the operands
    ``[v_0, z, z_0]``, where ``steps`` and ``target`` are the sampler's times. With one computed step a and b are kept.
    """
    z, z_0 = probe_now, probe_history[0]
    parts = [_decompose(v, old) for v, old in zip(history[:2], probe_history[:2], strict=True)]
    (a_0, b_0), (a_1, b_1) = parts[0], parts[-1]
    ahead = (target - steps[0]) / (steps[0] - steps[1]) if len(history) > 1 else 0.0
    a = a_0 + ahead * (a_0 - a_1)
    b = b_0 + ahead * (b_0 - b_1)
    now, before = inner(z, z), inner(z_0, z_0)
    kept = ratio(b * now.sqrt(), b_0 * before.sqrt(), 1.0)
    # rounding must not show where nothing has moved
    still = (distance(z, z_0) == 0.0) & (a == a_0) & (b == b_0)
    a, back = torch.where(still, 0.0, a), torch.where(still, 0.0, -kept * a_0)
    kept = torch.where(still, 1.0, kept)
    return table_of([kept + a + back, a, back], history[0])


def _decompose(v: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """``a`` and ``b`` of ``decomposed``, float64 ``[batch]``; zero for a latent that is zero."""
    along, square = inner(v, z), inner(z, z)
    a = ratio(along, square, 0.0)
    rest = (inner(v, v) - a * along).clamp(min=0.0)
    return a, ratio(rest.sqrt(), square.sqrt(), 0.0)


def _norm_of_change(a: Tensor, b: Tensor) -> Tensor:
    change = a.to(wide(a)) - b.to(wide(a))
    return inner(change, change).sqrt()
