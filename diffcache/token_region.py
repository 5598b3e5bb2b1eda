"""What of a site can run on a few of its tokens: its region, and what must be kept of it besides its values.

Enters: a captured graph, a site, and what its nodes cost. Leaves: a ``TokenRegion``, or a refusal with its reason.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from diffcache.liveness import live_nodes, sources
from diffcache.sites import Site
from diffcache.token_axes import TokenAxes
from diffcache.token_ops import shape_of
from diffcache.tracing.spec import TensorSpec

_ENOUGH = 0.5  # of the region's FLOPs: a site of which less can run on selected tokens gains too little


@dataclass(frozen=True)
class TokenRegion:
    """How a site runs on selected tokens.

    Attributes:
        site: the site's name.
        tokens: how many tokens each of the site's values has.
        kept: names of the nodes whose values history must hold besides the site's own: the keys and values that the
            selected tokens look at. Numbered on from the site's values: the first is value ``len(site.values)``.
        nodes: names of the nodes that run for the site's values alone.
        share: the share of the region's FLOPs that runs on selected tokens only.
        bytes_kept: bytes of one entry of ``kept``.
        attended: for each of the site's values where in ``kept`` stands what the last attention takes from its tokens,
            [batch, heads, tokens, channels], and the place of its first token there; None where that is not known.
    """

    site: str
    tokens: tuple[int, ...]
    kept: tuple[str, ...]
    nodes: frozenset[str]
    share: float
    bytes_kept: int
    attended: tuple[tuple[int, int] | None, ...] = ()


def token_region(module: fx.GraphModule, site: Site, flops: Mapping[str, float]) -> TokenRegion:
    """The region of a site of this captured graph; ``flops`` by node name, from ``measure_cost``.

    Raises:
        ValueError: the site cannot run on a few of its tokens, with the node that forbids it and why.
    """
    graph = module.graph
    named = {node.name: node for node in graph.nodes}
    values = [named[name] for name in site.values]
    for value in values:
        shape = shape_of(value)
        if shape is None or len(shape) != 3 or shape[1] < 2:
            raise ValueError(
                f"site '{site.name}' cannot run on a few tokens: its value '{value.name}' has the shape {shape}, "
                "expected [batch, tokens, channels] with two tokens or more. Forecast it or compute it in full"
            )
    nodes = region_nodes(graph, values, [named[name] for name in site.anchors if name is not None])
    axes = TokenAxes(module, nodes, values, range(len(values)))
    needed, whole = what_runs(axes)
    total = sum(flops.get(node.name, 0.0) for node in nodes)
    share = (
        sum(flops.get(node.name, 0.0) for node in needed - whole if axes.selects(axes.fresh[node].result)) / total
        if total
        else 0.0
    )
    stale = [value for value in values if value not in axes.fresh]
    if stale or share < _ENOUGH or not whole.isdisjoint(axes.lost):
        raise ValueError(_refusal(site, axes, whole, share))
    if (wrong := _unsettled(graph, axes, needed, nodes)) is not None:
        raise ValueError(f"site '{site.name}' cannot run on a few tokens: {wrong}. Compute or forecast it whole")
    kept = dict.fromkeys(node for fresh in nodes if fresh in needed for node in axes.meets(fresh))
    specs = [node.meta.get("val") for node in kept]
    return TokenRegion(
        site.name,
        tuple((shape_of(value) or ())[1] for value in values),
        tuple(node.name for node in kept),
        frozenset(node.name for node in nodes),
        share,
        sum(spec.bytes for spec in specs if isinstance(spec, TensorSpec)),
        _attended(axes, list(kept)),
    )


def _attended(axes: TokenAxes, kept: Sequence[fx.Node]) -> tuple[tuple[int, int] | None, ...]:
    """Where the values of the last attention hold each stream: their number among ``kept``, and the first token."""
    if not kept:
        return (None,) * len(axes.values)
    values, shape = kept[-1], shape_of(kept[-1]) or ()
    if len(shape) != 4 or shape[0] != axes.batch_size or axes.token_axis(values) != 2:
        return (None,) * len(axes.values)
    starts, start = {axes.token_root(values): 0}, 0
    for part, length in axes.labels.parts(axes.token_root(values)):
        starts.setdefault(part, start)
        start += length
    return tuple((len(kept) - 1, starts[root]) if root in starts else None for root in axes.streams)


def region_nodes(graph: fx.Graph, values: Sequence[fx.Node], anchors: Collection[fx.Node]) -> list[fx.Node]:
    """The nodes that run only for these values while the anchors are wanted, in order; the values are among them."""
    live = live_nodes(graph)
    rest = live_nodes(graph, values, anchors)
    above = nodes_above(values, live - rest - set(anchors) | set(values))
    return [node for node in graph.nodes if node in above]


def what_runs(axes: TokenAxes) -> tuple[set[fx.Node], set[fx.Node]]:
    """The fresh nodes that the values need, and the nodes of the region that all tokens are needed of."""
    region = set(axes.nodes)
    needed = nodes_above(axes.values, set(axes.fresh))
    outside = {source for node in needed for source in sources(node) if source in region and source not in axes.fresh}
    return needed, nodes_above([*outside, *(value for value in axes.values if value not in axes.fresh)], region)


def nodes_above(start: Iterable[fx.Node], within: Collection[fx.Node]) -> set[fx.Node]:
    """``start`` and what it is computed from, as far as that lies ``within``."""
    found: set[fx.Node] = set()
    todo = [node for node in start if node in within]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += [source for source in sources(node) if source in within and source not in found]
    return found


def _refusal(site: Site, axes: TokenAxes, whole: set[fx.Node], share: float) -> str:
    lost = [reason for node, reason in axes.lost.items() if node in whole]
    why = lost[0] if lost else f"only {100 * share:.0f} % of its work is on streams of tokens that lead to its values"
    return (
        f"site '{site.name}' cannot run on a few tokens: {why}. Forecast it or compute it in full, or select tokens "
        "at another site (its attention and feed-forward children)"
    )


def _unsettled(graph: fx.Graph, axes: TokenAxes, needed: set[fx.Node], nodes: Sequence[fx.Node]) -> str | None:
    """Memory that is written in ways that selected tokens would not see; None if there is none."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    region, writes = set(nodes), [node for node in graph.nodes if node.meta.get("writes")]
    for node in needed:
        if node.meta.get("writes"):
            into = node.args[0]
            storage = into.meta.get("storage") if isinstance(into, fx.Node) else None
            shared = [n for n in graph.nodes if n.meta.get("storage") == storage]
            if storage is None or any(n not in region for n in shared):
                return f"'{node.name}' writes into memory that others see"
        taken = [n for n in sources(node) if n not in axes.fresh and axes.token_axis(n) is not None]
        for source in [*taken, *axes.meets(node)]:
            late = [w for w in writes if _writes_into(w, source) and order[w] > order[source]]
            if late:
                return f"'{late[0].name}' writes into '{source.name}' after it is made"
    return None


def _writes_into(write: fx.Node, node: fx.Node) -> bool:
    storages = {n.meta.get("storage") for n in write.all_input_nodes[:1]} - {None}
    return node.meta.get("storage") in storages
