"""What every node of a captured graph costs: FLOPs, counted while one real call runs through it node by node.

Enters: a captured graph and the arguments of one call. Leaves: a ``Cost``. Matrix products, attention and convolutions
count two FLOPs per multiply-add; everything else counts one per element it makes, so that no work is free. Views count
one in all.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from diffcache.tracing import tree
from diffcache.tracing.variant import untouched

aten = torch.ops.aten
_FREE = ("placeholder", "get_attr", "output")


@dataclass(frozen=True)
class Cost:
    """FLOPs of one call: ``flops`` by node name, ``total`` their sum."""

    flops: dict[str, float]
    total: float

    def of(self, nodes: Iterable[fx.Node]) -> float:
        """FLOPs of these nodes together."""
        return sum(self.flops.get(node.name, 0.0) for node in nodes)


# -- operators that PyTorch's own table lacks: arguments as passed, FLOPs out ----------------------------------------


def _attention_flops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> float:
    """``query [..., Lq, D]``, ``key [..., Lk, D]``, ``value [..., Lk, Dv]``: two products per pair of tokens."""
    return 2.0 * math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _fused_projected_attention(tokens: float, keys: float, qkv: torch.Tensor, proj: torch.Tensor) -> float:
    """Self-attention over ``tokens`` rows with its projections; each row looks at ``keys`` rows."""
    return 2.0 * tokens * (qkv.numel() + proj.numel()) + 4.0 * tokens * keys * proj.shape[0]


def _native_attention_flops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **_: Any) -> float:
    qkv, proj = rest[2], rest[4]
    return _fused_projected_attention(*_rows(query), qkv, proj)


def _encoder_layer_flops(src: torch.Tensor, *rest: Any, **_: Any) -> float:
    qkv, proj, up, down = rest[2], rest[4], rest[13], rest[15]
    rows, keys = _rows(src)
    return _fused_projected_attention(rows, keys, qkv, proj) + 2.0 * rows * (up.numel() + down.numel())


def _rows(value: torch.Tensor) -> tuple[float, float]:
    """Rows in all and rows per sequence, of a tensor ``[B, L, D]`` or a nested one (taken as evenly long)."""
    if value.is_nested:
        rows = value._nested_tensor_size()[:, 0]
        return float(rows.sum()), float(rows.float().mean())
    return math.prod(value.shape[:-1]), value.shape[-2]


def _linear_flops(rows: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any) -> float:
    return 2.0 * math.prod(rows.shape[:-1]) * weight.numel()


def _product_flops(left: torch.Tensor, right: torch.Tensor, *_: Any, **__: Any) -> float:
    """``left @ right`` as one matrix product per leading index."""
    return 2.0 * left.numel() * (right.shape[-1] if right.dim() > 1 else 1)


def _added_product_flops(_bias: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *_: Any, **__: Any) -> float:
    return _product_flops(left, right)


def _fourier_flops(value: torch.Tensor, dims: Any, *_: Any, **__: Any) -> float:
    return 5.0 * value.numel() * math.log2(max(2, math.prod(value.shape[d] for d in dims)))


def _named(*names: str) -> list[Any]:
    """The operators of these names that this PyTorch has."""
    return [packet for name in names if (packet := getattr(aten, name, None)) is not None]


def _table(formulas: dict[Callable[..., float], tuple[str, ...]]) -> dict[Any, Callable[..., float]]:
    return {packet: formula for formula, names in formulas.items() for packet in _named(*names)}


_FORMULAS: dict[Any, Callable[..., float]] = _table(
    {
        _attention_flops: (
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_fused_attention_overrideable",
            "_scaled_dot_product_attention_math_for_mps",
        ),
        _native_attention_flops: ("_native_multi_head_attention",),
        _encoder_layer_flops: ("_transformer_encoder_layer_fwd",),
        _linear_flops: ("mkldnn_linear", "linear"),
        _product_flops: ("mv", "dot", "vdot", "_int_mm"),
        _added_product_flops: ("addmv", "addbmm", "_addmm_activation"),
        _fourier_flops: ("_fft_c2c", "_fft_r2c", "_fft_c2r"),
    }
)


class _Counter(TorchDispatchMode):
    """Adds up the FLOPs of the operators that run while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = getattr(func, "_overloadpacket", func)
        formula = _FORMULAS.get(packet)
        if formula is None and packet not in flop_registry and hasattr(func, "decompose"):
            with self:
                out = func.decompose(*args, **kwargs)  # composite operators reach this place whole in inference mode
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if formula is not None:
            self.flops += formula(*args, **kwargs)
        elif packet in flop_registry:
            self.flops += float(flop_registry[packet](*args, **kwargs, out_val=out))
        return out


