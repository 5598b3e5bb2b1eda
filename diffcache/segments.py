"""Where a graph is cut so that a gate can look at a probe: every node belongs to one segment and runs once.

Segment ``i`` computes the probe of cut ``i`` and what it needs; the last segment computes the rest. What a segment
makes and a later one reads is carried. Nodes with effects (writes, random draws) keep their order.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import fx

from diffcache.liveness import sources
from diffcache.sites import Site

Cuts = Sequence[Sequence[Site]]  # the probes of each cut, in the order in which they are computed


def named_nodes(graph: fx.Graph) -> dict[str, fx.Node]:
    """Nodes by the names they had in the capture, which is what sites go by."""
    return {node.meta.get("captured_as", node.name): node for node in graph.nodes}


def in_order(graph: fx.Graph, probes: Collection[Site]) -> list[list[Site]]:
    """Probes as cuts: one for each place in the graph, in the order in which they can be computed."""
    order = {name: index for index, name in enumerate(named_nodes(graph))}
    ends: dict[int, list[Site]] = {}
    for probe in probes:
        missing = [name for name in probe.values if name not in order]
        if missing:
            raise ValueError(f"probe '{probe.name}' names nodes {missing} that this graph lacks")
        ends.setdefault(max(order[name] for name in probe.values), []).append(probe)
    return [ends[end] for end in sorted(ends)]


def segment_numbers(graph: fx.Graph, cuts: Cuts) -> dict[fx.Node, int]:
    """The segment that each node runs in; placeholders and attributes are there in all and count as the first."""
    nodes = list(graph.nodes)
    named, order = named_nodes(graph), {node: index for index, node in enumerate(nodes)}
    number = {node: len(cuts) for node in nodes}
    for index in reversed(range(len(cuts))):
        wanted = {named[name] for probe in cuts[index] for name in (*probe.values, *filter(None, probe.anchors))}
        _pull(wanted, index, number)
    changed = True
    while changed:  # what must stay in front of a node with effects comes along into its segment
        changed = False
        for node in nodes:
            if number[node] == len(cuts) or not (node.meta.get("writes") or node.meta.get("random")):
                continue
            touched = _storages(node)
            before = [n for n in nodes[: order[node]] if number[n] > number[node] and _must_precede(n, node, touched)]
            _pull(before, number[node], number)
            changed = changed or bool(before)
    for node in nodes:
        if node.op in ("placeholder", "get_attr"):
            number[node] = 0
    return number


def _pull(wanted: Collection[fx.Node], index: int, number: dict[fx.Node, int]) -> None:
    """Move nodes and all they need into segment ``index``, where they are not in an earlier one."""
    todo = [node for node in wanted if number[node] > index]
    while todo:
        node = todo.pop()
        number[node] = index
        todo += [source for source in sources(node) if number[source] > index]


def _must_precede(earlier: fx.Node, node: fx.Node, touched: set[object]) -> bool:
    """Whether running ``earlier`` after a ``node`` with effects would change what either of them does."""
    if node.meta.get("random") and earlier.meta.get("random"):
        return True
    if earlier.op in ("placeholder", "get_attr", "output"):
        return False
    return bool(node.meta.get("writes")) and bool(touched & _storages(earlier))


def _storages(node: fx.Node) -> set[object]:
    return {n.meta.get("storage") for n in (node, *node.all_input_nodes)} - {None}
