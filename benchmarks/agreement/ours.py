"""Our side: the same generation under a recipe of diffcache, on a denoiser of the same weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

import diffcache
from benchmarks.agreement import rules
from benchmarks.agreement.peers.watching import Run
from benchmarks.agreement.subjects import Subject, generate
from diffcache.planning import plan_of
from diffcache.predictors import predictor
from diffcache.predictors.fixed import taylor
from diffcache.profiling import Calibration
from diffcache.recipes import Part, Plan, Recipe
from diffcache.recipes import Predict as Predictor
from diffcache.recipes.picks import one
from diffcache.schedule import COMPUTE, Cell, Forecast, Row, Schedule

Predict = Callable[[Sequence[int], int], Sequence[tuple[int, float]]]


def newest(computed: Sequence[int], step: int) -> list[tuple[int, float]]:
    """Reuse: the newest computed value as it is."""
    return [(max(s for s in computed if s < step), 1.0)]


@dataclass(frozen=True, kw_only=True, repr=False)
class Given(Recipe):
    """The decisions of a peer, site by site, taken from its run: to compare sites and predictors alone.

    ``computed``: name or role of a site -> the steps at which it is computed; all other steps are forecast with
    ``predict(computed, step) -> (step, weight), ...``, newest first.
    """

    parts: tuple[Part, ...] = ()
    computed: Mapping[str, Sequence[int]] = field(default_factory=dict, hash=False)
    predict: Predict = newest

    def schedule(self, plan: Plan) -> Schedule:
        rows = []
        for wanted, computed in self.computed.items():
            (site,) = one(wanted)(plan)
            cells = tuple(COMPUTE if step in computed else self._forecast(computed, step) for step in range(plan.steps))
            rows.append(Row(site.name, site.residual, cells))
        return Schedule(plan.steps, tuple(rows), clock=plan.clock, origin="given", guidance=self.guidance)

    def _forecast(self, computed: Sequence[int], step: int) -> Cell:
        pairs = self.predict(computed, step)
        return Forecast(tuple(s for s, _ in pairs), tuple(w for _, w in pairs))

    def __repr__(self) -> str:
        return f"Given({list(self.computed)})"


# -- what we do not copy, to be put in the place of our own predictors ----------------------------------------------


@predictor("taylor_from_step_3")
def taylor_from_step_3(history: Sequence[float], target: float, *, order: int = 1) -> list[float]:
    """cache-dit's TaylorSeer: derivatives are formed at computed steps >= 3 only."""
    return taylor(history, target, order=min(order, sum(step >= 3 for step in history)))


@predictor("guesses_from_guesses")
def guesses_from_guesses(history: Sequence[float], target: float, *, weight: float = 0.5) -> list[float]:
    """diffusers' FasterCache: a guessed value enters the history as if it had been computed."""
    guesses = dict(rules.faster_cache([int(step) for step in history], int(target) + 1, weight)[int(target)])
    return [guesses.get(int(step), 0.0) for step in history]


def with_predictor(recipe: Recipe, name: str, history: int, **options: float) -> Recipe:
    """The same recipe, its predictor exchanged."""
    told = Predictor(name, options, history=history)
    return replace(recipe, parts=tuple(replace(part, predictor=told) for part in recipe.parts))


# -- running -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ours:
    """One generation under diffcache: latents, model outputs, and what each row of the schedule computed.

    ``branches`` holds, for each guidance branch in the order of their first calls, site -> the computed steps;
    ``computed`` is that of the last one, ``left_out`` the steps at which it, or half of its batch, did not run.
    """

    latents: torch.Tensor
    outputs: tuple[torch.Tensor, ...]
    branches: tuple[dict[str, list[int]], ...]
    left_out: list[int] = field(default_factory=list)

    @property
    def computed(self) -> dict[str, list[int]]:
        return self.branches[-1]


def ours(recipe: Recipe, subject: Subject, seed: int = 0) -> Ours:
    """The generation under a recipe. The subject is calibrated once, which is what ``compile`` does with a recipe."""
    calibration = calibrated(subject)
    fast = calibration.cached(recipe.schedule(plan(subject)))
    fast.reset()
    made = generate(fast, subject, seed)
    branches = tuple(
        {
            row.site: [step for step, column in enumerate(columns) if column.removeprefix("-")[i] == COMPUTE.value]
            for i, row in enumerate(fast.schedule.rows)
        }
        for _, columns in fast.decisions  # from what was done, not from the schedule
    )
    _, columns = fast.decisions[-1]
    left_out = [step for step, column in enumerate(columns) if column.startswith("-")]
    return Ours(made.latents, made.outputs, branches, left_out)


@functools.cache
def calibrated(subject: Subject) -> Calibration:
    """A subject, calibrated on seed 0; the halves of a batch are told apart by what two prompts have in common."""
    seeds = [0, 1] if subject.guidance == "batched" else [0]
    return diffcache.profile(subject.make(), seeds, sample=subject.sample, sensitivity_prompts=0, verbose=False)


@functools.cache
def plan(subject: Subject) -> Plan:
    """A subject as recipes see it; what they measure is measured on seed 0."""
    return plan_of(calibrated(subject), lambda denoiser, index: subject.sample(denoiser, index), prompts=1)


def children(run: Run) -> dict[str, list[int]]:
    """Our names of the attention and feed-forward children that a peer skips at some steps -> the steps it computes."""
    short = {"ff": "ff", "ffn": "ff"}
    sites = {f"{short.get(path.split('.')[-1], 'attn')}:{path}": run.computed(path) for path in run.ran}
    return {name: computed for name, computed in sites.items() if len(computed) < len(next(iter(run.ran.values())))}


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
