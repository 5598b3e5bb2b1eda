"""Exact. Drop what nobody reads: this is where a forecast saves its work.

Before::

    %1 = attention(%0)
    %2 = extrapolate(%0, [history_0_0_0], weights_0)
    return %2

After::

    %2 = extrapolate(%0, [history_0_0_0], weights_0)
    return %2

Needs nothing from earlier passes. Writes that the caller sees and random draws stay (see ``diffcache.liveness``).
"""

from __future__ import annotations

from torch import fx

from diffcache.liveness import live_nodes


def eliminate_dead_code(gm: fx.GraphModule) -> fx.GraphModule:
    """Erase every node that is not live; placeholders stay, they are the calling convention."""
    live = live_nodes(gm.graph)
    for node in reversed(list(gm.graph.nodes)):
        if node not in live:
            gm.graph.erase_node(node)
        else:
            node.meta["deps"] = tuple(dep for dep in node.meta.get("deps", ()) if dep in live)
    return gm
