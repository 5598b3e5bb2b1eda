"""Residual blocks whose input has another shape than their output, as on a U-Net's way up.

Enters: an ``Anatomy``. Leaves: candidates. Such a block is of one kind with a repeated block, and ends in an addition
onto a projection of its input: that projection is the anchor.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from diffcache.anatomy import Anatomy
from diffcache.blocks import call_names, varying
from diffcache.flow import CATS, JOINS, Candidate, Flow, target_name


def residual_candidates(anatomy: Anatomy) -> Iterator[Candidate]:
    """Calls of one kind with a repeated block that are none themselves, because their input has another shape."""
    flow, known = anatomy.flow, {block.call for block in anatomy.blocks}
    kinds = {flow.calls[call].kind for call in known if not flow.calls[call].leaf}
    names = call_names(flow)
    for i, call in enumerate(flow.calls):
        if i in known or call.leaf or call.kind not in kinds:
            continue
        outputs = flow.call_outputs(i)
        entered = any(node in flow.from_latent for node in varying(flow, flow.call_inputs(i)))
        if len(outputs) == 1 and entered and outputs[0] in flow.from_latent and flow.eligible(outputs[0]):
            anchor = _shortcut(flow, i, outputs[0])
            yield Candidate("block", f"block:{names[i]}", (outputs[0],), (anchor,), call.path, i)


def _shortcut(flow: Flow, call: int, value: fx.Node) -> fx.Node | None:
    """The lighter operand of the addition that ends a block; None where it ends in no addition."""
    node = value
    while target_name(node, flow.module) not in JOINS - CATS:
        before = [n for n in flow.inputs[node] if flow.alike(n, value) and flow.inside(n, call)]
        if len(before) != 1:
            return None
        node = before[0]
    operands = [n for n in flow.inputs[node] if flow.alike(n, value) and flow.readable(n) and n is not value]
    if len(operands) != 2:
        return None
    weights = [sum(flow.flops.get(n.name, 0.0) for n in {*flow.ancestors(o), o} if flow.inside(n, call))
               for o in operands]  # fmt: skip
    return operands[weights.index(min(weights))]
