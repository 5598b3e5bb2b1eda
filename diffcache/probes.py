"""Probes: values that are cheap to compute and tell, before a step is computed, whether it needs to be.

Enters: an ``Anatomy``. Leaves: probes by name, each a ``Site`` of role "probe": a gate compares its values (minus their
anchors, where it has them) with those of earlier steps.

* ``latent``: what the sampler hands in. ``output``: what the denoiser returned (of the step before).
* ``timestep``: the embedding of the timestep that the first block reads (TeaCache on models whose blocks share one).
* ``modulated``: what the first attention of the first block projects to queries, normed and modulated by the timestep
  where the block does so (TeaCache).
* ``stack_input``: the streams that enter the first block. ``first_block``: what it adds to them (FBCache).
* ``blocks[:m]``: what the first ``m`` blocks add (DBCache's Fn, DiCache's probe); any ``blocks[first:last]`` will do.
* ``input:<path>`` and ``modulated:<path>`` of each block, and ``input:<path>`` of each attention and feed-forward child
  (LazyDiT, RFC); ``<path>`` as in the site's own name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import fx

from diffcache.anatomy import Anatomy
from diffcache.attention_kinds import attention_operands
from diffcache.blocks import Block, call_names, child_candidates, varying
from diffcache.cuts import output_candidates
from diffcache.flow import Candidate, target_name
from diffcache.ranges import is_requested, range_name
from diffcache.residual_blocks import residual_candidates
from diffcache.sites import Site, measured, named_site
from diffcache.timestep import clock_node, timestep_embedding

_PROJECTIONS = frozenset("linear conv1d conv2d conv3d".split())


def find_probes(anatomy: Anatomy, wanted: Iterable[str] = (), clock: str | None = None) -> dict[str, Site]:
    """The probes of a denoiser by name; which there are depends on what it is made of.

    Args:
        anatomy: a capture taken apart.
        wanted: further probes to make by name: ``blocks[:m]``.
        clock: name of the input that is the timestep; by default found from what is done with it.

    Raises:
        ValueError: a wanted probe cannot be made here.
    """
    found = [_latent(anatomy), _output(anatomy), _timestep(anatomy, clock), *_of_first_block(anatomy, clock),
             *_of_blocks(anatomy), *_of_residual_blocks(anatomy), *_of_children(anatomy)]  # fmt: skip
    probes: dict[str, Site] = {}
    for candidate in found:
        if candidate is not None and candidate.values:
            probes.setdefault(candidate.name, measured(anatomy, candidate))
    if anatomy.trunk:
        with contextlib.suppress(ValueError):  # what leaves the first block may be written in place
            probes["first_block"] = replace(named_site(anatomy, range_name(0, 1)), name="first_block", role="probe")
    for name in wanted:
        if name not in probes:
            if not is_requested(name):
                raise ValueError(f"no probe is named '{name}'; there are {', '.join(probes)}, and any blocks[:m]")
            probes[name] = replace(named_site(anatomy, name), role="probe")
    return probes


def probe_flops(anatomy: Anatomy, probe: Site) -> float:
    """FLOPs of one call that a probe needs, its anchors included: what looking before each step costs."""
    names = [*probe.values, *(anchor for anchor in probe.anchors if anchor)]
    return anatomy.needed_flops(anatomy.flow.named(names))


def _probe(name: str, values: Sequence[fx.Node], path: str = "", call: int = -1) -> Candidate:
    return Candidate("probe", name, tuple(values), (None,) * len(values), path, call)


def _latent(anatomy: Anatomy) -> Candidate | None:
    latent = anatomy.flow.latent
    return _probe("latent", [latent]) if latent is not None and anatomy.flow.readable(latent) else None


def _output(anatomy: Anatomy) -> Candidate | None:
    found = next(output_candidates(anatomy.flow), None)
    return _probe("output", found.values) if found is not None else None


def _timestep(anatomy: Anatomy, clock: str | None) -> Candidate | None:
    """What the first block reads of the timestep alone; where it takes no such input, the embedding that all share."""
    flow, start = anatomy.flow, clock_node(anatomy.flow, clock)
    if start is None:
        return None
    timed = flow.reached_from(start) - flow.from_latent
    read = [n for block in anatomy.trunk[:1] for n in block.inputs if n in timed and flow.readable(n)]
    found = max(read, key=lambda node: flow.index[node]) if read else timestep_embedding(flow, start)
    return _probe("timestep", [found]) if found is not None else None


# -- the first block ------------------------------------------------------------------------------------------------


def _first(anatomy: Anatomy) -> Block | None:
    """The first block of the trunk; without one, the first block that carries the latent."""
    carrying = (b for b in anatomy.blocks if any(n in anatomy.flow.from_latent for n in b.outputs))
    return anatomy.trunk[0] if anatomy.trunk else next(carrying, None)


def _of_first_block(anatomy: Anatomy, clock: str | None) -> Iterable[Candidate]:
    first = _first(anatomy)
    if first is not None:
        path = anatomy.flow.calls[first.call].path
        yield _probe("stack_input", _streams_into(anatomy, first), path, first.call)
        if not anatomy.trunk and len(first.outputs) == 1:
            anchor = next((n for n in _streams_into(anatomy, first) if anatomy.flow.alike(n, first.outputs[0])), None)
            yield Candidate("probe", "first_block", first.outputs, (anchor,), path, first.call)
    for call in [block.call for block in anatomy.trunk] or [0]:  # without a trunk, anywhere in the denoiser
        value = _query_input(anatomy, call)
        if value is not None:
            yield _probe("modulated", [value], str(value.meta.get("path", "")), call)
            return
    value = _meeting(anatomy, clock)
    if value is not None:
        yield _probe("modulated", [value], str(value.meta.get("path", "")))


def _meeting(anatomy: Anatomy, clock: str | None) -> fx.Node | None:
    """Without attention: the first value that hangs on both the latent and the timestep."""
    flow, start = anatomy.flow, clock_node(anatomy.flow, clock)
    timed = flow.reached_from(start) if start is not None else set()
    return next((n for n in flow.order if n in timed and n in flow.from_latent and flow.eligible(n)), None)


def _streams_into(anatomy: Anatomy, block: Block) -> list[fx.Node]:
    """The inputs of a block that hang on the latent."""
    return _streams(anatomy, varying(anatomy.flow, block.inputs))


def _streams(anatomy: Anatomy, nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Those that hang on the latent; the stream that it began comes first, as a gate looks at the first value."""
    found = [n for n in nodes if n in anatomy.flow.from_latent and anatomy.flow.readable(n)]
    return sorted(found, key=anatomy.foreign)


