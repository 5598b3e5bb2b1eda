"""Cuts that follow from the data flow alone: the output, the deep features behind skip connections, minimum cuts.

Enters: a ``Flow``. Leaves: candidates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import networkx
from networkx.algorithms.flow import boykov_kolmogorov
from torch import fx

from diffcache.blocks import Block
from diffcache.flow import CATS, JOINS, Candidate, Flow, target_name

_DEEP_SHARE = 0.1  # of the denoiser's FLOPs: branches with less are no deep features
_UNIT_SHARE = 0.01  # of the denoiser's FLOPs: what a module must hold to count among those a branch spans
_CUT_POINTS = (0.5, 0.75, 0.9)
_CUT_WINDOW = 0.15  # of the FLOPs, behind a cut point: where the minimum cut may lie
_HEAVY_SHARE = 0.002  # of the FLOPs: lighter nodes may stay live on either side of a minimum cut
_WEIGHTED = frozenset("linear conv1d conv2d conv3d matmul __matmul__ bmm einsum scaled_dot_product_attention".split())
_SAME_WEIGHT = 0.95  # of a value's FLOPs: a value before it with so much can stand for it
_MAX_CUT = 3


def output_candidates(flow: Flow) -> Iterator[Candidate]:
    """The output tensors; where one cannot be cached (an input, memory written in place), a value before them."""
    computed = [node for node in flow.output_tensors if node.meta.get("tainted") and node.op.startswith("call_")]
    values = tuple(node for node in computed if flow.eligible(node))
    if values and len(values) == len([n for n in computed if _floating(flow, n)]):
        yield Candidate("output", "output", values, (None,) * len(values), "")
        return
    behind = [node for node in flow.common_post_dominators(computed or flow.output_tensors) if flow.eligible(node)]
    before = behind[:1] or _last_before(flow, computed)
    if before:
        yield Candidate("output", "output", tuple(before), (None,), "")


def _floating(flow: Flow, node: fx.Node) -> bool:
    spec = flow.spec(node)
    return spec is not None and spec.dtype.is_floating_point


def _last_before(flow: Flow, outputs: Sequence[fx.Node]) -> list[fx.Node]:
    """The latest eligible value through which the latent's way to the outputs must pass."""
    for node in reversed(flow.latent_chain()):
        if flow.eligible(node) and node not in outputs:
            return [node]
    return []


# -- deep features -------------------------------------------------------------------------------------------------


def deep_candidates(flow: Flow, blocks: Sequence[Block]) -> list[Candidate]:
    """The deeper operand of every skip connection: given it, all that lies deeper is dead and the skips stay live.

    In post-dominator terms: a value that feeds a join only, off the latent's own chain, with the weight of several
    modules above it. The one that saves most, which keeps only the shallowest level live, has the role "deepest".
    """
    below = {node: nodes for node, (_, nodes) in _fed_only(flow, blocks, _DEEP_SHARE).items()}
    weight = {node: sum(flow.flops.get(n.name, 0.0) for n in nodes) for node, nodes in below.items()}
    found = [
        node
        for node in below
        if _spans_modules(flow, blocks, below[node])
        and not _within_block(flow, blocks, node, flow.post_dominators[node])
    ]
    names = _makers(flow)
    seen: Counter[str] = Counter()
    candidates = []
    for rank, node in enumerate(sorted(found, key=lambda node: -weight[node])):
        seen[names[node]] += 1
        suffix = f"#{seen[names[node]]}" if seen[names[node]] > 1 else ""
        path = str(node.meta.get("path", ""))
        candidates.append(
            Candidate("deep" if rank else "deepest", f"deep:{names[node]}{suffix}", (node,), (None,), path)
        )
    return candidates


@dataclass(frozen=True)
class Skip:
    """One skip connection: the value where it ends, the deeper operand there, and the operands that come around it."""

    join: fx.Node
    deep: fx.Node
    around: tuple[fx.Node, ...]


