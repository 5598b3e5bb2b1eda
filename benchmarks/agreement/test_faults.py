"""Where the originals err, each shown by its own code in a few lines: what our recipes do not copy.

Each test states what happens today in the pinned version; one that fails tells that the peer was mended.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.agreement import rules
from benchmarks.agreement.cases import MAG, MASK, THRESHOLDS, peer, ratios
from benchmarks.agreement.peers import cache_dit_blocks, deepcache, diffusers_hooks, smoothcache
from benchmarks.agreement.peers.watching import Run, uncached
from benchmarks.agreement.subjects import SUBJECTS

FLUX, DIT, SD3, WAN, UNET = (SUBJECTS[name] for name in ("flux", "dit", "sd3", "wan", "unet"))


def equal(a: Run, b: Run) -> bool:
    return torch.equal(a.latents, b.latents)


def apart(a: Run, b: Run) -> float:
    return ((a.latents - b.latents).norm() / b.latents.norm()).item()


# -- diffusers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [lambda s: diffusers_hooks.first_block_cache(s, 0.1),
                                 lambda s: diffusers_hooks.taylorseer(s, lite=True)])  # fmt: skip
def test_blocks_that_end_without_a_text_stream_fail(how: Any):
    with pytest.raises((TypeError, AttributeError), match="NoneType"):
        how(SD3)


def test_a_sample_is_decided_by_its_company():
    """d is a mean over the batch: what is next to a sample changes which of its steps are computed."""

    def beside(factor: float) -> Run:
        """Sample 0 in one batch with another, whose prompt is ``factor`` times as loud."""

        def inputs(x: torch.Tensor, sigma: float, branch: str, prompt: int) -> Any:
            _, one = FLUX.inputs(x[:1], sigma, branch, prompt)
            _, two = FLUX.inputs(x[1:], sigma, branch, prompt)
            both = {name: torch.cat([one[name], two[name]]) for name in ("hidden_states", "timestep")}
            for name in ("encoder_hidden_states", "pooled_projections"):
                both[name] = torch.cat([one[name], factor * two[name]])
            return (), {**one, **both}

        pair = replace(FLUX, name=f"pair-{factor}", inputs=inputs, shape=(2, *FLUX.shape[1:]))
        return diffusers_hooks.first_block_cache(pair, THRESHOLDS["flux"])

    quiet, loud = beside(1.0), beside(10.0)
    assert quiet.ran != loud.ran
    assert (quiet.latents[0] - loud.latents[0]).norm() > 1e-4 * quiet.latents[0].norm()


@pytest.mark.parametrize("name", ["dit", "wan"])
def test_taylorseer_finds_no_attention_named_attn1(name: str):
    assert equal(diffusers_hooks.taylorseer(SUBJECTS[name]), uncached(SUBJECTS[name]))


def test_taylorseer_lite_is_garbage_without_a_proj_out():
    """DiT's output layers are proj_out_1 and proj_out_2: blocks are zeroed and nothing stands for them."""
    model = DIT.make()
    with pytest.raises(AttributeError, match="proj_out"):
        model.get_submodule("proj_out")
    from diffusers.hooks import TaylorSeerCacheConfig

    run = diffusers_hooks.Hooked(DIT, TaylorSeerCacheConfig(use_lite_mode=True)).generate()
    assert apart(run, uncached(DIT)) > 0.2


def test_taylorseer_keeps_factors_in_bfloat16_by_default():
    exact = diffusers_hooks.taylorseer(FLUX)
    rounded = diffusers_hooks.taylorseer(FLUX, dtype=torch.bfloat16)
    assert exact.ran == rounded.ran
    assert apart(rounded, exact) > 1e-5


def test_taylors_ladder_is_not_exact_on_a_quadratic():
    """Backward differences taken as derivatives: right on lines, wrong from order 2 on even with equal gaps."""
    computed = [0, 4, 8, 12]
    for order, power, error in ((1, 1, 0.0), (2, 2, 12.0)):
        forecast = sum(w * float(s) ** power for s, w in rules.ladder(computed, 15, order))
        assert abs(forecast - 15.0**power) == pytest.approx(error, abs=1e-9)


def test_nothing_is_reset_between_generations_without_a_pipeline():
    """A second generation goes on from the first: it skips its first step, with the first one's residual."""
    from diffusers.hooks import FirstBlockCacheConfig

    held = diffusers_hooks.Hooked(FLUX, FirstBlockCacheConfig(2.0))
    first, second = held.generate(), held.generate(seed=5, reset=False)
    last = FLUX.block_paths(FLUX.make())[-1]
    assert first.computed(last) == [0]
    assert second.computed(last) == []


def test_mag_cache_after_an_interrupted_generation_is_shifted():
    from diffusers.hooks import MagCacheConfig

    options = {"threshold": 0.1, "max_skip_steps": 3, "retention_ratio": 0.2, "num_inference_steps": FLUX.steps}
    held = diffusers_hooks.Hooked(FLUX, MagCacheConfig(mag_ratios=list(ratios("flux")), **options))
    held.subject = replace(FLUX, steps=6)
    held.generate()
    held.subject = FLUX
    last = FLUX.block_paths(FLUX.make())[-1]
    assert held.generate(reset=False).computed(last) != rules.mag_cache(ratios("flux"), FLUX.steps, **MAG)


