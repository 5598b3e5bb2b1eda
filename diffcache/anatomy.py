"""A captured graph taken apart: its data flow, its repeated blocks, their trunk, its skips, levels and axes.

Enters: a captured graph, its module calls and its cost. Everything is found once, and only when it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

from torch import fx

from diffcache.axes import OTHER, Axes, latent_axes, names_in, tokens_in
from diffcache.blocks import Block, repeated_blocks, trunk
from diffcache.cost import Cost
from diffcache.cuts import Skip, skips
from diffcache.flow import Flow
from diffcache.tracing.recorder import ModuleCall


class Anatomy:
    """What site finding knows of one capture."""

    def __init__(self, graph_module: fx.GraphModule, calls: Sequence[ModuleCall], cost: Cost) -> None:
        missing = [node.name for node in graph_module.graph.nodes if node.name not in cost.flops]
        if missing:
            raise ValueError(f"the cost knows nothing of nodes {missing[:3]}; measure the cost of this graph")
        self.flow = Flow(graph_module, calls, cost)

    @cached_property
    def blocks(self) -> list[Block]:
        """Calls of repeated modules in order of execution, blocks within blocks included."""
        return repeated_blocks(self.flow)

    @cached_property
    def trunk(self) -> list[Block]:
        """The main run of blocks, which ``blocks[first:last]`` counts; empty in a U-Net."""
        return trunk(self.flow, self.blocks)

    @cached_property
    def axes(self) -> dict[fx.Node, Axes]:
        """Which axes of the latent each axis of a value runs over."""
        return latent_axes(self.flow)

    @cached_property
    def skips(self) -> list[Skip]:
        """Skip connections, the shallowest first; the index is DeepCache's branch."""
        return skips(self.flow, self.blocks)

    def depth(self, call: int) -> int:
        """The index in the trunk of the block that is this module call or holds it; -1 outside of the trunk."""
        for index, block in enumerate(self.trunk):
            if block.call == call or self.flow.inside_call(call, block.call):
                return index
        return -1

    def branch(self, value: fx.Node) -> int:
        """The index of the skip whose deeper operand a value is; -1 for any other value."""
        return next((index for index, skip in enumerate(self.skips) if skip.deep is value), -1)

    def foreign(self, value: fx.Node) -> bool:
        """Whether a value holds tokens that the latent did not begin (text), as far as that is known."""
        return OTHER in names_in(self.axes.get(value, ())) or not self.flow.carries_latent(value)

    # -- resolution levels ------------------------------------------------------------------------------------------

    def level(self, value: fx.Node) -> int:
        """The resolution level of a value, 0 the finest that blocks work at; -1 where all work at one."""
        places = self._places(value)
        return self._levels.index(places) if len(self._levels) > 1 and places in self._levels else -1

    @cached_property
    def _levels(self) -> list[int]:
        made = {self._places(block.outputs[0]) for block in self.blocks if block.outputs}
        return sorted(made - {1}, reverse=True)

    def _places(self, value: fx.Node) -> int:
        """How many places of the picture a value has tokens for (a clip's frames do not count)."""
        spec = self.flow.spec(self.flow.latent) if self.flow.latent is not None else None
        if spec is None or value not in self.axes:
            return 1
        rank = len(spec.shape)
        return tokens_in(self.axes[value], frozenset(range(max(rank - 2, 2), rank)))

    def side(self, value: fx.Node) -> str:
        """Where in a U shape a value is made: "down" (before a skip begins), "up" (behind where one ends), or "mid"."""
        if not self.skips:
            return ""
        if value in self._behind_joins:
            return "up"
        return "down" if value in self._before_skips else "mid"

    @cached_property
    def _behind_joins(self) -> set[fx.Node]:
        reached = {skip.join for skip in self.skips}
        for node in self.flow.order:
            if any(source in reached for source in self.flow.inputs[node]):
                reached.add(node)
        return reached

    @cached_property
    def _before_skips(self) -> set[fx.Node]:
        begun = {node for skip in self.skips for node in skip.around}
        return begun.union(*map(self.flow.ancestors, begun)) if begun else set()

    # -- what runs --------------------------------------------------------------------------------------------------

    def needed_flops(self, values: Iterable[fx.Node]) -> float:
        """FLOPs of one call that these values need: what looking at them costs."""
        wanted = list(values)
        needed = set(wanted).union(*map(self.flow.ancestors, wanted))
        return sum(self.flow.flops.get(node.name, 0.0) for node in needed)
