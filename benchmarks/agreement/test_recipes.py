"""The recipes of that name, gates and all, beside the peers: nothing is taken from the peer's run here.

A recipe that does not exist yet is skipped; the names of its options are a proposal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.agreement.cases import LATER, MAG, MASK, THRESHOLDS, WINDOW, peer, ratios
from benchmarks.agreement.ours import agreement, ours
from benchmarks.agreement.peers.watching import Run, uncached
from benchmarks.agreement.subjects import SUBJECTS
from diffcache import recipes

Options = Callable[[str], dict[str, Any]]


def dbcache(**options: Any) -> Options:
    return lambda subject: {"threshold": THRESHOLDS[subject], "warmup": 2, **options}


# peer -> recipe, its options for a subject, the subjects
RECIPES: dict[str, tuple[str, Options, tuple[str, ...]]] = {
    "first_block_cache": ("first_block_cache", lambda s: {"threshold": THRESHOLDS[s]}, ("flux", "dit", "wan")),
    "mag_cache": ("mag_cache", lambda s: {"ratios": ratios(s), **MAG}, ("flux", "dit", "wan")),
    "taylorseer-2": ("taylorseer", lambda s: {"order": 2, "interval": 5, "before": 3}, ("flux", "sd3")),
    "attention_broadcast": ("pyramid_attention_broadcast", lambda s: WINDOW, ("flux", "wan")),
    "faster_cache": ("faster_cache", lambda s: {"interval": 2, "window": (-1, 681), "weight": 0.5}, ("flux", "wan")),
    "dbcache-F1": ("dbcache", dbcache(first=1), ("flux", "dit", "wan")),
    "dbcache-F2B1": ("dbcache", dbcache(first=2, last=1), ("flux", "dit", "wan")),
    "dbcache-F1-taylor2": ("dbcache", dbcache(first=1, order=2), ("flux", "wan")),
    "dbcache-F1-mask": ("dbcache", dbcache(first=1, mask=MASK), ("flux", "dit")),
    "dbcache-F1-static-taylor1": ("dbcache", dbcache(first=1, mask=MASK, static=True, order=1), ("flux", "dit")),
    "deepcache-0": ("deepcache", lambda s: {"interval": 3, "branch": 0}, ("unet",)),
    "deepcache-4": ("deepcache", lambda s: {"interval": 3, "branch": 4}, ("unet",)),
    "smoothcache": ("smoothcache", lambda s: {"schedule": {"attn1": MASK, "ff": LATER}}, ("dit",)),
}


def skipping(run: Run) -> set[tuple[int, ...]]:
    """The distinct lists of computed steps among the modules that do not run at every step."""
    computed = {tuple(run.computed(path)) for path in run.ran}
    return {steps for steps in computed if len(steps) < len(run.outputs)}


@pytest.mark.parametrize(
    ("name", "subject"), [(name, subject) for name, (_, _, subjects) in RECIPES.items() for subject in subjects]
)
def test_recipe_agrees(name: str, subject: str):
    recipe, options, _ = RECIPES[name]
    if not hasattr(recipes, recipe):
        pytest.skip(f"there is no recipes.{recipe} yet")
    run = peer(name, subject)
    mine = ours(getattr(recipes, recipe)(**options(subject)), SUBJECTS[subject])
    assert {tuple(steps) for steps in mine.computed.values()} == skipping(run)
    apart, of_effect = agreement(mine, run.latents, run.outputs, uncached(SUBJECTS[subject]).outputs)
    assert apart < 1e-4
    assert of_effect < 1e-3
