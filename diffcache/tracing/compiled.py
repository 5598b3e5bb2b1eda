"""Modules that ``torch.compile`` has compiled, whole or in part: they are captured as what they were before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile(module)`` wraps, or the module itself."""
    inner = vars(module).get("_modules", {}).get("_orig_mod")
    return inner if type(module).__module__.startswith("torch._dynamo") and inner is not None else module


def is_compiled(module: nn.Module) -> bool:
    """Whether any part was compiled, by ``torch.compile(part)`` or ``part.compile()``."""
    return any(
        uncompiled(part) is not part or vars(part).get("_compiled_call_impl") is not None for part in module.modules()
    )


@contextlib.contextmanager
def running_eagerly(module: nn.Module) -> Iterator[None]:
    """Let the compiled parts of ``module`` run as they were before, as its capture will."""
    if not is_compiled(module):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
