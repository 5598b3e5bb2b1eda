"""The operations of a cached step, ``torch.ops.diffcache.*``, each with the plain torch code that says what it does.

- ``extrapolate``: what every linear predictor lowers to, with an optional gated residual add;
- ``extrapolate_modulate``: the same, followed by a layer norm with a factor and a shift;
- ``quantize``: what small history keeps of a value;
- ``relative_change``: what a gate looks at.

The functions ``*_reference`` are the truth; on CUDA tensors a Triton kernel in ``kernels/`` does the same in one
launch. They are made with ``torch.library.triton_op``, so ``torch.compile`` sees through them: on a CPU it fuses the
reference with its neighbours, on a GPU it places the kernel itself. ``diffcache/direct.py`` calls the same functions
(``BODIES``) without torch's dispatcher. Weights arrive in difference form
(``difference_form``), in which a value that does not change between steps is reproduced bit for bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from diffcache.kernels.starting import Start

try:  # the package works where triton does not exist
    from diffcache.kernels import extrapolate as extrapolate_kernels
    from diffcache.kernels import quantize as quantize_kernels
    from diffcache.kernels import relative_change as change_kernels

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

SMALL = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # dtypes that history may be stored in: the largest number


def difference_form(weights: Sequence[float]) -> list[float]:
    """``[w_0, w_1, ...]`` (newest first) as ``[total, w_1, ...]``, which is what the operation takes.

    ``sum_k w_k h_k = total h_0 + sum_{k>=1} w_k (h_k - h_0)`` with ``total = sum_k w_k``. A total within 1e-9 of one is
    made exactly one, so that equal history values come out unchanged.
    """
    if not weights:
        raise ValueError("a forecast needs at least one weight, got none")
    total = float(sum(weights))
    if abs(total - 1.0) < 1e-9:
        total = 1.0
    return [total, *map(float, weights[1:])]


# -- what the operations do ----------------------------------------------------------------------------------------


def extrapolate_reference(
    anchor: Tensor | None,
    history: Sequence[Tensor],
    weights: Tensor,
    gate: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``anchor + gate f`` with ``f = total h_0 + sum_{k>=1} w_k (h_k - h_0)``, differentiable.

    Args:
        anchor: of the shape of a history tensor, or None.
        history: K tensors of one shape, dtype and device, newest first; in int8 or float8 followed by their K scales,
            what each is multiplied by (``quantize``).
        weights: float ``[K]`` in difference form, or ``[K, ...]`` with one table for each history tensor that
            broadcasts to its shape: weights by channel ``[K, channels]``, by token ``[K, tokens, 1]``, by band.
        gate: broadcasts to the shape of a history tensor. ``f`` and ``gate f`` are then rounded as the two operations
            would that this replaces.
        dtype: of the result; needed for history in int8 or float8.

    Sums run in float32 (float64 for float64) and are rounded to the dtype of the result.
    """
    result_dtype = dtype or history[0].dtype
    wide = torch.float64 if result_dtype == torch.float64 else torch.float32
    small, scales = split_scales(history)
    values = [value.to(wide) for value in small]
    if scales:
        values = [value * scale.to(wide) for value, scale in zip(values, scales, strict=True)]
    base, *others = values
    factors = weights.to(wide).unbind()
    result = base * factors[0]
    for older, factor in zip(others, factors[1:], strict=True):
        result = torch.addcmul(result, older - base, factor)
    if gate is not None:
        result = (result.to(result_dtype).to(wide) * gate.to(wide)).to(result_dtype).to(wide)
    if anchor is not None:
        result = result + anchor.to(wide)
    return result.to(result_dtype)


