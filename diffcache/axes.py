"""What the axes of a value hold: which axes of the latent each of them runs over, followed through the graph.

Enters: a ``Flow``. Leaves: for each node an ``Axes``, or nothing where the way from the latent is not understood.

An axis is a tuple of atoms, outermost first, whose sizes multiply to its size. An atom is (names, size): the latent's
axes that it runs over, by number, and ``OTHER`` where tokens that the latent did not begin are among them (text). Atoms
without a name are features. ``[b, c, f, h, w]`` folded for attention within frames is ``[(0, 2), (3, 4), ()]``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import fx

from diffcache.flow import CATS, Flow, target_name

OTHER = -1

Atom = tuple[frozenset[int], int]
Axis = tuple[Atom, ...]
Axes = tuple[Axis, ...]

_PERMUTES = frozenset("permute transpose swapaxes swapdims movedim moveaxis t T mT".split())
_IN_ORDER = frozenset(  # the same elements in the same order under another shape
    "reshape view flatten unflatten squeeze unsqueeze ravel _unsafe_view view_as reshape_as Flatten Unflatten".split()
)
_PRODUCTS = frozenset("matmul bmm baddbmm __matmul__".split())
# Which axis these make of their own: what runs along it are features, whatever ran along it before.
_FEATURES = {"linear": -1, **{f"conv{places}d": -1 - places for places in (1, 2, 3)}}


def latent_axes(flow: Flow) -> dict[fx.Node, Axes]:
    """The axes of every node that can be followed from the latent to it."""
    spec = flow.spec(flow.latent) if flow.latent is not None else None
    if flow.latent is None or spec is None:
        return {}
    known: dict[fx.Node, Axes] = {flow.latent: tuple(_axis(frozenset((i,)), size) for i, size in enumerate(spec.shape))}
    for node in flow.order[flow.index[flow.latent] + 1 :]:
        if node in flow.from_latent and node.op.startswith("call_"):
            axes = _follow(flow, node, known)
            shape = _shape(flow, node)
            if axes is not None and (shape is None or len(axes) == len(shape)):
                known[node] = axes if shape is None else _fitted(axes, shape)
    return known


def names_in(axes: Sequence[Axis]) -> frozenset[int]:
    """All names in these axes."""
    return frozenset().union(*(names for axis in axes for names, _ in axis))


def tokens_in(axes: Axes, wanted: frozenset[int]) -> int:
    """The product of the sizes that run over any of the latent's axes in ``wanted``; 1 where other tokens mix in."""
    if OTHER in names_in(axes):
        return 1
    return math.prod(size for axis in axes for names, size in axis if names & wanted)


def same_order(a: Axes | None, b: Axes | None) -> bool:
    """Whether two values hold their tokens in the same order, as far as that is known."""
    return a is None or b is None or [names_in([x]) - {OTHER} for x in a] == [names_in([y]) - {OTHER} for y in b]


def _axis(names: frozenset[int], size: int) -> Axis:
    return ((names, size),) if size != 1 else ()


def _size(axis: Axis) -> int:
    return math.prod(size for _, size in axis)


def _shape(flow: Flow, node: fx.Node) -> tuple[int, ...] | None:
    spec = flow.spec(node)
    return spec.shape if spec is not None else None


def _fitted(axes: Axes, shape: Sequence[int]) -> Axes:
    """The axes at these sizes: what has another size (a piece, a padded or strided axis) becomes one atom."""
    return tuple(
        axis if _size(axis) == size else _axis(names_in([axis]), size) for axis, size in zip(axes, shape, strict=True)
    )


def _follow(flow: Flow, node: fx.Node, known: dict[fx.Node, Axes]) -> Axes | None:
    """The axes of what a node makes; for a node that makes several tensors, those of each."""
    name, shape = target_name(node, flow.module), _shape(flow, node)
    first = next((source for source in node.all_input_nodes if source in known), None)
    if first is None:
        return None
    axes = known[first]
    if name in _PERMUTES:
        return _permuted(axes, name, node)
    if name in _IN_ORDER:
        return _regrouped(axes, shape)
    if name in ("__getitem__", "getitem"):
        whole = _shape(flow, first) is None  # an item of several tensors
        return axes if whole else _indexed(axes, node.args[1])
    if name in ("unbind", "select"):
        return _without(axes, node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0))
    if name == "stack":
        return _inserted(axes, node)
    if name == "view_as_complex":
        return axes[:-1]
    if name == "view_as_real":
        return (*axes, ((frozenset(), 2),))
    if name == "einsum":
        return _einsum(node, known, shape)
    if shape is None:
        return axes
    return _elementwise(flow, node, name, known, shape)


