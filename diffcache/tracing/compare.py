"""Whether two recordings of the same forward are the same program."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from diffcache.tracing import reachable
from diffcache.tracing.bits import same_bits
from diffcache.tracing.expect import expect
from diffcache.tracing.trace import Trace


def first_difference(a: Trace, b: Trace) -> tuple[str, str] | None:
    """None if the traces are the same program, else (kind, description); kind is "guard", "constant" or "structure".

    ``a`` was recorded before ``b``: a constant of ``b`` that ``a`` computed from its inputs is hidden state.
    """
    index: dict[fx.Node, fx.Node] = {}
    for left, right in zip(a.graph.nodes, b.graph.nodes, strict=False):
        if left.op != right.op or not _same_target(left, right, a, b):
            return (
                "structure",
                f"{left.format_node()} against {right.format_node()} in {left.meta.get('path') or 'forward'}",
            )
        if left.op == "get_attr" and not _same_attribute(left, right, a, b):
            where = b.unseen.get(str(right.target)) or right.meta.get("where") or left.meta.get("path")
            return "constant", f"{left.target} used at {where}"
        if not _same(left.args, right.args, index) or not _same(left.kwargs, right.kwargs, index):
            kind = "guard" if left.target is expect else "constant"
            where = left.meta.get("where") or left.meta.get("path")
            return kind, f"{left.format_node()} against {right.format_node()}, {where}"
        index[left] = right
    if len(a.graph.nodes) != len(b.graph.nodes):
        return "structure", f"{len(a.graph.nodes)} nodes against {len(b.graph.nodes)}"
    return None


def carried_over(a: Trace, b: Trace) -> str | None:
    """A constant of ``b`` that ``a`` had computed from its inputs: state that would be frozen. Its place, or None."""
    derived = _derived(a)
    for name, value in b.attributes.items():
        entry = a.produced.get(id(value))
        if entry is not None and entry[0]() is value and entry[1].meta["fresh"] and entry[1] in derived:
            return b.unseen.get(name, name)
    return None


def _derived(trace: Trace) -> set[fx.Node]:
    """Nodes that depend on an input's value; a number whose value is guarded is as good as a constant."""
    pinned = {node.args[0] for node in trace.graph.nodes if node.target is expect}
    derived: set[fx.Node] = set()
    for node in trace.graph.nodes:
        sources = (*node.all_input_nodes, *node.meta.get("deps", ()))
        if node not in pinned and (
            node.op == "placeholder" or node.meta.get("random") or any(s in derived for s in sources)
        ):
            derived.add(node)
    return derived


def _same_target(left: fx.Node, right: fx.Node, a: Trace, b: Trace) -> bool:
    if left.op == "get_attr" and str(left.target).startswith("_") and str(right.target).startswith("_"):
        return True  # numbered constants: compared by what they hold
    return bool(left.target == right.target)


def _same_attribute(left: fx.Node, right: fx.Node, a: Trace, b: Trace) -> bool:
    x, y = a.attributes.get(str(left.target)), b.attributes.get(str(right.target))
    if x is y:
        return True
    if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
        literal = str(left.target) not in a.unseen and str(right.target) not in b.unseen
        return literal and same_bits(x, y)
    if callable(x) and callable(y):
        return getattr(x, "__code__", x) == getattr(y, "__code__", y)
    if isinstance(x, torch.Generator) or type(x) is not type(y):
        return False
    return reachable.position(x) == reachable.position(y)


def _same(x: Any, y: Any, index: dict[fx.Node, fx.Node]) -> bool:
    if isinstance(x, fx.Node):
        return index.get(x) is y
    if type(x) is not type(y):
        return False
    if isinstance(x, list | tuple):
        return len(x) == len(y) and all(_same(i, j, index) for i, j in zip(x, y, strict=True))
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(_same(x[k], y[k], index) for k in x)
    if isinstance(x, slice):
        return _same((x.start, x.stop, x.step), (y.start, y.stop, y.step), index)
    if hasattr(x, "shape"):
        return x.shape == y.shape and bool((x == y).all())
    try:
        return bool(x == y) or (x != x and y != y)
    except (TypeError, ValueError, RuntimeError):
        return x is y
