"""Approximate, the only pass that is: values that the schedule forecasts come from history instead of being computed.

Before::

    %3 = proj(%2)                       # site "block:blocks.1", anchor %0
    %4 = norm(%3)

After (forecast from two history values)::

    %3 = extrapolate(%0, [history_0_0_0, history_0_0_1], weights_0)
    %4 = norm(%3)

Needs nothing from earlier passes; what became dead stays until ``eliminate_dead_code``. New inputs are listed in
``meta["history"]`` as (row, value, age) and ``meta["weights"]`` as rows; the program returns ``(result, writes)``, with
``meta["writes"]`` naming each written value as (row, value). Weights made from values (a cell ``Given``) are those of
one value of a site: ``weights_0_0`` for row 0's first. A part of a value that is forecast by weights of its own (a
``View``) is what a projection keeps of a second weighted sum::

    %3 = extrapolate(%0, [history_0_0_0, history_0_0_1], weights_0[0], None, float32)
    %4 = extrapolate(None, [history_0_0_0, history_0_0_1], weights_0[1], None, float32)
    %5 = (%3 + low_band(%4, cutoff=0.1)).to(bfloat16)
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from diffcache.cells import View
from diffcache.graphs import find_output, returned_storages
from diffcache.liveness import live_nodes
from diffcache.memory import can_be_small
from diffcache.ops import extrapolate, quantize
from diffcache.predictors import MEASURES, PROJECTIONS
from diffcache.schedule import COMPUTE, Cell, Forecast, Forecasting
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
    forecasts: dict[fx.Node, fx.Node] = {}
    for place in places:
        # a site may stand on the value of another one that is itself forecast
        place = place._replace(anchor=forecasts.get(place.anchor, place.anchor) if place.anchor else None)
        if place.cell is COMPUTE:
            written.append(_kept(graph, place.value, place.anchor, returned, small))
            gm.meta["writes"].append((place.row, place.part))
        elif isinstance(place.cell, Forecasting):
            last, forecasts[place.value] = _forecast(
                gm, last, place, place.value.meta.get("storage") in returned, small
            )
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
    replaced = {place.value for place in places if isinstance(place.cell, Forecasting)}
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


def _forecast(
    gm: fx.GraphModule, last: fx.Node, place: _Place, returned: bool, small: torch.dtype | None
) -> tuple[fx.Node, fx.Node]:
    """Put the forecast in the place of the value; returns the last placeholder and the forecast."""
    row, index, cell, value, anchor = place
    assert isinstance(cell, Forecasting)
    given = not isinstance(cell, Forecast)  # its tensors come in full
    graph = gm.graph
    history: list[fx.Node] = []
    spec = value.meta.get("val")
    small_of = spec.dtype if isinstance(spec, TensorSpec) and can_be_small(spec, small) else None
    for kind in ("history", "scale") if small_of is not None and not given else ("history",):
        for age in range(cell.reads):
            with graph.inserting_after(last):
                last = graph.placeholder(f"{kind}_{row}_{index}_{age}")
            last.meta = {"val": spec if small_of is None else None, "path": ""}
            history.append(last)
            if kind == "history":
                gm.meta["history"].append((row, index, age))
    if isinstance(cell, Forecast) and cell.is_reuse and anchor is None and not returned and small_of is None:
        forecast = history[0]
    else:
        name = f"weights_{row}_{index}" if given else f"weights_{row}"
        weights = next((n for n in graph.nodes if n.op == "placeholder" and n.target == name), None)
        if weights is None:
            with graph.inserting_after(last):
                last = weights = graph.placeholder(name)
            weights.meta = {"path": ""}
            if not given:
                gm.meta["weights"].append(row)
        if isinstance(cell, Forecast) and cell.view is not None and cell.view.projection != "channels":
            last, forecast = _through(graph, last, place, cell.view, history, weights)
        else:
            with graph.inserting_after(value):
                stored = () if small_of is None else (None, small_of)
                forecast = graph.call_function(extrapolate, (anchor, history, weights, *stored))
        forecast.meta = {"val": value.meta.get("val"), "path": value.meta.get("path", ""), "forecast": True}
    forecast.meta["instead_of"] = value.meta.get("captured_as", value.name)
    value.replace_all_uses_with(forecast, delete_user_cb=lambda user: user is not forecast)
    return last, forecast


def _through(
    graph: fx.Graph, last: fx.Node, place: _Place, view: View, history: list[fx.Node], weights: fx.Node
) -> tuple[fx.Node, fx.Node]:
    """The forecast of a value with a part of its own; returns the last placeholder and the forecast."""
    spec = place.value.meta.get("val")
    assert isinstance(spec, TensorSpec)
    wide = torch.float64 if spec.dtype == torch.float64 else torch.float32
    given: dict[str, Any] = dict(view.options)
    if view.projection in MEASURES:
        with graph.inserting_after(last):
            last = graph.placeholder(f"basis_{place.row}_{place.part}")
        last.meta = {"path": ""}
        given = {"basis": last}
    with graph.inserting_before(place.value.next):
        outside, more = (graph.call_function(operator.getitem, (weights, number)) for number in range(2))
        base = graph.call_function(extrapolate, (place.anchor, history, outside, None, wide))
        added = graph.call_function(extrapolate, (None, history, more, None, wide))
        part = graph.call_function(PROJECTIONS[view.projection], (added,), given)
        whole = graph.call_function(torch.add, (base, part))
        return last, whole if spec.dtype == wide else graph.call_method("to", (whole, spec.dtype))
