"""The operations without torch's dispatcher: what eager programs and gates call.

Going through the dispatcher into an operation written in Python costs the host several times what the kernel costs the
device. Where nobody looks on (no gradient, no mode, no tracer) ``direct(op)`` runs what the operation runs, and on a
GPU repeats the launches of an equal call before. Everywhere else it calls the operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from diffcache import ops
from diffcache.kernels.starting import Recorded, Replay, Start

MAX_KNOWN = 256  # kinds of calls of one operation whose launches are remembered
PLAIN = (Tensor, nn.Parameter)

_made: dict[Any, Callable[..., Any]] = {}


def direct(op: Any) -> Callable[..., Any]:
    """A function that does the same as one of our operations; any other callable is returned as it is."""
    if op not in ops.BODIES:
        return op  # type: ignore[no-any-return]
    if op not in _made:
        _made[op] = _direct(op, ops.BODIES[op])
    return _made[op]


def _direct(op: Any, body: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[Any, Replay | None] = {}
    start = Start()

    def call(*arguments: Any, **options: Any) -> Any:
        tensors: list[Tensor] = []
        plain: list[Any] = [*options.items()]
        for argument in arguments:
            if isinstance(argument, Tensor):
                tensors.append(argument)
                plain.append(Tensor)
            elif isinstance(argument, (list, tuple)):
                tensors += argument
                plain.append(len(argument))
            else:
                plain.append(argument)
        if watched() or (layouts := _layouts(tensors)) is None:
            return op(*arguments, **options)
        if not ops.on_gpu(tensors[0]) or torch.version.hip:  # there Triton's code depends on more than layouts
            return body(start, *arguments, **options)
        key = (*plain, *layouts)
        replay = known.get(key)
        result = None if replay is None else replay(tensors)
        if result is None:
            recorded = Recorded(tensors)
            result = body(recorded, *arguments, **options)
            if len(known) >= MAX_KNOWN:
                known.clear()
            known[key] = recorded.replay(result) or replay
        return result

    call.__name__ = call.__qualname__ = f"direct_{op._opname}"
    return call


def watched() -> bool:
    """Whether a mode, a transform, a tracer or forward differentiation has to see the operation itself."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def _layouts(tensors: Sequence[Tensor]) -> list[Any] | None:
    """What of the tensors decides how kernels are started; None if one is none that a kernel may simply read."""
    found: list[Any] = []
    differentiated = torch.is_grad_enabled()
    for tensor in tensors:
        if type(tensor) not in PLAIN or tensor.is_neg() or (differentiated and tensor.requires_grad):
            return None
        # of contiguous tensors only strides of dimensions of one element differ, and those mean nothing
        found.append(
            (tensor.dtype, tensor.shape, tensor.get_device(), True if tensor.is_contiguous() else tensor.stride())
        )
    return found or None
