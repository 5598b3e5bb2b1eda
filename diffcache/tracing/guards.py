"""Guards on the Python world: a captured graph is used only while everything the forward read from it still holds.

While a forward is recorded, every attribute read from a module (``training``, ``processor``, an adapter's scale), what
the value holds (dictionaries, lists, plain objects, closures), every parameter, buffer and submodule reached, and every
global, module attribute and class attribute that its functions name is noted. Checking them again is a flat pass over
dictionary look-ups, done in C, so a graph that outlived a LoRA switch, a swapped processor or a new hook is never run.
"""

from __future__ import annotations

import functools
import itertools
import operator
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from diffcache.tracing import reachable
from diffcache.tracing.counting import only_counted
from diffcache.tracing.executed import ClassTables, Codes, globals_read, is_foreign_class

_MISSING = object()
_PROPERTIES = {
    **dict.fromkeys(("is_floating_point", "is_complex", "element_size", "dtype"), "dtype"),
    **dict.fromkeys(("size", "dim", "numel", "nelement", "__len__", "ndim", "shape"), "shape"),
    **dict.fromkeys(("is_cuda", "is_cpu", "get_device", "device"), "device"),
    "requires_grad": "requires_grad",
    "layout": "layout",
}


@dataclass
class Write:
    """A plain attribute assigned on a module while its forward ran."""

    module: nn.Module
    name: str
    before: Any
    after: Any
    where: str


@dataclass
class Held:
    """What a container held: kept by identity, plain values by equality."""

    path: str
    container: Any
    keys: tuple[Any, ...] | None
    values: tuple[Any, ...]

    def changed(self) -> bool:
        now = self.container.values() if self.keys is not None else self.container
        if len(now) != len(self.values):
            return True
        if all(map(operator.is_, now, self.values)) and (self.keys is None or tuple(self.container) == self.keys):
            return False
        if not all(map(same, now, self.values)) or (self.keys is not None and tuple(self.container) != self.keys):
            return True
        self.values = tuple(now)
        return False


@dataclass
class ModuleReads:
    """What one recorded forward read from, and wrote to, the module tree and the Python code around it."""

    slots: dict[tuple[int, str], tuple[Mapping[str, Any], str, Any]] = field(default_factory=dict)
    writes: dict[tuple[int, str], Write] = field(default_factory=dict)
    hooks: dict[int, tuple[Any, tuple[Any, ...]]] = field(default_factory=dict)
    read_first: set[tuple[int, str]] = field(default_factory=set)
    held: list[Held] = field(default_factory=list)
    probes: list[tuple[str, Callable[[], Any], Any]] = field(default_factory=list)
    facts: dict[tuple[int, str], tuple[torch.Tensor, Any]] = field(default_factory=dict)
    codes: Codes = field(default_factory=dict)
    classes: ClassTables = field(default_factory=ClassTables)
    born: dict[int, nn.Module] = field(default_factory=dict)  # made by the forward itself: a slice of a ModuleList
    in_leaf: bool = False  # a module that is one node reads its own attributes again at every run
    _seen: set[int] = field(default_factory=set)
    _kept: list[Any] = field(default_factory=list)  # alive, so that an identity in ``_seen`` names one object
    _tables: dict[int, tuple[nn.Module, dict[str, Any], dict[str, Any]]] = field(default_factory=dict)
    _hookless: list[Any] = field(default_factory=list)
    _flat: list[_Flat] | None = None

    def note(self, table: Mapping[str, Any], name: str, value: Any) -> None:
        self.slots.setdefault((id(table), name), (table, name, value))

    def note_absent(self, module: nn.Module, attributes: dict[str, Any], name: str) -> None:
        """An attribute found on the class: neither the instance nor a class nearer to it may get its own."""
        if name in _INTERNAL:
            return
        self.note(attributes, name, _MISSING)
        for kind in type(module).__mro__:
            if kind is nn.Module and name != "forward":
                return
            if name in kind.__dict__:
                self.note(self.classes[kind], name, kind.__dict__[name])
                if not is_foreign_class(kind):
                    self.note_held(kind.__dict__[name], name)
                return
            self.note(self.classes[kind], name, _MISSING)

    def note_missing(self, module: nn.Module, name: str) -> None:
        """An attribute that was asked for and is not there."""
        attributes = module.__dict__
        self.read_first.add((id(module), name))
        for table in (attributes, *(attributes[t] for t in ("_parameters", "_buffers", "_modules") if t in attributes)):
            self.note(table, name, _MISSING)
        for kind in type(module).__mro__:
            self.note(self.classes[kind], name, _MISSING)

    def note_held(self, value: Any, path: str) -> None:
        """Guard what a value read from a module (a processor, a dictionary of scales) holds in turn."""
        if not reachable.is_leaf(value):
            reachable.visit(value, path, self._seen, self._hold)

    def _hold(self, path: str, value: Any) -> None:
        if reachable.is_leaf(value):
            return
        self._kept.append(value)
        if isinstance(value, Mapping):
            if isinstance(value, dict):
                self.held.append(Held(path, value, tuple(value), tuple(value.values())))
        elif isinstance(value, list | deque):
            self.held.append(Held(path, value, None, tuple(value)))
        elif isinstance(value, set):
            self.probes.append((path, lambda: frozenset(value), frozenset(value)))
        elif isinstance(value, types.FunctionType):
            self._hold_function(path, value)
        elif isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, types.MethodType):
            if not is_foreign_class(type(value)) or isinstance(value, types.SimpleNamespace):
                table = vars(value)  # as a whole: a new entry can hide an attribute of the class
                self.held.append(Held(path, table, tuple(table), tuple(table.values())))
        elif not hasattr(value, "__next__") and not isinstance(value, torch.Generator):
            if (position := reachable.position(value)) is not None:
                self.probes.append((path, lambda: reachable.position(value), position))
        for name in reachable.slots_of(value) if not isinstance(value, tuple | Mapping) else ():
            self.probes.append(
                (f"{path}.{name}", functools.partial(getattr, value, name, _MISSING), getattr(value, name))
            )

    def _hold_function(self, path: str, value: types.FunctionType) -> None:
        self.probes.append((path, lambda: (value.__code__, value.__defaults__), (value.__code__, value.__defaults__)))
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            if only_counted(value.__code__, name):
                continue
            held = _contents(cell)
            self.probes.append((path, functools.partial(_contents, cell), held))

    def note_hooks(self, module: nn.Module) -> None:
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            self._note_hook_table(module.__dict__[name])
        if not self.hooks.get(-1):
            self.hooks[-1] = ({}, ())
            self._note_hook_table(nn.modules.module._global_forward_hooks)
            self._note_hook_table(nn.modules.module._global_forward_pre_hooks)

    def _note_hook_table(self, table: Any) -> None:
        self.hooks[id(table)] = (table, tuple(table))
        for hook in table.values():
            self.note_held(hook, "hook")

    def note_table(self, module: nn.Module, table: dict[str, Any]) -> None:
        """Submodules, parameters or buffers that were iterated over, not asked for by name."""
        self._tables.setdefault(id(table), (module, table, dict(table)))

    def _hold_tables(self) -> None:
        for module, table, values in self._tables.values():
            written = {name for owner, name in self.writes if owner == id(module)} & values.keys()
            if not written:
                self.held.append(Held("submodules", table, tuple(values), tuple(values.values())))
            for name in values.keys() - written if written else ():
                self.note(table, name, values[name])

    def note_fact(self, tensor: torch.Tensor, name: str) -> None:
        """A property of a tensor of the module that Python read: ``weight.dtype`` and the like."""
        if name := _PROPERTIES.get(name, ""):
            with torch._C.DisableTorchFunction():
                self.facts.setdefault((id(tensor), name), (tensor, getattr(tensor, name)))

    def finish(self) -> None:
        """Guard what the executed functions look up outside the model, too; called once, after the recording."""
        self._hold_tables()
        self.slots = {key: slot for key, slot in self.slots.items() if not _passing(*slot)}
        for table, name, value in globals_read(self.codes, self.classes):
            self.note(table, name, value)
            if not isinstance(value, types.FunctionType) or value.__code__ in self.codes:
                self.note_held(value, name)

    def lasting(self) -> list[Write]:
        """Writes that the next call will see: those of attributes that a call reads before it writes them."""
        return [w for key, w in self.writes.items() if key in self.read_first and not same(w.before, w.after)]

    def changed(self) -> str | None:
        """The first thing that is not what it was while recording, or None."""
        if self._flat is None:
            self._flat = list(_flatten(self.slots.values()))
            self._hookless = [table for table, keys in self.hooks.values() if not keys]
            self.hooks = {key: (table, keys) for key, (table, keys) in self.hooks.items() if keys}
        for flat in self._flat:
            if (name := flat.changed()) is not None:
                return name
        if any(self._hookless):
            return "forward hooks"
        for hooks, keys in self.hooks.values():
            if len(hooks) != len(keys) or any(key not in hooks for key in keys):
                return "forward hooks"
        for held in self.held:
            if held.changed():
                return held.path
        for path, read, value in self.probes:
            now = read()
            if now is not value and not _equal(now, value):
                return path
        for (_, name), (tensor, value) in self.facts.items():
            if getattr(tensor, name) != value:
                return name
        return None


