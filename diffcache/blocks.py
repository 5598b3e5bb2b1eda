"""Repeated blocks: the stack they form, each of them, and their attention and feed-forward children.

Enters: a ``Flow``. Leaves: candidates. A block is recognised by what it does, not by its class: a module called next to
others like it, whose outputs have the shapes of inputs of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import fx, nn

from diffcache.attention_kinds import attends
from diffcache.axes import Axes, same_order
from diffcache.flow import Candidate, Flow
from diffcache.tracing.spec import TensorSpec

_GROUP_SHARE = 0.02  # of the denoiser's FLOPs: like modules with less together are embedders and norms
_STACK_SHARE = 1 / 3  # of the FLOPs that depend on the latent: blocks with less are no trunk
_STACK_SAVES = 0.5  # of the blocks' FLOPs: a cut that saves less does not cut the stack
_CHILD_SHARE = 0.08  # of the block's FLOPs
_CHILD_SAVES = 1.1  # of the block's FLOPs: a child that saves more is a cut through what lies before the block
MAX_VALUES = 3


@dataclass(frozen=True)
class Block:
    """One call of a repeated module. ``outer``: no other block holds it. ``outputs`` are read outside of it."""

    call: int
    name: str
    outer: bool
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


def call_names(flow: Flow) -> list[str]:
    """A unique name per call: the module's path, and ``#2``, ``#3`` for its second and third call."""
    seen: Counter[str] = Counter()
    names = []
    for call in flow.calls:
        seen[call.path] += 1
        names.append(call.path if seen[call.path] == 1 else f"{call.path}#{seen[call.path]}")
    return names


def repeated_blocks(flow: Flow) -> list[Block]:
    """Calls of repeated modules, in order of execution, blocks within blocks included."""
    children: dict[int, list[int]] = {}
    for i, call in enumerate(flow.calls):
        children.setdefault(call.parent, []).append(i)
    names = call_names(flow)
    found: list[Block] = []
    todo = [(-1, True)]
    while todo:
        parent, outer = todo.pop()
        members = _repeated(flow, children.get(parent, []), outer)
        for i in children.get(parent, ()):
            if i in members:
                found.append(Block(i, names[i], outer, tuple(flow.call_inputs(i)), tuple(flow.call_outputs(i))))
            todo.append((i, outer and i not in members))
    return sorted(found, key=lambda block: block.call)


def _repeated(flow: Flow, siblings: list[int], outer: bool) -> set[int]:
    """Those among the calls of one parent that are alike: in one list, of one class, or of one module."""
    groups: dict[tuple[str, str], list[int]] = {}
    for i in siblings:
        call = flow.calls[i]
        if not _carried(flow, i) or (call.leaf and not outer):
            continue
        prefix, _, last = call.path.rpartition(".")
        if last.isdecimal():
            groups.setdefault(("list", prefix), []).append(i)
        if outer and not call.leaf:
            groups.setdefault(("kind", call.kind), []).append(i)
        groups.setdefault(("module", call.path), []).append(i)
    members: set[int] = set()
    for (how, _), group in groups.items():
        listed = any(flow.calls[i].path.rpartition(".")[2].isdecimal() for i in group)
        if how == "kind" and len(group) < 3 and not listed:
            continue  # two attentions of one class are no run of blocks
        shapes = Counter(spec for i in group for spec in _carried(flow, i))
        common, count = shapes.most_common(1)[0]
        alike = [i for i in group if common in _carried(flow, i)]
        alone = how == "list" and not outer and len(flow.calls[group[0]].outputs) == 1 and attends(flow, group[0])
        if (count >= 2 or alone) and _kin_flops(flow, alike, common) >= _GROUP_SHARE * flow.total:
            members.update(alike)
    return members


