"""Every recipe on five families at tiny size, and the rules that hold for all of them.

One calibration and one set of programs a family serve all recipes: what ``diffcache.compile`` adds to that, trying the
schedule out, is what is done here with it.
"""

from __future__ import annotations

import functools
import inspect
import statistics
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from diffcache.compiler import ALL_SITES
from diffcache.gates import make_gate
from diffcache.planning import plan_of
from diffcache.profiling import Calibration, calibrate, measure_sensitivity
from diffcache.recipes import METHODS, Plan
from diffcache.report import relative_error
from diffcache.runtime import CachedDenoiser
from diffcache.schedule import Schedule
from tests.denoisers import FAMILIES, STEPS
from tests.generation import Quiet

NAMES = ("class_dit", "flux", "pixart", "wan", "sdxl_unet")

# Settings for ten steps of tiny models with random weights; all others run at their published defaults.
SETTINGS: dict[str, dict[str, Any]] = {
    "adaptive_diffusion": {"theta": 0.5},
    "budcache": {"iterations": 2, "max_trials": 3},
    "bwcache": {"threshold": 1.0, "hold": 0.2},
    "clusca": {"clusters": 4},  # of 16 tokens
    "dbcache": {"front": 1, "warm_up": 3, "threshold": 2.0},
    "dbprune": {"threshold": 0.3},
    "dicache": {"threshold": 2.0},
    "easycache": {"threshold": 1.0, "warm_up": 3},
    "ecad": {"population": 4, "generations": 1},
    "ertacache": {"limit": 1.0},
    "fbcache": {"threshold": 2.0},
    "foresight": {"gamma": 5.0},
    "golden_path": {"iterations": 2, "max_trials": 3},
    "lazydit": {"laziness": 0.9},
    "procache": {"count": 2},
    "published_table": {"name": "meancache-flux-13"},
    "scalingcache": {"warm_up": 3},
    "sencache": {"early": 2.0, "main": 2.0},
    "speca": {"threshold": 5.0},
    "steps": {"computed": (0, 2, 5)},
    "t_gate": {"fold": False},
}
# what else a recipe lets pass at a threshold of zero
ALSO_ZERO: dict[str, dict[str, Any]] = {"sencache": {"early": 0.0}, "speca": {"floor": 0.0, "unchecked": 0}}

ROW = "it splits a row of equal blocks, which a U-Net does not have"
SHAPE = "it takes a velocity apart along the latent, and these models return a variance beside it"
TOKENS = "its tokens are places of a picture at some resolution, and what stands for the stack is convolved"
PROMPT = "it keeps cross-attention, and these models have none"
GUIDANCE = "these samplers do not guide; tests/test_branches.py tests them where one does"
GUIDED = ("adaptive_guidance", "dyncfgcache", "fastercache_guided")
# (recipe, family) -> (why it cannot run there, what the message says)
REFUSED: dict[tuple[str, str], tuple[str, str]] = {
    ("blockdance", "sdxl_unet"): (ROW, "this denoiser has none"),
    ("delta_dit", "sdxl_unet"): (ROW, "this denoiser has none"),
    ("profiling_dit", "sdxl_unet"): (ROW, "this denoiser has none"),
    ("vde", "class_dit"): (SHAPE, "must have the shape of the value"),
    ("vde", "pixart"): (SHAPE, "must have the shape of the value"),
    ("tap", "sdxl_unet"): (TOKENS, "needs a probe with the tokens of the value"),
    ("ras", "sdxl_unet"): (TOKENS, "finds no site that can run on a few tokens"),
    ("fastcache_tokens", "sdxl_unet"): (TOKENS, "finds no site that can run on a few tokens"),
    ("speca", "sdxl_unet"): (ROW, "this denoiser has none"),
    ("t_gate", "class_dit"): (PROMPT, "cross"),
    ("t_gate", "flux"): (PROMPT, "cross"),
    **{(recipe, name): (GUIDANCE, "saw no two branches") for recipe in GUIDED for name in NAMES},
}


