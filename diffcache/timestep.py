"""Which input of a denoiser is the timestep, told by what is done with it, and which value embeds it.

Enters: a ``Flow``. Leaves: a node or None. Where calibration has seen the calls, the clock of its pattern is certain
and should be given by name instead.
"""

from __future__ import annotations

from torch import fx

from diffcache.flow import Flow, lowest_above, target_name

_WAVES = frozenset(("sin", "cos", "sin_", "cos_"))


def clock_node(flow: Flow, name: str | None = None) -> fx.Node | None:
    """The timestep: the first input of one number a sample that is turned into sines, else the first floating one.

    Guidance scales are embedded in the same way; where a denoiser takes one, the timestep is the one given first.

    Raises:
        ValueError: ``name`` is no input of this graph.
    """
    inputs = [node for node in flow.order if "input" in node.meta]
    if name is not None:
        for node in inputs:
            if node.name == name or str(node.target) == name:
                return node
        raise ValueError(f"no input is named '{name}'; the inputs are {[node.name for node in inputs]}")
    numbers = [node for node in inputs if node is not flow.latent and _is_number(flow, node)]
    for node in numbers:
        if any(target_name(n, flow.module) in _WAVES for n in flow.reached_from(node) - flow.from_latent):
            return node
    return next((n for n in numbers if (spec := flow.spec(n)) is None or spec.dtype.is_floating_point), None)


def timestep_embedding(flow: Flow, clock: fx.Node) -> fx.Node | None:
    """The last value through which all that the latent meets of the timestep has passed; where the denoiser embeds the
    timestep more than once, the first that the latent meets."""
    timed = flow.reached_from(clock) - flow.from_latent
    above: dict[fx.Node, fx.Node | None] = {}
    depth: dict[fx.Node | None, int] = {None: 0}
    for node in flow.order:
        if node in timed:
            above[node] = _shared([n for n in flow.inputs[node] if n in timed], above, depth)
            depth[node] = depth[above[node]] + 1
    met = [n for node in flow.order if node in flow.from_latent for n in flow.inputs[node] if n in timed]
    last = _shared(met, above, depth)
    if last is not None and last is not clock and flow.readable(last):
        return last
    return next((n for n in met if flow.readable(n)), None)


def _shared(
    nodes: list[fx.Node], above: dict[fx.Node, fx.Node | None], depth: dict[fx.Node | None, int]
) -> fx.Node | None:
    """The last node through which the timestep has passed on its way to all of these."""
    found: fx.Node | None = nodes[0] if nodes else None
    for node in nodes[1:]:
        found = lowest_above(found, node, above, depth)
    return found


def _is_number(flow: Flow, node: fx.Node) -> bool:
    """Whether an input is a Python number, or a tensor of one number for all or for each sample."""
    spec, latent = flow.spec(node), flow.spec(flow.latent) if flow.latent is not None else None
    if spec is None:
        return node.op == "placeholder" or bool(node.meta.get("tainted"))
    return len(spec.shape) == 0 or (len(spec.shape) == 1 and (latent is None or spec.shape[0] in (1, latent.shape[0])))
