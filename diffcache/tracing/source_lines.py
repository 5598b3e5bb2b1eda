"""The line of user code that most likely changes a piece of Python state."""

from __future__ import annotations

import inspect
import os
import re
import types
from collections.abc import Iterable, Iterator

from torch import nn


def source_line(codes: Iterable[types.CodeType], path: str, root: nn.Module) -> str:
    """Of the functions that ran: the line that writes to what ``path`` names, or else calls something of it."""
    lines = [line for code in codes for line in _numbered(code)]
    names = [part for part in re.split(r"[^A-Za-z0-9_]+", path) if part.isidentifier()]
    for pattern in (*map(_writing, reversed(names)), *map(_calling, reversed(names))):
        for place, text in lines:
            if pattern.search(text.partition("#")[0]):
                return f"{place}: {text}"
    return f"{path}, in {forward_line(root)}"


def _writing(name: str) -> re.Pattern[str]:
    key = rf"\b{name}\b['\"]?(\]|\[.*\])*"
    change = r"append|appendleft|add|pop|popleft|update|extend|insert|setdefault|clear"
    return re.compile(rf"{key}\s*([-+*/|&^%@]|//|<<|>>)?=(?!=)|{key}\.({change})\(|next\(.*\b{name}\b")


def _calling(name: str) -> re.Pattern[str]:
    return re.compile(rf"\b{name}\b.*\(")


def _numbered(code: types.CodeType) -> Iterator[tuple[str, str]]:
    """The lines of a function as (file and line number, text)."""
    try:
        lines, start = inspect.getsourcelines(code)
    except (OSError, TypeError):
        return
    for number, line in enumerate(lines, start):
        if not line.lstrip().startswith(("def ", "@")) or number == code.co_firstlineno == start + len(lines) - 1:
            yield f"{os.path.basename(code.co_filename)}:{number}", line.strip()


def forward_line(root: nn.Module) -> str:
    """Where the forward is defined."""
    code = getattr(inspect.unwrap(root.forward), "__code__", None)
    if code is None:
        return type(root).__name__
    return f"{os.path.basename(code.co_filename)}:{code.co_firstlineno} in {code.co_name}"
