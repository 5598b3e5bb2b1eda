"""Our recipes beside the peers, gates and all: nothing is taken from the peer's run here.

Options are those of the peer's run in ``cases``. Where a recipe does not copy a fault of the original, the recipe is
compared twice: as it is, where the fault does not show, and with the fault put in the place of its predictor.

What no run here shows, because it takes an equality, a batch or a threshold that nobody sets:

* A change equal to the threshold computes, as in ParaAttention and cache-dit; the hook in diffusers skips.
* A change that is not a number computes; the hook in diffusers skips.
* cache-dit skips whatever the change when its threshold is 1 or more; ours compares.
* Peers decide by the mean over a batch, ours by the sample that most needs to be computed. All runs are of batch 1.
* MagCache's sums are fp32 in diffusers, fp64 here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

import diffcache
from benchmarks.agreement import rules
from benchmarks.agreement.cases import LATER, MASK, THRESHOLDS, peer, ratios
from benchmarks.agreement.ours import Ours, agreement, children, ours, plan, with_predictor
from benchmarks.agreement.peers import cache_dit_blocks, deepcache, diffusers_hooks, smoothcache
from benchmarks.agreement.peers.watching import Run, Watch, observe, uncached
from benchmarks.agreement.subjects import SUBJECTS, generate
from diffcache import planners, recipes, when
from diffcache.recipes import Recipe
from diffcache.recipes.static import layer_errors

Make = Callable[[str], Recipe]
ROOMY = ("flux", "dit", "wan")
MASKED, LATER_ONES = ([step for step, one in enumerate(bits) if one] for bits in (MASK, LATER))
MIXED = {"max_cached": 9, "max_skips": 2, "warm_up_interval": 2, "max_total": 6.0}


def dbcache(front: int = 1, **options) -> Make:
    return lambda subject: recipes.dbcache(front=front, threshold=THRESHOLDS[subject], **{"warm_up": 2, **options})


def late_taylor(order: int, **options) -> Make:
    """DBCache with cache-dit's own ladder, which begins at step 3."""
    make = dbcache(order=order, **options)
    return lambda subject: with_predictor(make(subject), "taylor_from_step_3", order + 1, order=order)


def taylorseer(order: int, **options) -> Make:
    return lambda subject: recipes.taylorseer(order=order, offset=1, roles=("attention",), **options)


def magcache(subject: str) -> Recipe:
    """Of 24 steps diffusers keeps round(0.2 * 24) = 5, the original's code floor(0.2 * 24) = 4, as we do."""
    return recipes.magcache(threshold=0.1, max_skips=3, retention=5 / 24, ratios=ratios(subject))


def guessing_on(subject: str) -> Recipe:
    """FasterCache with diffusers' own history, which holds guesses."""
    return with_predictor(recipes.fastercache(weight=0.5), "guesses_from_guesses", SUBJECTS[subject].steps, weight=0.5)