def skips(flow: Flow, blocks: Sequence[Block]) -> list[Skip]:
    """All skip connections, the shallowest first: it begins first and ends last. None where joins lie within blocks.

    The index is DeepCache's branch: at branch ``b`` all that lies deeper than the ``b``-th value kept for the way up is
    skipped. Concatenations count; only a denoiser without any has its skips among heavy additions.
    """
    found = {}
    for share in (0.0, _DEEP_SHARE):
        for node, (join, below) in _fed_only(flow, blocks, share, CATS if not share else JOINS).items():
            if _works_apart(flow, blocks, below, join):
                around = tuple(n for n in flow.inputs[join] if _comes_around(flow, n, node))
                if around:
                    found[join] = Skip(join, node, around)
        if found:
            break
    return sorted(found.values(), key=lambda skip: -flow.index[skip.join])


def _comes_around(flow: Flow, other: fx.Node, deep: fx.Node) -> bool:
    """Whether a value was there before the deeper one, but for work without weights on it (a filter).

    A second stream, or another piece of one tensor, comes around nothing.
    """
    before, beyond = {other, *flow.ancestors(other)}, {deep, *flow.ancestors(deep)}
    if other not in flow.from_latent or deep in before or any(_weighs(flow, node) for node in before - beyond):
        return False
    return any(_weighs(flow, node) for node in beyond - before)


def _weighs(flow: Flow, node: fx.Node) -> bool:
    """Whether a node multiplies with weights."""
    if node.op == "call_module":
        return any(parameter.dim() > 1 for parameter in flow.module.get_submodule(str(node.target)).parameters())
    return target_name(node, flow.module) in _WEIGHTED


def _fed_only(
    flow: Flow, blocks: Sequence[Block], share: float, joins: frozenset[str] = JOINS
) -> dict[fx.Node, tuple[fx.Node, list[fx.Node]]]:
    """Operands of joins off the latent's chain with a share of the FLOPs -> (join, the nodes that feed only them)."""
    above = flow.post_dominators
    children: dict[fx.Node, list[fx.Node]] = {}
    weight = {node: flow.flops.get(node.name, 0.0) for node in above}
    for node in flow.order:  # a node's post-dominator comes after it, so its weight is complete when it is passed on
        parent = above.get(node)
        if parent is not None:
            children.setdefault(parent, []).append(node)
            weight[parent] += weight[node]
    chain = set(flow.latent_chain())
    found = {}
    for node, join in above.items():
        if join is None or node in chain or node not in flow.from_latent or weight[node] < share * flow.total:
            continue
        if target_name(join, flow.module) not in joins or _within_block(flow, blocks, node, join):
            continue
        if _is_bypassed(flow, node, join, children):
            value = _cacheable(flow, node, children, weight)
            if value is not None:
                found[value] = (join, _subtree(value, children))
    return found


def _cacheable(
    flow: Flow, node: fx.Node, children: dict[fx.Node, list[fx.Node]], weight: dict[fx.Node, float]
) -> fx.Node | None:
    """The node, or the nearest one before it that can be cached and carries nearly all of its weight."""
    least = _SAME_WEIGHT * weight[node]
    while not flow.eligible(node):
        before = max(children.get(node, ()), key=lambda child: weight[child], default=None)
        if before is None or weight[before] < least:
            return None
        node = before
    return node


def _is_bypassed(flow: Flow, node: fx.Node, join: fx.Node, children: dict[fx.Node, list[fx.Node]]) -> bool:
    """Whether the join's other operand comes from a computed value that ``node`` depends on: a skip around it."""
    operands = flow.inputs[join]
    if node not in operands:
        return False
    before = flow.ancestors(node)
    for other in operands:
        made = _subtree(other, children) if flow.post_dominators.get(other) is join else [other]
        skips = {other, *(source for n in made for source in flow.inputs[n])} if other is not node else set()
        if any(
            n in before and n in flow.from_latent and n.op.startswith("call_") and "input" not in n.meta for n in skips
        ):
            return True
    return False


def _subtree(node: fx.Node, children: dict[fx.Node, list[fx.Node]]) -> list[fx.Node]:
    nodes = [node]
    for here in nodes:  # grows while it is walked
        nodes.extend(children.get(here, ()))
    return nodes


