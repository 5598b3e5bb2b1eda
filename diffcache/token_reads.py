"""What steps on some of a site's tokens read of earlier ones, told from the rows of a schedule. No torch here."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from diffcache.cells import COMPUTE, Cell, Deferred, Partial, Selected

if TYPE_CHECKING:
    from diffcache.schedule import Row

Lookers = dict[str, list[tuple[int, int, bool]]]


def lookers(rows: Sequence[Row]) -> Lookers:
    """Site -> for each step at which a row beside it chooses tokens by it: the step, how many values, attended or not.

    Raises ValueError for a row that chooses by a site without a row.
    """
    found: Lookers = {row.site: [] for row in rows}
    for row in rows:
        for step, cell in enumerate(row.cells):
            if isinstance(cell, Partial) and cell.beside:
                if cell.beside not in found:
                    raise ValueError(
                        f"site '{row.site}' chooses its tokens by '{cell.beside}', which has no row in this schedule; "
                        f"its rows are {list(found)}"
                    )
                found[cell.beside].append((step, cell.looks, cell.attended))
    return found


def full_values(row: Row) -> int:
    """How many values of full steps a row's rules read beside the newest one, which may be of some tokens only.

    A rule that reads one value goes on from the newest, whatever was computed of it.
    """
    rules = [cell.others if isinstance(cell, Partial) else cell for cell in row.cells if isinstance(cell, Deferred)]
    most = max((rule.history for rule in rules), default=0)
    return most if most > 1 and row.last_partial >= 0 else 0


def kept_steps(made: Sequence[int], partial: Collection[int], newest: int, full: int) -> set[int]:
    """Of the computed steps (newest first) the ``newest``, and the ``full`` newest at which all was computed."""
    return {*made[:newest], *[step for step in made if step not in partial][:full]}


def keeps_tokens(row: Row, step: int, looked_at: Collection[int]) -> bool:
    """Whether a later step looks at the keys and values that are known of a row after this one.

    Such are its own steps on some tokens, and steps ``looked_at`` at which another row does. Computing the row in full
    makes them anew.
    """
    for later in range(step + 1, max(row.last_partial, *looked_at, -1) + 1):
        if isinstance(row.cells[later], Partial) or later in looked_at:
            return True
        if row.cells[later] is COMPUTE:
            return False
    return False


def token_structure(cell: Cell, keeps: bool) -> str:
    """What the program of a cell depends on besides what is read: counts of tokens, and keys and values it keeps."""
    if isinstance(cell, Partial | Selected):
        return f"{cell}{' keeps' if keeps else ''}"
    return "keeps" if keeps and cell is COMPUTE else ""
