"""Which nodes of a captured graph matter: the one definition that dead-code removal, sites and costs share.

Edges are a node's arguments and ``meta["deps"]``, the writes that must have happened before it reads. Roots are the
output, writes that the caller or the module can see (``meta["persistent"]``), and random draws (``meta["random"]``),
which keep the generator's stream as it was. A guard lives unless it looks at something that is no longer computed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import fx


def sources(node: fx.Node) -> list[fx.Node]:
    """The nodes that must run before this one."""
    return [*node.all_input_nodes, *node.meta.get("deps", ())]


def is_root(node: fx.Node) -> bool:
    return node.op in ("output", "placeholder") or bool(node.meta.get("persistent") or node.meta.get("random"))


def live_nodes(graph: fx.Graph, replaced: Collection[fx.Node] = (), kept: Iterable[fx.Node] = ()) -> set[fx.Node]:
    """Nodes that still run when the values of ``replaced`` are given from outside and those of ``kept`` are wanted.

    A replaced node is itself not live unless something else (a write, say) needs it to run.
    """
    given = set(replaced)
    roots = [node for node in graph.nodes if is_root(node)]
    live = reached([*roots, *(node for node in kept if node not in given)], given)
    guards = [node for node in graph.nodes if node.meta.get("guard")]
    if guards:
        gone = reached(roots, set()) - live if given else set()
        for guard in guards:
            chain = reached([guard], given | live)
            if not chain & gone:
                live |= chain
    return live


def reached(start: Iterable[fx.Node], stop: Collection[fx.Node]) -> set[fx.Node]:
    """``start`` and everything it needs, not going past ``stop``."""
    found: set[fx.Node] = set()
    todo = list(start)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo.extend(source for source in sources(node) if source not in stop and source not in found)
    return found
