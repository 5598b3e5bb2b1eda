"""How reading and writing by index acts on axes: the part of ``diffcache.token_ops`` that goes by position."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from diffcache.token_ops import (
    RULES,
    Action,
    Axes,
    Taken,
    argument,
    module_action,
    rule,
    shape_of,
    split_axis,
    target_of,
)

# Where functions are what their names say; one of the same name from elsewhere may do anything.
_SPACES = (torch, F, operator)


def act(node: fx.Node, module: fx.GraphModule) -> Action | None:
    """How a node acts on axes; None if that is not known."""
    if node.op == "call_module":
        return module_action(node, module.get_submodule(str(node.target)))
    name = target_of(node)
    own = node.op == "call_method" or any(getattr(space, name, None) is node.target for space in _SPACES)
    found = RULES.get(name) if own and node.op in ("call_function", "call_method") else None
    return found(node) if found is not None else None


@dataclass(frozen=True)
class Indexed:
    """What a basic index does: for each axis of the source the axis of the result, the shape, slices that cut."""

    axes: Axes
    shape: tuple[int, ...]
    cuts: tuple[tuple[int, int, int, int], ...]  # axis of the source, of the result, start, step


def indexed(shape: Sequence[int], index: Any) -> Indexed | None:
    """A basic index on a tensor of this shape; None for one by tensors or unknown numbers."""
    steps = list(index) if isinstance(index, tuple) else [index]
    if not all(isinstance(step, int | slice) or step is None or step is Ellipsis for step in steps):
        return None
    if any(isinstance(step, bool) for step in steps):
        return None
    named = sum(isinstance(step, int | slice) for step in steps)
    rest = [slice(None)] * (len(shape) - named)
    at = next((i for i, step in enumerate(steps) if step is Ellipsis), len(steps))
    steps = [*steps[:at], *rest, *steps[at + 1 :]]
    axes: list[int | None] = []
    result: list[int] = []
    cuts = []
    for step in steps:
        if step is None:
            result.append(1)
            continue
        size = shape[len(axes)]
        if isinstance(step, int):
            axes.append(None)
            continue
        if any(bound is not None and not isinstance(bound, int) for bound in (step.start, step.stop, step.step)):
            return None
        start, stop, stride = step.indices(size)
        count = len(range(start, stop, stride))
        whole = count == size and stride == 1
        if not whole:
            cuts.append((len(axes), len(result), start, stride))
        axes.append(len(result) if whole else None)
        result.append(count)
    return Indexed(tuple(axes), tuple(result), tuple(cuts))


def recut(shape: Sequence[int], index: Any, axis: int, start: int, stop: int) -> tuple[Any, ...]:
    """The same index with other ends along an axis of the source."""
    steps = list(index) if isinstance(index, tuple) else [index]
    named = sum(isinstance(step, int | slice) for step in steps)
    at = next((i for i, step in enumerate(steps) if step is Ellipsis), len(steps))
    steps = [*steps[:at], *[slice(None)] * (len(shape) - named), *steps[at + 1 :]]
    axes = [i for i, step in enumerate(steps) if step is not None]
    steps[axes[axis]] = slice(start, stop)
    return tuple(steps)


@rule("__getitem__", "getitem")
def _getitem(node: fx.Node) -> Action | None:
    source, index = node.args[0], node.args[1]
    shape = shape_of(source)
    if not isinstance(source, fx.Node) or shape is None:
        return None
    if isinstance(source.meta.get("val"), tuple):
        return _item(node, source, index, shape)
    found = indexed(shape, index)
    if found is None or found.shape != shape_of(node):
        return None
    taken = [Taken(source, axis, to, start) for axis, to, start, step in found.cuts if step == 1]
    return Action(node, ((source, found.axes),), taken=taken[0] if len(found.cuts) == 1 and taken else None)


def _item(node: fx.Node, source: fx.Node, index: Any, shape: Sequence[int]) -> Action | None:
    """One of the tensors that ``chunk`` and its like give, or the first that attention gives."""
    own, rank = shape_of(node), len(shape)
    if source.op == "call_module":
        return Action(node, ((source, tuple(range(rank))),)) if index == 0 and own == tuple(shape) else None
    axis = split_axis(source)
    if own is None or axis is None or not isinstance(index, int):
        return None
    if target_of(source) == "unbind":
        return Action(node, ((source, tuple(None if a == axis else a - (a > axis) for a in range(rank))),))
    parts = source.meta["val"]
    start = sum(part.shape[axis] for part in parts[: index % len(parts)])
    whole = own[axis] == shape[axis]
    axes = tuple(a if whole or a != axis else None for a in range(rank))
    return Action(node, ((source, axes),), taken=None if whole else Taken(source, axis, axis, start))


@rule("narrow")
def _narrow(node: fx.Node) -> Action | None:
    source, axis, start = node.args[0], argument(node, 1, "dim"), argument(node, 2, "start")
    shape, own = shape_of(source), shape_of(node)
    if not isinstance(source, fx.Node) or shape is None or own is None or not isinstance(start, int):
        return None
    axis, whole = axis % len(shape), own[axis] == shape[axis]
    axes = tuple(a if whole or a != axis else None for a in range(len(shape)))
    return Action(node, ((source, axes),), taken=None if whole else Taken(source, axis, axis, start % shape[axis]))


@rule("select")
def _select(node: fx.Node) -> Action | None:
    source, axis = node.args[0], argument(node, 1, "dim")
    shape = shape_of(source)
    if not isinstance(source, fx.Node) or shape is None or not isinstance(axis, int):
        return None
    axis %= len(shape)
    return Action(node, ((source, tuple(None if a == axis else a - (a > axis) for a in range(len(shape)))),))


@rule("__setitem__")
def _setitem(node: fx.Node) -> Action | None:
    """What is written into is the result: its axes that the index covers stay apart."""
    into, index, value = node.args[:3]
    shape = shape_of(into)
    found = indexed(shape, index) if shape is not None else None
    if not isinstance(into, fx.Node) or found is None:
        return None
    back = {to: axis for axis, to in enumerate(found.axes) if to is not None}
    operands: list[tuple[fx.Node, Axes]] = [
        (into, tuple(a if to is not None else None for a, to in enumerate(found.axes)))
    ]
    given = shape_of(value)
    if given is not None and isinstance(value, fx.Node):
        shift = len(found.shape) - len(given)
        if shift < 0:
            return None
        axes = tuple(back.get(a + shift) if size == found.shape[a + shift] else None for a, size in enumerate(given))
        operands.append((value, axes))
    return Action(into, tuple(operands))
