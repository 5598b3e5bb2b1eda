"""From a graph module to something that runs: as it is, through ``torch.compile``, or replayed as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from diffcache.direct import direct
from diffcache.graphs import copy_graph_module
from diffcache.tracing import tree

BACKENDS = ("eager", "inductor", "cudagraphs")


def check_backend(backend: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; expected one of {list(BACKENDS)}")
    return backend


def lower(module: fx.GraphModule, backend: str = "eager") -> Callable[..., Any]:
    """A callable that runs ``module``.

    "eager" calls our own operations without torch's dispatcher, in a copy of ``module``. "inductor" compiles it as one
    graph at its first call; "cudagraphs" also records what that launches on a GPU and replays it (elsewhere it is the
    same as "inductor").
    """
    if check_backend(backend) == "eager":
        return _called_directly(module)
    if backend == "inductor":
        return torch.compile(module, fullgraph=True, dynamic=False)
    recorded = torch.compile(module, fullgraph=True, dynamic=False, mode="reduce-overhead")

    def replay(*inputs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        # a recording writes into the same memory every time, and history has to outlive the next replay
        return tree.rebuild(recorded(*inputs), lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf)

    return replay


def _called_directly(module: fx.GraphModule) -> fx.GraphModule:
    """A copy over the same tensors that calls ``direct`` operations."""
    if all(direct(node.target) is node.target for node in module.graph.nodes):
        return module
    copy = copy_graph_module(module)
    for node in copy.graph.nodes:
        node.target = direct(node.target)
    copy.recompile()
    return copy
