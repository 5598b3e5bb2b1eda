"""Graphs as text: numbered, typed lines that a person can review and a test can pin."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from diffcache.tracing.spec import TensorSpec

_INFIX = {"add": "+", "sub": "-", "mul": "*", "truediv": "/", "div": "/", "matmul": "@", "__add__": "+"}


def format_graph(module: fx.GraphModule, *, title: str = "graph") -> str:
    """One line per node: ``%12: bfloat16[2,64,192] = blocks.0.attn.to_q(%11)  # blocks.0.attn``."""
    numbers: dict[fx.Node, str] = {}
    lines = [f"{title}: {sum(n.op not in ('placeholder', 'output', 'get_attr') for n in module.graph.nodes)} ops"]
    for node in module.graph.nodes:
        if node.op == "placeholder":
            numbers[node] = str(node.target)
            lines.append(f"{node.target}{_type(node)}")
        elif node.op == "get_attr":
            numbers[node] = f"@{node.target}"
        elif node.op == "output":
            lines.append(f"return {_argument(node.args[0], numbers)}")
        else:
            numbers[node] = f"%{len(numbers)}"
            comment = f"  # {node.meta['path']}" if node.meta.get("path") else ""
            lines.append(f"{numbers[node]}{_type(node)} = {_call(node, numbers)}{comment}")
    return "\n".join(lines)


def _type(node: fx.Node) -> str:
    value = node.meta.get("val")
    if isinstance(value, tuple):
        return ": (" + ", ".join(map(str, value)) + ")"
    return f": {value}" if isinstance(value, TensorSpec) else ""


def _call(node: fx.Node, numbers: dict[fx.Node, str]) -> str:
    args = [_argument(a, numbers) for a in node.args]
    keywords = [f"{k}={_argument(v, numbers)}" for k, v in node.kwargs.items()]
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    if node.target in (operator.getitem,) or name == "__getitem__":
        return f"{args[0]}[{args[1]}]"
    if name in _INFIX and len(args) == 2 and not keywords and node.op != "call_module":
        return f"{args[0]} {_INFIX[name]} {args[1]}"
    if node.op == "call_method":
        return f"{args[0]}.{name}({', '.join(args[1:] + keywords)})"
    return f"{name}({', '.join(args + keywords)})"


def _argument(value: Any, numbers: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return numbers.get(value, value.name)
    if isinstance(value, list | tuple):
        inner = ", ".join(_argument(v, numbers) for v in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_argument(v, numbers)}" for k, v in value.items()) + "}"
    if isinstance(value, slice):
        ends = ["" if v is None else _argument(v, numbers) for v in (value.start, value.stop)]
        return ":".join(ends) + (f":{_argument(value.step, numbers)}" if value.step is not None else "")
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return "..." if value is Ellipsis else repr(value)
