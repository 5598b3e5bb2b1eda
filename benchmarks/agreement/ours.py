"""Our side: the same generation under a recipe of diffcache, on a denoiser of the same weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

import diffcache
from benchmarks.agreement.subjects import Subject, generate
from diffcache.compiler import site_choices
from diffcache.profiling import Calibration
from diffcache.recipes import Recipe
from diffcache.runtime import CachedDenoiser
from diffcache.schedule import COMPUTE, Cell, Forecast, Row, Schedule, SiteChoice

Predict = Callable[[Sequence[int], int], Sequence[tuple[int, float]]]


def newest(computed: Sequence[int], step: int) -> list[tuple[int, float]]:
    """Reuse: the newest computed value as it is."""
    return [(max(s for s in computed if s < step), 1.0)]


@dataclass(frozen=True, kw_only=True, repr=False)
class Given(Recipe):
    """The decisions of a peer, site by site: what our recipes cannot decide yet is taken from the peer's run.

    ``computed``: name or role of a site -> the steps at which it is computed; all other steps are forecast with
    ``predict(computed, step) -> (step, weight), ...``, newest first.
    """

    computed: Mapping[str, Sequence[int]] = field(default_factory=dict, hash=False)
    predict: Predict = newest

    def schedule(self, steps: int, sites: Sequence[SiteChoice]) -> Schedule:
        rows, saved = [], 0.0
        for wanted, computed in self.computed.items():
            site = next((s for s in sites if s.name == wanted), None) or next(
                (s for s in sites if s.role == wanted), None
            )
            if site is None:
                raise ValueError(f"no site is named '{wanted}' or has that role here; known: {[s.name for s in sites]}")
            cells = tuple(COMPUTE if step in computed else self._forecast(computed, step) for step in range(steps))
            rows.append(Row(site.name, site.residual, cells))
            saved += site.flops_fraction_saved * (steps - len(computed)) / steps
        return Schedule(steps, tuple(rows), origin="given", flops_fraction=max(1.0 - saved, 0.01))

    def _forecast(self, computed: Sequence[int], step: int) -> Cell:
        pairs = self.predict(computed, step)
        return Forecast(tuple(s for s, _ in pairs), tuple(w for _, w in pairs))

    def __repr__(self) -> str:
        return f"Given({list(self.computed)})"


@dataclass(frozen=True)
class Ours:
    """One generation under diffcache: latents, model outputs, and for each row of the schedule the computed steps."""

    latents: torch.Tensor
    outputs: tuple[torch.Tensor, ...]
    computed: dict[str, list[int]]


def ours(recipe: Recipe, subject: Subject, seed: int = 0) -> Ours:
    """The generation under a recipe, on a new denoiser of the subject.

    Fixed decisions share one calibration per subject, which nothing in them depends on; any other recipe is compiled.
    """
    if isinstance(recipe, Given):
        calibration = _calibrated(subject)
        schedule = recipe.schedule(subject.steps, site_choices(calibration))
        fast = calibration.cached(replace(schedule, clock=calibration.profile.clock))
    else:
        fast = diffcache.compile(subject.make(), [seed], sample=subject.sample, recipe=recipe, verbose=False)
    fast.reset()
    made = generate(fast, subject, seed)
    return Ours(made.latents, made.outputs, _computed(fast))


@functools.lru_cache(maxsize=8)
def _calibrated(subject: Subject) -> Calibration:
    return diffcache.profile(subject.make(), [0], sample=subject.sample, sensitivity_prompts=0, verbose=False)


def _computed(fast: CachedDenoiser) -> dict[str, list[int]]:
    """Site -> the steps at which it was computed, of the newest stream: from what was done, not from the schedule."""
    _, columns = fast.decisions[-1]
    return {
        row.site: [step for step, column in enumerate(columns) if column[i] == COMPUTE.value]
        for i, row in enumerate(fast.schedule.rows)
    }


def agreement(
    mine: Ours, peer_latents: torch.Tensor, peer_outputs: Sequence[torch.Tensor], uncached: Sequence[torch.Tensor]
) -> tuple[float, float]:
    """How far apart two generations are: the worst relative L2 over latents and outputs, and that over the effect.

    The effect is the distance from the peer's outputs to the uncached ones. Small subjects move little when they are
    cached, so 1e-4 of the output alone would let a wrong forecast pass; the second number would not.
    """
    pairs = [(mine.latents, peer_latents), *zip(mine.outputs, peer_outputs, strict=True)]
    apart = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
    effect = max(((a - b).norm() / b.norm()).item() for a, b in zip(peer_outputs, uncached, strict=True))
    return apart, apart / effect
