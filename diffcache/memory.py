"""What history costs: bytes of one entry, how many are held at once, and where they lie."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from diffcache.cells import Forecast, Partial
from diffcache.ops import SMALL
from diffcache.schedule import Row, Schedule
from diffcache.sites import Site
from diffcache.token_reads import kept_steps
from diffcache.tracing.spec import TensorSpec

SMALL_DTYPES = {"int8": torch.int8, "float8": torch.float8_e4m3fn}
assert set(SMALL_DTYPES.values()) == set(SMALL)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of history over a generation.

    ``entries`` is the most values of a site that are held at once by one stream (a condition of one generation),
    ``entry_bytes`` the size of one. ``device_bytes`` and ``host_bytes`` are the peaks of all ``streams`` together.
    """

    entries: Mapping[str, int]
    entry_bytes: Mapping[str, int]
    streams: int
    device_bytes: int
    host_bytes: int
    peak_step: int

    def __str__(self) -> str:
        lines = [
            f"history: {in_words(self.device_bytes)} at its peak (step {self.peak_step}, {self.streams} streams)"
            + (f", and {in_words(self.host_bytes)} of host memory" if self.host_bytes else "")
        ]
        width = max((len(site) for site in self.entries), default=0)
        lines += [
            f"  {site:<{width}}  {count} x {in_words(self.entry_bytes[site])}" for site, count in self.entries.items()
        ]
        return "\n".join(lines)


def plan_memory(
    schedule: Schedule, entry_bytes: Mapping[str, int], *, streams: int = 1, offload: bool = False
) -> MemoryPlan:
    """What a schedule holds at each step: entries that a later forecast still reads, and those written there.

    With ``offload`` only what a step reads and writes is on the device, and all that waits is in host memory. Probes
    that rules look at have entries of their own (``probe_entry``) and stay on the device; so do the keys and values of
    rows that run on some of their tokens (``token_entry``), which are offloaded with history.
    """
    probes = {
        probe_entry(probe): [row for row in schedule.rows if probe in row.probes]
        for probe in dict.fromkeys(probe for row in schedule.rows for probe in row.probes)
    }
    keys = [row for row in schedule.rows if token_entry(row.site) in entry_bytes]
    entries = dict.fromkeys(
        [*(row.site for row in schedule.rows), *probes, *(token_entry(row.site) for row in keys)], 0
    )
    device, host = [], []
    for step in range(schedule.steps):
        waiting = {site: len(steps) for site, steps in schedule.live_after(step - 1).items()} if step else {}
        newest = {row.site: _newest_held(schedule, row, step) for row in schedule.rows}
        waiting |= {site: max(count, waiting.get(site, 0)) for site, count in newest.items() if count}
        written = schedule.writes(step)
        reads = {row.site: n for row, n in zip(schedule.rows, schedule.structure(step).reads, strict=True)}
        held = {row.site: waiting.get(row.site, 0) + (row.site in written) for row in schedule.rows}
        held |= {token_entry(row.site): _keys_held(schedule, row, step) for row in keys}
        looked_at = {  # those of computed steps, and the one of now
            probe: 1 + max(min(step, row.keeps) if row.last_online >= step else 0 for row in rows)
            for probe, rows in probes.items()
        }
        entries = {site: max(count, (held | looked_at)[site]) for site, count in entries.items()}
        busy = {site: reads.get(site, held[site]) + (site in written) for site in held} if offload else held
        device.append(sum(count * entry_bytes[site] for site, count in (busy | looked_at).items()))
        host.append(sum(count * entry_bytes[site] for site, count in held.items()) if offload else 0)
    peak = max(range(schedule.steps), key=lambda step: device[step])
    return MemoryPlan(entries, dict(entry_bytes), streams, streams * device[peak], streams * max(host), peak)


def _newest_held(schedule: Schedule, row: Row, step: int) -> int:
    """How many values of a row at most are kept before a step for what is decided at run time."""
    newest, full = schedule.newest_after(row, step - 1), schedule.full_after(row, step - 1)
    made = [at for at in range(step - 1, -1, -1) if not isinstance(row.cells[at], Forecast)] if full else range(step)
    return len(kept_steps(made, [at for at in made if isinstance(row.cells[at], Partial)], newest, full))


def _keys_held(schedule: Schedule, row: Row, step: int) -> int:
    """How many times keys and values of a row are held at a step: the old ones, and those that it makes."""
    return int(step > 0 and schedule.keeps_tokens(row, step - 1)) + int(schedule.keeps_tokens(row, step))


def entry_bytes(graph: fx.Graph, sites: Sequence[Site], small: torch.dtype | None = None) -> dict[str, int]:
    """Bytes of one entry of each site's history, as the shapes of this graph make it."""
    specs = {node.meta.get("captured_as", node.name): node.meta.get("val") for node in graph.nodes}
    return {site.name: sum(spec_bytes(specs.get(value), small) for value in site.values) for site in sites}


def probe_entry(name: str) -> str:
    """The name under which a probe is counted: it may be a site as well."""
    return f"probe {name}"


def token_entry(name: str) -> str:
    """The name under which the keys and values are counted that a row on some tokens keeps beside its value."""
    return f"keys of {name}"


def can_be_small(spec: Any, small: torch.dtype | None) -> bool:
    """Whether history keeps a value in the small dtype: 16 or 32 bits, in rows with one scale each."""
    return small is not None and isinstance(spec, TensorSpec) and _has_rows(spec)


def _has_rows(spec: TensorSpec) -> bool:
    return (
        spec.dtype in (torch.float32, torch.bfloat16, torch.float16) and len(spec.shape) >= 2 and spec.shape[-1] >= 16
    )


def spec_bytes(spec: Any, small: torch.dtype | None = None) -> int:
    """Bytes of a value, as history keeps it."""
    if not isinstance(spec, TensorSpec):
        return 0
    if not can_be_small(spec, small):
        return spec.bytes
    count = math.prod(spec.shape)
    return count + 4 * count // spec.shape[-1]


def in_words(size: int) -> str:
    """``3.2 MB``."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"


def in_full(kept: Kept) -> torch.Tensor:
    """The value again of what history keeps; of a small one up to its rounding."""
    return kept[0].to(torch.float32) * kept[1] if isinstance(kept, tuple) else kept


Kept = torch.Tensor | tuple[torch.Tensor, torch.Tensor]  # a value, or a small one and its scale


def to_host(kept: Kept) -> Kept:
    """A copy in pinned host memory; the copy is queued on the device's stream, nothing waits for it."""
    if isinstance(kept, tuple):
        return _to_host(kept[0]), _to_host(kept[1])
    return _to_host(kept)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
