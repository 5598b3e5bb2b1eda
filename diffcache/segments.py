"""Where a graph is cut so that a gate can look at a probe: every node belongs to one segment and runs once.

Segment ``i`` computes the probe of cut ``i`` and what it needs; the last segment computes the rest. What a segment
makes and a later one reads is carried. Nodes with effects (writes, random draws) keep their order.

A segment may run twice where a check is made on a forecast: first with the forecast and, if that is refused, as it is.
What both runs need and no forecast changes is computed before, in a segment of its own (``before_check``).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import fx

from diffcache.liveness import reached, sources
from diffcache.sites import Site
from diffcache.tracing.spec import TensorSpec

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


def before_check(graph: fx.Graph, check: Site, forecast: Collection[Site]) -> Site | None:
    """What a check needs beside the forecasts that it is made on, as a probe; None where that is nothing.

    ``check`` is the site whose value is computed and compared, ``forecast`` are the sites before it.
    """
    named = named_nodes(graph)
    given = {named[value] for site in forecast for value in site.values}
    anchors = {named[anchor] for site in forecast for anchor in site.anchors if anchor}
    wanted = {named[name] for name in (*check.values, *filter(None, check.anchors))}
    needed = reached((wanted | anchors) - given, given)
    changed = set(given)
    for node in graph.nodes:
        if any(source in changed for source in sources(node)):
            changed.add(node)
    found = [(name, node) for name, node in named.items() if node in needed - changed and node.op.startswith("call_")]
    # a probe is the first of its values
    found.sort(key=lambda pair: not isinstance(pair[1].meta.get("val"), TensorSpec))
    names = tuple(name for name, _ in found)
    return Site(f"before {check.name}", "probe", names, (None,) * len(names), "", 0.0, 0) if names else None


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
