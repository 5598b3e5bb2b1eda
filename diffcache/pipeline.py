"""The order of the passes, and the runner that times, verifies, prints, disables and bisects them by name."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import fx

from diffcache.graphs import copy_graph_module, count_ops
from diffcache.passes.apply_schedule import apply_schedule
from diffcache.passes.drop_dead_writes import drop_dead_writes
from diffcache.passes.eliminate_dead_code import eliminate_dead_code
from diffcache.passes.flatten_inputs import flatten_inputs
from diffcache.passes.fuse_forecasts import fuse_forecasts
from diffcache.passes.hoist_step_invariant import hoist_step_invariant
from diffcache.passes.subset_tokens import subset_tokens
from diffcache.passes.take_segment import take_segment
from diffcache.tracing.printer import format_graph

Pass = Callable[..., fx.GraphModule]

# once for each capture
PREPARE: tuple[Pass, ...] = (
    flatten_inputs,  # every tensor and number a placeholder of its own
    hoist_step_invariant,  # what depends on neither latent nor timestep, once per generation
)
# once for each distinct column of the schedule
SPECIALISE: tuple[Pass, ...] = (
    take_segment,  # of a graph that is cut at the probes of its gates
    apply_schedule,  # forecasts in the place of values
    subset_tokens,  # a few fresh tokens among forecast ones: with the pass before the approximating ones
    drop_dead_writes,  # keep only what a later step reads
    eliminate_dead_code,  # here the saving happens
    fuse_forecasts,  # into the kernels: gated residual adds and modulated norms
)
# they fix the calling convention of a program
REQUIRED = frozenset(("flatten_inputs", "take_segment", "apply_schedule", "subset_tokens"))


@dataclass(frozen=True)
class PassReport:
    """What one pass did: its time and the number of ops before and after."""

    name: str
    milliseconds: float
    before: int
    after: int

    def __str__(self) -> str:
        return f"{self.name:<22} {self.milliseconds:7.1f} ms  {self.before:5d} -> {self.after:5d} ops"


def known_passes() -> tuple[str, ...]:
    return tuple(dict.fromkeys(p.__name__ for p in (*PREPARE, *SPECIALISE)))


def disabled_passes(names: Collection[str] = ()) -> frozenset[str]:
    """The passes to leave out: those given and those of ``DIFFCACHE_DISABLE_PASSES`` (names separated by commas).

    Raises:
        ValueError: a name is unknown, or the pass cannot be left out.
    """
    wanted = {*names, *filter(None, os.environ.get("DIFFCACHE_DISABLE_PASSES", "").split(","))}
    unknown = sorted(wanted - set(known_passes()))
    if unknown:
        raise ValueError(f"unknown passes {unknown} to disable; known: {list(known_passes())}")
    if wanted & REQUIRED:
        raise ValueError(f"passes {sorted(wanted & REQUIRED)} fix how a program is called and cannot be disabled")
    return frozenset(wanted)


def run_passes(
    module: fx.GraphModule,
    passes: Sequence[Pass],
    options: Mapping[str, Mapping[str, Any]],
    *,
    title: str,
    disable: Collection[str] = (),
    dump: str | None = None,
) -> tuple[fx.GraphModule, list[PassReport]]:
    """Run ``passes`` in order on a private copy of ``module``.

    Args:
        options: keyword arguments by pass name.
        title: names the program in dumps and error notes.
        disable: names of passes to leave out, besides ``DIFFCACHE_DISABLE_PASSES``.
        dump: a folder for one text file per stage; default ``DIFFCACHE_DUMP``.
    """
    skip = disabled_passes(disable)
    folder = dump or os.environ.get("DIFFCACHE_DUMP")
    module = copy_graph_module(module)
    reports: list[PassReport] = []
    _dump(folder, title, 0, "input", module)
    for number, pass_ in enumerate(passes, 1):
        name = pass_.__name__
        if name in skip:
            continue
        before, start = count_ops(module.graph), time.perf_counter()
        try:
            result = pass_(module, **options.get(name, {}))
            assert isinstance(result, fx.GraphModule), f"pass '{name}' returned a {type(result).__name__}"
            verify(result)
        except Exception as error:
            error.add_note(f"in pass '{name}' of {title}, after {[r.name for r in reports]}")
            raise
        module = result
        reports.append(PassReport(name, 1e3 * (time.perf_counter() - start), before, count_ops(module.graph)))
        _dump(folder, title, number, name, module)
    module.recompile()
    return module, reports


def verify(module: fx.GraphModule) -> None:
    """Check what every stage promises: defined before use, every attribute present, writes before reads they feed."""
    module.graph.lint()
    order = {node: index for index, node in enumerate(module.graph.nodes)}
    for node in module.graph.nodes:
        for dep in node.meta.get("deps", ()):
            assert dep not in order or order[dep] < order[node], (
                f"{node.name} needs the write {dep.name}, which comes later"
            )


def bisect_passes(is_bad: Callable[[frozenset[str]], bool]) -> str | None:
    """The optional pass without which ``is_bad(disabled)`` becomes false, or None if no single pass explains it."""
    if not is_bad(frozenset()):
        raise ValueError("nothing to bisect: is_bad() is false with all passes on")
    optional = [name for name in known_passes() if name not in REQUIRED]
    return next((name for name in optional if not is_bad(frozenset((name,)))), None)


def _dump(folder: str | None, title: str, number: int, name: str, module: fx.GraphModule) -> None:
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = format_graph(module, title=f"{title} after {name}")
        Path(folder, f"{title}-{number:02d}-{name}.txt").write_text(text + "\n")
