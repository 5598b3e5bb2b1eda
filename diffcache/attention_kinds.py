"""What an attention looks at: its own tokens, the prompt's, both, one frame, or one place through all frames.

Enters: a ``Flow``, the axes of its nodes and one call. Leaves: a kind. Read from where queries and keys come from and
from which axes of the latent the attention runs over (``axes``), never from a name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import fx

from diffcache.axes import OTHER, Axes, names_in
from diffcache.flow import Flow, target_name

KINDS = ("self", "cross", "joint", "spatial", "temporal", "mixed")

ATTENTION_OPS = frozenset(
    "scaled_dot_product_attention softmax flex_attention multi_head_attention_forward _native_multi_head_attention "
    "memory_efficient_attention flash_attn_func MultiheadAttention Softmax TransformerEncoderLayer TransformerEncoder "
    "TransformerDecoderLayer".split()
)
_PRODUCTS = frozenset(("matmul", "bmm", "baddbmm", "einsum", "__matmul__"))
_LENGTH_BEFORE_HEADS = frozenset(("flash_attn_func", "memory_efficient_attention"))  # [batch, length, heads, features]
_VIDEO = 5  # dimensions of a video latent: [b, c, f, h, w] or [b, f, c, h, w]


def attends(flow: Flow, call: int) -> bool:
    """Whether tokens meet in this call: an attention operator, or a product of two computed tensors."""
    return any(_meets(flow, node) for node in flow.region(call))


def _meets(flow: Flow, node: fx.Node) -> bool:
    name = target_name(node, flow.module)
    if name in ATTENTION_OPS:
        return True
    return name in _PRODUCTS and sum(bool(n.meta.get("tainted")) for n in node.all_input_nodes) > 1


def attention_kind(flow: Flow, axes: Mapping[fx.Node, Axes], call: int) -> str:
    """The kind of attention in a call, one of ``KINDS``, or "" where tokens do not meet.

    * "cross": keys and values come from what does not depend on the latent.
    * "joint": tokens that the latent did not begin (text) are among those that attend or are attended to.
    * "spatial": of a video, the places of one frame: frames are folded into the batch.
    * "temporal": of a video, the frames at one place: places are folded into the batch.
    * "self": all tokens of the latent.
    * "mixed": the call holds attentions of several kinds.
    """
    kinds = {_kind(flow, axes, query, keys, at) for query, keys, at in attention_operands(flow, call)}
    if len(kinds) > 1:
        return "mixed"
    return kinds.pop() if kinds else "self" if attends(flow, call) else ""


def attention_operands(flow: Flow, call: int) -> Iterator[tuple[fx.Node, fx.Node, int]]:
    """(queries, keys, axis of the query's tokens) of every attention in a call whose queries hang on the latent."""
    for node in flow.region(call):
        name = target_name(node, flow.module)
        operands = [n for n in node.all_input_nodes if flow.spec(n) is not None]
        if not operands or not _meets(flow, node) or operands[0] not in flow.from_latent:
            continue
        rank = len(flow.spec(operands[0]).shape)  # type: ignore[union-attr]
        if name in ("softmax", "Softmax") or rank < 2:
            continue  # the product before it tells
        at = rank - 3 if name in _LENGTH_BEFORE_HEADS and rank > 3 else rank - 2
        if node.op == "call_module" and not getattr(flow.module.get_submodule(str(node.target)), "batch_first", True):
            at = 0
        if name == "TransformerDecoderLayer":
            yield operands[0], operands[0], at  # it holds a self-attention and one to what is given second
        yield operands[0], operands[min(1, len(operands) - 1)], at


def _kind(flow: Flow, axes: Mapping[fx.Node, Axes], query: fx.Node, keys: fx.Node, at: int) -> str:
    if keys not in flow.from_latent:
        return "cross"
    if query not in axes:
        return "self"
    attending = names_in([axes[query][at]])
    if OTHER in attending | names_in(axes.get(keys, ())):
        return "joint"
    return _grouping(flow, axes[query], at, attending)


def _grouping(flow: Flow, axes: Axes, at: int, attending: frozenset[int]) -> str:
    """Which of a video's axes attention runs over, and which are folded into the batch."""
    spec = flow.spec(flow.latent) if flow.latent is not None else None
    if spec is None or len(spec.shape) != _VIDEO:
        return "self"
    places, frames = frozenset((3, 4)), frozenset((1, 2))
    folded = names_in([axis for i, axis in enumerate(axes) if i not in (at, len(axes) - 1)])
    if attending & places and not attending & frames and folded & frames:
        return "spatial"
    if attending & frames and not attending & places and folded & places:
        return "temporal"
    return "self"
