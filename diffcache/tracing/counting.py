"""Counters that nothing reads: a hook or wrapper that only counts calls keeps state that no result can see."""

from __future__ import annotations

import dis
import functools
import types

_NOISE = frozenset(("CACHE", "NOP", "RESUME", "EXTENDED_ARG", "PRECALL", "PUSH_NULL"))
_LOADS = ("LOAD_DEREF", "LOAD_GLOBAL", "LOAD_NAME", "LOAD_CLOSURE", "LOAD_CLASSDEREF")
_INSERTS = frozenset(("append", "add"))
# what follows the load of a name in ``n += 1``, ``n[0] += 1`` and ``counter.n += 1``
_PLAIN = ("LOAD_", "BINARY_OP", "STORE_")
_ITEM = ("LOAD_", "COPY", "COPY", "BINARY_", "LOAD_", "BINARY_OP", "SWAP", "SWAP", "STORE_SUBSCR")
_ATTRIBUTE = ("COPY", "LOAD_ATTR", "LOAD_", "BINARY_OP", "SWAP", "STORE_ATTR")


@functools.lru_cache(maxsize=4096)
def only_counted(code: types.CodeType, name: str) -> bool:
    """Whether all that ``code`` does with the outer variable ``name`` is ``+=`` or ``append``: it never reads it."""
    instructions = [i for i in dis.get_instructions(code) if i.opname not in _NOISE]
    counted = False
    for k, instruction in enumerate(instructions):
        if instruction.argval != name or instruction.opname not in _LOADS:
            continue
        if instruction.opname == "LOAD_CLOSURE" or not _counts(name, instructions[k + 1 : k + 10]):
            return False
        counted = True
    return counted


def _counts(name: str, following: list[dis.Instruction]) -> bool:
    if _matches(following, _PLAIN):
        return bool(following[2].argval == name)
    if _matches(following, _ITEM) or _matches(following, _ATTRIBUTE):
        return True
    return bool(following) and following[0].opname in ("LOAD_METHOD", "LOAD_ATTR") and following[0].argval in _INSERTS


def _matches(following: list[dis.Instruction], pattern: tuple[str, ...]) -> bool:
    return len(following) >= len(pattern) and all(
        instruction.opname.startswith(wanted) for instruction, wanted in zip(following, pattern, strict=False)
    )
