"""Short digests of what a schedule was made for: the module tree, and the captured graph."""

from __future__ import annotations

import hashlib

from torch import fx, nn


def module_fingerprint(module: nn.Module) -> str:
    """Names and classes of all modules, names and shapes of all parameters."""
    parts = [f"{path}:{type(child).__qualname__}" for path, child in module.named_modules()]
    parts += [f"{name}:{tuple(parameter.shape)}" for name, parameter in module.named_parameters()]
    return _digest(parts)


def graph_fingerprint(graph: fx.Graph) -> str:
    """Ops and module paths in order; sizes do not count, so another resolution has the same one."""
    parts = []
    for node in graph.nodes:
        target = (
            node.target
            if isinstance(node.target, str)
            else getattr(node.target, "__name__", type(node.target).__name__)
        )
        parts.append(f"{node.op}:{target}:{node.meta.get('path', '')}")
    return _digest(parts)


def _digest(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
