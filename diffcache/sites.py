"""Cache sites: the cuts of a captured graph that are worth forecasting, found from its structure.

Enters: a captured graph, its module calls and its cost. Leaves: a list of ``Site``. No model is known here by name.

A site's values, once given, make all that only they needed dead. Where a live value of the same shape lies below, it is
the anchor: then ``value - anchor`` is cached, and ``anchor + forecast`` used, whose anchor is always current.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import fx

from diffcache.blocks import block_candidates, child_candidates, repeated_blocks, stack_candidates, trunk
from diffcache.cost import Cost
from diffcache.cuts import deep_candidates, minimum_cuts, output_candidates
from diffcache.flow import Candidate, Flow
from diffcache.tracing.recorder import ModuleCall

# Where two finds are the same cut, the one listed first here gives it its name.
ROLES = ("output", "stack", "deepest", "stack0", "stack2", "deep", "block", "attention", "feedforward", "cut")

_MIN_SAVED = 1e-4  # of the denoiser's FLOPs
_ENOUGH = 0.5  # of the denoiser's FLOPs: where an inner site saves this much, minimum cuts are not searched


@dataclass(frozen=True)
class Site:
    """One cut of a captured graph.

    Attributes:
        name: stable across captures of the same denoiser at other sizes, and unique among its sites.
        role: what the cut is, one of ``ROLES``.
        values: names of the nodes whose values are cached.
        anchors: for each value the name of a node of the same shape and dtype that runs before it and stays live, or
            None where the value itself is cached.
        path: path of the module whose work the site saves; empty for the denoiser itself.
        flops_saved: FLOPs of one call that are not run when the values are given and the anchors wanted.
        bytes_kept: bytes of one entry of history.
    """

    name: str
    role: str
    values: tuple[str, ...]
    anchors: tuple[str | None, ...]
    path: str
    flops_saved: float
    bytes_kept: int

    @property
    def residual(self) -> bool:
        """Whether every value is cached as its difference to an anchor."""
        return all(anchor is not None for anchor in self.anchors)


def find_sites(graph_module: fx.GraphModule, trace_calls: Sequence[ModuleCall], cost: Cost) -> list[Site]:
    """All sites of a captured graph, the one that saves most FLOPs first.

    Args:
        graph_module: a graph from ``capture``, with its ``meta``.
        trace_calls: its module calls, ``variant.trace.calls``.
        cost: its cost, from ``measure_cost``.

    Raises:
        ValueError: the cost is of another graph.
    """
    missing = [node.name for node in graph_module.graph.nodes if node.name not in cost.flops]
    if missing:
        raise ValueError(f"the cost knows nothing of nodes {missing[:3]}; measure the cost of this graph")
    flow = Flow(graph_module, trace_calls, cost)
    blocks = repeated_blocks(flow)
    sites = _measured(
        flow,
        [
            *output_candidates(flow),
            *stack_candidates(flow, trunk(flow, blocks)),
            *deep_candidates(flow, blocks),
            *block_candidates(flow, blocks),
            *child_candidates(flow, blocks),
        ],
    )
    if not any(site.flops_saved >= _ENOUGH * flow.total and site.role != "output" for site in sites):
        sites += _measured(flow, list(minimum_cuts(flow)))
    return sorted(_named(_distinct(sites)), key=lambda site: -site.flops_saved)


def _measured(flow: Flow, candidates: Iterable[Candidate]) -> list[Site]:
    sites = []
    for found in candidates:
        flops = flow.saved(found.values, found.anchors)
        if flops < _MIN_SAVED * flow.total:
            continue
        size = sum(spec.bytes for node in found.values if (spec := flow.spec(node)) is not None)
        anchors = tuple(anchor.name if anchor is not None else None for anchor in found.anchors)
        values = tuple(node.name for node in found.values)
        sites.append(Site(found.name, found.role, values, anchors, found.path, flops, size))
    return sites


def _distinct(sites: Sequence[Site]) -> list[Site]:
    """One site per cut: the same values on the same anchors are found in several ways."""
    best: dict[frozenset[tuple[str, str | None]], Site] = {}
    for site in sorted(sites, key=lambda site: ROLES.index(site.role)):
        best.setdefault(frozenset(zip(site.values, site.anchors, strict=True)), site)
    return list(best.values())


def _named(sites: Sequence[Site]) -> list[Site]:
    """Names made unique."""
    seen: Counter[str] = Counter()
    named = []
    for site in sites:
        seen[site.name] += 1
        count = seen[site.name]
        named.append(site if count == 1 else _renamed(site, f"{site.name}~{count}"))
    return named


def _renamed(site: Site, name: str) -> Site:
    return Site(name, site.role, site.values, site.anchors, site.path, site.flops_saved, site.bytes_kept)


def describe(sites: Sequence[Site], graph_module: fx.GraphModule | None = None, cost: Cost | None = None) -> str:
    """The sites as a table: name, role, what is cached on which anchor, share of FLOPs saved, kB per history entry.

    Shapes need ``graph_module`` and shares need ``cost``; without them node names and FLOPs stand in their place.
    """
    specs = {node.name: node.meta.get("val") for node in graph_module.graph.nodes} if graph_module is not None else {}
    rows = [("site", "role", "values", "anchors", "saved", "kB")]
    for site in sites:
        values = ", ".join(str(specs.get(name) or name) for name in site.values)
        anchors = ", ".join(anchor or "-" for anchor in site.anchors)
        saved = f"{100 * site.flops_saved / cost.total:.1f} %" if cost is not None else f"{site.flops_saved:.3g}"
        rows.append((site.name, site.role, values, anchors, saved, f"{site.bytes_kept / 1000:.1f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    left = (True, True, True, True, False, False)
    return "\n".join(
        "  ".join(
            cell.ljust(w) if to_left else cell.rjust(w) for cell, w, to_left in zip(row, widths, left, strict=True)
        ).rstrip()
        for row in rows
    )
