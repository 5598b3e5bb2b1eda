"""Library functions that trace, vmap or compile inside: while recording, a call of one is one node.

User code has often imported them by name, so the function object itself is given other code for the time being.
"""

from __future__ import annotations

import contextlib
import threading
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention import flex_attention as flex

if TYPE_CHECKING:
    from diffcache.tracing.recorder import Recorder

_DIRECT: tuple[Any, ...] = (flex.flex_attention, flex.create_block_mask, flex.create_mask, torch.cond)
_CURRENT = threading.local()


def vmapped(
    function: Callable[..., Any], vmap_args: tuple[Any, ...], vmap_kwargs: dict[str, Any], args: Any, kwargs: Any
) -> Any:
    """``torch.vmap(function, ...)(*args, **kwargs)`` as one call."""
    return torch.vmap(function, *vmap_args, **vmap_kwargs)(*args, **kwargs)


def call(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a function whose code is replaced runs."""
    recorder, originals = getattr(_CURRENT, "recorder", None), _ORIGINALS[-1]
    function, original = originals[name]
    if recorder is None or not recorder.active or recorder.passive:
        return original(*args, **kwargs)
    if function is torch.vmap:

        def mapped(*inner: Any, **inner_kwargs: Any) -> Any:
            inner_args = (args[0], args[1:], kwargs, inner, inner_kwargs)
            run = lambda: original(*args, **kwargs)(*inner, **inner_kwargs)  # noqa: E731
            return recorder.opaque_call(vmapped, inner_args, {}, run)

        return mapped
    return recorder.opaque_call(function, args, kwargs, lambda: original(*args, **kwargs))


_ORIGINALS: list[dict[str, tuple[Any, Callable[..., Any]]]] = []


@contextlib.contextmanager
def opaque_functions(recorder: Recorder) -> Iterator[None]:
    """Let this thread's calls of the listed functions become single nodes of ``recorder``."""
    functions = {function.__name__: function for function in (*_DIRECT, torch.vmap)}
    saved = {name: function.__code__ for name, function in functions.items()}
    _ORIGINALS.append({name: (function, _copy(function)) for name, function in functions.items()})
    _CURRENT.recorder = recorder
    for name, function in functions.items():
        function.__code__ = _trampoline(name, function.__code__)
    try:
        yield
    finally:
        for name, function in functions.items():
            function.__code__ = saved[name]
        _CURRENT.recorder = None
        _ORIGINALS.pop()


def _copy(function: types.FunctionType) -> types.FunctionType:
    copy = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _trampoline(name: str, code: types.CodeType) -> types.CodeType:
    """Code that hands the call over, with as many free variables as the code it stands in for."""
    assert not code.co_freevars, f"{name} has a closure"
    body = f"from diffcache.tracing import opaque\n    return opaque.call({name!r}, args, kwargs)"
    source = f"def {name}(*args, **kwargs):\n    {body}\n"
    scope: dict[str, Any] = {}
    exec(source, scope)
    return scope[name].__code__
