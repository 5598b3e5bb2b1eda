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

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import fx

from diffcache.graphs import find_output, returned_storages
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
    graph, end = gm.graph, find_output(gm.graph)
    places = list(_places(gm, sites, cells))
    returned = gm.meta["returned"] if "returned" in gm.meta else returned_storages(graph)
    last = _last_placeholder(graph)
    gm.meta.update(history=[], weights=[], writes=[])
    _drop_blind_guards(graph, places)
    written = []
    for place in places:
        if place.cell is COMPUTE:
            written.append(_kept(graph, place.value, place.anchor, returned, small))
            gm.meta["writes"].append((place.row, place.part))
        elif isinstance(place.cell, Forecast):
            last = _forecast(gm, last, place, place.value.meta.get("storage") in returned, small)
    end.args = ((end.args[0], tuple(written)),)
    return gm


class _Place(NamedTuple):
    """One value of a site in this graph; ``part`` counts the values of the site."""

    row: int
    part: int
    cell: Cell
    value: fx.Node
    anchor: fx.Node | None


def _places(gm: fx.GraphModule, sites: Sequence[Site], cells: Sequence[Cell]) -> Iterator[_Place]:
    """The values that are made in this graph; of a segment these may be some of a site's."""
    nodes = {node.meta.get("captured_as", node.name): node for node in gm.graph.nodes}
    own = gm.meta.get("own")
    for row, (site, cell) in enumerate(zip(sites, cells, strict=True)):
        pairs = list(enumerate(zip(site.values, site.anchors, strict=True)))
        here = [pair for pair in pairs if own is None or pair[1][0] in own]
        missing = [name for _, pair in here for name in filter(None, pair) if name not in nodes]
        if missing:
            raise ValueError(
                f"site '{site.name}' names nodes {missing} that this graph lacks; find the sites of this capture"
            )
        for index, (value, anchor) in here:
            yield _Place(row, index, cell, nodes[value], nodes[anchor] if anchor else None)


def _drop_blind_guards(graph: fx.Graph, places: Sequence[_Place]) -> None:
    """Guards on values inside a forecast region go with it: they must not keep it alive."""
    replaced = {place.value for place in places if isinstance(place.cell, Forecast)}
    kept = [place.value for place in places if place.cell is COMPUTE] + [p.anchor for p in places if p.anchor]
    live = live_nodes(graph, replaced, kept)
    for node in [node for node in graph.nodes if node.meta.get("guard") and node not in live]:
        graph.erase_node(node)


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


def _forecast(gm: fx.GraphModule, last: fx.Node, place: _Place, returned: bool, small: torch.dtype | None) -> fx.Node:
    """Put the forecast in the place of the value; returns the last placeholder."""
    row, index, cell, value, anchor = place
    assert isinstance(cell, Forecast)
    graph = gm.graph
    history: list[fx.Node] = []
    spec = value.meta.get("val")
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