def _query_input(anatomy: Anatomy, call: int) -> fx.Node | None:
    """What the first attention in a call projects to queries; of several streams the one that the latent began.

    An attention that looks at the prompt only counts where there is no other.
    """
    flow = anatomy.flow
    operands = sorted(attention_operands(flow, call), key=lambda found: found[1] not in flow.from_latent)
    for query, _, _ in operands:
        found = [node for node in _projected(anatomy, query, call) if flow.readable(node)]
        if found:
            return min(found, key=lambda node: (anatomy.foreign(node), flow.index[node]))
    return None


def _projected(anatomy: Anatomy, query: fx.Node, call: int) -> list[fx.Node]:
    """What is projected to these queries: the walk back ends at the first products with weights."""
    flow = anatomy.flow
    found: list[fx.Node] = []
    seen, todo = {query}, [query]
    while todo:
        node = todo.pop()
        before = [n for n in flow.inputs[node] if n in flow.from_latent]
        if _projects(anatomy, node) or not flow.inside(node, call):
            found += before[:1] if flow.inside(node, call) else [node]
            continue
        new = [n for n in before if n not in seen]
        seen.update(new)
        todo += new
    return found


def _projects(anatomy: Anatomy, node: fx.Node) -> bool:
    if node.op != "call_module":
        return target_name(node, anatomy.flow.module) in _PROJECTIONS
    weight = getattr(anatomy.flow.module.get_submodule(str(node.target)), "weight", None)
    return weight is not None and weight.dim() > 1


# -- every block and its children -----------------------------------------------------------------------------------


def _of_blocks(anatomy: Anatomy) -> Iterable[Candidate]:
    flow = anatomy.flow
    for block in anatomy.blocks:
        path = flow.calls[block.call].path
        yield _probe(f"input:{block.name}", _streams_into(anatomy, block), path, block.call)
        value = _query_input(anatomy, block.call)
        if value is not None:
            yield _probe(f"modulated:{block.name}", [value], path, block.call)


def _of_residual_blocks(anatomy: Anatomy) -> Iterable[Candidate]:
    """The inputs of blocks whose input has another shape than their output."""
    flow, names = anatomy.flow, call_names(anatomy.flow)
    for block in residual_candidates(anatomy):
        given = [n for n in flow.call_inputs(block.call) if n in flow.from_latent and flow.readable(n)]
        yield _probe(f"input:{names[block.call]}", given, block.path, block.call)


def _of_children(anatomy: Anatomy) -> Iterable[Candidate]:
    flow, names = anatomy.flow, call_names(anatomy.flow)
    for child in child_candidates(flow, anatomy.blocks):
        given = _streams(anatomy, flow.call_inputs(child.call))
        yield _probe(f"input:{names[child.call]}", given, child.path, child.call)
