"""How one torch call acts on the axes of its operands: what a token-subset run must know of each op.

Enters: a node of a captured graph. Leaves: an ``Action``, or None where it is not known that the op treats the entries
of any axis one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from diffcache.tracing.spec import TensorSpec

# For each axis of an operand the axis of the result it becomes, entry by entry; None where it is mixed or gone.
Axes = tuple[int | None, ...]
Key = tuple[fx.Node, int]  # an axis of a node
Argument = int | str  # the place of an operand: position or keyword


@dataclass(frozen=True)
class Taken:
    """``result`` holds, along its axis, the entries ``start ...`` of an operand's axis."""

    operand: fx.Node
    axis: int
    result_axis: int
    start: int


@dataclass(frozen=True)
class Action:
    """What an op does with axes.

    Attributes:
        result: the node whose axes are meant: the op itself, or what it writes into.
        operands: operands with their ``Axes``; those whose value does not count (dtype donors) have none.
        meets: arguments of which every entry meets every entry of the others (keys and values of attention).
        joined: the axis of the result along which the operands are laid end to end.
        taken: part of an operand's axis.
        outer: pairs of axes of which the first is the outermost factor of the second.
        sized: arguments tell the sizes of the result.
    """

    result: fx.Node
    operands: tuple[tuple[fx.Node, Axes], ...]
    meets: tuple[Argument, ...] = ()
    joined: int | None = None
    taken: Taken | None = None
    outer: tuple[tuple[Key, Key], ...] = ()
    sized: bool = False


Rule = Callable[[fx.Node], Action | None]
RULES: dict[str, Rule] = {}


def shape_of(node: Any) -> tuple[int, ...] | None:
    """The shape of a node that is a tensor; of one that gives several, the shape of what it takes apart."""
    if not isinstance(node, fx.Node):
        return None
    spec = node.meta.get("val")
    if isinstance(spec, TensorSpec):
        return spec.shape
    return shape_of(node.args[0]) if isinstance(spec, tuple) and node.args else None


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def _along(node: fx.Node, axes: Callable[[int], int | None], **more: Any) -> Action | None:
    """The action of an op on its first argument, axis by axis."""
    source = node.args[0] if node.args else None
    shape = shape_of(source)
    if shape is None:
        return None
    return Action(node, ((source, tuple(axes(a) for a in range(len(shape)))),), **more)  # type: ignore[arg-type]


def _dims(value: Any, rank: int) -> list[int] | None:
    """Dimensions given as one number or several, counted from the front; None where they are not given as numbers."""
    many = list(value) if isinstance(value, list | tuple) else [value]
    if not many or not all(type(d) is int and -rank <= d < rank for d in many):
        return None
    return [d % rank for d in many]


# -- modules ----------------------------------------------------------------------------------------------------------

_POINTWISE_MODULES: tuple[type[nn.Module], ...] = (
    nn.Identity, nn.GELU, nn.SiLU, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.Sigmoid, nn.Tanh,
    nn.Mish, nn.Softplus, nn.Hardswish, nn.Hardsigmoid, nn.LogSigmoid,
)  # fmt: skip