@dataclass
class Case:
    """A family with its calibration, and what recipes and tests share of it."""

    name: str
    calibration: Calibration
    plan: Plan
    base: CachedDenoiser
    reference: torch.Tensor
    given: list[Any] = field(repr=False)

    def run(self, denoiser: nn.Module, item: int = 0) -> torch.Tensor:
        return walk(denoiser, self.given, item)

    def schedule(self, recipe: str, **options: Any) -> Schedule:
        return METHODS[recipe].make(**{**SETTINGS.get(recipe, {}), **options}).schedule(self.plan)


def walk(denoiser: nn.Module, given: Collection[Any], item: int) -> torch.Tensor:
    """Euler steps from the item's noise over the inputs of every step."""
    x: torch.Tensor | None = None
    for args, kwargs in given:
        name = "hidden_states" if "hidden_states" in kwargs else "sample"
        if x is None:
            first = args[0] if args else kwargs[name]
            x = torch.randn(first.shape, generator=torch.Generator().manual_seed(item))
        with torch.no_grad():
            out = denoiser(x, *args[1:], **kwargs) if args else denoiser(**{**kwargs, name: x})
        out = out if isinstance(out, torch.Tensor) else out[0] if isinstance(out, tuple) else out.sample
        x = x - out[:, : x.shape[1]] / STEPS
    assert x is not None
    return x


@functools.cache
def case(name: str) -> Case:
    entry = FAMILIES[name]
    given = [entry.make_inputs(step, batch=2) for step in range(STEPS)]

    def sample(denoiser: nn.Module, item: int) -> torch.Tensor:
        return walk(denoiser, given, item)

    found = calibrate(entry.make_model(), sample, 1, name=name, sensitivity_prompts=0, most_sites=ALL_SITES)
    found = measure_sensitivity(found, sample, 1, points=3)
    base = found.cached(Schedule.exact(STEPS))
    return Case(name, found, plan_of(found, sample, 1), base, sample(found.captured.denoiser, 0), given)


@pytest.mark.parametrize("recipe", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_runs_or_says_why_not(name: str, recipe: str) -> None:
    here = case(name)
    if (recipe, name) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[recipe, name][1]):
            here.run(here.base.with_schedule(here.schedule(recipe)))
        return
    schedule = here.schedule(recipe)
    assert Schedule.from_json(schedule.to_json()) == schedule
    cached = here.base.with_schedule(schedule)
    with Quiet():
        first = here.run(cached)
        assert torch.equal(here.run(cached), first), "the second generation differs from the first"
    assert 0 < relative_error(first, here.reference) < 0.5
    assert cached.steps_forecast
    assert cached.flops < cached.flops_in_full
    if not schedule.is_online:  # what it says of itself is what it does
        assert cached.flops / cached.flops_in_full == pytest.approx(schedule.flops_fraction, abs=0.02)
    (_, log), (_, again) = cached.decisions
    assert log == again
    assert len(log) == STEPS
    assert set(log[0]) == {"C"}, "nothing can be forecast at the first step"
    for step, column in enumerate(log):  # a gate can only veto
        computed = [row for row, cell in zip(schedule.rows, column, strict=True) if cell == "C"]
        assert all(row in computed for row in schedule.rows if row.cells[step] is schedule.rows[0].cells[0])


def gated() -> Mapping[str, str]:
    """Recipes with a gate that has a threshold, and the option that is this threshold."""
    found = {}
    for recipe, method in METHODS.items():
        options = inspect.signature(method.make).parameters
        for option in ("threshold", "theta", "gamma", "scale", "main"):
            if option in options and (recipe, "flux") not in REFUSED and case("flux").schedule(recipe).gates:
                found[recipe] = option
                break
    return found