def _kin_flops(flow: Flow, group: Sequence[int], common: TensorSpec) -> float:
    """FLOPs of a group and of its kin under other parents: a U-Net has few blocks a level, but many levels."""
    kinds = {flow.calls[i].kind for i in group if not flow.calls[i].leaf}
    kinds = {kind for kind in kinds if not hasattr(nn, kind)}  # containers of PyTorch say nothing of what they hold
    kin = {i for i, call in enumerate(flow.calls) if call.kind in kinds and common in _carried(flow, i)}
    return sum(flow.call_flops[i] for i in kin.union(group))


def _carried(flow: Flow, call: int) -> set[TensorSpec]:
    """The shapes a call hands on; empty if an output has none of its inputs' shapes."""
    inputs = {flow.spec(node) for node in flow.call_inputs(call)}
    outputs = {spec for node in flow.call_outputs(call) if (spec := flow.spec(node)) is not None}
    return outputs if outputs <= inputs else set()


# -- the stack ----------------------------------------------------------------------------------------------------


def trunk(flow: Flow, blocks: Sequence[Block]) -> list[Block]:
    """The outermost blocks that carry the latent and have one caller: the main run of blocks, in order."""
    callers: dict[int, list[Block]] = {}
    for block in blocks:
        if block.outer and any(node in flow.from_latent for node in block.outputs):
            callers.setdefault(flow.calls[block.call].parent, []).append(block)
    runs = [(sum(flow.call_flops[b.call] for b in run), run) for run in callers.values() if len(run) > 1]
    flops, run = max(runs, key=lambda item: item[0], default=(0.0, []))
    return run if flops >= _STACK_SHARE * sum(flow.flops.get(node.name, 0.0) for node in flow.from_latent) else []


def stack_candidates(flow: Flow, run: Sequence[Block], axes: Mapping[fx.Node, Axes]) -> Iterator[Candidate]:
    """The whole run as one site, on the residual after its first block, its input, or its second block."""
    if not run:
        return
    name, path = f"{run[0].name}..{run[-1].name}", flow.calls[run[0].call].path
    boundaries = {"stack": (1, run[0].outputs), "stack0": (0, run[0].inputs)}
    if len(run) > 3:
        boundaries["stack2"] = (2, run[1].outputs)
    blocks_flops = sum(flow.call_flops[block.call] for block in run)
    for role, (first, boundary) in boundaries.items():
        values, anchors = stack_cut(flow, run, boundary, axes)
        if role == "stack" and (not values or flow.saved(values, anchors) < _STACK_SAVES * blocks_flops):
            return  # no cut behind the run: its blocks' values leave it in other ways, too
        if role == "stack" or None not in anchors:
            yield Candidate(role, f"{role}:{name}", values, anchors, path, run[first].call)


def stack_cut(
    flow: Flow, run: Sequence[Block], boundary: Sequence[fx.Node], axes: Mapping[fx.Node, Axes]
) -> tuple[tuple[fx.Node, ...], tuple[fx.Node | None, ...]]:
    """The value behind all blocks that continues a boundary value; several values where no single one is behind all."""
    behind = flow.common_post_dominators([node for block in run for node in block.outputs])
    cuts = [node for node in behind if flow.eligible(node)]
    for value in cuts:
        anchor = _anchor(flow, value, boundary, axes)
        if anchor is not None:
            return (value,), (anchor,)
    if cuts:
        return (cuts[0],), (None,)
    last = tuple(node for node in run[-1].outputs if flow.eligible(node))[:MAX_VALUES]
    return last, paired(flow, last, boundary, axes)


def _anchor(flow: Flow, value: fx.Node, boundary: Sequence[fx.Node], axes: Mapping[fx.Node, Axes]) -> fx.Node | None:
    """The boundary value of the same shape; among several, the one whose stream the latent started."""
    fitting = [
        node
        for node in boundary
        if node is not value
        and flow.readable(node)
        and flow.alike(node, value)
        and flow.index[node] < flow.index[value]
        and same_order(axes.get(node), axes.get(value))
    ]
    stream = flow.stream(value) if len(fitting) > 1 else set()
    return max(
        fitting, key=lambda node: (flow.carries_latent(node), node in stream, node.op != "placeholder"), default=None
    )


