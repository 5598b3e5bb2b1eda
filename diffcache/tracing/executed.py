"""Which Python functions a forward ran, and what they can read from globals, modules and classes.

A flag in a configuration module, a function imported by name, an attention function swapped for another: nothing of it
is an attribute of the model, but a graph recorded under the old value is stale under the new one.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import sysconfig
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from diffcache.tracing.counting import only_counted

Codes = dict[types.CodeType, dict[str, Any]]
Slot = tuple[Any, str, Any]

_OWN = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_ASIDE = ("<frozen importlib", os.path.join(_TORCH, "_dynamo"), os.path.join(_TORCH, "fx"), os.path.join(_TORCH, "jit"))
_STDLIB = sysconfig.get_paths()["stdlib"]
_SITE = tuple({sysconfig.get_paths()[name] for name in ("purelib", "platlib")})


def is_foreign(file: str) -> bool:
    """Whether a file is torch's, Python's or ours: such code is taken to be as it was."""
    if file.startswith((_OWN, _TORCH)) or (file.startswith("<") and not file.startswith(("<stdin", "<ipython"))):
        return True
    return file.startswith(_STDLIB) and not file.startswith(_SITE) and "site-packages" not in file


@contextlib.contextmanager
def executed_code(found: Codes) -> Iterator[None]:
    """Collect the code objects of the functions that this thread calls, but for what imports and compilers run."""
    before = sys.getprofile()
    verdicts: dict[str, bool] = {}
    aside: list[types.FrameType] = []
    collector = {getattr(callback, "__code__", None) for callback in gc.callbacks}  # runs wherever it pleases

    def note(frame: types.FrameType, event: str, argument: Any) -> None:
        if event == "call" and not aside:
            code = frame.f_code
            if code in collector:
                aside.append(frame)
                return
            file = code.co_filename
            foreign = verdicts.get(file)
            if foreign is None:
                foreign = verdicts[file] = is_foreign(file)
            if not foreign:
                found.setdefault(code, frame.f_globals)
            elif file.startswith(_ASIDE):
                aside.append(frame)
        elif event == "return" and aside and aside[0] is frame:
            aside.clear()

    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(before)


class ClassTables(dict[type, Mapping[str, Any]]):
    """The attribute table of a class, the same object each time (``vars`` of a class is a new one at every call)."""

    def __missing__(self, kind: type) -> Mapping[str, Any]:
        self[kind] = kind.__dict__
        return self[kind]


def globals_read(codes: Codes, classes: ClassTables) -> Iterator[Slot]:
    """What these functions can look up: (table, name, value) for globals, attributes of modules and of classes."""
    seen: set[tuple[int, str]] = set()
    for code, scope in codes.items():
        names = _looked_up(code)
        for inner in code.co_consts:  # functions and comprehensions defined inside
            if isinstance(inner, types.CodeType):
                names |= _looked_up(inner)
        tables: list[Mapping[str, Any]] = [scope, *_own_class_tables(code, scope, classes)]
        tables += [vars(sys.modules[name]) for name in names if name in sys.modules and name not in scope]
        for table in tables:  # grows: modules and classes found among the values are searched, too
            for name in names:
                if name not in table or not _is_worth(table, value := table[name]):
                    continue
                if (id(table), name) not in seen:
                    seen.add((id(table), name))
                    yield table, name, value
                if isinstance(value, types.ModuleType | type):
                    tables += [t for t in _attribute_tables(value, classes) if not any(t is old for old in tables)]


def _looked_up(code: types.CodeType) -> set[str]:
    return {name for name in code.co_names if not only_counted(code, name)}


def _attribute_tables(value: Any, classes: ClassTables) -> list[Mapping[str, Any]]:
    if isinstance(value, types.ModuleType):
        return [vars(value)]
    if isinstance(value, type) and not is_foreign_class(value):
        return [classes[kind] for kind in value.__mro__ if not is_foreign_class(kind)]
    return []


def _own_class_tables(code: types.CodeType, scope: dict[str, Any], classes: ClassTables) -> list[Mapping[str, Any]]:
    """Of a method: the attributes that it can reach as ``cls.name`` or ``self.name``."""
    *outer, _ = code.co_qualname.split(".")
    value: Any = scope.get(outer[0]) if outer else None
    for name in outer[1:]:
        value = getattr(value, name, None)
    return _attribute_tables(value, classes) if isinstance(value, type) else []


def is_foreign_class(kind: type) -> bool:
    source = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return is_foreign(source) if source is not None else kind.__module__ != "__main__"


def _is_worth(table: Mapping[str, Any], value: Any) -> bool:
    """Of foreign modules only what can be called is watched: their own counters are their own affair."""
    file = table.get("__file__") or ""
    if isinstance(table, dict) and file and is_foreign(file):
        return callable(value) or isinstance(value, types.ModuleType)
    return True
