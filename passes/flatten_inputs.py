"""Exact. Make every tensor and number among the inputs a placeholder of its own.

Before::

    added: placeholder
    %0 = added['text_embeds']
    %1 = linear(%0)

After::

    added_text_embeds: placeholder
    %0 = linear(added_text_embeds)

Needs nothing from earlier passes. ``meta["inputs"]`` lists the paths of the placeholders in order.
"""

from __future__ import annotations

from torch import fx

from diffcache.tracing.tree import Path


def flatten_inputs(gm: fx.GraphModule) -> fx.GraphModule:
    """Replace accesses into arguments by flat placeholders, in the order of ``gm.meta["inputs"]``."""
    graph = gm.graph
    originals = [node for node in graph.nodes if node.op == "placeholder"]
    for node in [node for node in graph.nodes if "input" in node.meta]:
        with graph.inserting_before(originals[0]):
            leaf = graph.placeholder(_identifier(node.meta["input"]))
        leaf.meta = dict(node.meta) | {"captured_as": node.name}  # sites go by the names of the capture
        node.replace_all_uses_with(leaf)
        node.meta.pop("input")
    for node in reversed(list(graph.nodes)):
        access = node.op == "call_function" and node.meta.get("call") == -1 and not node.meta.get("persistent")
        if not node.users and (access or (node in originals)):
            graph.erase_node(node)
    for node in originals:
        if node.users:  # an argument object that the forward writes to is passed on whole
            node.meta["input"] = (("item", str(node.target)),)
    gm.meta["inputs"] = tuple(node.meta["input"] for node in graph.nodes if node.op == "placeholder")
    return gm


def _identifier(path: Path) -> str:
    name = "".join(c if c.isalnum() else "_" for c in "_".join(str(key) for _, key in path)).strip("_")
    return name if name[:1].isalpha() else f"input_{name}"
