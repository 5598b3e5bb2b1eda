"""Guards on the module tree: a captured graph is used only while everything the forward read from it still holds.

While a forward is recorded, every plain attribute read from a module (``training``, ``processor``, an adapter's scale,
a flag) and every parameter, buffer and submodule reached is noted. Checking them again is a flat loop over dictionary
look-ups, so a graph that outlived a LoRA switch, a swapped attention processor or a new hook is never run.
"""

from __future__ import annotations

import contextlib
import threading
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from diffcache.tracing.errors import user_line

_VALUES = (int, float, complex, str, bytes, bool, type(None))
_TABLES = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_UNGUARDED = frozenset((*_TABLES, *_HOOKS, "_backward_hooks", "_backward_pre_hooks", "__dict__", "__class__"))
_MISSING = object()


@dataclass
class Write:
    """A plain attribute assigned on a module while its forward ran."""

    module: nn.Module
    name: str
    before: Any
    after: Any
    where: str


@dataclass
class ModuleReads:
    """What one recorded forward read from, and wrote to, the module tree."""

    slots: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = field(default_factory=dict)
    writes: dict[tuple[int, str], Write] = field(default_factory=dict)
    hooks: dict[int, tuple[Any, tuple[Any, ...]]] = field(default_factory=dict)
    read_first: set[tuple[int, str]] = field(default_factory=set)

    def note(self, table: dict[str, Any], name: str, value: Any) -> None:
        self.slots.setdefault((id(table), name), (table, name, value))

    def note_object(self, value: Any) -> None:
        """Guard the simple attributes of a plain object reached from a module, such as an attention processor."""
        if isinstance(value, type | types.ModuleType | nn.Module | Mapping):  # mappings: frozen configs
            return
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            for name, item in attributes.items():
                if isinstance(item, _VALUES):
                    self.note(attributes, name, item)

    def note_hooks(self, module: nn.Module) -> None:
        for name in _HOOKS:
            table = module.__dict__[name]
            self.hooks[id(table)] = (table, tuple(table))

    def lasting(self) -> list[Write]:
        """Writes that the next call will see: those of attributes that a call reads before it writes them."""
        return [w for key, w in self.writes.items() if key in self.read_first and not _same(w.before, w.after)]

    def changed(self) -> str | None:
        """The first attribute that is not what it was while recording, or None."""
        for table, name, value in self.slots.values():
            if table.get(name, _MISSING) is not value and not _same(table.get(name, _MISSING), value):
                return name
        for hooks, keys in self.hooks.values():
            if len(hooks) != len(keys) or any(key not in hooks for key in keys):
                return "forward hooks"
        return None


def _same(x: Any, y: Any) -> bool:
    """Identity, or equality of plain values."""
    if x is y or not isinstance(x, _VALUES) or not isinstance(y, _VALUES):
        return x is y
    return type(x) is type(y) and x == y


@contextlib.contextmanager
def watch_modules(reads: ModuleReads) -> Iterator[None]:
    """Note every plain attribute that this thread reads from or writes to a module."""
    thread = threading.get_ident()
    get, set_ = nn.Module.__getattribute__, nn.Module.__setattr__
    getattr_ = nn.Module.__getattr__

    def read(self: nn.Module, name: str) -> Any:
        value = get(self, name)
        if name not in _UNGUARDED and threading.get_ident() == thread:
            attributes = get(self, "__dict__")
            if name in attributes and (id(self), name) not in reads.writes:
                reads.read_first.add((id(self), name))
                reads.note(attributes, name, value)
                reads.note_object(value)
        return value

    def reach(self: nn.Module, name: str) -> Any:
        value = getattr_(self, name)
        if threading.get_ident() == thread:
            attributes = get(self, "__dict__")
            for table in _TABLES:
                if name in attributes.get(table, ()) and (id(self), name) not in reads.writes:
                    reads.read_first.add((id(self), name))
                    reads.note(attributes[table], name, value)
        return value

    def write(self: nn.Module, name: str, value: Any) -> None:
        attributes = get(self, "__dict__")
        if threading.get_ident() == thread and "_parameters" in attributes and name not in _TABLES:
            before = attributes.get(name, attributes["_buffers"].get(name, _MISSING))
            old = reads.writes.get((id(self), name))
            reads.writes[id(self), name] = Write(self, name, old.before if old else before, value, user_line())
        set_(self, name, value)

    nn.Module.__getattribute__ = read  # type: ignore[method-assign]
    nn.Module.__getattr__ = reach  # type: ignore[assignment, method-assign]
    nn.Module.__setattr__ = write  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        del nn.Module.__getattribute__
        nn.Module.__getattr__ = getattr_  # type: ignore[method-assign]
        nn.Module.__setattr__ = set_  # type: ignore[method-assign]


def undo(reads: ModuleReads) -> None:
    """Give every attribute that the recorded forward assigned its value from before."""
    for write in reads.writes.values():
        if write.before is _MISSING:
            write.module.__dict__.pop(write.name, None)
        else:
            setattr(write.module, write.name, write.before)