def module_action(node: fx.Node, module: nn.Module) -> Action | None:
    """Modules of ``torch.nn`` as they are: a subclass with a forward of its own, or a hook, may do anything."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    kind = next((base for base in type(module).__mro__ if base.__module__.startswith("torch.nn.modules")), None)
    if hooked or kind is None or type(module).forward is not kind.forward:  # type: ignore[attr-defined]
        return None
    rank = len(shape_of(node.args[0]) or ()) if node.args else 0
    if kind in _POINTWISE_MODULES or (issubclass(kind, nn.Dropout) and not module.training):
        return _along(node, lambda a: a)
    if kind is nn.Linear:
        return _along(node, lambda a: a if a < rank - 1 else None)
    if kind in (nn.LayerNorm, nn.RMSNorm):
        normed = len(module.normalized_shape)  # type: ignore[arg-type]
        return _along(node, lambda a: a if a < rank - normed else None)
    if kind is nn.MultiheadAttention and module.batch_first and len(node.args) >= 3:  # type: ignore[truthy-function]
        plain = all(value is None or isinstance(value, bool) for value in (*node.args[3:], *node.kwargs.values()))
        query = node.args[0]
        if not plain or not isinstance(query, fx.Node) or rank != 3 or node.kwargs.get("is_causal"):
            return None
        if query is node.args[1]:  # it projects all three in one product then, and not in three that round alike
            return None
        return Action(node, ((query, (0, 1, None)),), meets=(1, 2))
    return None


# -- entry by entry ---------------------------------------------------------------------------------------------------

_POINTWISE = (
    "add sub mul div true_divide floor_divide remainder pow neg abs exp log sqrt rsqrt square reciprocal sin cos tanh "
    "sigmoid relu silu gelu leaky_relu elu softplus mish hardswish logsigmoid erf sign clamp clip clamp_min clamp_max "
    "maximum minimum where addcmul addcdiv lerp masked_fill nan_to_num eq ne lt le gt ge logical_and logical_or "
    "logical_not isnan rsub"
).split()
_LIKE = "to type type_as float half bfloat16 double contiguous clone detach empty_like zeros_like ones_like".split()
_INPLACE = [f"{name}_" for name in _POINTWISE]
_REFLECTED = [f"__{side}{name}__" for name in ("add", "sub", "mul", "truediv", "pow", "div") for side in ("", "r", "i")]


@rule(*_POINTWISE, *_INPLACE, *_REFLECTED)
def _pointwise(node: fx.Node) -> Action | None:
    if "out" in node.kwargs:
        return None
    operands = [given for given in (*node.args, *node.kwargs.values()) if isinstance(given, fx.Node)]
    return _aligned(node, shape_of(node), dict.fromkeys(operands))


@rule("dropout")
def _dropout(node: fx.Node) -> Action | None:
    return _along(node, lambda a: a) if argument(node, 2, "training", True) is False else None


@rule(*_LIKE)
def _like(node: fx.Node) -> Action | None:
    return _along(node, lambda a: a) if shape_of(node) == shape_of(node.args[0] if node.args else None) else None


def _aligned(node: fx.Node, shape: tuple[int, ...] | None, operands: dict[fx.Node, None]) -> Action | None:
    """Operands that broadcast against each other: axes match from the last, where the sizes are equal."""
    if shape is None:
        return None
    return Action(node, tuple((n, found) for n in operands if (found := _align(n, shape)) is not None))


def _align(node: fx.Node, shape: Sequence[int]) -> Axes | None:
    """The axes of ``node`` in a result of this shape, which it is broadcast to; None for a number."""
    own = shape_of(node)
    if own is None or len(own) > len(shape):
        return None
    shift = len(shape) - len(own)
    return tuple(a + shift if size == shape[a + shift] else None for a, size in enumerate(own))


# -- along the last axes ----------------------------------------------------------------------------------------------


@rule("linear")
def _linear(node: fx.Node) -> Action | None:
    rank = len(shape_of(node) or ())
    return _along(node, lambda a: a if a < rank - 1 else None)


@rule("layer_norm", "rms_norm")
def _norm(node: fx.Node) -> Action | None:
    rank, normed = len(shape_of(node) or ()), argument(node, 1, "normalized_shape")
    return _along(node, lambda a: a if a < rank - len(normed) else None) if isinstance(normed, list | tuple) else None


@rule("softmax", "log_softmax", "glu", "cumsum", "flip", "roll", "normalize")
def _within(node: fx.Node) -> Action | None:
    """Entries of one axis meet, the others stay as they are."""
    name = str(getattr(node.target, "__name__", node.target))
    place, key, default = {"glu": (1, "dim", -1), "flip": (1, "dims", None), "roll": (2, "dims", None),
                           "normalize": (2, "dim", 1)}.get(name, (1, "dim", None))  # fmt: skip
    dims = _dims(argument(node, place, key, default), len(shape_of(node) or ()))
    return _along(node, lambda a: None if a in dims else a) if dims is not None else None


@rule("mean", "sum", "amax", "amin", "var", "std", "norm", "logsumexp")
def _reduced(node: fx.Node) -> Action | None:
    name = str(getattr(node.target, "__name__", node.target))
    source = shape_of(node.args[0] if node.args else None) or ()
    dims = _dims(argument(node, 2 if name == "norm" else 1, "dim"), len(source))
    if dims is None:
        return None
    keeps = len(shape_of(node) or ()) == len(source)
    return _along(node, lambda a: None if a in dims else a if keeps else a - sum(d < a for d in dims))


@rule("repeat_interleave")
def _repeated(node: fx.Node) -> Action | None:
    dims = _dims(argument(node, 2, "dim"), len(shape_of(node) or ()))
    return _along(node, lambda a: None if a in dims else a) if dims is not None else None


@rule("repeat")
def _tiled(node: fx.Node) -> Action | None:
    shape = shape_of(node)
    source = node.args[0] if node.args else None
    return _aligned(node, shape, {source: None}) if isinstance(source, fx.Node) else None


# -- attention --------------------------------------------------------------------------------------------------------


@rule("scaled_dot_product_attention")
def _attention(node: fx.Node) -> Action | None:
    """Queries stay apart, keys and values meet. A causal mask goes by position, which a subset does not have."""
    places = tuple(i if len(node.args) > i else name for i, name in enumerate(("query", "key", "value")))
    query, key, value = (argument(node, i, name) for i, name in enumerate(("query", "key", "value")))
    shape, mask = shape_of(node), argument(node, 3, "attn_mask")
    dropout, causal = argument(node, 4, "dropout_p", 0.0), argument(node, 5, "is_causal", False)
    if shape is None or dropout != 0.0 or causal is not False or shape_of(query) is None:
        return None
    rank = len(shape)
    operands = [(query, (*range(rank - 1), None))]
    for given in (key, value):
        own = shape_of(given)
        if own is None or len(own) != rank:
            return None
        operands.append((given, tuple(a if a < rank - 2 and own[a] == shape[a] else None for a in range(rank))))
    if isinstance(mask, fx.Node):
        rows = _align(mask, (*shape[:-1], (shape_of(key) or (0,))[-2] if rank > 1 else 0))
        if rows is None:
            return None
        operands.append((mask, (*rows[:-1], None)))
    return Action(node, tuple(operands), meets=places[1:])


@rule("matmul", "bmm", "__matmul__", "baddbmm")
def _product(node: fx.Node) -> Action | None:
    """Rows of the first factor stay apart; every entry of the second meets them."""
    first = 1 if getattr(node.target, "__name__", node.target) == "baddbmm" else 0
    if len(node.args) < first + 2:
        return None
    left, right = node.args[first : first + 2]
    shape, own, other = shape_of(node), shape_of(left), shape_of(right)
    if shape is None or own is None or other is None or not 2 <= len(other) <= len(own) == len(shape):
        return None
    rank = len(shape)
    rows = tuple(a if a < rank - 1 and own[a] == shape[a] else None for a in range(rank))
    batch = (*(_align(right, shape) or ())[:-2], None, None)  # type: ignore[arg-type]
    operands = [(left, rows), (right, batch)]
    if first:
        operands.append((node.args[0], _align(node.args[0], shape) or ()))  # type: ignore[arg-type]
    return Action(node, tuple(operands), meets=(first + 1,))  # type: ignore[arg-type]


# -- axes moved, made and taken apart ---------------------------------------------------------------------------------


@rule("reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze")
def _reshaped(node: fx.Node) -> Action | None:
    """An axis lives on where as many entries lie before it and it has as many itself."""
    source = node.args[0] if node.args else None
    own, shape = shape_of(source), shape_of(node)
    if not isinstance(source, fx.Node) or own is None or shape is None:
        return None
    places = list(_places(shape))
    axes = tuple(next((p for p, (before, size) in enumerate(places) if (before, size) == here), None)
                 for here in _places(own))  # fmt: skip
    outer: list[tuple[Key, Key]] = []
    for a, (before, size) in enumerate(_places(own)):
        for p, (there, length) in enumerate(places):
            if axes[a] is None and there == before and min(size, length) > 1:
                if length % size == 0:
                    outer.append(((source, a), (node, p)))
                elif size % length == 0:
                    outer.append(((node, p), (source, a)))
    sized = target_of(node) not in ("squeeze", "unsqueeze", "flatten")
    return Action(node, ((source, axes),), outer=tuple(outer), sized=sized)  # type: ignore[arg-type]


def target_of(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _places(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    for axis, size in enumerate(shape):
        yield math.prod(shape[:axis]), size


@rule("expand", "expand_as", "broadcast_to")
def _expanded(node: fx.Node) -> Action | None:
    source, shape = node.args[0] if node.args else None, shape_of(node)
    if not isinstance(source, fx.Node) or shape is None:
        return None
    axes = _align(source, shape)
    return Action(node, ((source, axes),), sized=True) if axes is not None else None


@rule("transpose", "swapaxes", "swapdims")
def _transposed(node: fx.Node) -> Action | None:
    dims = _dims([argument(node, 1, "dim0"), argument(node, 2, "dim1")], len(shape_of(node) or ()))
    if dims is None:
        return None
    swap = {dims[0]: dims[1], dims[1]: dims[0]}
    return _along(node, lambda a: swap.get(a, a))


@rule("permute")
def _permuted(node: fx.Node) -> Action | None:
    given = node.args[1] if len(node.args) == 2 and not isinstance(node.args[1], int) else node.args[1:]
    dims = _dims(given or node.kwargs.get("dims"), len(shape_of(node) or ()))
    return _along(node, lambda a: dims.index(a)) if dims is not None else None


@rule("view_as_complex", "view_as_real")
def _complex(node: fx.Node) -> Action | None:
    rank = min(len(shape_of(node) or ()), len(shape_of(node.args[0]) or ()))
    return _along(node, lambda a: a if a < rank else None)


@rule("cat", "concat", "concatenate")
def _joined(node: fx.Node) -> Action | None:
    sources, shape = argument(node, 0, "tensors"), shape_of(node)
    dims = _dims(argument(node, 1, "dim", 0), len(shape or ()))
    if dims is None or not isinstance(sources, list | tuple) or any(shape_of(s) is None for s in sources):
        return None
    axes = tuple(None if a == dims[0] else a for a in range(len(shape or ())))
    return Action(node, tuple((s, axes) for s in sources), joined=dims[0])


@rule("stack")
def _stacked(node: fx.Node) -> Action | None:
    sources, shape = argument(node, 0, "tensors"), shape_of(node)
    dims = _dims(argument(node, 1, "dim", 0), len(shape or ()))
    if dims is None or not isinstance(sources, list | tuple) or any(shape_of(s) is None for s in sources):
        return None
    axes = tuple(a + (a >= dims[0]) for a in range(len(shape or ()) - 1))
    return Action(node, tuple((s, axes) for s in sources))


@rule("chunk", "split", "split_with_sizes", "tensor_split", "unbind")
def _split(node: fx.Node) -> Action | None:
    """What is taken apart keeps its axes; the parts are what ``getitem`` makes of it."""
    return _along(node, lambda a: a)


def split_axis(node: fx.Node) -> int | None:
    """The axis along which ``chunk`` and its like take a tensor apart."""
    place = 1 if target_of(node) == "unbind" else 2
    dims = _dims(argument(node, place, "dim", 0), len(shape_of(node) or ()))
    return dims[0] if dims is not None else None