def paired(
    flow: Flow, values: Sequence[fx.Node], boundary: Sequence[fx.Node], axes: Mapping[fx.Node, Axes]
) -> tuple[fx.Node | None, ...]:
    """One boundary value of the same shape and order of tokens for each value, none twice; streams first."""
    pairs: dict[fx.Node, fx.Node] = {}
    for by_stream in (True, False):
        for value in values:
            stream = flow.stream(value) if by_stream else None
            for node in boundary:
                fits = flow.readable(node) and flow.alike(node, value) and flow.index[node] < flow.index[value]
                taken = value in pairs or node in pairs.values() or node in values
                ordered = fits and not taken and same_order(axes.get(node), axes.get(value))
                if ordered and (stream is None or node in stream):
                    pairs[value] = node
    return tuple(pairs.get(value) for value in values)


# -- single blocks and their children ------------------------------------------------------------------------------


def block_candidates(flow: Flow, blocks: Sequence[Block], axes: Mapping[fx.Node, Axes]) -> Iterator[Candidate]:
    """Each block on the residual over its inputs."""
    for block in blocks:
        if 0 < len(block.outputs) <= MAX_VALUES and _cacheable(flow, block.outputs):
            anchors = paired(flow, block.outputs, varying(flow, block.inputs), axes)
            path = flow.calls[block.call].path
            yield Candidate("block", f"block:{block.name}", block.outputs, anchors, path, block.call)


def _cacheable(flow: Flow, values: Sequence[fx.Node]) -> bool:
    """Whether these are eligible and hang on the latent: what hangs on the prompt alone is hoisted, not forecast."""
    return all(map(flow.eligible, values)) and any(node in flow.from_latent for node in values)


def varying(flow: Flow, nodes: Sequence[fx.Node]) -> list[fx.Node]:
    return [node for node in nodes if node.meta.get("tainted")]


def child_candidates(flow: Flow, blocks: Sequence[Block], share: float = _CHILD_SHARE) -> Iterator[Candidate]:
    """Attention and feed-forward children of the innermost blocks: what they hand out, as it is.

    A feed-forward child must do this share of the block's work; what attends counts at any.
    """
    names = call_names(flow)
    children: dict[int, list[int]] = {}
    for i, call in enumerate(flow.calls):
        children.setdefault(call.parent, []).append(i)
    for block in blocks:
        if any(flow.inside_call(other.call, block.call) for other in blocks):
            continue
        for i in children.get(block.call, ()):
            found = _child(flow, block, i, names[i], share)
            if found is not None and flow.saved(found.values, ()) <= _CHILD_SAVES * flow.call_flops[block.call]:
                yield found


def _child(flow: Flow, block: Block, call: int, name: str, share: float) -> Candidate | None:
    """One child as a site, if it does a good part of the block's work and hands out one or two tensors."""
    outputs = tuple(flow.call_outputs(call))
    is_attention = attends(flow, call)
    small = not is_attention and flow.call_flops[call] < share * flow.call_flops[block.call]
    if small or not 0 < len(outputs) <= 2:
        return None
    if not _cacheable(flow, outputs) or (
        flow.calls[call].leaf and not is_attention and not _closes(flow, call, outputs, block)
    ):
        return None
    role, short = ("attention", "attn") if is_attention else ("feedforward", "ff")
    return Candidate(role, f"{short}:{name}", outputs, (None,) * len(outputs), flow.calls[call].path, call)


def _closes(flow: Flow, call: int, outputs: Sequence[fx.Node], block: Block) -> bool:
    """Whether a leaf is the linear layer that ends a branch: it has the shape of what the block hands on."""
    weight = getattr(flow.module.get_submodule(flow.calls[call].path), "weight", None)
    linear = weight is not None and weight.dim() == 2
    return linear and all(any(flow.alike(node, out) for out in block.outputs) for node in outputs)
