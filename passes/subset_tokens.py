"""Approximate. A site runs on a few of its tokens, and the others come from history.

Before::

    %2 = norm(%1)                       # [batch, tokens, channels]
    %3, %4, %5 = to_q(%2), to_k(%2), to_v(%2)
    %6 = attention(%3, %4, %5)          # site "attn:blocks.1.attn"
    %7 = proj(%6)

After (k tokens of each sample)::

    %2 = norm(take_rows(%1, tokens_0_0, 1))
    %3, %4, %5 = to_q(%2), to_k(%2), to_v(%2)
    %8 = put_rows(history_0_1_0, tokens_0_0, %4, 1)     # the keys of all tokens, those selected fresh
    %9 = put_rows(history_0_2_0, tokens_0_0, %5, 1)
    %6 = attention(%3, %8, %9)
    %7 = put_rows(history_0_0_0, tokens_0_0, proj(%6), 1)
    return (result, (%7, %8, %9))       # writes (0, 0), (0, 1), (0, 2)

Needs ``apply_schedule``, to which such a row is neither computed nor forecast; what became dead stays until
``eliminate_dead_code``. New inputs are ``tokens_ROW_VALUE``, int64 [batch, k], listed in ``meta["tokens"]`` as
(row, value), and ``clusters_ROW_VALUE`` where the row blends. A row that is computed in this column keeps, besides
the site's values, what its region needs: value ``len(site.values) + i`` of the row is ``region.kept[i]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import fx

from diffcache.graphs import find_output
from diffcache.ops import extrapolate
from diffcache.passes.token_copies import TokenCopies
from diffcache.sites import Site
from diffcache.token_axes import TokenAxes
from diffcache.token_region import TokenRegion, nodes_above, what_runs
from diffcache.token_rows import blend_clusters, put_rows, take_rows
from diffcache.tracing.spec import TensorSpec


@dataclass(frozen=True)
class TokenRow:
    """One row of the schedule whose site may run on selected tokens.

    Attributes:
        row: its number, as in the names of its inputs.
        counts: how many tokens of each of the site's values are selected, None for all of them; empty where the row is
            computed in this column, and only keeps what later columns need.
        history: how many entries the forecast of the other tokens reads; one means that they are reused.
        blend: (gamma, clusters) of ``blend_clusters``, or None.
    """

    row: int
    site: Site
    region: TokenRegion
    counts: tuple[int | None, ...] = ()
    history: int = 1
    blend: tuple[float, int] | None = None


def subset_tokens(gm: fx.GraphModule, *, token_rows: Sequence[TokenRow] = ()) -> fx.GraphModule:
    """Keep or reuse what rows on selected tokens need, in the order of the rows.

    Raises:
        ValueError: a row asks for more tokens than there are, or for none, or names nodes that this graph lacks.
    """
    gm.meta.setdefault("tokens", [])
    for token_row in token_rows:
        if token_row.counts:
            _check(token_row)
            _Partial(gm, token_row).rewrite()
        else:
            _keep(gm, token_row)
    return gm


def _check(token_row: TokenRow) -> None:
    site, tokens, counts = token_row.site.name, token_row.region.tokens, token_row.counts
    fits = len(counts) == len(tokens) and all(k is None or 1 <= k <= n for k, n in zip(counts, tokens, strict=False))
    if not fits or all(k is None for k in counts):
        raise ValueError(
            f"site '{site}' has {tokens} tokens in its values, and {counts} of them are to be selected: expected for "
            "each value a number from one to its tokens or None for all, and one number at least"
        )
    if token_row.history < 1 or (token_row.blend is not None and not 0 <= token_row.blend[0] <= 1):
        raise ValueError(
            f"site '{site}' forecasts from {token_row.history} entries and blends by {token_row.blend}: expected one "
            "entry or more, and a share between zero and one"
        )


def _captured(gm: fx.GraphModule) -> dict[str, fx.Node]:
    """The nodes of the capture by the names that sites use; what passes added is not among them."""
    own = (n for n in gm.graph.nodes if "captured_as" in n.meta or "tainted" in n.meta or n.op == "get_attr")
    return {node.meta.get("captured_as", node.name): node for node in own}


def _resolve(gm: fx.GraphModule, token_row: TokenRow, names: Sequence[str]) -> list[fx.Node]:
    nodes = _captured(gm)
    missing = [name for name in names if name not in nodes]
    if missing:
        raise ValueError(
            f"site '{token_row.site.name}' names nodes {missing} that this graph lacks; find the sites of this capture"
        )
    return [nodes[name] for name in names]


# -- a computed step --------------------------------------------------------------------------------------------------


def _keep(gm: fx.GraphModule, token_row: TokenRow) -> None:
    """Write the keys and values that later columns look at."""
    first = len(token_row.site.values)
    for i, node in enumerate(_resolve(gm, token_row, token_row.region.kept)):
        with gm.graph.inserting_after(node):
            kept = gm.graph.call_method("clone", (node,)) if _shares(gm.graph, node) else node
        if kept is not node:
            kept.meta = {"val": node.meta.get("val"), "path": node.meta.get("path", "")}
        _write(gm, (token_row.row, first + i), kept)


def _shares(graph: fx.Graph, node: fx.Node) -> bool:
    """Whether a node's memory is more than its own: an input, a result, or a part of something larger."""
    storage, own = node.meta.get("storage"), node.meta["val"].bytes
    for other in graph.nodes:
        if storage is None or other.meta.get("storage") != storage or other is node:
            continue
        spec = other.meta.get("val")
        larger = getattr(spec, "bytes", 0) > own
        if other.op in ("placeholder", "get_attr") or larger or other in find_output(graph).all_input_nodes:
            return True
    return storage is None


