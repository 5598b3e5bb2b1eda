"""Approximate, the only pass that is: values that the schedule forecasts come from history instead of being computed.

Before::

    %3 = proj(%2)                       # site "block:blocks.1", anchor %0
    %4 = norm(%3)

After (forecast from two history values)::

    %3 = extrapolate(%0, [history_0_0_0, history_0_0_1], weights_0)
    %4 = norm(%3)

Needs nothing from earlier passes; what became dead stays until ``eliminate_dead_code``. New inputs are listed in
``meta["history"]`` as (row, value, age) and ``meta["weights"]`` as rows; the program returns ``(result, writes)``, with
``meta["writes"]`` naming each written value as (row, value).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from diffcache.graphs import find_output
from diffcache.liveness import live_nodes
from diffcache.memory import can_be_small
from diffcache.ops import extrapolate, quantize
from diffcache.schedule import COMPUTE, Cell, Forecast
from diffcache.sites import Site
from diffcache.tracing.spec import TensorSpec


def apply_schedule(
    gm: fx.GraphModule, *, sites: Sequence[Site] = (), cells: Sequence[Cell] = (), small: torch.dtype | None = None
) -> fx.GraphModule:
    """Specialise the graph to one column of a schedule; ``cells[i]`` decides about ``sites[i]``.

    With ``small`` (int8 or float8) history is kept in that dtype, each row with a scale of its own: a write is then the
    pair of both, and ``scale_0_0_0`` stands beside ``history_0_0_0``.

    Raises:
        ValueError: a site's node is not in this graph.
    """
    graph = gm.graph
    nodes = {node.meta.get("captured_as", node.name): node for node in graph.nodes}
    end = find_output(graph)
    returned = {node.meta.get("storage") for node in _returned(end)}
    last = _last_placeholder(graph)
    gm.meta.update(history=[], weights=[], writes=[])
    _drop_blind_guards(graph, sites, cells, nodes)
    written = []
    for row, (site, cell) in enumerate(zip(sites, cells, strict=True)):
        for index, (value, anchor) in enumerate(_resolve(site, nodes)):
            if cell is COMPUTE:
                written.append(_kept(graph, value, anchor, returned, small))
                gm.meta["writes"].append((row, index))
            elif isinstance(cell, Forecast):
                copied = value.meta.get("storage") in returned
                last = _forecast(gm, last, value, anchor, (row, index), cell, copied, small)
    end.args = ((end.args[0], tuple(written)),)
    return gm


def _drop_blind_guards(
    graph: fx.Graph, sites: Sequence[Site], cells: Sequence[Cell], nodes: dict[str, fx.Node]
) -> None:
    """Guards on values inside a forecast region go with it: they must not keep it alive."""
    places = [(cell, place) for site, cell in zip(sites, cells, strict=True) for place in _resolve(site, nodes)]
    replaced = {value for cell, (value, _) in places if isinstance(cell, Forecast)}
    kept = [value for cell, (value, _) in places if cell is COMPUTE] + [anchor for _, (_, anchor) in places if anchor]
    live = live_nodes(graph, replaced, kept)
    for node in [node for node in graph.nodes if node.meta.get("guard") and node not in live]:
        graph.erase_node(node)


def _resolve(site: Site, nodes: dict[str, fx.Node]) -> list[tuple[fx.Node, fx.Node | None]]:
    missing = [name for name in (*site.values, *(a for a in site.anchors if a)) if name not in nodes]
    if missing:
        raise ValueError(
            f"site '{site.name}' names nodes {missing} that this graph lacks; find the sites of this capture"
        )
    return [(nodes[v], nodes[a] if a else None) for v, a in zip(site.values, site.anchors, strict=True)]


def _returned(end: fx.Node) -> list[fx.Node]:
    found = []
    for node in end.all_input_nodes:
        found += node.all_input_nodes if node.meta.get("assembles") else [node]
    return found


def _last_placeholder(graph: fx.Graph) -> fx.Node:
    return [node for node in graph.nodes if node.op == "placeholder"][-1]


def _kept(
    graph: fx.Graph, value: fx.Node, anchor: fx.Node | None, returned: set[object], small: torch.dtype | None
) -> fx.Node:
    """What history keeps of a computed value: its residual, or the value (a copy if the caller gets it as well)."""
    with graph.inserting_after(value):
        if can_be_small(value.meta.get("val"), small):
            kept = graph.call_function(quantize, (value, anchor, small))
        elif anchor is not None:
            kept = graph.call_function(torch.sub, (value, anchor))
        elif value.meta.get("storage") in returned:
            kept = graph.call_method("clone", (value,))
        else:
            return value
    kept.meta = {"val": value.meta.get("val"), "path": value.meta.get("path", "")}
    return kept


def _forecast(
    gm: fx.GraphModule, last: fx.Node, value: fx.Node, anchor: fx.Node | None, place: tuple[int, int], cell: Forecast,
    returned: bool, small: torch.dtype | None,
) -> fx.Node:  # fmt: skip
    """Put the forecast in the place of ``value``; returns the last placeholder."""
    graph, (row, index) = gm.graph, place
    history, spec = [], value.meta.get("val")
    small_of = spec.dtype if isinstance(spec, TensorSpec) and can_be_small(spec, small) else None
    for kind in ("history", "scale") if small_of is not None else ("history",):
        for age in range(len(cell.steps)):
            with graph.inserting_after(last):
                last = graph.placeholder(f"{kind}_{row}_{index}_{age}")
            last.meta = {"val": spec if small_of is None else None, "path": ""}
            history.append(last)
            if kind == "history":
                gm.meta["history"].append((row, index, age))
    if cell.is_reuse and anchor is None and not returned and small_of is None:
        forecast = history[0]
    else:
        weights = next((n for n in graph.nodes if n.op == "placeholder" and n.target == f"weights_{row}"), None)
        if weights is None:
            with graph.inserting_after(last):
                last = weights = graph.placeholder(f"weights_{row}")
            weights.meta = {"path": ""}
            gm.meta["weights"].append(row)
        with graph.inserting_after(value):
            stored = () if small_of is None else (None, small_of)
            forecast = graph.call_function(extrapolate, (anchor, history, weights, *stored))
        forecast.meta = {"val": value.meta.get("val"), "path": value.meta.get("path", ""), "forecast": True}
    value.replace_all_uses_with(forecast, delete_user_cb=lambda user: user is not forecast)
    return last