def split_scales(history: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """History as values and their scales; there are scales only for values in int8 or float8."""
    count = len(history) // 2 if history[0].dtype in SMALL else len(history)
    return history[:count], history[count:]


def extrapolate_modulate_reference(
    anchor: Tensor | None,
    history: Sequence[Tensor],
    weights: Tensor,
    factor: Tensor,
    shift: Tensor,
    eps: float,
    gate: Tensor | None = None,
    dtype: torch.dtype | None = None,
    keep: bool = True,
) -> tuple[Tensor, Tensor]:
    """The value that ``extrapolate`` gives, and ``layer_norm(value) * factor + shift`` over the last dimension.

    Without ``keep`` the value itself is not wanted: an empty tensor stands in its place.
    """
    value = extrapolate_reference(anchor, history, weights, gate, dtype)
    return value if keep else value.new_empty(0), F.layer_norm(value, value.shape[-1:], eps=eps) * factor + shift


def quantize_reference(value: Tensor, anchor: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``(value - anchor) / scale`` in ``dtype``, and ``scale`` float32 [..., 1]: a row's largest over the dtype's."""
    kept = (value if anchor is None else value - anchor).to(torch.float32)
    scale = kept.abs().amax(dim=-1, keepdim=True) / SMALL[dtype]
    scale = torch.where(scale > 0, scale, 1.0)
    small = kept / scale
    return (small if dtype.is_floating_point else small.round()).to(dtype), scale


def relative_change_reference(new: Tensor, old: Tensor, norm: int = 1) -> Tensor:
    """``|new - old| / |old|`` of each sample (the first dimension): float32 [samples], in L1 or L2 norm."""
    wide = torch.float64 if new.dtype == torch.float64 else torch.float32
    before = old.reshape(len(old), -1).to(wide)
    change = new.reshape(len(new), -1).to(wide) - before
    if norm == 2:
        found = torch.linalg.vector_norm(change, dim=1) / torch.linalg.vector_norm(before, dim=1)
    else:  # on a CPU sums are made with vector instructions, an L1 norm is not
        found = change.abs_().sum(1) / before.abs().sum(1)
    return found.to(torch.float32)


# -- what they refuse ----------------------------------------------------------------------------------------------


def _check(
    anchor: Tensor | None,
    history: Sequence[Tensor],
    weights: Tensor,
    gate: Tensor | None,
    dtype: torch.dtype | None,
) -> None:
    if not history:
        raise ValueError("extrapolate needs at least one history tensor, got none")
    values, scales = split_scales(history)
    newest = history[0]
    if newest.dtype in SMALL and (dtype is None or len(values) != len(scales)):
        raise ValueError(
            f"history in {newest.dtype} needs dtype= and one scale for each tensor, got {len(history)} tensors in all "
            f"and dtype {dtype}; make them with quantize()"
        )
    for tensor in (*(scales or values), weights, anchor, gate):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(
                f"extrapolate takes real floating-point tensors, got {tensor.dtype}; "
                "compute this site at every step, or forecast torch.view_as_real of a complex value"
            )
    for older in values[1:]:
        if older.shape != newest.shape or older.dtype != newest.dtype:
            raise ValueError(
                f"history tensors must agree in shape and dtype, got {list(newest.shape)} {newest.dtype} "
                f"and {list(older.shape)} {older.dtype}; start a new history when the shape changes"
            )
    if anchor is not None and anchor.shape != newest.shape:
        raise ValueError(
            f"anchor has shape {list(anchor.shape)}, the history has {list(newest.shape)}; they must be equal"
        )
    if weights.ndim < 1 or weights.shape[0] != len(values):
        raise ValueError(f"weights have shape {list(weights.shape)}, expected [{len(values)}], one per history tensor")
    tables = {"a table of weights": weights.shape[1:], "the gate": () if gate is None else gate.shape}
    for name, shape in tables.items():
        fits = len(shape) <= newest.ndim and all(
            size in (1, full) for size, full in zip(shape[::-1], newest.shape[::-1], strict=False)
        )
        if not fits:
            raise ValueError(f"{name} of shape {list(shape)} does not broadcast to the history's {list(newest.shape)}")


def on_gpu(tensor: Tensor, small: torch.dtype | None = None) -> bool:
    """Whether a kernel can take it; GPUs older than Ada have no float8."""
    if not HAS_TRITON or not tensor.is_cuda:
        return False
    return small != torch.float8_e4m3fn or torch.cuda.get_device_capability(tensor.device) >= (8, 9)


# -- the operations ------------------------------------------------------------------------------------------------


def _extrapolate_body(
    start: Start,
    anchor: Tensor | None,
    history: Sequence[Tensor],
    weights: Tensor,
    gate: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    _check(anchor, history, weights, gate, dtype)
    if on_gpu(history[0], history[0].dtype):
        done = extrapolate_kernels.extrapolate(start, anchor, *split_scales(history), weights, gate, dtype)
        if done is not None:
            return done[0]
    return extrapolate_reference(anchor, history, weights, gate, dtype)


def _extrapolate_modulate_body(
    start: Start,
    anchor: Tensor | None,
    history: Sequence[Tensor],
    weights: Tensor,
    factor: Tensor,
    shift: Tensor,
    eps: float,
    gate: Tensor | None = None,
    dtype: torch.dtype | None = None,
    keep: bool = True,
) -> tuple[Tensor, Tensor]:
    _check(anchor, history, weights, gate, dtype)
    if on_gpu(history[0], history[0].dtype) and factor.dtype == shift.dtype == (dtype or history[0].dtype):
        modulation = (factor, shift, eps, keep)
        done = extrapolate_kernels.extrapolate(start, anchor, *split_scales(history), weights, gate, dtype, modulation)
        if done is not None:
            return done
    return extrapolate_modulate_reference(anchor, history, weights, factor, shift, eps, gate, dtype, keep)


def _quantize_body(start: Start, value: Tensor, anchor: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if dtype not in SMALL:
        raise ValueError(f"history can be stored in {list(SMALL)}, got {dtype}")
    if on_gpu(value, dtype):
        done = quantize_kernels.quantize(start, value, anchor, dtype, SMALL[dtype])
        if done is not None:
            return done
    return quantize_reference(value, anchor, dtype)


def _relative_change_body(start: Start, new: Tensor, old: Tensor, norm: int = 1) -> Tensor:
    if norm not in (1, 2):
        raise ValueError(f"norm must be 1 or 2, got {norm}")
    if new.shape != old.shape or new.ndim == 0 or new.dtype != old.dtype:
        raise ValueError(
            f"relative_change compares two batches of one shape and dtype, got {list(new.shape)} {new.dtype} and "
            f"{list(old.shape)} {old.dtype}"
        )
    if on_gpu(new) and new.numel():
        return change_kernels.relative_change(start, new, old, norm)
    return relative_change_reference(new, old, norm)


@torch.library.triton_op("diffcache::extrapolate", mutates_args=())
def _extrapolate(
    anchor: Tensor | None,
    history: Sequence[Tensor],
    weights: Tensor,
    gate: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    return _extrapolate_body(Start(), anchor, history, weights, gate, dtype)


@torch.library.triton_op("diffcache::extrapolate_modulate", mutates_args=())
def _extrapolate_modulate(
    anchor: Tensor | None,
    history: Sequence[Tensor],
    weights: Tensor,
    factor: Tensor,
    shift: Tensor,
    eps: float,
    gate: Tensor | None = None,
    dtype: torch.dtype | None = None,
    keep: bool = True,
) -> tuple[Tensor, Tensor]:
    """The value that ``extrapolate`` gives, and ``layer_norm(value) * factor + shift``."""
    return _extrapolate_modulate_body(Start(), anchor, history, weights, factor, shift, eps, gate, dtype, keep)


@torch.library.triton_op("diffcache::quantize", mutates_args=())
def _quantize(value: Tensor, anchor: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return _quantize_body(Start(), value, anchor, dtype)


@torch.library.triton_op("diffcache::relative_change", mutates_args=())
def _relative_change(new: Tensor, old: Tensor, norm: int = 1) -> Tensor:
    return _relative_change_body(Start(), new, old, norm)


def _differentiate(op: Any, reference: Callable[..., Any]) -> None:
    """Let gradients of ``op`` go through its reference, computed again."""
    defaults = [parameter.default for parameter in inspect.signature(reference).parameters.values()]

    def remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.inputs = inputs

    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        leaves, spec = tree_flatten(ctx.inputs)
        wanted = [isinstance(x, Tensor) and x.is_floating_point() and x.dtype not in SMALL for x in leaves]
        fresh = [x.detach().requires_grad_() if want else x for x, want in zip(leaves, wanted, strict=True)]
        with torch.enable_grad():
            results = reference(*tree_unflatten(fresh, spec))
        results = results if isinstance(results, tuple) else (results,)
        sources = [x for x, want in zip(fresh, wanted, strict=True) if want]
        found = iter(torch.autograd.grad(results, sources, gradients, allow_unused=True))
        found_all = tree_unflatten([next(found) if want else None for want in wanted], spec)
        # the dispatcher leaves out trailing arguments that equal their defaults, and wants no gradients for them
        given = len(ctx.inputs)
        while ctx.inputs[given - 1] is defaults[given - 1]:
            given -= 1
        return tuple(found_all[:given])

    op.register_autograd(backward, setup_context=remember)


_differentiate(_extrapolate, extrapolate_reference)
_differentiate(_extrapolate_modulate, extrapolate_modulate_reference)

extrapolate = torch.ops.diffcache.extrapolate.default
extrapolate_modulate = torch.ops.diffcache.extrapolate_modulate.default
quantize = torch.ops.diffcache.quantize.default
relative_change = torch.ops.diffcache.relative_change.default

# what each operation runs: the function behind it, which is told first how kernels are started
BODIES: dict[Any, Callable[..., Any]] = {
    extrapolate: _extrapolate_body,
    extrapolate_modulate: _extrapolate_modulate_body,
    quantize: _quantize_body,
    relative_change: _relative_change_body,
}
