"""The Python state a denoiser keeps between calls: as a comparable digest, and as a copy that can be put back.

A graph cannot replay ``self.calls += 1``. The digest before and after a forward shows such state wherever it hides:
attributes, dictionaries and lists on modules, iterators, arrays, closures of replaced forwards, class attributes and
globals.
"""

from __future__ import annotations

import copy
import functools
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn

from diffcache.tracing import reachable
from diffcache.tracing.executed import ClassTables, Codes, globals_read, is_foreign_class

_SKIPPED = frozenset(
    ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks",
     "_backward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks", "_non_persistent_buffers_set")
)  # fmt: skip
_IN_PLACE = (dict, list, set, deque)
Digest = dict[str, Any]
Root = tuple[str, Any]


def digest(root: nn.Module, codes: Codes) -> Digest:
    """Every plain value reachable from the module tree and from the functions in ``codes``, by a path that names it."""
    found: Digest = {}
    seen: set[int] = set()

    def note(path: str, value: Any) -> None:
        if reachable.is_simple(cast(Any, type(value))):
            found[path] = (type(value).__name__, value if value == value else "nan")
        elif isinstance(value, torch.Tensor):
            found[path] = ("tensor", id(value))  # writes in place are nodes of the graph; a new tensor is hidden state
        elif not reachable.is_leaf(value):
            state = reachable.position(value)
            found[path] = ("length", len(value)) if isinstance(value, _IN_PLACE) else ("position", state)

    for path, value in (*_module_roots(root), *_code_roots(codes)):
        reachable.visit(value, path, seen, note)
    found["python random state"] = hash(random.getstate())
    if (numpy := sys.modules.get("numpy")) is not None:
        state = numpy.random.get_state()
        found["numpy random state"] = (state[1].tobytes(), *state[2:])
    return found


def changes(before: Digest, after: Digest) -> list[str]:
    """Paths whose value is not the same in both digests."""
    return [path for path in {**before, **after} if before.get(path, "absent") != after.get(path, "absent")]


def _module_roots(root: nn.Module) -> Iterator[Root]:
    classes: dict[type, None] = {}
    for path, module in root.named_modules():
        classes.update(dict.fromkeys(type(module).__mro__))
        for name, value in (*vars(module).items(), *module._buffers.items()):
            if name not in _SKIPPED:
                yield f"{path}.{name}".lstrip("."), value
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for hook in list(hooks.values()):
                yield f"{path} hook", hook
    for kind in classes:
        if not is_foreign_class(kind):
            for name, value in list(vars(kind).items()):
                if not name.startswith("__") and not isinstance(value, property | classmethod | staticmethod):
                    yield f"class {kind.__name__}.{name}", value


def _code_roots(codes: Codes) -> Iterator[Root]:
    for table, name, value in globals_read(codes, ClassTables()):
        if not isinstance(value, types.ModuleType | type):
            yield f"global {table.get('__name__') or table.get('__qualname__')}.{name}", value


class Kept:
    """A shallow copy of everything mutable that the module tree reaches, to undo what a refused capture's runs did."""

    def __init__(self, root: nn.Module):
        self._undo: list[Callable[[], None]] = []
        self._random = random.getstate()
        numpy = sys.modules.get("numpy")
        self._numpy = None if numpy is None else (numpy.random, numpy.random.get_state())
        for module in root.modules():
            for table in (vars(module), module._buffers, module._parameters, module._modules):
                self._keep(table)
        seen: set[int] = set()
        for _, value in _module_roots(root):
            reachable.visit(value, "", seen, lambda _, item: self._keep(item))
        for kind in {kind for module in root.modules() for kind in type(module).__mro__ if not is_foreign_class(kind)}:
            for name, value in list(vars(kind).items()):
                if isinstance(value, reachable.SIMPLE) and not name.startswith("__"):
                    self._undo.append(functools.partial(_reset, kind, name, value))

    def _keep(self, value: Any) -> None:
        if isinstance(value, _IN_PLACE):
            saved = value.__class__(value) if type(value) in (set, deque) else _copied(value)
            self._undo.append(lambda: _refill(value, saved))
        elif isinstance(value, types.FunctionType):
            for cell in value.__closure__ or ():
                self._keep_cell(cell)
        elif reachable.is_numpy(value, "ndarray"):
            array = value.copy()
            self._undo.append(lambda: value.__setitem__(Ellipsis, array))
        elif isinstance(value, torch.Generator):
            state = value.get_state()
            self._undo.append(functools.partial(_set_state, value, state))
        elif isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
            drawn = value.getstate()
            self._undo.append(lambda: value.setstate(drawn))
        elif reachable.is_numpy(value, "random.Generator"):
            bits = value.bit_generator.state
            self._undo.append(lambda: setattr(value.bit_generator, "state", bits))
        elif not reachable.is_leaf(value) and isinstance(getattr(value, "__dict__", None), dict):
            self._keep(vars(value))

    def _keep_cell(self, cell: types.CellType) -> None:
        try:
            held = cell.cell_contents
        except ValueError:
            return
        if isinstance(held, reachable.SIMPLE):
            self._undo.append(lambda: setattr(cell, "cell_contents", held))

    def restore(self) -> None:
        for undo in self._undo:
            undo()
        random.setstate(self._random)
        if self._numpy is not None:
            self._numpy[0].set_state(self._numpy[1])


def _reset(kind: type, name: str, value: Any) -> None:
    if kind.__dict__.get(name, _reset) is not value:
        setattr(kind, name, value)


def _copied(value: Any) -> Any:
    """A shallow copy; iterators are copied too, because running them is how they change."""
    if isinstance(value, dict):
        return {key: _iterator_copy(item) for key, item in value.items()}
    return [_iterator_copy(item) for item in value]


def _iterator_copy(value: Any) -> Any:
    if hasattr(value, "__next__") and not hasattr(value, "send"):
        try:
            return copy.deepcopy(value)  # a shallow copy of some goes on from the same inner iterator
        except Exception:  # it may hold anything
            return value
    return value


def _refill(value: Any, saved: Any) -> None:
    if isinstance(value, dict):
        if len(value) == len(saved) and all(value.get(key, saved) is item for key, item in saved.items()):
            return
    if isinstance(value, dict | set):
        value.clear()
        value.update(saved)
    else:
        value.clear()
        value.extend(saved)


def _set_state(generator: torch.Generator, state: torch.Tensor) -> None:
    generator.set_state(state)
