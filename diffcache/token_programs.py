"""What programs need of the rows of a schedule that run on some of their tokens: regions, and rows of the pass."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import fx

from diffcache.cells import COMPUTE, SKIP, Cell, Selected
from diffcache.memory import token_entry
from diffcache.options import RunOptions
from diffcache.passes.subset_tokens import TokenRow
from diffcache.schedule import Row, Schedule
from diffcache.sites import Site
from diffcache.token_region import TokenRegion, token_region

NEWEST = -2  # in the place of a step: keys and values, of which only the newest are kept


class TokenRegions:
    """The regions of a captured variant's sites by row, each found when it is first asked for."""

    def __init__(self, module: fx.GraphModule, sites: Sequence[Site], flops: Mapping[str, float]):
        self.module, self.sites, self.flops = module, sites, flops
        self._found: dict[int, TokenRegion] = {}

    def of(self, row: int) -> TokenRegion:
        """Raises ValueError where the site cannot run on a few of its tokens."""
        if row not in self._found:
            self._found[row] = token_region(self.module, self.sites[row], self.flops)
        return self._found[row]

    def token_rows(self, cells: Sequence[Cell], keeping: Collection[int]) -> list[TokenRow]:
        """The rows of the pass for one column; ``keeping`` are those whose keys and values a later step looks at."""
        rows = []
        for row, (site, cell) in enumerate(zip(self.sites, cells, strict=False)):
            if isinstance(cell, Selected):
                rows.append(TokenRow(row, site, self.of(row), cell.counts, cell.reads, cell.blend))
            elif cell is COMPUTE and row in keeping:
                rows.append(TokenRow(row, site, self.of(row)))
        return rows

    def sizes(self, schedule: Schedule) -> dict[str, int]:
        """Bytes of the keys and values of each row that keeps them."""
        kept = {schedule.rows[row].site: self.of(row).bytes_kept for row in keeping_rows(schedule)}
        return {token_entry(site): size for site, size in kept.items() if size}

    def check(self, schedule: Schedule, segments: Sequence[Collection[str]]) -> None:
        """Find all regions now; ``segments`` are the nodes of each, by name in the capture.

        Raises:
            ValueError: a site cannot run on a few of its tokens, or a gate looks at something inside it.
        """
        for row in keeping_rows(schedule):
            site, region = self.sites[row], self.of(row)
            wanted = {*site.values, *region.kept}
            if not any(wanted <= set(nodes) for nodes in segments):
                raise ValueError(
                    f"site '{site.name}' runs on some of its tokens, and a gate or a rule looks at a probe in the "
                    "middle of it; look at something that lies before the site"
                )


def keeping_rows(schedule: Schedule) -> list[int]:
    """The rows that run on some of their tokens, or whose keys and values another row looks at."""
    return [
        number
        for number, row in enumerate(schedule.rows)
        if row.last_partial >= 0 or any(schedule.keeps_tokens(row, step) for step in range(schedule.steps))
    ]


def without_tokens(cells: Sequence[Cell]) -> list[Cell]:
    """The column as the pass before sees it: rows on some tokens are neither computed nor forecast there."""
    return [SKIP if isinstance(cell, Selected) else cell for cell in cells]


def part_flops(node: fx.Node, flops: Mapping[str, float]) -> float:
    """FLOPs of a node of a program; a copy on some tokens has that share of its original's."""
    name, share = node.meta.get("part_of", (node.meta.get("captured_as", node.name), 1.0))
    return share * flops.get(name, 0.0)


def check_options(rows: Sequence[Row], options: RunOptions) -> None:
    """Raise ValueError where history is kept in a small dtype and rows run on some of their tokens."""
    partial = [row.site for row in rows if row.last_partial >= 0]
    if partial and options.small is not None:
        raise ValueError(
            f"history_dtype is {options.history_dtype!r}, but sites {partial[:3]} run on some of their tokens, whose "
            "rows are put into history one by one: keep it as it is (history_dtype=None)"
        )