def _work(flow: Flow, blocks: Sequence[Block], nodes: Sequence[fx.Node]) -> Counter[int]:
    """FLOPs of these nodes by the outermost block, or else the innermost module, that they lie in."""
    outer = [block.call for block in blocks if block.outer]
    work: Counter[int] = Counter()
    for node in nodes:
        flops = flow.flops.get(node.name, 0.0)
        if flops:
            unit = next((call for call in outer if flow.inside(node, call)), None)
            work[flow.module_call(node) if unit is None else unit] += flops  # type: ignore[assignment]
    return work


def _spans_modules(flow: Flow, blocks: Sequence[Block], nodes: Sequence[fx.Node]) -> bool:
    """Whether these nodes' work lies in more than one block: a branch within one block is no deep feature."""
    return sum(flops >= _UNIT_SHARE * flow.total for flops in _work(flow, blocks, nodes).values()) > 1


def _works_apart(flow: Flow, blocks: Sequence[Block], nodes: Sequence[fx.Node], join: fx.Node) -> bool:
    """Whether some of these nodes' work lies in a block or module that does not hold the join itself."""
    return any(call >= 0 and not flow.inside(join, call) for call in _work(flow, blocks, nodes))


def _within_block(flow: Flow, blocks: Sequence[Block], node: fx.Node, join: fx.Node | None) -> bool:
    """Whether a value and the join it feeds lie in one block, as an attention branch and its residual addition do."""
    return any(flow.inside(node, b.call) and join is not None and flow.inside(join, b.call) for b in blocks if b.outer)


def _makers(flow: Flow) -> dict[fx.Node, str]:
    """The path of the outermost module (below the denoiser) that hands a value out, else of the one it was made in."""
    names: dict[fx.Node, str] = {}
    for i, call in enumerate(flow.calls):
        if call.path:
            for node in flow.named(call.outputs):
                if flow.inside(node, i):
                    names.setdefault(node, call.path)
    return {node: names.get(node) or str(node.meta.get("path") or node.name) for node in flow.order}


# -- minimum cuts --------------------------------------------------------------------------------------------------


def minimum_cuts(flow: Flow) -> Iterator[Candidate]:
    """The fewest bytes that stand for the first half, three quarters and nine tenths of the latent's FLOPs."""
    names = _makers(flow)
    for point in _CUT_POINTS:
        values = _minimum_cut(flow, point)
        if 0 < len(values) <= _MAX_CUT:
            name = "cut:" + "+".join(names[node] for node in values)
            yield Candidate("cut", name, values, (None,) * len(values), str(values[0].meta.get("path", "")))


def _minimum_cut(flow: Flow, point: float) -> tuple[fx.Node, ...]:
    """The cut between what is heavy in the first ``point`` of the FLOPs and what runs after a window behind it.

    Values that do not depend on the latent stay live; they are cheap, and cutting them would cost bytes for nothing.
    """
    network: networkx.DiGraph = networkx.DiGraph()
    network.add_nodes_from(("source", "sink"))
    begun = dict(
        zip(flow.order, accumulate((flow.flops.get(n.name, 0.0) for n in flow.order), initial=0.0), strict=False)
    )
    early = {node for node in flow.order if begun[node] < (point + _CUT_WINDOW) * flow.total and node.op != "output"}
    for node in flow.order:
        if node not in flow.from_latent or node not in early:
            continue
        spec = flow.spec(node)
        capacity = {"capacity": spec.bytes} if spec is not None and flow.eligible(node) else {}
        network.add_edge((node, "in"), (node, "out"), **capacity)  # no capacity: cannot be cut
        heavy = flow.flops.get(node.name, 0.0) >= _HEAVY_SHARE * flow.total
        if heavy and begun[node] < point * flow.total:
            network.add_edge("source", (node, "in"))
        for user in flow.users[node]:
            network.add_edge((node, "out"), (user, "in") if user in early else "sink")
    try:
        _, (reached, _) = networkx.minimum_cut(network, "source", "sink", flow_func=boykov_kolmogorov)
    except networkx.NetworkXUnbounded:
        return ()
    return tuple(n for n in flow.order if (n, "in") in reached and (n, "out") in network and (n, "out") not in reached)
