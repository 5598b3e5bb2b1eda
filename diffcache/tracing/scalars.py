"""Python numbers that the graph must follow: timesteps passed as numbers, and numbers read from tensors by ``.item()``.

A ``Tracked`` number says it is a ``float`` or ``int`` (``isinstance`` agrees) without being one, so no C code can
read it unseen. Arithmetic on it is recorded as nodes, a comparison becomes a guard on its truth, torch calls take its
node, and every other use goes through ``__float__``, ``__index__`` and the like, where its value is guarded.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import fx

    from diffcache.tracing.recorder import Recorder

_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
_UNARY = ("neg", "pos", "abs")
_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
_ESCAPES: dict[str, Callable[..., Any]] = {
    "bool": bool,
    "int": int,
    "float": float,
    "complex": complex,
    "index": operator.index,
    "hash": hash,
    "round": round,
    "trunc": math.trunc,
    "floor": math.floor,
    "ceil": math.ceil,
    "str": str,
    "repr": repr,
    "format": format,
}


class Tracked:
    """A number with the node that produces it."""

    __slots__ = ("node", "number", "recorder")

    def __init__(self, number: int | float, node: fx.Node, recorder: Recorder):
        self.number, self.node, self.recorder = number, node, recorder

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]
        return type(self.number)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """After recording has ended (or inside code that hides it): use the plain number."""
        return func(*plain(args), **plain(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        return getattr(_escape(self), name)


def track(value: Any, node: fx.Node, recorder: Recorder) -> Any:
    """``value`` as a number that knows its node; what is no plain int or float is returned as it is."""
    return Tracked(value, node, recorder) if type(value) in (int, float) else value


def plain(value: Any) -> Any:
    """``value`` with every tracked number in it replaced by an ordinary one."""
    if type(value) is Tracked:
        return value.number
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    if type(value) is dict:
        return {key: plain(item) for key, item in value.items()}
    if type(value) is slice:
        return slice(plain(value.start), plain(value.stop), plain(value.step))
    return value


def _escape(value: Tracked) -> int | float:
    """A use that needs the number itself: its value is guarded."""
    if value.recorder.active:
        value.recorder.guard(value.node, value.number, escape=True)
    return value.number


def _recorded(function: Callable[..., Any], reflected: bool, compares: bool) -> Callable[..., Any]:
    def method(self: Tracked, *others: Any) -> Any:
        if any(type(other) not in (int, float, bool, Tracked) for other in others):
            return NotImplemented
        operands = (*others, self) if reflected else (self, *others)
        result = function(*plain(operands))
        if not self.recorder.active:
            return result
        node = self.recorder.record_scalar(function, operands)
        if compares:
            self.recorder.guard(node, result)
            return result
        return track(result, node, self.recorder)

    return method


def _escaping(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *args: function(_escape(self), *args)


for _name in (*_ARITHMETIC, *_UNARY, *_COMPARISONS):
    _function = getattr(operator, _name)
    setattr(Tracked, f"__{_name}__", _recorded(_function, reflected=False, compares=_name in _COMPARISONS))
    if _name in _ARITHMETIC:
        setattr(Tracked, f"__r{_name}__", _recorded(_function, reflected=True, compares=False))
for _name, _escape_as in _ESCAPES.items():
    setattr(Tracked, f"__{_name}__", _escaping(_escape_as))
