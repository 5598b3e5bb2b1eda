"""Which axis of every value holds the tokens, and which nodes can run on a few of them.

Enters: the nodes of a site's region and the site's values [batch, tokens, channels]. Axes that match entry by entry get
one label, from the values up to the streams that they are computed from; a label may be several others end to end, as
the joint sequence of two streams is. No model is known here by name.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

from torch import fx

from diffcache.liveness import sources
from diffcache.token_indexing import act
from diffcache.token_ops import Action, Argument, Key, shape_of, target_of

Root = Key

_PIECE = 64  # a piece of an axis has no node of its own: it goes by its owner and a number beyond the owner's axes


class Labels:
    """Axes that match entry by entry, as a union of sets; a set may be others end to end."""

    def __init__(self) -> None:
        self._above: dict[Key, Key] = {}
        self._parts: dict[Root, tuple[tuple[Key, int], ...]] = {}
        self._outer: dict[Root, Key] = {}

    def root(self, key: Key) -> Root:
        while (above := self._above.get(key)) is not None:
            key = above
        return key

    def parts(self, root: Root) -> tuple[tuple[Root, int], ...]:
        return tuple((self.root(key), length) for key, length in self._parts.get(root, ()))

    def composed(self) -> list[Root]:
        return list(self._parts)

    def outer(self, root: Root) -> Root | None:
        """What the outermost factor of this axis is."""
        found = self._outer.get(root)
        return self.root(found) if found is not None else None

    def unite(self, a: Key, b: Key) -> None:
        todo = [(a, b)]
        while todo:
            one, other = map(self.root, todo.pop())
            if one == other:
                continue
            self._above[other] = one
            parts, outer = self._parts.pop(other, None), self._outer.pop(other, None)
            if parts is not None:
                todo += self._same_parts(one, parts)
            if outer is not None:
                todo += self._same_outer(one, outer)

    def join(self, key: Key, parts: Sequence[tuple[Key, int]]) -> None:
        """``key`` is these axes end to end."""
        for pair in self._same_parts(self.root(key), tuple(parts)):
            self.unite(*pair)

    def factor(self, small: Key, big: Key) -> None:
        """``small`` is the outermost factor of ``big``."""
        for pair in self._same_outer(self.root(big), small):
            self.unite(*pair)

    def _same_parts(self, root: Root, parts: tuple[tuple[Key, int], ...]) -> list[tuple[Key, Key]]:
        known = self._parts.setdefault(root, parts)
        if [length for _, length in known] != [length for _, length in parts]:
            return []  # two ways to cut one axis: of no use, and nothing is claimed of it
        return [(a, b) for (a, _), (b, _) in zip(known, parts, strict=True)]

    def _same_outer(self, root: Root, small: Key) -> list[tuple[Key, Key]]:
        known = self._outer.setdefault(root, small)
        return [(known, small)] if (shape_of(known[0]) or ())[known[1]] == (shape_of(small[0]) or ())[small[1]] else []


class TokenAxes:
    """The token axes of a region.

    Args:
        module: the graph module of the nodes.
        nodes: the region, in order.
        values: its results, each [batch, tokens, channels].
        selected: which of the values get a few of their tokens computed only; the others get all.

    Attributes:
        chosen: labels of the selected streams, with the first value of each.
        followed: labels of streams that share a sequence with those: all their tokens are computed, from fresh ones.
        fresh: nodes of the region that can be computed from selected tokens alone.
        lost: nodes of the region that need all tokens, with the reason.
    """

    def __init__(
        self, module: fx.GraphModule, nodes: Sequence[fx.Node], values: Sequence[fx.Node], selected: Collection[int]
    ) -> None:
        self.nodes, self.values = list(nodes), list(values)
        self.actions: dict[fx.Node, Action] = {}
        self.labels = Labels()
        for node in self.nodes:
            if (action := act(node, module)) is not None:
                self.actions[node] = action
        self._label()
        self.batch = self.labels.root((self.values[0], 0))
        self.batch_size = (shape_of(self.values[0]) or (0,))[0]
        self.streams = [self.labels.root((value, 1)) for value in self.values]
        self.chosen = {self.streams[i]: i for i in sorted(selected, reverse=True)}
        self.followed: set[Root] = set()
        self._follow()
        self._axis: dict[fx.Node, int | None] = {}
        self.fresh: dict[fx.Node, Action] = {}
        self.lost: dict[fx.Node, str] = {}
        self._find_fresh()

    # -- labels ------------------------------------------------------------------------------------------------

    def _label(self) -> None:
        for action in self.actions.values():
            for operand, axes in action.operands:
                for axis, to in enumerate(axes):
                    if to is not None:
                        self.labels.unite((action.result, to), (operand, axis))
            for small, big in action.outer:
                self.labels.factor(small, big)
        while True:
            before = dict(self.labels._above), dict(self.labels._parts)
            for action in self.actions.values():
                self._label_parts(action)
            if before == (self.labels._above, self.labels._parts):
                return

    def _label_parts(self, action: Action) -> None:
        if action.joined is not None:
            ends = [((operand, action.joined), _size(operand, action.joined)) for operand, _ in action.operands]
            self.labels.join((action.result, action.joined), ends)
        taken = action.taken
        if taken is None:
            return
        root = self.labels.root((taken.operand, taken.axis))
        key, length = (action.result, taken.result_axis), _size(action.result, taken.result_axis)
        run = self._run(root, taken.start, length)
        if run is None:
            if not self.labels.parts(root) and root[1] < _PIECE:
                self.labels.join(root, self._cut(root))
            return
        self.labels.unite(key, run[0][0]) if len(run) == 1 else self.labels.join(key, run)

    def _run(self, root: Root, start: int, length: int) -> tuple[tuple[Root, int], ...] | None:
        """The parts of a label that are its entries ``start ... start + length``."""
        at, found = 0, []
        for part, size in self.labels.parts(root):
            if start <= at and at + size <= start + length:
                found.append((part, size))
            at += size
        return tuple(found) if found and sum(size for _, size in found) == length else None

    def _cut(self, root: Root) -> list[tuple[Key, int]]:
        """A label that slices take apart, as the pieces between their ends."""
        ends, size = {0, _size(*root)}, _size(*root)
        for action in self.actions.values():
            taken = action.taken
            if taken is not None and self.labels.root((taken.operand, taken.axis)) == root:
                ends |= {taken.start, taken.start + _size(action.result, taken.result_axis)}
        cuts = sorted(ends)
        return [((root[0], _PIECE + root[1] * size + at), to - at) for at, to in itertools.pairwise(cuts)]

    # -- tokens ------------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        self.followed = {root for i, root in enumerate(self.streams) if root not in self.chosen}
        while True:
            joint = [self.labels.parts(root) for root in self.labels.composed() if root not in self.chosen]
            mixed = [parts for parts in joint if any(self.holds(part) for part, _ in parts)]
            more = {part for parts in mixed for part, _ in parts if not self.holds(part)}
            if not more:
                return
            self.followed |= more

    def is_subset(self, root: Root) -> bool:
        """Whether only some entries of axes with this label are computed."""
        if root in self.chosen:
            return True
        return root not in self.followed and any(self.is_subset(part) for part, _ in self.labels.parts(root))

    def holds(self, root: Root) -> bool:
        """Whether axes with this label hold tokens of a stream that is selected from, or of one beside it."""
        if root in self.chosen or root in self.followed:
            return True
        return any(self.holds(part) for part, _ in self.labels.parts(root))

    def token_root(self, node: fx.Node) -> Root:
        axis = self.token_axis(node)
        assert axis is not None
        return self.labels.root((node, axis))

    def token_axis(self, node: fx.Node) -> int | None:
        """The axis along which a node holds tokens."""
        if node not in self._axis:
            rank = len(shape_of(node) or ())
            found = [axis for axis in range(rank) if self.holds(self.labels.root((node, axis)))]
            self._axis[node] = found[0] if len(found) == 1 else None
        return self._axis[node]

    def selects(self, node: fx.Node) -> bool:
        """Whether a fresh node is computed for some of its tokens only."""
        return self.token_axis(node) is not None and self.is_subset(self.token_root(node))

    def batch_axis(self, node: fx.Node) -> tuple[int, int] | None:
        """The axis of the samples, and how many entries of it each sample has."""
        shape = shape_of(node) or ()
        for axis, size in enumerate(shape):
            root = self.labels.root((node, axis))
            if self.batch in (root, self.labels.outer(root)):
                return axis, size // self.batch_size
        if self.batch_size == 1:  # all entries of any other axis are the one sample's
            return next(((axis, size) for axis, size in enumerate(shape) if axis != self.token_axis(node)), None)
        return None

    def carries(self, node: fx.Node) -> bool:
        """Whether a node holds the tokens of every sample, so that those selected can be taken out of it."""
        return self.token_axis(node) is not None and self.batch_axis(node) is not None

    def meets(self, node: fx.Node) -> list[fx.Node]:
        """The operands of a fresh node of which all tokens are needed and some are fresh: keys and values."""
        found = (operand_at(node, place) for place in self.fresh[node].meets)
        return [operand for operand in found if operand in self.fresh and self.selects(operand)]

    def _find_fresh(self) -> None:
        for node in self.nodes:
            reads = [n for n in sources(node) if n in self.fresh or self.carries(n)]
            several = [n for n in reads if isinstance(n.meta.get("val"), tuple)]
            if not reads or any(n not in self.fresh for n in several):  # a part of what is taken apart whole
                continue
            reason = self._why_not(node)
            if reason is None:
                self.fresh[node] = self.actions[node]
            else:
                self.lost[node] = reason

    def _why_not(self, node: fx.Node) -> str | None:
        """Why a node that reads tokens cannot run on some of them; None if it can."""
        action = self.actions.get(node)
        what = f"'{node.name}' ({target_of(node) if node.op != 'call_module' else 'module'})"
        if action is None:
            return f"{what} is not known to treat tokens one by one"
        to = self.token_axis(action.result)
        if to is None:
            return f"{what} leaves no token axis"
        meets = {operand_at(node, place) for place in action.meets}
        ready = False
        for operand, axes in action.operands:
            axis = self.token_axis(operand)
            if axis is None or (operand not in self.fresh and not self.carries(operand)):
                continue
            if action.joined == to or self._takes(action, to):
                # tokens of a sequence chosen as one lie anywhere in it: its parts have other numbers in each sample
                joint = (action.result, to) if action.joined == to else (operand, axis)
                if self.labels.root(joint) in self.chosen or self.labels.root(joint) in self.followed:
                    return f"{what} joins or cuts a sequence whose tokens are selected as one"
                ready = True
            elif axes[axis] == to:
                ready = True
            elif operand not in meets:
                return f"{what} mixes tokens"
        return None if ready else f"{what} makes its tokens from something else"

    def _takes(self, action: Action, to: int) -> bool:
        return action.taken is not None and action.taken.result_axis == to


def operand_at(node: fx.Node, place: Argument) -> fx.Node:
    found = node.args[place] if isinstance(place, int) else node.kwargs[place]
    assert isinstance(found, fx.Node)
    return found


def _size(node: fx.Node, axis: int) -> int:
    return (shape_of(node) or ())[axis]