def _write(gm: fx.GraphModule, place: tuple[int, int], node: fx.Node) -> None:
    end = find_output(gm.graph)
    result, written = cast("tuple[Any, tuple[fx.Node, ...]]", end.args[0])
    end.args = ((result, (*written, node)),)
    gm.meta["writes"].append(place)


# -- a step on selected tokens ----------------------------------------------------------------------------------------


class _Partial:
    """One row of a program that runs on selected tokens."""

    def __init__(self, gm: fx.GraphModule, token_row: TokenRow) -> None:
        self.gm, self.graph, self.token_row, self.row = gm, gm.graph, token_row, token_row.row
        site, region = token_row.site, token_row.region
        self.values = _resolve(gm, token_row, site.values)
        named = [None if name is None else _resolve(gm, token_row, [name])[0] for name in site.anchors]
        instead = {node.meta["instead_of"]: node for node in self.graph.nodes if "instead_of" in node.meta}
        # a site may stand on the value of another one that is forecast, or on some tokens itself
        self.anchors = [
            None if name is None else instead.get(name, anchor)
            for name, anchor in zip(site.anchors, named, strict=True)
        ]
        captured = _captured(gm)
        within = {captured[n] for n in region.nodes if n in captured and captured[n].op != "placeholder"}
        nodes = [node for node in self.graph.nodes if node in within]
        chosen = [i for i, count in enumerate(token_row.counts) if count is not None]
        self.axes = TokenAxes(gm, nodes, self.values, chosen)
        self.returned = {n.meta.get("storage") for n in self._results()} - {None}
        self._last = [node for node in self.graph.nodes if node.op == "placeholder"][-1]
        self._inputs: dict[str, fx.Node] = {}

    def _results(self) -> list[fx.Node]:
        found = []
        for node in find_output(self.graph).all_input_nodes:
            found += node.all_input_nodes if node.meta.get("assembles") else [node]
        return found

    def rewrite(self) -> None:
        kept = _resolve(self.gm, self.token_row, self.token_row.region.kept)
        first = len(self.values)
        copies = TokenCopies(
            self.gm, self.axes, {root: self._tokens(i) for root, i in self.axes.chosen.items()},
            {root: self.token_row.counts[i] or 0 for root, i in self.axes.chosen.items()},
            {node: partial(self._history, first + i, 0, node) for i, node in enumerate(kept)},
        )  # fmt: skip
        needed, whole = what_runs(self.axes)
        for node in self.axes.nodes:
            if node in needed:
                copies.copy(node)
        for i, value in enumerate(self.values):
            self._mix(i, value, copies)
        for i, node in enumerate(kept):
            if node in copies.complete:
                _write(self.gm, (self.row, first + i), copies.complete[node])
        self._drop_blind_guards(whole)

    def _drop_blind_guards(self, whole: set[fx.Node]) -> None:
        """Guards on what no longer runs as it is go with it: they must not keep it alive."""
        gone, every = set(self.axes.nodes) - whole, set(self.graph.nodes)
        for node in [node for node in self.graph.nodes if node.meta.get("guard")]:
            if not gone.isdisjoint(nodes_above([node], every)):
                self.graph.erase_node(node)

    # -- inputs ------------------------------------------------------------------------------------------------

    def _input(self, name: str, meta: dict[str, Any]) -> fx.Node:
        if name not in self._inputs:
            with self.graph.inserting_after(self._last):
                node = self.graph.placeholder(name)
            node.meta = {"path": ""} | meta
            self._inputs[name] = self._last = node
        return self._inputs[name]

    def _tokens(self, value: int) -> fx.Node:
        self.gm.meta["tokens"].append((self.row, value))
        spec, count = self.values[value].meta["val"], self.token_row.counts[value] or 0
        shape = (spec.shape[0], count)
        return self._input(f"tokens_{self.row}_{value}", {"val": TensorSpec(shape, torch.int64, spec.device)})

    def _history(self, value: int, age: int, like: fx.Node) -> fx.Node:
        name = f"history_{self.row}_{value}_{age}"
        if name not in self._inputs:
            self.gm.meta["history"].append((self.row, value, age))
        return self._input(name, {"val": like.meta.get("val")})

    def _weights(self) -> fx.Node:
        name = f"weights_{self.row}"
        if name not in self._inputs:
            self.gm.meta["weights"].append(self.row)
        return self._input(name, {})

    # -- the value -----------------------------------------------------------------------------------------------

    def _call(self, function: Any, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
        with self.graph.inserting_before(self._place):
            node = self.graph.call_function(function, args)
        node.meta = {"val": like.meta.get("val"), "path": like.meta.get("path", "")}
        return node

    def _forecast(self, index: int, value: fx.Node, anchor: fx.Node | None) -> fx.Node:
        """What history says of all tokens, on the anchor if there is one."""
        entries = [self._history(index, age, value) for age in range(self.token_row.history)]
        if len(entries) == 1:
            return entries[0] if anchor is None else self._call(torch.add, (anchor, entries[0]), value)
        return self._call(extrapolate, (anchor, entries, self._weights()), value)

    def _mix(self, index: int, value: fx.Node, copies: TokenCopies) -> None:
        """The value with fresh rows in the place of the selected tokens, and what history keeps of it."""
        anchor, rows = self.anchors[index], copies.new[value]
        self._place = rows.next
        chosen = self.axes.selects(value)
        tokens = copies.tokens(self.axes.token_root(value)) if chosen else None
        mixed = self._put(index, self._forecast(index, value, anchor), tokens, rows) if chosen else rows
        entry = mixed
        if anchor is not None and chosen:
            below = self._call(take_rows, (anchor, tokens, 1), rows)
            change = self._call(torch.sub, (rows, below), rows)
            entry = self._put(index, self._forecast(index, value, None), tokens, change)
        elif anchor is not None:
            entry = self._call(torch.sub, (rows, anchor), value)
        elif value.meta.get("storage") in self.returned:
            entry = self._call(torch.clone, (mixed,), value)
        mixed.meta["instead_of"] = value.meta.get("captured_as", value.name)
        value.replace_all_uses_with(mixed)
        _write(self.gm, (self.row, index), entry)

    def _put(self, index: int, base: fx.Node, tokens: fx.Node | None, rows: fx.Node) -> fx.Node:
        if self.token_row.blend is None:
            return self._call(put_rows, (base, tokens, rows, 1), base)
        clusters = self._input(f"clusters_{self.row}_{index}", {})
        return self._call(blend_clusters, (base, tokens, rows, clusters, *self.token_row.blend), base)
