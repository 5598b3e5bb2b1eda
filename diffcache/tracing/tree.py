"""Nested Python values (arguments, outputs, module state) as leaves with paths.

A path is a tuple of steps; a step is ``("item", key)`` for ``value[key]`` or ``("attr", name)`` for ``value.name``.
"""

from __future__ import annotations

import dataclasses
import enum
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from diffcache.tracing.reachable import slots_of, slots_of_class

Step = tuple[str, Any]
Path = tuple[Step, ...]

_ATOMS = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size, torch.layout,
          torch.memory_format, torch.Generator, type, enum.Enum, os.PathLike)  # fmt: skip


def is_container(value: Any) -> bool:
    """Whether the value is walked into: a list, tuple, mapping, or a plain object with attributes."""
    if isinstance(value, _ATOMS) or isinstance(value, torch.Tensor | torch.nn.Module):
        return False
    if isinstance(value, list | tuple | Mapping):
        return True
    return (
        bool(hasattr(value, "__dict__") or slots_of(value))
        and not callable(value)
        and not isinstance(value, type(torch))
    )


def children(value: Any) -> Iterator[tuple[Step, Any]]:
    """The direct members of a container with the step that leads to each."""
    if isinstance(value, Mapping):
        for key in value:
            yield ("item", key), value[key]
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield ("item", index), item
    else:
        for name in (*getattr(value, "__dict__", ()), *slots_of(value)):
            yield ("attr", name), getattr(value, name)


def walk(
    value: Any, path: Path = (), _open: frozenset[int] = frozenset(), *, is_leaf: Callable[[Any], bool] | None = None
) -> Iterator[tuple[Path, Any]]:
    """All leaves below ``value``; a container that contains itself is visited once."""
    if not is_container(value) or (is_leaf is not None and is_leaf(value)):
        yield path, value
    elif id(value) not in _open:
        inside = _open | {id(value)}
        for step, item in children(value):
            yield from walk(item, (*path, step), inside, is_leaf=is_leaf)


def follow(value: Any, path: Path) -> Any:
    for kind, key in path:
        value = value[key] if kind == "item" else getattr(value, key)
    return value


def assign(value: Any, path: Path, item: Any) -> None:
    """Set the leaf at ``path`` (the last step's container must be mutable)."""
    owner = follow(value, path[:-1])
    kind, key = path[-1]
    if kind == "item" and isinstance(owner, list) and key == len(owner):
        owner.append(item)
    elif kind == "item":
        owner[key] = item
    else:
        setattr(owner, key, item)


def rebuild(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """A copy of ``value`` with every leaf mapped; plain objects are copied shallowly, never constructed."""
    if not is_container(value):
        return leaf(value)
    if isinstance(value, dict) and not dataclasses.is_dataclass(value):
        copy = value.copy() if type(value) is not dict else {}
        for key, item in value.items():
            copy[key] = rebuild(item, leaf)
        return copy
    if isinstance(value, tuple):
        items = [rebuild(item, leaf) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, list):
        return [rebuild(item, leaf) for item in value]
    return rebuild_object(
        type(value),
        {k[1]: rebuild(v, leaf) for k, v in children(value) if k[0] == "attr"}
        if not isinstance(value, Mapping)
        else {k: rebuild(v, leaf) for k, v in vars(value).items()},
        _items(value, leaf),
    )


def _items(value: Any, leaf: Callable[[Any], Any]) -> dict[Any, Any]:
    return {key: rebuild(item, leaf) for key, item in value.items()} if isinstance(value, Mapping) else {}


def rebuild_object(kind: type, attributes: dict[str, Any], items: dict[Any, Any] | None = None) -> Any:
    """An instance of ``kind`` with these attributes (and items, for mappings), without running its constructor."""
    make: Any = kind.__new__
    copy = make(kind)
    if items:
        put: Any = (
            OrderedDict.__setitem__ if isinstance(copy, OrderedDict) else dict.__setitem__
        )  # it has an order to keep
        for key, item in items.items():
            put(copy, key, item)
    for name in slots_of_class(kind) if not hasattr(copy, "__dict__") else ():
        if name in attributes:
            object.__setattr__(copy, name, attributes[name])
    getattr(copy, "__dict__", {}).update(attributes)
    return copy


def show(path: Path) -> str:
    return "".join(f"[{key!r}]" if kind == "item" else f".{key}" for kind, key in path)


def with_children(value: Any, items: Mapping[Step, Any]) -> Any:
    """A copy of one container with these members (its own kind, not constructed)."""
    if isinstance(value, tuple):
        members = [items["item", k] for k in range(len(value))]
        return type(value)(*members) if hasattr(value, "_fields") else type(value)(members)
    if isinstance(value, list):
        return [items["item", k] for k in range(len(value))]
    if type(value) is dict:
        return {key: items["item", key] for key in value}
    attributes = {key: item for (kind, key), item in items.items() if kind == "attr"}
    keys = {key: item for (kind, key), item in items.items() if kind == "item"}
    if isinstance(value, Mapping) and hasattr(value, "__dict__"):
        attributes = {**vars(value), **{k: v for k, v in keys.items() if k in vars(value)}}
    return rebuild_object(type(value), attributes, keys)


def with_leaves(value: Any, leaves: Mapping[Path, Any], path: Path = ()) -> Any:
    """A copy of ``value`` with other leaves at these paths; all else is shared with it."""
    if path in leaves:
        return leaves[path]
    if not is_container(value) or not any(found[: len(path)] == path for found in leaves):
        return value
    return with_children(value, {step: with_leaves(item, leaves, (*path, step)) for step, item in children(value)})


def differences(before: Any, after: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Where ``after`` is not ``before``: the outermost changed places, each with its new value."""
    if not is_container(after) or not is_container(before) or type(before) is not type(after):
        if after is not before:
            yield path, after
        return
    old = dict(children(before))
    for step, item in children(after):
        if step not in old:
            yield (*path, step), item
        else:
            yield from differences(old[step], item, (*path, step))