def _elementwise(
    flow: Flow, node: fx.Node, name: str, known: dict[fx.Node, Axes], shape: tuple[int, ...]
) -> Axes | None:
    """Each axis as in the operand of that size that mixes fewest axes of the latent; strided axes keep their names."""
    operands = [known[n] for n in node.all_input_nodes if n in known and len(known[n]) == len(shape)]
    if not operands:
        return None
    made = []
    for i, size in enumerate(shape):
        fitting = [axes[i] for axes in operands if _size(axes[i]) == size and names_in([axes[i]])]
        if fitting:
            made.append(min(fitting, key=lambda axis: len(names_in([axis]))))
        else:
            made.append(_axis(names_in([axes[i] for axes in operands]), size))
    if name in CATS:
        _join(flow, node, made, operands, shape)
    features = _FEATURES.get(name.lower().replace("_transpose", "").replace("transpose", ""))
    if features is not None:
        made[features] = _axis(frozenset(), shape[features])
    if name in _PRODUCTS:
        right = known.get(node.all_input_nodes[-1])
        fits = right is not None and _size(right[-1]) == shape[-1]
        made[-1] = right[-1] if right is not None and fits else _axis(frozenset(), shape[-1])
    return tuple(made)


def _join(flow: Flow, node: fx.Node, made: list[Axis], operands: Sequence[Axes], shape: Sequence[int]) -> None:
    """The axis that a concatenation lengthens holds what all operands hold there."""
    dim = _dims(node)[:1]
    at = dim[0] % len(shape) if dim else 0
    others = [n for n in node.all_input_nodes if n not in flow.from_latent and n.meta.get("tainted")]
    begun = any((s := _shape(flow, n)) is not None and len(s) == len(shape) and s[at] > 1 for n in others)
    names = names_in([axes[at] for axes in operands]) | (frozenset((OTHER,)) if begun else frozenset())
    made[at] = _axis(names, shape[at])


def _regrouped(axes: Axes, shape: Sequence[int] | None) -> Axes | None:
    """The same atoms in the same order, cut where the new axes end; None where an axis would cut through an atom."""
    left = [atom for axis in axes for atom in axis][::-1]
    made: list[Axis] = []
    for size in shape if shape is not None else ():
        taken: list[Atom] = []
        while size > 1:
            if not left:
                return None
            names, have = left.pop()
            part = math.gcd(size, have)
            if part not in (size, have):
                return None
            taken.append((names, part))
            if have > part:
                left.append((names, have // part))
            size //= part
        made.append(tuple(taken))
    return tuple(made) if shape is not None and not left else None


def _dims(node: fx.Node) -> list[int]:
    """The numbers among a node's arguments, of one level of nesting."""
    given = [*node.args[1:], *(node.kwargs[k] for k in ("dims", "dim", "dim0", "dim1", "axis") if k in node.kwargs)]
    flat: Iterator[Any] = (x for arg in given for x in (arg if isinstance(arg, list | tuple) else (arg,)))
    return [x for x in flat if isinstance(x, int)]


def _permuted(axes: Axes, name: str, node: fx.Node) -> Axes | None:
    order, dims = list(range(len(axes))), _dims(node)
    if name == "permute":
        return tuple(axes[d] for d in dims) if len(dims) == len(axes) else None
    if name in ("T", "t", "mT") or len(dims) != 2:
        dims = [-2, -1] if len(axes) > 1 and (name == "mT" or len(axes) == 2) else []
    if not dims:
        return None
    if name in ("movedim", "moveaxis"):
        order.insert(dims[1] % len(axes), order.pop(dims[0]))
    else:
        order[dims[0]], order[dims[1]] = order[dims[1]], order[dims[0]]
    return tuple(axes[d] for d in order)


def _indexed(axes: Axes, index: Any) -> Axes | None:
    """Plain indexing with slices, numbers, None and an ellipsis; sizes are fitted by the caller."""
    items = list(index) if isinstance(index, tuple | list) else [index]
    if any(not (i is None or i is Ellipsis or isinstance(i, int | slice)) for i in items):
        return None
    taken = sum(i is not None and i is not Ellipsis for i in items)
    if taken > len(axes):
        return None
    at = items.index(Ellipsis) if Ellipsis in items else len(items)
    items[at : at + 1] = [slice(None)] * (len(axes) - taken)
    left = list(axes)
    made: list[Axis] = []
    for item in items:
        if item is None:
            made.append(())
        else:
            axis = left.pop(0)
            if isinstance(item, slice):
                made.append(axis)
    return tuple(made)


def _without(axes: Axes, dim: Any) -> Axes | None:
    if not isinstance(dim, int) or not axes:
        return None
    at = dim % len(axes)
    return axes[:at] + axes[at + 1 :]


def _inserted(axes: Axes, node: fx.Node) -> Axes:
    """``stack``: a new axis of as many entries as there are tensors."""
    dims = _dims(node)
    at = dims[0] % (len(axes) + 1) if dims else 0
    return (*axes[:at], ((frozenset(), len(node.all_input_nodes)),), *axes[at:])


def _einsum(node: fx.Node, known: dict[fx.Node, Axes], shape: Sequence[int] | None) -> Axes | None:
    equation = node.args[0]
    if shape is None or not isinstance(equation, str) or "->" not in equation or "." in equation:
        return None
    left, right = equation.replace(" ", "").split("->")
    letters: dict[str, Axis] = {}
    for term, operand in zip(left.split(","), node.all_input_nodes, strict=False):
        for letter, axis in zip(term, known.get(operand, ()), strict=False):
            if not letters.get(letter):
                letters[letter] = axis
    return _fitted(tuple(letters.get(letter, ()) for letter in right), shape)