class _CostRun(fx.Interpreter):
    """Runs the graph and notes each node's cost; values are freed after their last use."""

    def __init__(self, module: fx.GraphModule, inputs: dict[str, Any]) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.inputs = inputs
        self.flops: dict[str, float] = {}

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        name = str(target).lstrip("*")
        if name in self.inputs:
            return self.inputs[name]
        if args:
            return args[0]  # its default
        raise ValueError(f"the graph needs the argument {name!r}; given are {sorted(self.inputs)}")

    def run_node(self, n: fx.Node) -> Any:
        if n.op in _FREE:
            self.flops[n.name] = 0.0
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        counter = _Counter()
        if getattr(n.target, "__name__", "") == "flex_attention":
            out = super().run_node(n)  # compiles itself, which a dispatch mode would get in the way of
            counter.flops = _flex_flops(*args, **kwargs)
        else:
            with counter:
                out = super().run_node(n)
        self.flops[n.name] = counter.flops + _element_flops(out, (args, kwargs), bool(n.meta.get("writes")))
        return out


def _flex_flops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **options: Any) -> float:
    mask: Any = options.get("block_mask", rest[1] if len(rest) > 1 else None)
    dense = 1.0 - float(mask.sparsity()) / 100 if hasattr(mask, "sparsity") else 1.0
    return dense * _attention_flops(query, key, value)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for _, leaf in tree.walk(value) if isinstance(leaf, torch.Tensor)]


def _element_flops(out: Any, inputs: Any, writes: bool) -> float:
    """One FLOP per element made; one in all for a view, a number or an assembled object."""
    owned = set() if writes else {_memory(tensor) for tensor in _tensors(inputs)} - {None}
    made = [tensor for tensor in _tensors(out) if _memory(tensor) not in owned]
    return float(max(1, sum(_elements(tensor) for tensor in made)))


def _memory(value: torch.Tensor) -> int | None:
    try:
        return value.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # sparse, nested and wrapper tensors have no storage of their own
        return None


def _elements(value: torch.Tensor) -> int:
    return int(value._nested_tensor_size().prod(1).sum()) if value.is_nested else value.numel()


def _private(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def measure_cost(
    graph_module: fx.GraphModule, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> Cost:
    """FLOPs of every node of a captured graph, from one run of it on these arguments.

    Random generators and buffers are left as they were found, and arguments that the graph writes into are not changed.

    Args:
        graph_module: a graph from ``capture``.
        args, kwargs: the arguments of one call of the kind that was captured.

    Raises:
        ValueError: the arguments are not those of the captured call.
    """
    try:
        inputs = inspect.signature(graph_module.forward).bind(*args, **(kwargs or {})).arguments
    except TypeError as error:
        raise ValueError(f"these are not the arguments of the captured call: {error}") from error
    if any(node.meta.get("persistent") for node in graph_module.graph.nodes):
        inputs = {name: tree.rebuild(value, _private) for name, value in inputs.items()}
    run = _CostRun(graph_module, dict(inputs))
    with torch.no_grad(), untouched(graph_module):
        run.run()
    return Cost(run.flops, sum(run.flops.values()))
