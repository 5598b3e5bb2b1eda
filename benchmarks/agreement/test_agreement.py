"""Sites and predictors beside each peer, on the decisions that the peer made: latents and outputs equal to 1e-4.

The steps are taken from the peer's run (``Given``). Where a recipe disagrees (``test_recipes.py``) and these tests do
not, its gate is to blame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from benchmarks.agreement import rules
from benchmarks.agreement.cases import LATER, MASK, peer
from benchmarks.agreement.ours import Given, Predict, agreement, children, newest, ours
from benchmarks.agreement.peers.watching import Run, uncached
from benchmarks.agreement.subjects import SUBJECTS
from diffcache import recipes
from diffcache.guidance import Guidance

CLOSE = 1e-4  # relative L2, of the latents and of every model output
OF_EFFECT = 1e-3  # the same, as a share of what caching changes: small subjects move little
FROM_STEP_3 = {"first": 3}  # cache-dit's ladder


def taylor(order: int, **options: int) -> Predict:
    return lambda computed, step: rules.ladder(computed, step, order, **options)


def agrees(
    run: Run,
    subject: str,
    computed: Mapping[str, Sequence[int]],
    predict: Predict = newest,
    guidance: Guidance | None = None,
) -> None:
    mine = ours(Given(computed=computed, predict=predict, guidance=guidance), SUBJECTS[subject])
    assert list(mine.computed.values()) == [list(steps) for steps in computed.values()]
    close(mine, run, subject)


def close(mine, run: Run, subject: str) -> None:
    apart, of_effect = agreement(mine, run.latents, run.outputs, uncached(SUBJECTS[subject]).outputs)
    assert apart < CLOSE
    assert of_effect < OF_EFFECT


@pytest.mark.parametrize("subject", ["flux", "dit", "wan"])
def test_first_block_cache(subject: str):
    run = peer("first_block_cache", subject)
    agrees(run, subject, {"stack": run.computed(list(run.ran)[-1])})


@pytest.mark.parametrize("subject", ["flux", "dit", "wan"])
def test_mag_cache(subject: str):
    run = peer("mag_cache", subject)
    agrees(run, subject, {"stack0": run.computed(list(run.ran)[-1])})


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("subject", ["flux", "sd3"])
def test_taylorseer(subject: str, order: int):
    run = peer(f"taylorseer-{order}", subject)
    agrees(run, subject, children(run), taylor(order))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("subject", ["flux", "wan"])
def test_taylorseer_lite(subject: str, order: int):
    run = peer(f"taylorseer-lite-{order}", subject)
    agrees(run, subject, {"output": run.computed("proj_out")}, taylor(order))


def test_taylorseer_lite_by_recipe():
    """The same by what users write today: the peer's steps as a list, and the registered predictor."""
    run = peer("taylorseer-lite-2", "flux")
    recipe = recipes.steps(computed=rules.taylorseer_steps(24), predictor="taylor", order=2, site="output")
    mine = ours(recipe, SUBJECTS["flux"])
    assert list(mine.computed.values()) == [run.computed("proj_out")]
    close(mine, run, "flux")


@pytest.mark.parametrize("subject", ["flux", "dit", "wan"])
def test_attention_broadcast(subject: str):
    run = peer("attention_broadcast", subject)
    agrees(run, subject, children(run))


@pytest.mark.parametrize("subject", ["flux", "dit", "wan"])
def test_faster_cache(subject: str):
    """Attention in a distilled model. The recipe follows the original: guesses enter the history."""
    run = peer("faster_cache", subject)
    guesses = rules.faster_cache(run.computed(next(iter(run.ran))), SUBJECTS[subject].steps)
    agrees(run, subject, children(run), lambda computed, step: guesses[step])


