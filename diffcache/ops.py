"""``torch.ops.diffcache.extrapolate``: the one operation every linear predictor lowers to.

The function ``extrapolate_reference`` is the truth; on CUDA tensors the Triton kernel in ``kernels/extrapolate.py``
does the same in one launch. Weights arrive in difference form (``difference_form``), in which a value that does not
change between steps is reproduced bit for bit, whatever the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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


def extrapolate_reference(anchor: Tensor | None, history: Sequence[Tensor], weights: Tensor) -> Tensor:
    """``total h_0 + sum_{k>=1} w_k (h_k - h_0) + anchor``, differentiable and made of plain torch operations.

    ``history`` holds K tensors of one shape, dtype and device, newest first; ``weights`` is float ``[K]`` in difference
    form; ``anchor`` has the shape of a history tensor. Sums run in float32 (float64 for float64 history) and are
    rounded once, to the dtype of the history. Also fit as a decomposition: a compiler can fuse it with its neighbours.
    """
    newest = history[0]
    wide = torch.float64 if newest.dtype == torch.float64 else torch.float32
    factors = weights.to(wide).unbind()
    base = newest.to(wide)
    result = base * factors[0]
    for older, factor in zip(history[1:], factors[1:], strict=True):
        result = torch.addcmul(result, older.to(wide) - base, factor)
    if anchor is not None:
        result = result + anchor.to(wide)
    return result.to(newest.dtype)


def _check(anchor: Tensor | None, history: Sequence[Tensor], weights: Tensor) -> None:
    if not history:
        raise ValueError("extrapolate needs at least one history tensor, got none")
    newest = history[0]
    for tensor in (*history, weights) if anchor is None else (*history, weights, anchor):
        if not tensor.is_floating_point():
            raise TypeError(
                f"extrapolate takes real floating-point tensors, got {tensor.dtype}; "
                "compute this site at every step, or forecast torch.view_as_real of a complex value"
            )
    for older in history[1:]:
        if older.shape != newest.shape or older.dtype != newest.dtype:
            raise ValueError(
                f"history tensors must agree in shape and dtype, got {list(newest.shape)} {newest.dtype} "
                f"and {list(older.shape)} {older.dtype}; start a new history when the shape changes"
            )
    if anchor is not None and anchor.shape != newest.shape:
        raise ValueError(
            f"anchor has shape {list(anchor.shape)}, the history has {list(newest.shape)}; they must be equal"
        )
    if weights.ndim != 1 or weights.shape[0] != len(history):
        raise ValueError(f"weights have shape {list(weights.shape)}, expected [{len(history)}], one per history tensor")


def _extrapolate(anchor: Tensor | None, history: Sequence[Tensor], weights: Tensor) -> Tensor:
    _check(anchor, history, weights)
    return extrapolate_reference(anchor, history, weights)


def _extrapolate_cuda(anchor: Tensor | None, history: Sequence[Tensor], weights: Tensor) -> Tensor:
    _check(anchor, history, weights)
    try:
        # imported late, so that the package works where triton does not exist
        from diffcache.kernels import extrapolate as kernel
    except ImportError:
        return extrapolate_reference(anchor, history, weights)
    if len(history) > kernel.MAX_HISTORY:
        return extrapolate_reference(anchor, history, weights)
    return kernel.extrapolate(anchor, history, weights)


def _extrapolate_autograd(
    keys: torch._C.DispatchKeySet, anchor: Tensor | None, history: Sequence[Tensor], weights: Tensor
) -> Tensor:
    """Gradients go through the reference; without them straight on to the device's kernel."""
    if torch.is_grad_enabled():
        tensors = (*history, weights) if anchor is None else (*history, weights, anchor)
        if any(tensor.requires_grad for tensor in tensors):
            return _extrapolate(anchor, history, weights)
    return extrapolate.redispatch(keys & _BELOW_AUTOGRAD, anchor, history, weights)


# torch.library.Library instead of torch.library.custom_op: the same checks (opcheck) at a fraction of the call overhead
_LIBRARY = torch.library.Library("diffcache", "FRAGMENT")
_BELOW_AUTOGRAD = torch._C._after_autograd_keyset
_LIBRARY.define(
    "extrapolate(Tensor? anchor, Tensor[] history, Tensor weights) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
_LIBRARY.impl("extrapolate", _extrapolate, "CompositeExplicitAutograd")
_LIBRARY.impl("extrapolate", _extrapolate_cuda, "CUDA")
_LIBRARY.impl("extrapolate", _extrapolate_autograd, "Autograd", with_keyset=True)


@torch.library.register_fake("diffcache::extrapolate", lib=_LIBRARY)
def _extrapolate_fake(anchor: Tensor | None, history: Sequence[Tensor], weights: Tensor) -> Tensor:
    _check(anchor, history, weights)
    return torch.empty_like(history[0])


extrapolate = torch.ops.diffcache.extrapolate.default
