"""``torch.compile(model, backend="diffcache")``: inductor, with step-invariant work hoisted out of repeated calls.

Enters: a graph of a model that is called again and again, with some inputs that do not change (weights, the prompt).
Leaves: two compiled graphs. What depends on the unchanged inputs alone runs once, the rest at every call. Which inputs
those are is seen at the second call, and checked at every call after it: a changed one runs the first graph again.
Nothing is approximated; results are those of inductor up to where it rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.registry import lookup_backend

from diffcache.graphs import copy_graph_module, find_output
from diffcache.lower import lower
from diffcache.streams import unchanged, version


def backend(module: fx.GraphModule, example_inputs: list[Any], **options: Any) -> Any:
    """The Dynamo backend. Calls that need gradients go to inductor as they are."""
    needs_gradients = any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs)
    if torch.is_grad_enabled() and needs_gradients:
        return lookup_backend("inductor")(module, example_inputs, **options)
    return aot_autograd(fw_compiler=_boxed, inference_compiler=_boxed)(module, example_inputs)


class Hoisting:
    """A functional graph that learns at its second call what need not be computed again."""

    def __init__(self, module: fx.GraphModule):
        self.module = module
        self._last: list[tuple[Any, Any]] | None = None  # every input of the first call, with its version
        self._body: Any = None
        self._prologue: Any = None
        self._watched: list[int] = []
        self._known: list[tuple[Any, Any]] = []
        self._hoisted: Sequence[Any] = ()

    def __call__(self, *inputs: Any) -> Any:
        if self._body is None:
            if self._last is None:  # one call tells nothing: run it as it is
                self._last = [(x, version(x)) for x in inputs]
                return self.module(*inputs)
            same = [unchanged(*known, new) for known, new in zip(self._last, inputs, strict=True)]
            self._split(frozenset(place for place, hold in enumerate(same) if hold))
            self._last = None
        if self._prologue is not None:
            given = [inputs[place] for place in self._watched]
            if not self._known or not all(unchanged(*k, new) for k, new in zip(self._known, given, strict=True)):
                self._hoisted = self._prologue(*inputs)
                self._known = [(x, version(x)) for x in given]
        return self._body(*inputs, *self._hoisted)

    def _split(self, invariant: frozenset[int]) -> None:
        body, prologue, self._watched = split(self.module, invariant)
        self._body = lower(body, "inductor")
        self._prologue = None if prologue is None else lower(prologue, "inductor")


def split(module: fx.GraphModule, invariant: frozenset[int]) -> tuple[fx.GraphModule, fx.GraphModule | None, list[int]]:
    """The graph with what the ``invariant`` inputs decide as further inputs; the graph that makes those; their inputs.

    Only values that took work are moved: not views of an input, and not constants, which cost nothing where they are.
    """
    body = copy_graph_module(module)
    graph = body.graph
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    fixed = {node for place, node in enumerate(inputs) if place in invariant}
    worked: set[fx.Node] = set()
    returned = _returned(graph)
    for node in graph.nodes:
        if node.op == "get_attr":
            fixed.add(node)
        elif node in returned:
            continue
        elif node.op == "call_function" and _pure(node) and all(source in fixed for source in node.all_input_nodes):
            fixed.add(node)
            from_work = any(source in worked for source in node.all_input_nodes)
            if from_work or (node.all_input_nodes and not _is_view(node)):
                worked.add(node)
    moved = [node for node in graph.nodes if node in worked and any(user not in fixed for user in node.users)]
    moved = [node for node in moved if isinstance(node.meta.get("val"), torch.Tensor)]
    if not moved:
        return body, None, []
    prologue = _prologue(module, [node.name for node in moved])
    used = {node.name for node in prologue.graph.nodes if node.op == "placeholder" and node.users}
    last = inputs[-1]
    for index, node in enumerate(moved):
        with graph.inserting_after(last):
            last = graph.placeholder(f"hoisted_{index}")
        last.meta = dict(node.meta)
        node.replace_all_uses_with(last)
    graph.eliminate_dead_code()
    body.recompile()
    return body, prologue, [place for place, node in enumerate(inputs) if node.name in used]


def _returned(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose memory the caller gets: it may write there, so each call makes its own."""
    found: set[fx.Node] = set()
    todo = list(find_output(graph).all_input_nodes)
    while todo:
        node = todo.pop()
        found.add(node)
        if _is_view(node):
            todo += node.all_input_nodes
    return found


def _prologue(module: fx.GraphModule, names: Sequence[str]) -> fx.GraphModule:
    prologue = copy_graph_module(module)
    named = {node.name: node for node in prologue.graph.nodes}
    find_output(prologue.graph).args = (tuple(named[name] for name in names),)
    for node in reversed(prologue.graph.nodes):  # also what draws random numbers, which eliminate_dead_code keeps
        if not node.users and node.op not in ("placeholder", "output"):
            prologue.graph.erase_node(node)
    prologue.recompile()
    return prologue


def _pure(node: fx.Node) -> bool:
    """Whether running it once is the same as running it every time."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__name__", "") == "getitem"
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def _is_view(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.is_view


def _boxed(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
    hoisting = Hoisting(module)

    def run(inputs: list[Any]) -> Any:
        given = list(inputs)
        inputs.clear()
        return hoisting(*given)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run
