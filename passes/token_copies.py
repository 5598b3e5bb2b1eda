"""Copies of a region's nodes that run on selected tokens: the part of ``subset_tokens`` that knows ops."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from diffcache.token_axes import Root, TokenAxes, operand_at
from diffcache.token_indexing import recut
from diffcache.token_ops import Action, Argument, Axes, shape_of, split_axis, target_of
from diffcache.token_rows import joint_tokens, put_rows, take_rows
from diffcache.tracing.spec import TensorSpec


class TokenCopies:
    """Makes the copies, each where its original stands.

    Args:
        gm: the graph module; nodes are added to its graph.
        axes: what is known of the region.
        chosen: token numbers of each selected stream, as nodes.
        counts: how many they are.
        kept: for nodes of which all tokens are needed, what gives their value in history.

    Attributes:
        new: original -> copy.
        complete: original -> its value for all tokens, those selected fresh.
    """

    def __init__(
        self, gm: fx.GraphModule, axes: TokenAxes, chosen: Mapping[Root, fx.Node], counts: Mapping[Root, int],
        kept: Mapping[fx.Node, Callable[[], fx.Node]],
    ) -> None:  # fmt: skip
        self.gm, self.graph, self.axes, self.counts, self.kept = gm, gm.graph, axes, counts, kept
        self.new: dict[fx.Node, fx.Node] = {}
        self.complete: dict[fx.Node, fx.Node] = {}
        self._chosen = dict(chosen)
        self._joint: dict[tuple[Any, ...], fx.Node] = {}
        self._taken: dict[fx.Node, fx.Node] = {}
        self._here: fx.Node | None = None

    # -- token numbers -------------------------------------------------------------------------------------------

    def count(self, root: Root, full: int) -> int:
        """How many entries an axis of this label has in the copies; ``full`` is how many it has in the capture."""
        if root in self.counts:
            return self.counts[root]
        if not self.axes.is_subset(root):
            return full
        return sum(self.count(part, length) for part, length in self.axes.labels.parts(root))

    def tokens(self, root: Root) -> fx.Node:
        """The numbers of the selected tokens along axes of this label."""
        if root in self._chosen:
            return self._chosen[root]
        parts = self.axes.labels.parts(root)
        given = [self.tokens(part) if self.axes.is_subset(part) else None for part, _ in parts]
        lengths = [length for _, length in parts]
        key = (*given, *lengths)
        if key not in self._joint:
            last = [node for node in self.graph.nodes if node.op == "placeholder"][-1]
            made = [node for node in self._joint.values() if node in given]
            with self.graph.inserting_after(made[-1] if made else last):
                self._joint[key] = self.graph.call_function(joint_tokens, (given, lengths))
            self._joint[key].meta = {"path": ""}
        return self._joint[key]

    # -- copies --------------------------------------------------------------------------------------------------

    def copy(self, node: fx.Node) -> None:
        """Make the copy of a fresh node; those it reads have been made."""
        self._here, action = node, self.axes.fresh[node]
        to = self.axes.token_axis(action.result)
        assert to is not None
        taken = action.taken
        if isinstance(node.meta.get("val"), tuple) and node.op != "call_module" and split_axis(node) == to:
            self.new[node] = self._operand(action, action.operands[0][0])  # its parts are taken out of it one by one
        elif taken is not None and taken.result_axis == to:
            self.new[node] = self._cut(node, action)
        else:
            self.new[node] = self._same(node, action, to)

    def _same(self, node: fx.Node, action: Action, to: int) -> fx.Node:
        """The same op on fresh operands."""
        args, kwargs = self._arguments(node, action)
        target: Any = node.target
        if action.sized:
            target, args, kwargs = self._resized(node, args[0], to)
        with self.graph.inserting_before(node):
            new = self.graph.create_node(node.op, target, args, kwargs, name=f"{node.name}_selected")
        new.meta = self._meta(node, action, to)
        return new

    def _resized(self, node: fx.Node, source: Any, to: int) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """Sizes in the arguments were those of all tokens."""
        shape = list(shape_of(node) or ())
        shape[to] = self.count(self.axes.token_root(node), shape[to])
        method = "expand" if target_of(node) in ("expand", "expand_as", "broadcast_to") else "reshape"
        return (method if node.op == "call_method" else getattr(torch.Tensor, method)), (source, *shape), {}

    def _meta(self, node: fx.Node, action: Action, to: int) -> dict[str, Any]:
        gone = ("tainted", "storage", "captured_as", "deps", "call")
        meta = {key: value for key, value in node.meta.items() if key not in gone}
        meta["deps"] = tuple(self.new.get(dep, dep) for dep in node.meta.get("deps", ()))
        full = (shape_of(action.result) or ())[to]
        count = self.count(self.axes.token_root(action.result), full)
        meta["val"] = _shrunk(node.meta.get("val"), to, count, full)
        meta["part_of"] = (node.meta.get("captured_as", node.name), count / full)
        return meta

    def _cut(self, node: fx.Node, action: Action) -> fx.Node:
        """Part of a joint sequence, where that part lies among the selected tokens."""
        taken, to = action.taken, self.axes.token_axis(action.result)
        assert taken is not None
        assert to is not None
        source = self._operand(action, taken.operand)
        length = (shape_of(node) or ())[to]
        root = self.axes.labels.root((taken.operand, taken.axis))
        start = sum(self.count(part, size) for part, size in self._before(root, taken.start))
        count = self.count(self.axes.labels.root((node, to)), length)
        with self.graph.inserting_before(node):
            if target_of(node) == "__getitem__":
                index = recut(shape_of(taken.operand) or (), node.args[1], taken.axis, start, start + count)
                new = self.graph.call_method("__getitem__", (source, index))
            else:
                new = self.graph.call_method("narrow", (source, taken.axis, start, count))
        new.meta = self._meta(node, action, to)
        return new

    def _before(self, root: Root, start: int) -> list[tuple[Root, int]]:
        """The parts of a label that lie before one of its entries."""
        at, found = 0, []
        for part, size in self.axes.labels.parts(root):
            if at < start:
                found.append((part, size))
            at += size
        return found

    # -- operands ------------------------------------------------------------------------------------------------

    def _arguments(self, node: fx.Node, action: Action) -> tuple[tuple[Any, ...], dict[str, Any]]:
        meets = {place: self._complete(operand_at(node, place)) for place in action.meets}

        def given(place: Argument, value: Any) -> Any:
            if place in meets:
                return meets[place]
            return fx.node.map_arg(value, lambda operand: self._operand(action, operand))

        args = tuple(given(place, value) for place, value in enumerate(node.args))
        return args, {name: given(name, value) for name, value in node.kwargs.items()}

    def _operand(self, action: Action, operand: fx.Node) -> fx.Node:
        """What a copy reads in the place of an operand: its copy, rows of it, or all of it."""
        if operand in self.new:
            return self.new[operand]
        axis = self.axes.token_axis(operand)
        axes = next((axes for n, axes in action.operands if n is operand), None)
        if axis is None or axes is None or not self.axes.is_subset(self.axes.token_root(operand)):
            return operand
        if self.axes.carries(operand):
            return self._rows(operand, axis)
        return self._table(action, operand, axes, axis)

    def _rows(self, operand: fx.Node, axis: int) -> fx.Node:
        """The selected tokens' rows of a stream that is whole."""
        if operand not in self._taken:
            samples = self.axes.batch_axis(operand)
            new = self._call(take_rows, (operand, self.tokens(self.axes.token_root(operand)), axis, samples), operand)
            self._taken[operand] = new
        return self._taken[operand]

    def _table(self, action: Action, operand: fx.Node, axes: Axes, axis: int) -> fx.Node:
        """The selected tokens' rows of a table that all samples share, as wide as what it is broadcast to."""
        to, rank = axes[axis], len(shape_of(action.result) or ())
        samples = self.axes.batch_axis(action.result)
        if to is None or samples is None or to - axis != rank - len(axes):
            raise ValueError(
                f"'{operand.name}' holds a value for each token and none for each sample, and '{action.result.name}' "
                "reads it in a way that has no place for the samples: this site cannot run on a few tokens"
            )
        return self._call(take_rows, (operand, self.tokens(self.axes.token_root(operand)), to, samples, rank), operand)

    def _complete(self, operand: fx.Node) -> fx.Node:
        """All tokens of an operand: those selected fresh, the others as history has them."""
        if operand not in self.new:
            return operand
        if not self.axes.selects(operand):
            return self.new[operand]
        if operand not in self.complete:
            axis, samples = self.axes.token_axis(operand), self.axes.batch_axis(operand)
            assert operand in self.kept, f"{operand.name} is not among what the region keeps"
            tokens = self.tokens(self.axes.token_root(operand))
            args = (self.kept[operand](), tokens, self.new[operand], axis, samples)
            self.complete[operand] = self._call(put_rows, args, operand)
        return self.complete[operand]

    def _call(self, function: Any, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
        assert self._here is not None
        with self.graph.inserting_before(self._here):
            node = self.graph.call_function(function, args)
        node.meta = {"val": like.meta.get("val"), "path": like.meta.get("path", "")}
        return node


def _shrunk(spec: Any, axis: int, count: int, full: int) -> Any:
    """The spec of what has ``count`` tokens in the place of ``full``."""
    if isinstance(spec, tuple):
        return tuple(_shrunk(part, axis, count, full) for part in spec)
    if not isinstance(spec, TensorSpec):
        return spec
    at = axis if axis < len(spec.shape) and spec.shape[axis] == full else axis - 1  # a part of ``unbind``
    if not 0 <= at < len(spec.shape) or spec.shape[at] != full:
        return spec
    return dataclasses.replace(spec, shape=(*spec.shape[:at], count, *spec.shape[at + 1 :]))
