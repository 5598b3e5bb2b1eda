"""From a graph module to something that runs: as it is, through ``torch.compile``, or replayed as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from diffcache.tracing import tree

BACKENDS = ("eager", "inductor", "cudagraphs")


def check_backend(backend: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; expected one of {list(BACKENDS)}")
    return backend


def lower(module: fx.GraphModule, backend: str = "eager") -> Callable[..., Any]:
    """A callable that runs ``module``.

    "inductor" compiles it as one graph at its first call; "cudagraphs" also records what that launches on a GPU and
    replays it (elsewhere it is the same as "inductor").
    """
    if check_backend(backend) == "eager":
        return module
    if backend == "inductor":
        return torch.compile(module, fullgraph=True, dynamic=False)
    recorded = torch.compile(module, fullgraph=True, dynamic=False, mode="reduce-overhead")

    def replay(*inputs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        # a recording writes into the same memory every time, and history has to outlive the next replay
        return tree.rebuild(recorded(*inputs), lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf)

    return replay