@pytest.mark.parametrize("name", ["flux", "sdxl_unet"])
def test_a_threshold_of_zero_is_exact(name: str) -> None:
    """Bit for bit the result of the uncached denoiser, for every recipe whose gate has a threshold."""
    here, recipes = case(name), gated()
    assert len(recipes) >= 12
    for recipe, option in recipes.items():
        if (recipe, name) in REFUSED:
            continue
        schedule = here.schedule(recipe, **{option: 0.0}, **ALSO_ZERO.get(recipe, {}))
        assert schedule.gates, recipe
        cached = here.base.with_schedule(schedule)
        assert torch.equal(here.run(cached), here.reference), recipe
        assert not cached.steps_forecast, recipe


def test_a_threshold_without_bound_computes_only_what_is_forced() -> None:
    here = case("flux")
    for recipe, forced in {"teacache": {0, 9}, "seacache": {0, 1, 9}, "fbcache": {0}, "dicache": {0, 1}}.items():
        cached = here.base.with_schedule(here.schedule(recipe, threshold=1e9))
        here.run(cached)
        (_, log), *_ = cached.decisions
        assert {step for step, column in enumerate(log) if column == "C"} == forced, recipe


# what methods.md gives for ten steps: computed steps of static recipes at these settings
COMPUTED = {
    ("fora", "interval=3"): (0, 3, 6, 9),
    ("taylorseer", "interval=5, warm_up=3"): (0, 1, 2, 7),
    ("hicache", "interval=6, warm_up=3"): (0, 1, 2, 8),
    ("ab_cache", "interval=6, warm_up=2"): (0, 1, 7),
    ("spectrum", "warm_up=5, window=2, growth=0.75"): (0, 1, 2, 3, 4, 6, 8),
    ("uniform", "interval=3"): (0, 3, 6, 9),
}


@pytest.mark.parametrize(("recipe", "options"), COMPUTED, ids=str)
def test_step_counts(recipe: str, options: str) -> None:
    given = {name: float(value) if "." in value else int(value)
             for name, value in (pair.split("=") for pair in options.split(", "))}  # fmt: skip
    assert case("flux").schedule(recipe, **given).computed_steps() == COMPUTED[recipe, options]


def test_recipes_are_short_and_say_what_they_are() -> None:
    lines = {}
    for recipe, method in METHODS.items():
        assert method.title, recipe
        assert method.make.__doc__, recipe
        source = inspect.getsource(inspect.unwrap(method.make))
        lines[recipe] = len([line for line in source.splitlines() if line.strip()])
    assert statistics.median(lines.values()) <= 25, lines


def test_what_is_asked_for_and_not_there_is_refused() -> None:
    """Never silently something else, never silently nothing."""
    with pytest.raises(ValueError, match=r"'blocks\[8:\]' reaches past the 5 blocks"):
        case("flux").schedule("dbcache", front=8)
    with pytest.raises(ValueError, match=r"'deep\[9\]': this denoiser has \d+ skip connections"):
        case("sdxl_unet").schedule("deepcache", branch=9)
    with pytest.raises(ValueError, match=r"has no sites or probes \['elsewhere'\]"):
        case("flux").schedule("teacache", probe="elsewhere")


def test_every_gate_of_a_recipe_is_made_of_what_its_schedule_holds() -> None:
    for recipe in METHODS:
        for spec in case("class_dit").schedule(recipe).gates if (recipe, "class_dit") not in REFUSED else ():
            make_gate(spec.name, **spec.options)


def test_a_gate_decides_by_content() -> None:
    """Another picture, other steps: what is decided at run time is not a table."""
    here = case("wan")
    found = []
    for threshold in (0.1, 0.15, 0.2, 0.25):
        cached = here.base.with_schedule(here.schedule("teacache", threshold=threshold))
        logs = set()
        for item in range(6):
            here.run(cached, item)
            logs.add(tuple(cached.decisions[-1][1]))
        found.append(len(logs))
    assert max(found) > 1, found