def test_attention_broadcast_hands_the_conditional_attention_to_the_unconditional_call():
    guided = WAN.guided("separate")
    run = diffusers_hooks.pyramid_attention_broadcast(guided, spatial=2, window=(-1, 1001))
    path = next(iter(run.ran))
    assert run.decisions(path, slice(0, None, 2)) == "C" * guided.steps
    assert run.decisions(path, slice(1, None, 2)) == "." * guided.steps


def test_faster_cache_fails_where_its_window_has_the_first_step():
    with pytest.raises(TypeError, match="NoneType"):
        diffusers_hooks.faster_cache(FLUX, window=(-1, 1001))


@pytest.mark.parametrize("name", ["flux", "dit"])
def test_faster_cache_halves_only_the_inputs_it_knows(name: str):
    guided = SUBJECTS[name].guided("batched")
    with pytest.raises((RuntimeError, IndexError)):
        diffusers_hooks.faster_cache(guided, tensor_format="BCHW")


def test_faster_cache_guesses_from_guesses():
    """The weights reach back to where the window began; the paper's formula has two."""
    assert rules.faster_cache([0, 1, 2, 4, 6], 8)[7] == ((6, 1.5), (4, -0.75), (2, 0.375), (1, -0.125))


# -- cache-dit ---------------------------------------------------------------------------------------------------------


def test_dbcache_begins_a_second_request_inside_the_first():
    """The refresh is tested before the counter moves: under a static mask step 0 reuses another request's residual."""
    held = cache_dit_blocks.Cached(FLUX, mask=MASK, static=True)
    last = FLUX.block_paths(FLUX.make())[-1]
    clean = held.generate(seed=5)
    held.generate(seed=0)
    assert clean.computed(last)[0] == 0
    second = held.generate(seed=5, refresh=False)
    assert second.computed(last)[0] != 0
    assert apart(second, clean) > 1e-3


def test_dbcache_forms_no_derivative_before_step_3():
    """Three steps are computed, then one: the calibrator has only step 2's value, so it reuses it as it is."""
    mask = [1, 1, 1, *[0] * (FLUX.steps - 4), 1]
    reused = cache_dit_blocks.dbcache(FLUX, mask=mask, static=True)
    for order in (1, 2):
        assert equal(cache_dit_blocks.dbcache(FLUX, mask=mask, static=True, order=order), reused)
    assert rules.ladder([0, 1, 2], 5, 2, first=3) == ((2, 1.0),)


def test_dbcache_spends_its_accumulated_difference_once():
    """The sum is never set back, and computed steps add to it: from some step on everything is computed."""
    path = FLUX.block_paths(FLUX.make())[-1]
    limited, free = (
        [step for step in range(FLUX.steps) if step not in peer(name, "flux").computed(path)]
        for name in ("dbcache-F1-accumulated", "dbcache-F1")
    )
    assert limited == free[: len(limited)]
    assert max(limited) < max(free) - 6  # nothing is skipped after that, however little changes


def test_dbcache_does_not_know_every_transformer_without_its_pipeline():
    with pytest.raises(ValueError, match="not officially supported"):
        cache_dit_blocks.dbcache(SD3)


# -- DeepCache ---------------------------------------------------------------------------------------------------------


def test_deepcache_has_one_skip_mode():
    with pytest.raises(KeyError):
        deepcache.Helped(UNET, mode="quad").generate()


def test_deepcache_remembers_where_the_first_generation_began():
    held = deepcache.Helped(UNET)
    held.generate()
    later = replace(UNET, name="later")
    object.__setattr__(later, "sigmas", lambda: UNET.sigmas()[1:])
    object.__setattr__(later, "steps", UNET.steps - 1)
    held.subject = later
    assert held.generate(seed=5).computed("mid_block")[0] == 2  # steps 0 and 1 reuse another generation's features


@pytest.mark.filterwarnings("ignore::numpy.exceptions.ComplexWarning")
def test_deepcaches_quadratic_steps_run_through_the_complex_plane():
    """The paper's c +- u^p, with real roots of negative numbers, gives other steps."""
    steps, computed, center, power = 50, 10, 15, 1.4
    theirs = deepcache.quadratic_steps(steps, computed, center, power)
    assert theirs == [0, 5, 9, 13, 17, 21, 26, 31, 37, 43]
    start, end = -(center ** (1 / power)), (steps - center) ** (1 / power)
    line = [start + i * (end - start) / computed for i in range(1, computed)]
    papers = [0, *sorted({int(abs(u) ** power * (1 if u > 0 else -1)) + center for u in line})]
    assert papers != theirs


# -- SmoothCache -------------------------------------------------------------------------------------------------------


def test_smoothcache_caches_one_generation_only():
    held = smoothcache.Helped(DIT, {"attn1": MASK})
    first, second = held.generate(), held.generate()
    assert not equal(first, uncached(DIT))
    assert equal(second, uncached(DIT))


def test_smoothcache_finds_nothing_in_other_transformers():
    assert equal(smoothcache.smoothcache(FLUX, {"attn": MASK}), uncached(FLUX))


def test_smoothcache_comes_without_its_calibration():
    assert importlib.util.find_spec("SmoothCache") is not None
    assert importlib.util.find_spec("SmoothCache.calibration") is None
