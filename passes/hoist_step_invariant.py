"""Exact. Compute once per generation what depends on neither the latent nor the timestep.

Before::

    %0 = linear(encoder_hidden_states)
    %1 = linear(hidden_states)
    %2 = scaled_dot_product_attention(%1, %0, %0)

After::

    hoisted_0: placeholder          # prologue: hoisted_0 = linear(encoder_hidden_states)
    %0 = linear(hidden_states)
    %1 = scaled_dot_product_attention(%0, hoisted_0, hoisted_0)

Needs ``flatten_inputs``. ``meta["prologue"]`` is the graph module that computes the hoisted values from the inputs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import fx

from diffcache.graphs import copy_graph_module, find_output
from diffcache.liveness import sources


def hoist_step_invariant(
    gm: fx.GraphModule, *, invariant: Collection[object] = (), named: Collection[str] = ()
) -> fx.GraphModule:
    """Move all nodes that depend only on the inputs at ``invariant`` paths, parameters and constants to a prologue.

    Equal values come out of it once, except those that sites go by (``named``), which come out whoever reads them.
    """
    fixed = _fixed_nodes(gm.graph, frozenset(invariant))
    work = [node for node in gm.graph.nodes if node in fixed and node.op.startswith("call_")]
    computed = [node for node in work if not node.meta.get("guard")]
    values = [n for n in computed if n.name in named or any(user not in fixed for user in n.users)]
    first = _first_of_equals(work, named)
    distinct = list(dict.fromkeys(first.get(value, value) for value in values))
    gm.meta["hoisted"] = len(work)
    gm.meta["prologue"] = _prologue(gm, {n.name for n in fixed}, [n.name for n in distinct]) if work else None
    if not work:
        return gm
    last = [node for node in gm.graph.nodes if node.op == "placeholder"][-1]
    inputs: dict[fx.Node, fx.Node] = {}
    for index, node in enumerate(distinct):
        with gm.graph.inserting_after(last):
            last = inputs[node] = gm.graph.placeholder(f"hoisted_{index}")
        last.meta = {k: v for k, v in node.meta.items() if k != "deps"}
        last.meta.setdefault("captured_as", node.name)
    for node in values:
        node.replace_all_uses_with(inputs[first.get(node, node)])
    for node in reversed(work):
        if not node.users:
            gm.graph.erase_node(node)
    left = set(gm.graph.nodes)
    for node in left:  # what the prologue does is done before
        node.meta["deps"] = tuple(dep for dep in node.meta.get("deps", ()) if dep in left)
    return gm


def _first_of_equals(work: Sequence[fx.Node], named: Collection[str]) -> dict[fx.Node, fx.Node]:
    """For each node the first that computes the same from the same: every block brings the same rotary table anew."""
    first: dict[fx.Node, fx.Node] = {}
    if any(node.meta.get("writes") or node.meta.get("mutated") for node in work):
        return first  # then the same read may find something else
    known: dict[object, fx.Node] = {}
    for node in work:
        if node.op == "call_module" or node.name in named:
            continue
        same = fx.node.map_arg((node.args, node.kwargs), lambda source: first.get(source, source))
        # by its text, for what is no node compares by value: a 1, a 1.0 and a True are three things
        first[node] = known.setdefault((node.op, node.target, repr(same)), node)
    return first


def _fixed_nodes(graph: fx.Graph, invariant: frozenset[object]) -> set[fx.Node]:
    """Nodes with the same value at every step, in memory that no step writes and no caller gets to see."""
    fixed: set[fx.Node] = set()
    shared = {node.meta["storage"] for node in find_output(graph).all_input_nodes if node.meta.get("storage")}
    for node in graph.nodes:
        if node.op == "placeholder":
            hold = node.meta.get("input") in invariant
        elif (
            node.op == "output" or node.meta.get("random") or node.meta.get("persistent") or node.meta.get("assembles")
        ):
            hold = False
        else:
            hold = all(source in fixed for source in sources(node))
        hold = hold and (node.op == "placeholder" or node.meta.get("storage") not in shared or node.op == "get_attr")
        if hold and not (node.op == "get_attr" and node.meta.get("mutated")):
            fixed.add(node)
    return _closed_under_writes(graph, fixed)


def _closed_under_writes(graph: fx.Graph, fixed: set[fx.Node]) -> set[fx.Node]:
    """Memory that is written belongs to the prologue only if all that touches and writes it does."""
    while True:
        groups: dict[object, list[fx.Node]] = {}
        for node in graph.nodes:
            storages = {node.meta.get("storage")} | {
                s.meta.get("storage") for s in node.all_input_nodes if node.meta.get("writes")
            }
            for storage in storages - {None}:
                groups.setdefault(storage, []).append(node)
        broken = {
            node
            for group in groups.values()
            if any(n.meta.get("writes") or n.meta.get("mutated") for n in group) and not all(n in fixed for n in group)
            for node in group
            if node in fixed
        }
        if not broken:
            return fixed
        fixed -= broken
        for node in graph.nodes:
            if (
                node in fixed
                and node.op not in ("placeholder", "get_attr")
                and any(s not in fixed for s in sources(node))
            ):
                fixed.discard(node)


def _prologue(gm: fx.GraphModule, fixed: set[str], values: list[str]) -> fx.GraphModule:
    """The nodes named ``fixed`` as a program of their own, from the same placeholders to the hoisted values."""
    prologue = copy_graph_module(gm)
    graph = prologue.graph
    named = {node.name: node for node in graph.nodes}
    end = find_output(graph)
    end.args, end.meta["deps"] = (tuple(named[name] for name in values),), ()
    for node in reversed(list(graph.nodes)):
        idle = not node.users and not node.meta.get("guard") and not node.meta.get("writes")
        if node.op not in ("placeholder", "output") and (node.name not in fixed or idle):
            graph.erase_node(node)
    prologue.delete_all_unused_submodules()
    prologue.recompile()
    return prologue
