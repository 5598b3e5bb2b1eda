"""Cache sites: the cuts of a captured graph that are worth forecasting, found from its structure.

Enters: a captured graph, its module calls and its cost. Leaves: a list of ``Site``. No model is known here by name.

A site's values, once given, make all that only they needed dead. Where a live value of the same shape lies below, it is
the anchor: then ``value - anchor`` is cached, and ``anchor + forecast`` used, whose anchor is always current.

Some sites are made on request only, since there are many: runs of blocks and what ``ranges`` describes beside them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import fx

from diffcache.anatomy import Anatomy
from diffcache.attention_kinds import attention_kind
from diffcache.blocks import block_candidates, child_candidates, stack_candidates
from diffcache.cost import Cost
from diffcache.cuts import deep_candidates, minimum_cuts, output_candidates
from diffcache.flow import Candidate
from diffcache.ranges import is_requested, requested
from diffcache.residual_blocks import residual_candidates
from diffcache.tracing.recorder import ModuleCall

# Where two finds are the same cut, the one listed first here gives it its name.
ROLES = (
    "output", "stack", "deepest", "stack0", "stack2", "deep", "block", "attention", "feedforward", "cut",
    "range", "prefix", "encoder", "probe",
)  # fmt: skip

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
        depth: index in the trunk (the main run of blocks) of the block that the site is, lies in or begins with; of a
            deep feature the index of its skip, 0 the shallowest (DeepCache's branch); -1 where neither applies.
        blocks: how many blocks the trunk has; 0 without one.
        kind: of an attention, what it looks at: "self", "cross", "joint", "spatial", "temporal" or "mixed"
            (see ``attention_kinds``); else empty.
        level: resolution level of the values, 0 the finest that blocks work at; -1 where all work at one.
        side: in a denoiser with skips "down", "mid" or "up", else empty.
    """

    name: str
    role: str
    values: tuple[str, ...]
    anchors: tuple[str | None, ...]
    path: str
    flops_saved: float
    bytes_kept: int
    depth: int = -1
    blocks: int = 0
    kind: str = ""
    level: int = -1
    side: str = ""

    @property
    def residual(self) -> bool:
        """Whether every value is cached as its difference to an anchor."""
        return all(anchor is not None for anchor in self.anchors)

    def without_anchors(self) -> Site:
        """The same values, cached as they are."""
        return replace(self, anchors=(None,) * len(self.values))


def find_sites(
    graph_module: fx.GraphModule, trace_calls: Sequence[ModuleCall], cost: Cost, wanted: Iterable[str] = ()
) -> list[Site]:
    """All sites of a captured graph and those wanted by name, the one that saves most FLOPs first.

    Args:
        graph_module: a graph from ``capture``, with its ``meta``.
        trace_calls: its module calls, ``variant.trace.calls``.
        cost: its cost, from ``measure_cost``.
        wanted: names of sites that must be among them: ``blocks[8:-2]`` and the other forms of ``ranges``.

    Raises:
        ValueError: the cost is of another graph, or this denoiser has no site of a wanted name.
    """
    anatomy = Anatomy(graph_module, trace_calls, cost)
    sites = all_sites(anatomy)
    known = {site.name for site in sites}
    sites += [named_site(anatomy, name, sites) for name in dict.fromkeys(wanted) if name not in known]
    return sorted(sites, key=lambda site: -site.flops_saved)


def all_sites(anatomy: Anatomy) -> list[Site]:
    """The sites that need no name to be found, the one that saves most FLOPs first."""
    flow, blocks = anatomy.flow, anatomy.blocks
    sites = _measured(
        anatomy,
        [
            *output_candidates(flow),
            *stack_candidates(flow, anatomy.trunk, anatomy.axes),
            *deep_candidates(flow, blocks),
            *block_candidates(flow, blocks, anatomy.axes),
            *residual_candidates(anatomy),
            *child_candidates(flow, blocks),
        ],
    )
    if not any(site.flops_saved >= _ENOUGH * flow.total and site.role != "output" for site in sites):
        sites += _measured(anatomy, list(minimum_cuts(flow)))
    return sorted(_named(_distinct(sites)), key=lambda site: -site.flops_saved)


def named_site(anatomy: Anatomy, name: str, sites: Sequence[Site] = ()) -> Site:
    """The site of a name: one of ``sites``, or made on request. Raises ValueError where the denoiser has none."""
    for site in sites:
        if site.name == name:
            return site
    if name.startswith("ff:"):  # at another size it may do a smaller share of the work
        found = (c for c in child_candidates(anatomy.flow, anatomy.blocks, 0.0) if c.name == name)
        for candidate in found:
            return measured(anatomy, candidate)
    if not is_requested(name):
        raise ValueError(
            f"no site is named '{name}'; there are {', '.join(site.name for site in sites) or 'none'}, and on request "
            "blocks[first:last], prefix[block], deep[branch], encoder and output-latent"
        )
    return measured(anatomy, requested(anatomy, name))


def measured(anatomy: Anatomy, found: Candidate) -> Site:
    """A candidate with what it saves and keeps, and where it lies."""
    flow = anatomy.flow
    specs = [spec for node in found.values if (spec := flow.spec(node)) is not None]
    inner, skip = found.role in ("attention", "feedforward"), found.role in ("deep", "deepest")
    return Site(
        name=found.name,
        role=found.role,
        values=tuple(node.name for node in found.values),
        anchors=tuple(anchor.name if anchor is not None else None for anchor in found.anchors),
        path=found.path,
        flops_saved=flow.saved(found.values, found.anchors),
        bytes_kept=sum(spec.bytes for spec in specs),
        depth=anatomy.branch(found.values[0]) if skip else anatomy.depth(found.call),
        blocks=len(anatomy.trunk),
        kind=attention_kind(flow, anatomy.axes, found.call) if found.role == "attention" else "",
        level=anatomy.level(found.values[-1]) if skip or inner or found.role == "block" else -1,
        side=anatomy.side(found.values[-1]) if inner or found.role == "block" else "",
    )


def _measured(anatomy: Anatomy, candidates: Iterable[Candidate]) -> list[Site]:
    least = _MIN_SAVED * anatomy.flow.total
    return [site for found in candidates if (site := measured(anatomy, found)).flops_saved >= least]


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
        named.append(site if count == 1 else replace(site, name=f"{site.name}~{count}"))
    return named


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
