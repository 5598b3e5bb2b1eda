"""Lists of computed steps as papers and their code print them.

Which denoiser a list was made for is part of what was published, and no more than that: a name under which to look it
up. Nothing here depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Table:
    """The computed steps of ``steps``, and where they were published."""

    computed: tuple[int, ...]
    steps: int
    source: str


GOLDEN_PATH = "as listed in the Golden Path Hypothesis repository, 2026"


def _published(source: str, steps: int, text: str) -> Table:
    return Table(tuple(int(step) for step in text.replace(",", " ").split()), steps, source)


TABLES: dict[str, Table] = {
    "fasterdiffusion": _published("FasterDiffusion, 2023", 50, "0 1 2 3 5 10 15 25 35"),
    # its key steps 6, 18, ... are those computed from its start step on; before it every step is computed
    "profilingdit": _published("ProfilingDiT, 2025", 50, "0 1 2 3 4 5 6 18 26 32 38 42 46 48"),
    "meancache-flux-21": _published(
        f"MeanCache {GOLDEN_PATH}", 50, "0 1 2 3 4 5 6 7 8 10 12 15 18 22 26 30 35 40 44 47 49"
    ),
    "budcache-flux-21": _published(
        f"BudCache {GOLDEN_PATH}", 50, "0 1 2 3 5 6 7 11 13 14 16 17 20 23 28 32 37 41 44 46 49"
    ),
    "dpcache-flux-21": _published(
        f"DPCache {GOLDEN_PATH}", 50, "0 1 2 3 5 7 9 12 15 19 21 24 27 30 33 36 39 42 45 47 49"
    ),
    "seacache-flux-21": _published(
        f"SeaCache's most frequent schedule, {GOLDEN_PATH}",
        50,
        "0 1 2 3 4 5 6 8 10 12 15 18 21 25 29 33 37 41 45 48 49",
    ),
    "meancache-flux-13": _published(f"MeanCache {GOLDEN_PATH}", 50, "0 1 2 3 4 6 9 13 18 25 34 43 49"),
    "budcache-flux-13": _published(f"BudCache {GOLDEN_PATH}", 50, "0 1 2 3 4 6 11 15 21 29 39 45 49"),
    "dpcache-flux-13": _published(f"DPCache {GOLDEN_PATH}", 50, "0 1 2 4 7 12 19 24 30 36 41 45 49"),
    "seacache-flux-13": _published(
        f"SeaCache's most frequent schedule, {GOLDEN_PATH}", 50, "0 1 2 4 6 9 13 18 25 33 41 47 49"
    ),
    "goldenpath-flux-9": _published("Golden Path Hypothesis, 2026: best of all", 50, "0 1 2 4 6 11 24 41 49"),
    "budcache-flux-9": _published(f"BudCache {GOLDEN_PATH}", 50, "0 1 2 4 7 13 20 39 49"),
    "meancache-flux-9": _published(f"MeanCache {GOLDEN_PATH}", 50, "0 1 2 3 4 9 19 34 49"),
    "dpcache-flux-9": _published(f"DPCache {GOLDEN_PATH}", 50, "0 1 2 5 11 20 29 40 49"),
    "meancache-qwen-21": _published(
        f"MeanCache {GOLDEN_PATH}", 50, "0 1 2 3 4 5 6 7 8 9 10 12 14 17 20 24 29 34 41 47 49"
    ),
    "budcache-qwen-21": _published(
        f"BudCache {GOLDEN_PATH}", 50, "0 1 2 3 4 5 6 7 9 10 12 14 16 20 23 28 32 37 43 47 49"
    ),
    "meancache-qwen-13": _published(f"MeanCache {GOLDEN_PATH}", 50, "0 1 2 3 4 5 7 10 14 20 28 38 49"),
    "budcache-qwen-13": _published(f"BudCache {GOLDEN_PATH}", 50, "0 1 2 3 4 5 7 9 11 18 29 40 49"),
    "meancache-qwen-9": _published(f"MeanCache {GOLDEN_PATH}", 50, "0 1 2 3 4 9 19 34 49"),
    "budcache-qwen-9": _published(f"BudCache {GOLDEN_PATH}", 50, "0 1 2 3 8 14 25 37 49"),
    "meancache-qwen-25": _published(
        "MeanCache's code, 2026", 50, "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 24 32 40 43 45 47 48 49"
    ),
    "meancache-qwen-17": _published("MeanCache's code, 2026", 50, "0 1 2 3 4 5 6 7 8 10 17 24 31 38 45 48 49"),
    "meancache-qwen-10": _published("MeanCache's code, 2026", 50, "0 1 3 7 14 21 28 35 42 49"),
    "meancache-zimage-20": _published(
        "MeanCache's code, 2026", 50, "0 1 2 3 4 6 8 10 12 14 16 18 20 22 30 38 43 46 48 49"
    ),
    "meancache-zimage-15": _published("MeanCache's code, 2026", 50, "0 1 2 3 5 7 10 12 17 25 33 41 45 48 49"),
    "meancache-zimage-13": _published("MeanCache's code, 2026", 50, "0 1 2 3 5 9 15 22 29 36 43 47 49"),
}

# The look-back K that MeanCache's code stores with three of its lists: computed step -> K for the steps skipped after
# it, 1 where nothing is said (`predictors.mean_velocity_weights`).
LOOKBACKS: dict[str, dict[int, int]] = {
    "meancache-qwen-25": {40: 5, 43: 5, 45: 5},
    "meancache-qwen-17": {8: 2, 45: 4},
    "meancache-qwen-10": {1: 2, 42: 4},
}
