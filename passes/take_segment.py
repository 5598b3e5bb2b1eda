"""Exact. One segment of a graph that is cut at the probes of its gates (see ``diffcache.segments``).

Before::

    %0 = embed(x)
    %1 = block0(%0)                     # the probe of the cut
    %2 = block1(%1)
    return %2

After, segment 0::

    %0 = embed(x)
    %1 = block0(%0)
    return (%1, %1)                     # what is carried, then the probes

After, segment 1::

    carried_0: placeholder              # %1
    %2 = block1(carried_0)
    return %2

Needs nothing from earlier passes. ``meta["carried_in"]`` and ``meta["carried_out"]`` name what passes between segments,
``meta["probes"]`` the probes that stand behind what is carried, ``meta["own"]`` the nodes. Nothing is in two segments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from diffcache.graphs import find_output, returned_storages
from diffcache.segments import Cuts, named_nodes, segment_numbers
from diffcache.sites import Site


def take_segment(gm: fx.GraphModule, *, cuts: Cuts = (), number: int = 0, sites: Sequence[Site] = ()) -> fx.GraphModule:
    """Keep what runs in segment ``number``; anchors of ``sites`` are carried to where their values are made."""
    gm.meta.update(carried_in=[], carried_out=[], probes=[])
    if not cuts:
        return gm
    graph, named, end = gm.graph, named_nodes(gm.graph), find_output(gm.graph)
    gm.meta["returned"] = returned_storages(graph)
    place = segment_numbers(graph, cuts)
    read_in = _reading_segments(graph, place, sites, cuts, named)
    arriving = [node for node, segments in read_in.items() if place[node] < number and number in segments]
    leaving = [node for node, segments in read_in.items() if place[node] == number]
    if number < len(cuts):
        probes = [_probe(graph, probe, named) for probe in cuts[number]]
        place |= {probe: number for probe in probes if probe not in place}
        end.args, end.meta["deps"], place[end] = (tuple([*leaving, *probes]),), (), number
        gm.meta["carried_out"] = [node.meta.get("captured_as", node.name) for node in leaving]
        gm.meta["probes"] = [probe.name for probe in cuts[number]]
    gm.meta["own"] = {name for name, node in named.items() if place[node] == number and node.op.startswith("call_")}
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for index, node in enumerate(arriving):
        with graph.inserting_after(last):
            last = graph.placeholder(f"carried_{index}")
        last.meta = {k: v for k, v in node.meta.items() if k not in ("deps", "writes", "persistent", "random", "guard")}
        last.meta.setdefault("captured_as", node.name)
        place[last] = number
        node.replace_all_uses_with(last)
    gm.meta["carried_in"] = [node.meta.get("captured_as", node.name) for node in arriving]
    for node in reversed(list(graph.nodes)):
        if node.op not in ("placeholder", "get_attr", "output") and place[node] != number:
            graph.erase_node(node)
        else:
            deps = node.meta.get("deps", ())
            node.meta["deps"] = tuple(dep for dep in deps if place[dep] == number and dep.op.startswith("call_"))
    return gm


def _reading_segments(
    graph: fx.Graph, place: dict[fx.Node, int], sites: Sequence[Site], cuts: Cuts, named: dict[str, fx.Node]
) -> dict[fx.Node, set[int]]:
    """Nodes that a later segment reads, and the segments that do."""
    readers: dict[fx.Node, set[int]] = {}
    for node in graph.nodes:
        for source in node.all_input_nodes:
            readers.setdefault(source, set()).add(place[node])
    for site in sites:
        for value, anchor in zip(site.values, site.anchors, strict=True):
            if anchor is not None:
                readers.setdefault(named[anchor], set()).add(place[named[value]])
    for number, probes in enumerate(cuts):
        for probe in probes:
            for name in filter(None, (probe.values[0], probe.anchors[0])):
                readers.setdefault(named[name], set()).add(number)
    calls = [node for node in graph.nodes if node.op.startswith("call_")]
    later = {node: {segment for segment in readers.get(node, ()) if segment > place[node]} for node in calls}
    return {node: segments for node, segments in later.items() if segments}


def _probe(graph: fx.Graph, probe: Site, named: dict[str, fx.Node]) -> fx.Node:
    """What a gate looks at: the (first) value, less its anchor."""
    value, anchor = named[probe.values[0]], probe.anchors[0]
    if anchor is None:
        return value
    with graph.inserting_before(find_output(graph)):
        residual = graph.call_function(torch.sub, (value, named[anchor]))
    residual.meta = {"val": value.meta.get("val"), "path": value.meta.get("path", "")}
    return residual