# peer -> our recipe, the subjects
RECIPES: dict[str, tuple[Make, tuple[str, ...]]] = {
    "first_block_cache": (lambda s: recipes.fbcache(THRESHOLDS[s]), (*ROOMY, "wan-separate")),
    "mag_cache": (magcache, ROOMY),
    "taylorseer-1": (taylorseer(1), ("flux", "sd3")),
    "taylorseer-2": (taylorseer(2), ("flux", "sd3")),
    "taylorseer-2-after": (taylorseer(2, interval=4, warm_up=2, last=4), ("flux", "sd3")),
    "taylorseer-lite-1": (lambda s: recipes.taylorseer_lite(order=1, offset=1, site="output"), ("flux", "wan")),
    "taylorseer-lite-2": (lambda s: recipes.taylorseer_lite(order=2, offset=1, site="output"), ("flux", "wan")),
    "attention_broadcast": (lambda s: recipes.pab(spatial=2, cross=3), ROOMY),
    "faster_cache": (guessing_on, ROOMY),
    "dbcache-F1": (dbcache(), (*ROOMY, "wan-separate")),
    "dbcache-F2": (dbcache(front=2), ROOMY),
    "dbcache-F2B1": (dbcache(front=2, back=1), ROOMY),
    "dbcache-F1-limits": (dbcache(**MIXED), ROOMY),
    "dbcache-F1-accumulated": (dbcache(max_total=3.0), ROOMY),
    "dbcache-F1-mask": (dbcache(mask=MASK), ROOMY),
    "dbcache-F1-static": (dbcache(mask=MASK, static=True), ROOMY),
    "dbcache-F1-taylor1": (late_taylor(1), ROOMY),
    "dbcache-F1-taylor2": (late_taylor(2), ROOMY),
    "dbcache-F2B1-taylor1": (late_taylor(1, front=2, back=1), ROOMY),
    "dbcache-F1-static-taylor1": (late_taylor(1, mask=MASK, static=True), ROOMY),
    "dbcache-F1-static-taylor2": (late_taylor(2, mask=MASK, static=True), ROOMY),
    **{f"deepcache-{b}": (lambda s, b=b: recipes.deepcache(interval=3, branch=b), ("unet",)) for b in range(7)},
    "smoothcache": (lambda s: recipes.smoothcache(steps={"self": MASKED, "feedforward": LATER_ONES}), ("dit",)),
}


def same_decisions(mine: Ours, run: Run, subject: str) -> None:
    """Every row computes exactly when the peer computes what it stands for; guidance branches each for itself."""
    branches = 2 if SUBJECTS[subject].guidance == "separate" else 1
    assert len(mine.branches) == branches
    for number, rows in enumerate(mine.branches):
        calls = slice(number, None, branches)
        if next(iter(rows)).startswith(("attn:", "ff:")):
            assert rows == children(run)
            continue
        decisions = {run.decisions(path, calls) for path in run.ran}
        skipping = [decided for decided in decisions if "." in decided]
        wanted = [[step for step, one in enumerate(decided) if one == "C"] for decided in skipping]
        assert list(rows.values()) == wanted


def close(mine: Ours, run: Run, subject: str) -> None:
    apart, of_effect = agreement(mine, run.latents, run.outputs, uncached(SUBJECTS[subject]).outputs)
    print(f"apart {apart:.1e}, of the effect {of_effect:.1e}")
    assert apart < 1e-4
    assert of_effect < 1e-3


@pytest.mark.parametrize(
    ("name", "subject"), [(name, subject) for name, (_, subjects) in RECIPES.items() for subject in subjects]
)
def test_recipe_agrees(name: str, subject: str):
    run, mine = peer(name, subject), ours(RECIPES[name][0](subject), SUBJECTS[subject])
    same_decisions(mine, run, subject)
    close(mine, run, subject)


def test_compile_does_the_same():
    """What users call, without the shortcuts of these tests."""
    flux, run = SUBJECTS["flux"], peer("first_block_cache", "flux")
    recipe = recipes.fbcache(THRESHOLDS["flux"])
    fast = diffcache.compile(flux.make(), [0], sample=flux.sample, recipe=recipe, verbose=False)
    fast.reset()
    made = generate(fast, flux, 0)
    ((_, columns),) = fast.decisions
    close(Ours(made.latents, made.outputs, ()), run, "flux")
    assert "".join(columns).replace("r", ".") == run.decisions(list(run.ran)[-1])


# -- where we do not copy the original ---------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("subject", ROOMY)
def test_taylorseer_on_dbcache_agrees_once_its_ladder_is_full(subject: str, order: int):
    """With the steps 0 to 5 computed, cache-dit has formed the derivatives that it leaves out before step 3."""
    threshold = THRESHOLDS[subject]
    run = cache_dit_blocks.dbcache(SUBJECTS[subject], threshold=threshold, warmup=6, order=order)
    mine = ours(recipes.dbcache(front=1, threshold=threshold, warm_up=6, order=order), SUBJECTS[subject])
    same_decisions(mine, run, subject)
    close(mine, run, subject)


