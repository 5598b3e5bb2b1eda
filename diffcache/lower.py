"""From a graph module to something that runs: as it is, or through ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

BACKENDS = ("eager", "inductor")


def check_backend(backend: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; expected one of {list(BACKENDS)}")
    return backend


def lower(module: fx.GraphModule, backend: str = "eager") -> Callable[..., Any]:
    """A callable that runs ``module``; "inductor" compiles it as one graph at its first call."""
    return module if check_backend(backend) == "eager" else torch.compile(module, fullgraph=True, dynamic=False)
