"""The Python state a denoiser keeps between calls, as a comparable digest.

A graph cannot replay ``self.calls += 1``. The digest before and after a forward shows such state wherever it hides:
attributes, dictionaries and lists on modules, iterators, closures of replaced forwards, class attributes and globals.
"""

from __future__ import annotations

import os
import random
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

_SIMPLE = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size)
_SKIPPED = frozenset(
    ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
     "_state_dict_hooks", "_load_state_dict_pre_hooks", "_non_persistent_buffers_set")
)  # fmt: skip
_MAX_ITEMS, _MAX_DEPTH = 512, 6
Digest = dict[str, Any]


def digest(root: nn.Module, *extra: Any) -> Digest:
    """Every plain value reachable from the module tree (and from ``extra``), by a path that names it."""
    seen: set[int] = set()
    found: Digest = {}
    classes: set[type] = set()
    for path, module in root.named_modules():
        classes.add(type(module))
        for name, value in (*vars(module).items(), *module._buffers.items()):
            if name not in _SKIPPED:
                _digest(value, f"{path}.{name}".lstrip("."), found, seen, 0)
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for hook in list(hooks.values()):
                _digest(hook, f"{path} hook", found, seen, 0)
    for kind in classes:
        _digest_class(kind, found, seen)
    for index, value in enumerate(extra):
        _digest(value, f"<argument {index}>", found, seen, 0)
    found["python random state"] = hash(random.getstate())
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        state = numpy.random.get_state()
        found["numpy random state"] = (state[1].tobytes(), *state[2:])
    return found


def changes(before: Digest, after: Digest) -> list[str]:
    """Paths whose value is not the same in both digests."""
    return [path for path in {**before, **after} if before.get(path, "absent") != after.get(path, "absent")]


def _digest(value: Any, path: str, found: Digest, seen: set[int], depth: int) -> None:
    if isinstance(value, _SIMPLE):
        found[path] = (type(value).__name__, value if value == value else "nan")
    elif isinstance(value, torch.Tensor):
        found[path] = ("tensor", id(value))  # writes in place are nodes of the graph; a new tensor is hidden state
    elif id(value) in seen or depth > _MAX_DEPTH or isinstance(value, nn.Module | type | types.ModuleType):
        return
    else:
        seen.add(id(value))
        for name, item in _members(value):
            _digest(item, f"{path}{name}", found, seen, depth + 1)


def _members(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield ".len()", len(value)
        for key in list(value)[:_MAX_ITEMS]:
            yield f"[{key!r}]" if isinstance(key, _SIMPLE) else f"[{id(key)}]", value[key]
    elif isinstance(value, list | tuple | set | frozenset) or type(value).__name__ == "deque":
        yield ".len()", len(value)
        for index, item in enumerate(list(value)[:_MAX_ITEMS]):
            yield f"[{index}]", item
    elif isinstance(value, types.FunctionType):
        place = f"{os.path.basename(value.__code__.co_filename)}:{value.__code__.co_firstlineno}"
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                yield f" closure {name} of {place}", cell.cell_contents
            except ValueError:  # an empty cell
                continue
        for index, item in enumerate(value.__defaults__ or ()):
            yield f" default {index}", item
    elif isinstance(value, types.MethodType):
        yield "", value.__func__
        if not isinstance(value.__self__, nn.Module):
            yield ".__self__", value.__self__
    elif hasattr(value, "__length_hint__") or type(value).__module__ == "itertools":
        yield " position", repr(value.__reduce__())
    elif hasattr(value, "__dict__"):
        for name, item in list(vars(value).items()):
            yield f".{name}", item


def _digest_class(kind: type, found: Digest, seen: set[int]) -> None:
    """Plain attributes of the class, closures of its methods, and simple globals of the file that defines it."""
    for base in kind.__mro__:
        if base.__module__.startswith(("torch.", "builtins")) or id(base) in seen:
            continue
        seen.add(id(base))
        for name, value in list(vars(base).items()):
            if isinstance(value, types.FunctionType | list | dict | set | int | float | str | bool):
                _digest(value, f"class {base.__name__}.{name}", found, seen, 3)
        source = sys.modules.get(base.__module__)
        if source is None or id(source) in seen:
            continue
        seen.add(id(source))
        for name, value in list(vars(source).items()):
            if isinstance(value, int | float | list | dict) and not name.startswith("__"):
                _digest(value, f"global {base.__module__}.{name}", found, seen, 4)
