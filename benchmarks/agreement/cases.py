"""The generations that the tests share: every peer at settings that make it decide now one way, now the other."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from benchmarks.agreement.peers import cache_dit_blocks, deepcache, diffusers_hooks, smoothcache
from benchmarks.agreement.peers.watching import Run
from benchmarks.agreement.subjects import SUBJECTS, Subject

# Of a change of the first block's residual; between the values that occur, far from each of them.
THRESHOLDS = {"flux": 0.29, "dit": 0.13, "wan": 0.06, "wan-separate": 0.06}
MASK = (1, 1, 0, 1, 0, 0, 1, 0, 1, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 1)
LATER = (1, *MASK[:-1])
MAG = {"threshold": 0.1, "max_skip": 3, "retention": 0.2}
WINDOW = {"spatial": 2, "cross": 3, "window": (100, 800)}

Peer = Callable[[Subject], Run]


@functools.cache
def ratios(name: str) -> tuple[float, ...]:
    """MagCache's own calibration of a subject."""
    return tuple(diffusers_hooks.mag_ratios(SUBJECTS[name]))


def _dbcache(**options: Any) -> Peer:
    return lambda s: cache_dit_blocks.dbcache(s, threshold=THRESHOLDS[s.name], warmup=2, **options)


PEERS: dict[str, Peer] = {
    "first_block_cache": lambda s: diffusers_hooks.first_block_cache(s, THRESHOLDS[s.name]),
    "taylorseer-1": lambda s: diffusers_hooks.taylorseer(s, order=1),
    "taylorseer-2": lambda s: diffusers_hooks.taylorseer(s, order=2),
    "taylorseer-2-after": lambda s: diffusers_hooks.taylorseer(s, order=2, interval=4, before=2, after=20),
    "taylorseer-lite-1": lambda s: diffusers_hooks.taylorseer(s, order=1, lite=True),
    "taylorseer-lite-2": lambda s: diffusers_hooks.taylorseer(s, order=2, lite=True),
    "mag_cache": lambda s: diffusers_hooks.mag_cache(s, list(ratios(s.name)), **MAG),
    "attention_broadcast": lambda s: diffusers_hooks.pyramid_attention_broadcast(s, **WINDOW),
    "faster_cache": lambda s: diffusers_hooks.faster_cache(s),
    "dbcache-F1": _dbcache(),
    "dbcache-F2": _dbcache(first=2),
    "dbcache-F2B1": _dbcache(first=2, last=1),
    "dbcache-F1-taylor1": _dbcache(order=1),
    "dbcache-F1-taylor2": _dbcache(order=2),
    "dbcache-F2B1-taylor1": _dbcache(first=2, last=1, order=1),
    "dbcache-F1-limits": _dbcache(max_cached=9, max_in_row=2, warmup_interval=2, max_accumulated=6.0),
    "dbcache-F1-accumulated": _dbcache(max_accumulated=3.0),
    "dbcache-F1-mask": _dbcache(mask=MASK),
    "dbcache-F1-static": _dbcache(mask=MASK, static=True),
    "dbcache-F1-static-taylor1": _dbcache(mask=MASK, static=True, order=1),
    "dbcache-F1-static-taylor2": _dbcache(mask=MASK, static=True, order=2),
    **{f"deepcache-{b}": functools.partial(deepcache.deepcache, branch=b) for b in range(7)},
    "smoothcache": lambda s: smoothcache.smoothcache(s, {"attn1": MASK, "ff": LATER}),
}


@functools.cache
def peer(name: str, subject: str) -> Run:
    """One of ``PEERS`` on a subject, seed 0; made once."""
    return PEERS[name](SUBJECTS[subject])
