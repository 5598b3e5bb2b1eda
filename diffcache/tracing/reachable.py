"""What Python objects hold: one walk for the digest of hidden state, for guards on it, and for putting it back.

Tensors, modules, classes and plain values are leaves; all else that can keep a value between two calls is entered.
"""

from __future__ import annotations

import contextvars
import functools
import os
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn

from diffcache.tracing.counting import only_counted
from diffcache.tracing.executed import is_foreign_class

SIMPLE = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size)
MAX_ITEMS, MAX_DEPTH = 4096, 6


@functools.lru_cache(maxsize=4096)
def _leaf_type(kind: type) -> bool:
    return issubclass(kind, SIMPLE) or issubclass(kind, torch.Tensor | nn.Module | type | types.ModuleType)


def is_leaf(value: Any) -> bool:
    return _leaf_type(cast(Any, type(value))) or isinstance(value, torch.Tensor)


@functools.lru_cache(maxsize=4096)
def is_simple(kind: type) -> bool:
    """Whether values of this type are plain: equal ones are interchangeable."""
    return issubclass(kind, SIMPLE)


def is_numpy(value: Any, name: str) -> bool:
    """Whether ``value`` is of this NumPy class (without importing NumPy for a program that does not)."""
    if not type(value).__module__.startswith("numpy"):
        return False
    return isinstance(value, cast(type, functools.reduce(getattr, name.split("."), sys.modules["numpy"])))


def position(value: Any) -> Any:
    """State of an object that C code keeps for itself: iterators, random generators, arrays; None if it is none."""
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return value.getstate()
    if isinstance(value, torch.Generator):
        return None  # its draws are nodes of the graph
    if isinstance(value, types.GeneratorType):
        frame = value.gi_frame
        return (
            None
            if frame is None
            else (frame.f_lasti, repr([v for v in frame.f_locals.values() if isinstance(v, SIMPLE)]))
        )
    if is_numpy(value, "random.Generator"):
        return repr(value.bit_generator.state)
    if is_numpy(value, "random.RandomState"):
        return repr(value.get_state())
    if is_numpy(value, "ndarray"):
        return value.tobytes() if value.dtype != object and value.nbytes <= 1 << 20 else (value.shape, value.dtype)
    if isinstance(value, bytearray):
        return bytes(value)
    if isinstance(value, contextvars.ContextVar):
        return value.get(None)
    if hasattr(value, "__length_hint__") or type(value).__module__ == "itertools":
        return repr(value.__reduce__()) if hasattr(value, "__reduce__") else None
    return None


def slots_of(value: Any) -> list[str]:
    """Names in ``__slots__`` of the classes of an object that hold something."""
    return [name for name in slots_of_class(cast(Any, type(value))) if hasattr(value, name)]


@functools.lru_cache(maxsize=1024)
def slots_of_class(kind: type) -> tuple[str, ...]:
    names = [name for base in kind.__mro__ for name in _as_tuple(base.__dict__.get("__slots__", ()))]
    return tuple(name for name in names if not name.startswith("__"))


def _as_tuple(names: Any) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def members(value: Any) -> Iterator[tuple[str, Any]]:
    """The direct members of a value that is no leaf, each with a label that extends the path."""
    if isinstance(value, Mapping):
        for key in list(value)[:MAX_ITEMS]:
            yield f"[{key!r}]" if isinstance(key, SIMPLE) else f"[{id(key)}]", value.get(key)
    elif isinstance(value, list | tuple | set | frozenset | deque):
        for index, item in enumerate(list(value)[:MAX_ITEMS]):
            yield f"[{index}]", item
    elif isinstance(value, types.FunctionType):
        yield from _function_members(value)
    elif isinstance(value, types.MethodType):
        yield "", value.__func__
        yield ".__self__", value.__self__
    elif isinstance(value, functools.partial):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    elif not is_foreign_class(type(value)) or isinstance(value, types.SimpleNamespace):
        if hasattr(value, "__dict__"):
            for name, item in list(vars(value).items()):
                yield f".{name}", item
        for name in slots_of(value):
            yield f".{name}", getattr(value, name)


def _function_members(value: types.FunctionType) -> Iterator[tuple[str, Any]]:
    place = f"{os.path.basename(value.__code__.co_filename)}:{value.__code__.co_firstlineno}"
    for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
        if only_counted(value.__code__, name):
            continue
        try:
            yield f" closure {name} of {place}", cell.cell_contents
        except ValueError:  # an empty cell
            continue
    defaults = value.__defaults__ or ()
    arguments = value.__code__.co_varnames[: value.__code__.co_argcount]
    for name, item in zip(arguments[len(arguments) - len(defaults) :], defaults, strict=False):
        yield f" default {name}", item
    for name, item in (value.__kwdefaults__ or {}).items():
        yield f" default {name}", item
    for name, item in vars(value).items():
        yield f".{name}", item


def visit(value: Any, path: str, seen: set[int], act: Callable[[str, Any], None], depth: int = 0) -> None:
    """Call ``act(path, value)`` for ``value`` and all it holds, containers once each."""
    if is_leaf(value):
        act(path, value)
    elif depth <= MAX_DEPTH and id(value) not in seen:
        seen.add(id(value))
        act(path, value)
        for label, item in members(value):
            visit(item, path + label, seen, act, depth + 1)