@pytest.mark.parametrize("subject", ROOMY)
def test_fastercache_computes_when_the_original_does(subject: str):
    """Its guesses are the paper's, from two computed values, and differ from those that are guessed from guesses."""
    run, mine = peer("faster_cache", subject), ours(recipes.fastercache(weight=0.5), SUBJECTS[subject])
    same_decisions(mine, run, subject)
    apart, _ = agreement(mine, run.latents, run.outputs, uncached(SUBJECTS[subject]).outputs)
    assert apart > 1e-4


def test_fastercache_guesses_the_unconditional_half_as_the_original_does():
    """Without boost: the original's compounds over the skips in a row, which no equation of the paper does.

    Attention is always computed here; with guidance the original pauses it only where the half is left out.
    """
    guided = SUBJECTS["wan-batched"]
    run = diffusers_hooks.faster_cache(guided, window=(-2, -1), boost=1.0)
    recipe = recipes.fastercache_guided(guidance_interval=5, guidance_start=9 / guided.steps, boost=1.0)
    mine = ours(replace(recipe, parts=()), guided)
    both = [step for step, passed in enumerate(run.passed["blocks.0.attn2"]) if len(passed[0]) == 2]
    assert both == rules.guidance_steps([guided.timestep(step) for step in range(guided.steps)])
    assert mine.left_out == [step for step in range(guided.steps) if step not in both]
    close(mine, run, "wan-batched")


# -- what calibration measures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("subject", ROOMY)
def test_calibration_measures_magcaches_ratios(subject: str):
    (site,) = (site.name for site in plan(SUBJECTS[subject]).sites if site.role == "stack0")
    found = plan(SUBJECTS[subject]).measure([site], "norm_ratio")[site][0, 1:, 0]
    assert found == pytest.approx(ratios(subject)[1:], rel=1e-4)


def test_magcache_by_our_own_calibration():
    run = peer("mag_cache", "flux")
    mine = ours(recipes.magcache(threshold=0.1, max_skips=3, retention=5 / 24), SUBJECTS["flux"])
    same_decisions(mine, run, "flux")
    close(mine, run, "flux")


def test_smoothcache_by_our_own_calibration():
    """Errors, steps and results: the published rule on the peer's side, fed to the package's own helper."""
    dit = SUBJECTS["dit"]
    blocks, schedule = dit.block_paths(dit.make()), {}
    for child, kind in (("attn1", "self"), ("ff", "")):
        paths = [f"{path}.{child}" for path in blocks]
        watched = dit.make()
        run = observe(watched, dit, 0, Watch(watched, paths))
        errors = rules.smoothcache_errors([[p[1] for p in run.passed[path] if p is not None] for path in paths])
        (site, *_) = (s for s in plan(dit).sites if s.role in ("attention", "feedforward") and s.kind == kind)
        table = layer_errors(plan(dit), site, 3)
        for gap, row in enumerate(errors, start=1):
            assert table[gap:, gap] == pytest.approx(row, rel=1e-4)
        schedule[child] = rules.smoothcache_schedule(errors, 0.16, dit.steps)
        assert 4 <= sum(schedule[child]) <= dit.steps - 4
    run = smoothcache.smoothcache(dit, schedule)
    mine = ours(recipes.smoothcache(threshold=0.16), dit)
    same_decisions(mine, run, "dit")
    close(mine, run, "dit")


@pytest.mark.parametrize(("computed", "center", "power"), [(10, 15, 1.4), (17, 15, 1.2), (25, 20, 1.3)])
def test_deepcaches_quadratic_steps(computed: int, center: int, power: float):
    ours = when.quadratic_centre(50, computed=computed, centre=center, power=power)
    assert ours == deepcache.quadratic_steps(50, computed, center, power)


def test_smoothcache_asks_the_far_end_only():
    errors = np.pad(np.full((6, 3), np.inf), ((0, 0), (1, 0)))
    by_gap = [[0.9] * 5, [0.1] * 4, [0.9] * 3]
    for gap, row in enumerate(by_gap, start=1):
        errors[gap:, gap] = row
    far = planners.smooth_cache(errors, threshold=0.5, far_end=True)
    assert far == [s for s, one in enumerate(rules.smoothcache_schedule(by_gap, 0.5, 6)) if one]
