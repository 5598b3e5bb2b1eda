"""Copies of graphs that keep what capture knows about them."""

from __future__ import annotations

import copy

from torch import fx


def copy_graph_module(module: fx.GraphModule) -> fx.GraphModule:
    """A GraphModule with its own graph over the same submodules and tensors; ``meta["deps"]`` point into the copy."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(module.graph, mapping)
    end = graph.output(output)
    old_end = next(node for node in reversed(module.graph.nodes) if node.op == "output")
    mapping[old_end] = end
    for old, new in mapping.items():
        new.meta = copy.copy(old.meta)
        new.meta["deps"] = tuple(mapping[dep] for dep in old.meta.get("deps", ()) if dep in mapping)
    result = fx.GraphModule(module, graph, class_name=type(module).__name__)
    for node in graph.nodes:  # GraphModule copies attribute references only for tensors it knows
        if node.op == "get_attr":
            _share(module, result, str(node.target))
    result.meta = dict(module.meta)
    return result


def _share(source: fx.GraphModule, target: fx.GraphModule, name: str) -> None:
    owner_path, _, attribute = name.rpartition(".")
    owner = source.get_submodule(owner_path)
    if attribute in owner.__dict__:
        object.__setattr__(target.get_submodule(owner_path), attribute, owner.__dict__[attribute])


def find_output(graph: fx.Graph) -> fx.Node:
    return next(node for node in reversed(graph.nodes) if node.op == "output")


def returned_storages(graph: fx.Graph) -> set[object]:
    """The memory that the caller gets, seen through the nodes that assemble objects."""
    found: list[fx.Node] = []
    for node in find_output(graph).all_input_nodes:
        found += node.all_input_nodes if node.meta.get("assembles") else [node]
    return {node.meta.get("storage") for node in found}


def count_ops(graph: fx.Graph) -> int:
    """Nodes that do something: no placeholders, attribute reads, output."""
    return sum(node.op.startswith("call_") for node in graph.nodes)