class _Flat:
    """Look-ups in tables of one kind, compared in one pass."""

    def __init__(self, get: Callable[..., Any], rows: Sequence[tuple[Any, str, Any]]):
        self.get = get
        self.tables, self.names, self.values = map(list, zip(*rows, strict=True))

    def changed(self) -> str | None:
        now = map(self.get, self.tables, self.names, itertools.repeat(_MISSING))
        if all(map(operator.is_, now, self.values)):
            return None
        for index, (table, name, value) in enumerate(zip(self.tables, self.names, self.values, strict=True)):
            item = table.get(name, _MISSING)
            if item is not value:
                if not same(item, value):
                    return name
                self.values[index] = item
        return None


def _flatten(slots: Any) -> Iterator[_Flat]:
    rows = [(t, n, v) for t, n, v in slots if type(t) is dict]
    classes = [(t, n, v) for t, n, v in slots if type(t) is types.MappingProxyType]
    if rows:
        yield _Flat(dict.get, rows)
    if classes:
        yield _Flat(types.MappingProxyType.get, classes)
    if others := [(t, n, v) for t, n, v in slots if type(t) not in (dict, types.MappingProxyType)]:
        yield _Flat(lambda table, name, default: table.get(name, default), others)


_INTERNAL = frozenset(set(vars(nn.Module)) - {"forward", "training"}) | frozenset(("__class__", "__dict__"))


def _passing(table: Mapping[str, Any], name: str, value: Any) -> bool:
    """A tensor that the forward itself put there and took away again, as offloading hooks do."""
    return isinstance(value, torch.Tensor) and table.get(name, value) is not value


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _MISSING


def _equal(x: Any, y: Any) -> bool:
    if isinstance(x, bytes | frozenset | tuple):
        return bool(type(x) is type(y) and x == y)
    return same(x, y)


def same(x: Any, y: Any) -> bool:
    """Identity, or equality of plain values."""
    if x is y or not isinstance(x, reachable.SIMPLE) or not isinstance(y, reachable.SIMPLE):
        return x is y
    return type(x) is type(y) and bool(x == y)
