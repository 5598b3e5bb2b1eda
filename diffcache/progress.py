"""A live display of what calibration and search are doing; silent where there is nobody to watch."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

Report = Callable[[str, int, int], None]  # (stage, done, total)


def silent(stage: str, done: int, total: int) -> None:
    """Show nothing."""


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """A line that moves while something takes long that nobody was told of; on a terminal only."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.errors import LiveError

    with contextlib.ExitStack() as shown:
        with contextlib.suppress(LiveError):  # another display is already on
            shown.enter_context(Console(stderr=True).status(what))
        yield


@contextlib.contextmanager
def display(enabled: bool) -> Iterator[Report]:
    """A bar for each stage, on standard error."""
    if not enabled:
        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, object] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)  # type: ignore[arg-type]

        yield report