def test_faster_cache_with_guidance():
    """One call for both halves: the unconditional one is guessed, by factors that compound over the skips in a row."""
    run, guided = peer("faster_cache", "wan-batched"), SUBJECTS["wan-batched"]
    times = [guided.timestep(step) for step in range(guided.steps)]
    both = rules.guidance_steps(times)
    guesses = rules.faster_cache(run.computed(next(iter(run.ran))), guided.steps)
    bands = tuple(rules.guidance_bands(times, both))
    agrees(
        run, "wan-batched", children(run), lambda computed, step: guesses[step], Guidance(computed=both, bands=bands)
    )


@pytest.mark.parametrize("decided", ["", "static-"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("subject", ["flux", "dit", "wan"])
def test_dbcache_with_taylorseer(subject: str, order: int, decided: str):
    run = peer(f"dbcache-F1-{decided}taylor{order}", subject)
    agrees(run, subject, {"stack": run.computed(list(run.ran)[-1])}, taylor(order, **FROM_STEP_3))


@pytest.mark.parametrize(
    ("name", "site"),
    [("dbcache-F1", "stack"), ("dbcache-F1-static", "stack"), ("dbcache-F1-mask", "stack"), ("dbcache-F2", "stack2")],
)
@pytest.mark.parametrize("subject", ["flux", "dit", "wan"])
def test_dbcache(subject: str, name: str, site: str):
    run = peer(name, subject)
    agrees(run, subject, {site: run.computed(list(run.ran)[-1])})


@pytest.mark.parametrize(("name", "order"), [("dbcache-F1-static", 0), ("dbcache-F1-static-taylor2", 2)])
def test_dbcache_keeps_guidance_branches_apart(name: str, order: int):
    run, computed = peer(name, "wan-separate"), [step for step, one in enumerate(MASK) if one]
    last = list(run.ran)[-1]
    assert run.decisions(last, slice(0, None, 2)) == run.decisions(last, slice(1, None, 2))
    given = Given(computed={"stack": computed}, predict=taylor(order, **FROM_STEP_3) if order else newest)
    close(ours(given, SUBJECTS["wan-separate"]), run, "wan-separate")


@pytest.mark.parametrize("name", ["dbcache-F2B1", "dbcache-F2B1-taylor1"])
def test_dbcache_with_last_blocks(name: str):
    run = peer(name, "flux")
    predict = taylor(1, **FROM_STEP_3) if "taylor" in name else newest
    agrees(run, "flux", {"blocks[2:-1]": run.computed(list(run.ran)[-2])}, predict)


def test_dbcache_static_mask_by_recipe():
    run = peer("dbcache-F1-static", "dit")
    mine = ours(recipes.steps(computed=[step for step, one in enumerate(MASK) if one]), SUBJECTS["dit"])
    assert list(mine.computed.values()) == [run.computed(list(run.ran)[-1])]
    close(mine, run, "dit")


FEATURES = ("up_blocks.2.attentions.1", "up_blocks.2.attentions.0", "up_blocks.1", "up_blocks.1.attentions.1",
            "up_blocks.1.attentions.0")  # fmt: skip


@pytest.mark.parametrize("name", [*(f"deep:{feature}" for feature in FEATURES), "deep[5]", "deep[6]"])
def test_deepcache(name: str):
    branch = FEATURES.index(name.removeprefix("deep:")) if name.startswith("deep:") else int(name[5:-1])
    run = peer(f"deepcache-{branch}", "unet")
    agrees(run, "unet", {name: run.computed("mid_block")})


def test_deepcache_by_recipe():
    run = peer("deepcache-0", "unet")
    mine = ours(recipes.uniform(interval=3, site="deepest"), SUBJECTS["unet"])
    assert list(mine.computed.values()) == [run.computed("mid_block")]
    close(mine, run, "unet")


def test_smoothcache():
    run = peer("smoothcache", "dit")
    agrees(run, "dit", children(run))
    assert children(run)["ff:transformer_blocks.0.ff"] == [step for step, one in enumerate(LATER) if one]
