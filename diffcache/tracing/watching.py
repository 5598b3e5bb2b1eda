"""Patches of ``nn.Module`` that note, while a forward is recorded, what it reads from and writes to modules."""

from __future__ import annotations

import threading
from typing import Any

from torch import nn

from diffcache.tracing.errors import user_line
from diffcache.tracing.guards import ModuleReads, Write

_TABLES = ("_parameters", "_buffers", "_modules")
_UNGUARDED = frozenset(
    ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_non_persistent_buffers_set",
     "_state_dict_hooks", "_load_state_dict_pre_hooks", "_forward_hooks_always_called", "_forward_hooks_with_kwargs",
     "_forward_pre_hooks_with_kwargs", "__dict__", "__class__")
)  # fmt: skip
_MISSING = object()


Patch = tuple[Any, str, Any]


class Patches:
    """Attributes of classes and modules of torch that are something else while a forward is recorded."""

    def __init__(self, patches: list[Patch]):
        self._patches = patches
        self._before: list[Any] = []

    def __enter__(self) -> None:
        self._before = [vars(owner).get(name, _MISSING) for owner, name, _ in self._patches]
        for owner, name, value in self._patches:
            setattr(owner, name, value)

    def __exit__(self, *error: object) -> None:
        for (owner, name, _), value in zip(self._patches, self._before, strict=True):
            if value is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


def watch_modules(reads: ModuleReads) -> list[Patch]:
    """Patches that note every attribute that this thread reads from or writes to a module."""
    thread = threading.get_ident()
    get, set_ = nn.Module.__getattribute__, nn.Module.__setattr__
    getattr_, init = nn.Module.__getattr__, nn.Module.__init__

    def mine(self: nn.Module) -> bool:
        return threading.get_ident() == thread and id(self) not in reads.born

    def create(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        if threading.get_ident() == thread:
            reads.born[id(self)] = self
        init(self, *args, **kwargs)

    def read(self: nn.Module, name: str) -> Any:
        value = get(self, name)
        if name not in _UNGUARDED and (not reads.in_leaf or name == "training") and mine(self):
            attributes = get(self, "__dict__")
            if name in _TABLES:
                reads.note_table(self, value)
            elif name not in attributes:
                reads.read_first.add((id(self), name))
                reads.note_absent(self, attributes, name)
            elif (id(self), name) not in reads.writes:
                reads.read_first.add((id(self), name))
                reads.note(attributes, name, value)
                reads.note_held(value, name)
        return value

    def reach(self: nn.Module, name: str) -> Any:
        try:
            value = getattr_(self, name)
        except AttributeError:
            if not reads.in_leaf and mine(self):
                reads.note_missing(self, name)
            raise
        if not reads.in_leaf and mine(self):
            attributes = get(self, "__dict__")
            for table in _TABLES:
                if name in attributes.get(table, ()) and (id(self), name) not in reads.writes:
                    reads.read_first.add((id(self), name))
                    reads.note(attributes[table], name, value)
        return value

    def write(self: nn.Module, name: str, value: Any) -> None:
        attributes = get(self, "__dict__")
        if mine(self) and "_parameters" in attributes and name not in _TABLES:
            before = attributes.get(name, attributes["_buffers"].get(name, _MISSING))
            old = reads.writes.get((id(self), name))
            reads.writes[id(self), name] = Write(self, name, old.before if old else before, value, user_line())
        set_(self, name, value)

    methods = {"__init__": create, "__getattribute__": read, "__getattr__": reach, "__setattr__": write}
    return [(nn.Module, name, method) for name, method in methods.items()]
