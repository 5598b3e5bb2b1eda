"""Exact. What follows a forecast is done in the kernel that makes it: a gated residual add, a modulated layer norm.

Before::

    %3 = extrapolate(None, [history_0_0_0, history_0_0_1], weights_0)
    %4 = %2 * %3                        # the block's gate
    %5 = %1 + %4
    %6 = norm(%5)                       # a layer norm without weights
    %7 = %6 * scale
    %8 = %7 + shift

After::

    %3 = extrapolate_modulate(%1, [history_0_0_0, history_0_0_1], weights_0, scale, shift, 1e-06, %2)
    %5 = %3[0]                          # only where something else needs it
    %8 = %3[1]

Needs ``apply_schedule``; leaves nothing dead. The operation rounds where the nodes that it replaces round.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from diffcache.ops import extrapolate, extrapolate_modulate
from diffcache.tracing.spec import TensorSpec

ADD, MUL = ("add", "__add__", torch.add, operator.add), ("mul", "__mul__", torch.mul, operator.mul)


def fuse_forecasts(gm: fx.GraphModule) -> fx.GraphModule:
    """Rewrite every forecast whose only users are what the kernels can do."""
    for node in [node for node in gm.graph.nodes if node.target is extrapolate]:
        fused = _fuse_gate(gm.graph, node)
        _fuse_norm(gm, fused)
    return gm


def _fuse_gate(graph: fx.Graph, forecast: fx.Node) -> fx.Node:
    """``other + gate * forecast`` as one node; returns the node that makes the value."""
    anchor, history, weights, *rest = forecast.args
    scaled = _only_user(forecast, MUL)
    total = _only_user(scaled, ADD) if scaled is not None else None
    if anchor is not None or scaled is None or total is None:
        return forecast
    gate, other = _other(scaled, forecast), _other(total, scaled)
    if gate is None or other is None or not _alike(forecast, other, total) or not _fit(forecast, gate, scaled):
        return forecast
    with graph.inserting_before(total):
        fused = graph.call_function(extrapolate, (other, history, weights, gate, *rest[1:]))
    fused.meta = dict(total.meta)
    total.replace_all_uses_with(fused)
    _erase(graph, (total, scaled, forecast))
    return fused


def _fuse_norm(gm: fx.GraphModule, forecast: fx.Node) -> None:
    """``norm(value) * factor + shift`` in the node that makes the value."""
    graph = gm.graph
    norm = next((user for user in forecast.users if _norm_eps(gm, user, forecast) is not None), None)
    scaled = _only_user(norm, MUL) if norm is not None else None
    total = _only_user(scaled, ADD) if scaled is not None else None
    if norm is None or scaled is None or total is None:
        return
    factor, shift = _other(scaled, norm), _other(total, scaled)
    if factor is None or shift is None or not _alike(forecast, norm, scaled, total):
        return
    order = {node: place for place, node in enumerate(graph.nodes)}
    others = [user for user in forecast.users if user is not norm]
    ready = max(order[factor], order[shift], order[forecast])
    if not _fit(forecast, factor, shift) or any(order[user] <= ready for user in others):
        return
    anchor, history, weights, *rest = forecast.args
    with graph.inserting_after(max((factor, shift, forecast), key=order.__getitem__)):
        both = graph.call_function(
            extrapolate_modulate,
            (anchor, history, weights, factor, shift, _norm_eps(gm, norm, forecast), *(rest or [None])),
            {"keep": bool(others)},
        )
    with graph.inserting_after(both):
        modulated = graph.call_function(operator.getitem, (both, 1))
    both.meta = {"val": (forecast.meta.get("val"), total.meta.get("val")), "path": norm.meta.get("path", "")}
    modulated.meta = dict(total.meta)
    total.replace_all_uses_with(modulated)
    if others:
        with graph.inserting_after(both):
            value = graph.call_function(operator.getitem, (both, 0))
        value.meta = dict(forecast.meta)
        forecast.replace_all_uses_with(value, delete_user_cb=lambda user: user is not norm)
    _erase(graph, (total, scaled, norm, forecast))


def _only_user(node: fx.Node, kinds: tuple[Any, ...]) -> fx.Node | None:
    """The one node that uses ``node``, if it is one of the kinds, of two operands and nothing more."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    plain = user.op in ("call_method", "call_function") and user.target in kinds and len(user.args) == 2
    return user if plain and not user.kwargs and not user.meta.get("writes") else None


def _other(user: fx.Node, known: fx.Node) -> fx.Node | None:
    """The operand that is not ``known``."""
    left, right = user.args
    found = right if left is known else left
    return found if isinstance(found, fx.Node) and found is not known else None


def _norm_eps(gm: fx.GraphModule, node: fx.Node, value: fx.Node) -> float | None:
    """What a layer norm of ``value`` over its last dimension without weights adds to the variance; None for others."""
    shape: Any = None
    eps: Any = None
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        if type(module) is nn.LayerNorm and module.weight is None and module.bias is None:
            shape, eps = module.normalized_shape, module.eps
    elif node.op == "call_function" and node.target is F.layer_norm and node.args:
        given = dict(zip(("input", "normalized_shape", "weight", "bias", "eps"), node.args, strict=False)) | node.kwargs
        if given.get("weight") is None and given.get("bias") is None:
            shape, eps = given["normalized_shape"], given.get("eps", 1e-5)
    spec = value.meta.get("val")
    fits = shape is not None and spec is not None and tuple(shape) == tuple(spec.shape[-1:])
    return eps if fits and isinstance(eps, float) else None


def _alike(first: fx.Node, *others: fx.Node) -> bool:
    """Whether all are tensors of the same shape and dtype."""
    specs = _specs(first, *others)
    return len(specs) == 1 + len(others) and all((s.shape, s.dtype) == (specs[0].shape, specs[0].dtype) for s in specs)


def _fit(first: fx.Node, *others: fx.Node) -> bool:
    """Whether all are tensors of the first one's dtype that broadcast to its shape."""
    specs = _specs(first, *others)
    return len(specs) == 1 + len(others) and all(
        s.dtype == specs[0].dtype
        and len(s.shape) <= len(specs[0].shape)
        and all(size in (1, full) for size, full in zip(s.shape[::-1], specs[0].shape[::-1], strict=False))
        for s in specs
    )


def _specs(*nodes: fx.Node) -> list[TensorSpec]:
    return [spec for node in nodes if isinstance(spec := node.meta.get("val"), TensorSpec)]


def _erase(graph: fx.Graph, nodes: Iterable[fx.Node]) -> None:
    for node in nodes:
        if not node.users:
            graph.erase_node(node)
