"""One capture's data flow, with what site finding asks of it: users, calls, post-dominators and FLOPs.

Enters: a captured graph, its module calls and its cost. Everything is computed once; a query costs a walk at most.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from diffcache.cost import Cost
from diffcache.liveness import is_root, live_nodes, sources
from diffcache.tracing.recorder import ModuleCall
from diffcache.tracing.spec import TensorSpec

# Operators that hand their operand's residual stream on: what comes out is what went in, plus something.
_ADDITIVE = frozenset(
    "add __add__ __radd__ __iadd__ add_ sub __sub__ addcmul to type_as float half bfloat16 contiguous clone dropout "
    "Dropout Identity".split()
)
# What these make depends on the shape, dtype and device of all their operands, or of all but the first.
_SHAPED_LIKE = frozenset("zeros_like ones_like empty_like rand_like randn_like new_zeros new_ones new_empty".split())
_CAST_LIKE = frozenset("type_as to expand_as view_as reshape_as".split())

# Joins of two branches: concatenation, and the additions among the above.
CATS = frozenset(("cat", "concat", "concatenate"))
JOINS = CATS | frozenset(("add", "__add__", "__radd__", "__iadd__", "add_", "addcmul"))


@dataclass(frozen=True)
class Candidate:
    """A cut before it is measured and named for good. ``anchors[i]`` goes with ``values[i]``.

    ``call`` is the module call whose work it stands for, -1 for none in particular.
    """

    role: str
    name: str
    values: tuple[fx.Node, ...]
    anchors: tuple[fx.Node | None, ...]
    path: str
    call: int = -1


def target_name(node: fx.Node, module: fx.GraphModule) -> str:
    """The function or method a node calls, or the class of the module it calls."""
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))).__name__
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


class Flow:
    """A captured graph as site finding sees it. Only live nodes count."""

    def __init__(self, module: fx.GraphModule, calls: Sequence[ModuleCall], cost: Cost) -> None:
        self.module, self.calls, self.flops = module, calls, cost.flops
        self.graph = module.graph
        self.live = live_nodes(self.graph)
        self.order = [node for node in self.graph.nodes if node in self.live]
        self.index = {node: i for i, node in enumerate(self.order)}
        self.by_name = {node.name: node for node in self.order}
        self.total = self._sum(self.live)
        self.users: dict[fx.Node, list[fx.Node]] = {node: [] for node in self.order}
        self.inputs: dict[fx.Node, list[fx.Node]] = {}  # those whose values count, not only their shape or dtype
        for node in self.order:
            self.inputs[node] = [source for source in _data_sources(node) if source in self.live]
            for source in self.inputs[node]:
                self.users[source].append(node)
        self._input_memory = {node.meta.get("storage") for node in self.order if "input" in node.meta} - {None}
        self._end_of_call = self._call_ends()
        self._made: dict[int, list[fx.Node]] = {}
        for node in self.order:
            self._made.setdefault(node.meta.get("call", -1), []).append(node)
        self.call_flops = self._call_flops()
        self.output_tensors = self._output_tensors()
        self.latent = self._latent()
        self.from_latent = self.reached_from(self.latent)

    def _sum(self, nodes: Iterable[fx.Node]) -> float:
        return sum(self.flops.get(node.name, 0.0) for node in nodes)

    # -- nodes -------------------------------------------------------------------------------------------------

    def spec(self, node: fx.Node) -> TensorSpec | None:
        """Shape and dtype of a node that is one tensor, else None."""
        value = node.meta.get("val")
        return value if isinstance(value, TensorSpec) else None

    def readable(self, node: fx.Node) -> bool:
        """Whether a node can be an anchor: one floating tensor that nothing writes into."""
        spec = self.spec(node)
        return (
            node in self.live
            and spec is not None
            and spec.dtype.is_floating_point
            and math.prod(spec.shape) > 0
            and not node.meta.get("mutated")
        )

    def eligible(self, node: fx.Node) -> bool:
        """Whether a node's value can be cached: it varies, is computed here, and is no view of an input."""
        return (
            node.op.startswith("call_")
            and bool(node.meta.get("tainted"))
            and self.readable(node)
            and node.meta.get("storage") not in self._input_memory
        )

    def alike(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether two tensors have the same shape, dtype and device."""
        return self.spec(a) is not None and self.spec(a) == self.spec(b)

    def named(self, names: Iterable[str]) -> list[fx.Node]:
        """The live nodes of these names, each once."""
        return [self.by_name[name] for name in dict.fromkeys(names) if name in self.by_name]

    def saved(self, values: Collection[fx.Node], anchors: Iterable[fx.Node | None]) -> float:
        """FLOPs that are no longer run when the values are given and the anchors wanted."""
        kept = [anchor for anchor in anchors if anchor is not None]
        if self._guarded:
            return self.total - self._sum(live_nodes(self.graph, values, kept))
        return self._sum(self._dead(values, kept))

    def _dead(self, values: Collection[fx.Node], kept: Collection[fx.Node]) -> list[fx.Node]:
        """What ``live_nodes`` leaves out, found from the values down: nodes that only dead nodes need."""
        needs, readers = self._needs
        left: dict[fx.Node, int] = {}
        dead = [node for node in dict.fromkeys(values) if node in self.live and not is_root(node)]
        gone = set(dead)
        for node in dead:  # grows while it is walked
            for source in needs[node]:
                left[source] = left.get(source, readers[source]) - 1
                if not left[source] and source not in gone and source not in kept and not is_root(source):
                    gone.add(source)
                    dead.append(source)
        return dead

    @functools.cached_property
    def _guarded(self) -> bool:
        return any(node.meta.get("guard") for node in self.graph.nodes)

    @functools.cached_property
    def _needs(self) -> tuple[dict[fx.Node, set[fx.Node]], dict[fx.Node, int]]:
        """For each live node what must run before it, and how many live nodes need it."""
        needs = {node: set(sources(node)) & self.live for node in self.order}
        readers = dict.fromkeys(self.order, 0)
        for needed in needs.values():
            for source in needed:
                readers[source] += 1
        return needs, readers

    # -- module calls ------------------------------------------------------------------------------------------

    def _call_ends(self) -> list[int]:
        """Calls are listed in pre-order, so those inside call ``i`` are ``i ... end[i] - 1``."""
        ends = [i + 1 for i in range(len(self.calls))]
        for i in reversed(range(len(self.calls))):
            parent = self.calls[i].parent
            if parent >= 0:
                ends[parent] = max(ends[parent], ends[i])
        return ends

    def _call_flops(self) -> list[float]:
        totals = [self._sum(self._made.get(i, ())) for i in range(len(self.calls))]
        for i in reversed(range(len(self.calls))):
            if self.calls[i].parent >= 0:
                totals[self.calls[i].parent] += totals[i]
        return totals

    def inside(self, node: fx.Node, call: int) -> bool:
        """Whether a node was made in this call or one below it."""
        return call <= node.meta.get("call", -1) < self._end_of_call[call]

    def inside_call(self, inner: int, outer: int) -> bool:
        """Whether one call was made within another."""
        return outer < inner < self._end_of_call[outer]

    def module_call(self, node: fx.Node) -> int:
        """The innermost call that is no leaf in which a node was made; -1 outside of all."""
        call = node.meta.get("call", -1)
        while call >= 0 and self.calls[call].leaf:
            call = self.calls[call].parent
        return call

    def region(self, call: int) -> Iterator[fx.Node]:
        """The nodes made in a call or below it."""
        return (node for inner in range(call, self._end_of_call[call]) for node in self._made.get(inner, ()))

    def call_outputs(self, call: int) -> list[fx.Node]:
        """The floating tensors that a call hands out and something outside it reads."""
        made = self.named(self.calls[call].outputs)
        return [
            node
            for node in made
            if self.inside(node, call)
            and (spec := self.spec(node)) is not None
            and spec.dtype.is_floating_point
            and any(not self.inside(user, call) for user in self.users[node])
        ]

    def call_inputs(self, call: int) -> list[fx.Node]:
        return self.named(self.calls[call].inputs)

    # -- where the latent goes ---------------------------------------------------------------------------------

    def _output_tensors(self) -> list[fx.Node]:
        """The tensors a call returns, seen through the nodes that assemble objects."""
        found: dict[fx.Node, None] = {}
        todo = [node for node in self.order if node.op == "output"]
        while todo:
            for node in todo.pop(0).all_input_nodes:
                if node.meta.get("assembles"):
                    todo.append(node)
                elif self.spec(node) is not None:
                    found[node] = None
        return list(found)

    def _latent(self) -> fx.Node | None:
        """The input that the denoiser cleans: the floating one most like the output in shape, the first of equals."""
        shapes = [spec.shape for node in self.output_tensors if (spec := self.spec(node)) is not None]
        best, best_score = None, -1.0
        for node in self.order:
            spec = self.spec(node)
            if "input" not in node.meta or spec is None or not spec.dtype.is_floating_point or len(spec.shape) < 2:
                continue
            score = max((_likeness(spec.shape, shape) for shape in shapes), default=0.0)
            if score > best_score:
                best, best_score = node, score
        return best

    def reached_from(self, start: fx.Node | None) -> set[fx.Node]:
        """Nodes that depend on ``start``; without one, all nodes that depend on any input."""
        if start is None:
            return {node for node in self.order if node.meta.get("tainted")}
        reached = {start}
        for node in self.order[self.index[start] :]:
            if any(source in reached for source in self.inputs[node]):
                reached.add(node)
        return reached

    def stream(self, node: fx.Node, limit: int = 4000) -> set[fx.Node]:
        """The residual stream that a value continues: what it was added onto, back to where the stream was made."""
        seen, todo = {node}, [node]
        while todo and len(seen) < limit:
            here = todo.pop()
            if target_name(here, self.module) not in _ADDITIVE:
                continue
            for source in self.inputs[here]:
                if source not in seen and self.spec(source) is not None and self._same_shape(source, node):
                    seen.add(source)
                    todo.append(source)
        return seen

    def ancestors(self, node: fx.Node) -> set[fx.Node]:
        """The nodes that a node is computed from."""
        seen: set[fx.Node] = set()
        todo = [node]
        while todo:
            for source in self.inputs[todo.pop()]:
                if source not in seen:
                    seen.add(source)
                    todo.append(source)
        return seen

    def _same_shape(self, a: fx.Node, b: fx.Node) -> bool:
        one, other = self.spec(a), self.spec(b)
        return one is not None and other is not None and one.shape == other.shape

    def carries_latent(self, node: fx.Node) -> bool:
        """Whether a value depends on the latent and continues no stream that began without it (a text stream)."""
        if node not in self.from_latent:
            return False
        return all(n in self.from_latent or not n.meta.get("tainted") for n in self.stream(node))

    # -- post-dominators ---------------------------------------------------------------------------------------

    @functools.cached_property
    def post_dominators(self) -> dict[fx.Node, fx.Node | None]:
        """Node -> the first node after it through which everything it feeds must pass; None is the end itself.

        Only the output counts as an end: random draws and lasting writes run anyway. What never reaches it is left out.
        """
        above: dict[fx.Node, fx.Node | None] = {}
        depth: dict[fx.Node | None, int] = {None: 0}
        for node in reversed(self.order):
            ends: list[fx.Node | None] = [user for user in self.users[node] if user in above]
            if node.op == "output":
                ends.append(None)
            if not ends:
                continue
            meet = ends[0]
            for end in ends[1:]:
                meet = lowest_above(meet, end, above, depth)
            above[node] = meet
            depth[node] = depth[meet] + 1
        return above

    def latent_chain(self) -> list[fx.Node]:
        """The nodes through which everything that depends on the latent must pass, in order."""
        return self.common_post_dominators([self.latent]) if self.latent is not None else []

    def common_post_dominators(self, nodes: Sequence[fx.Node]) -> list[fx.Node]:
        """Nodes through which everything that these feed must pass, the nearest first."""
        above = self.post_dominators
        paths = [list(_up(node, above)) for node in nodes if node in above]
        if not paths:
            return []
        common = set.intersection(*map(set, paths))
        return [node for node in paths[0] if node in common]


def _data_sources(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values this one depends on; tensors asked for their shape, dtype or device only do not count."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op.startswith("call_") and name in _SHAPED_LIKE and node.args:
        hidden = set(node.all_input_nodes) - set(node.meta.get("deps", ()))
    elif node.op.startswith("call_") and name in _CAST_LIKE and len(node.args) > 1:
        hidden = {arg for arg in node.args[1:] if isinstance(arg, fx.Node) and arg is not node.args[0]}
    else:
        hidden = set()
    return [source for source in dict.fromkeys(sources(node)) if source not in hidden]


def lowest_above(a: fx.Node | None, b: fx.Node | None, above: dict[fx.Node, fx.Node | None],
                 depth: dict[fx.Node | None, int]) -> fx.Node | None:  # fmt: skip
    """The lowest node above both in a tree; ``depth`` counts from its root."""
    while a is not b:
        if a is not None and depth[a] >= depth[b]:
            a = above[a]
        elif b is not None:
            b = above[b]
    return a


def _up(node: fx.Node | None, above: dict[fx.Node, fx.Node | None]) -> Iterator[fx.Node]:
    while node is not None:
        yield node
        node = above[node]


def _likeness(a: torch.Size | tuple[int, ...], b: torch.Size | tuple[int, ...]) -> float:
    """How alike two shapes are: equal rank counts one, and each equal size in place one more."""
    if len(a) != len(b):
        return 0.0
    return 1.0 + sum(m == n for m, n in zip(a, b, strict=True))
