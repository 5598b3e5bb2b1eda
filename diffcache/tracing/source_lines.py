"""The line of user code that most likely changes a piece of Python state."""

from __future__ import annotations

import inspect
import os
import re

from torch import nn


def source_line(root: nn.Module, path: str) -> str:
    """The line that most likely changes the state at ``path``: an assignment to that name outside ``__init__``."""
    names = [part for part in re.split(r"[^A-Za-z0-9_]+", path) if part.isidentifier()]
    for name in reversed(names):
        write = re.compile(
            rf"\b{name}\b(\[.*\])?\s*([-+*/|&]|//)?=(?!=)|\b{name}\.(append|add|pop|update|extend)|next\(.*\b{name}\b"
        )
        for kind in {type(module) for module in root.modules()}:
            if kind.__module__.startswith(("torch.", "builtins")):
                continue
            if found := _search_methods(kind, write):
                return found
    return f"{path}, in {forward_line(root)}"


def forward_line(root: nn.Module) -> str:
    """Where the forward is defined."""
    code = getattr(inspect.unwrap(root.forward), "__code__", None)
    return (
        f"{os.path.basename(code.co_filename)}:{code.co_firstlineno} in {code.co_name}" if code else type(root).__name__
    )


def _search_methods(kind: type, pattern: re.Pattern[str]) -> str | None:
    try:
        lines, start = inspect.getsourcelines(kind)
        file = os.path.basename(inspect.getsourcefile(kind) or "?")
    except (OSError, TypeError):
        return None
    method = ""
    for number, line in enumerate(lines, start):
        if line.lstrip().startswith("def "):
            method = line
        if method and "init" not in method and pattern.search(line.partition("#")[0]):
            return f"{file}:{number}: {line.strip()}"
    return None
