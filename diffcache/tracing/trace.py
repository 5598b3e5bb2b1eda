"""What recording one forward gives: the graph, what it stands on, and the calls of modules that made it."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from diffcache.tracing.bits import same_bits
from diffcache.tracing.guards import ModuleReads


@dataclass
class ModuleCall:
    """One call of a module that is not a leaf: names of the nodes that entered and left it, in order."""

    path: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...] = ()
    nodes: tuple[int, int] = (0, 0)
    parent: int = -1
    leaf: bool = False


@dataclass
class Trace:
    """What recording one forward gives."""

    graph: fx.Graph
    attributes: dict[str, Any]
    calls: list[ModuleCall]
    reads: ModuleReads
    output: Any = None
    produced: dict[int, tuple[weakref.ref[Any], fx.Node]] = field(default_factory=dict)
    unseen: dict[str, str] = field(default_factory=dict)
    escaped: list[fx.Node] = field(default_factory=list)
    layout_read: bool = False
    persistent: list[torch.Tensor] = field(default_factory=list)
    effects: list[fx.Node] = field(default_factory=list)
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    generators: dict[int, tuple[torch.Generator, torch.Tensor]] = field(default_factory=dict)
    swallowed: str | None = None
    writes_inputs: bool = False

    def put_back(self) -> None:
        """Give tensors that the forward wrote to, and generators that it drew from, what they had before."""
        for generator, state in self.generators.values():
            generator.set_state(state)
        with torch.no_grad():
            for tensor, value in self.kept.values():
                if not same_bits(tensor, value):
                    tensor.copy_(value)
