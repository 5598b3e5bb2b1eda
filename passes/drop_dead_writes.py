"""Exact. Keep in history only what a later column of the schedule reads.

Before::

    return (result, (%7, %9))           # writes (0, 0) and (1, 0)

After (only site 1 is read later)::

    return (result, (%9,))

Needs ``apply_schedule``; ``live`` are the rows that ``Schedule.writes`` names for this step. Of rows in ``first`` only
so many values are read later: the keys and values beyond them are not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, cast

from torch import fx

from diffcache.graphs import find_output


def drop_dead_writes(
    gm: fx.GraphModule, *, live: Collection[int] = (), first: Mapping[int, int] | None = None
) -> fx.GraphModule:
    """Drop written values of rows that are not ``live``, and those beyond the ``first`` ones of a row."""
    end = find_output(gm.graph)
    result, values = cast("tuple[Any, tuple[fx.Node, ...]]", end.args[0])
    kept = [
        ((row, part), value)
        for (row, part), value in zip(gm.meta["writes"], values, strict=True)
        if row in live and part < (first or {}).get(row, part + 1)
    ]
    gm.meta["writes"] = [place for place, _ in kept]
    end.args = ((result, tuple(value for _, value in kept)),)
    return gm
