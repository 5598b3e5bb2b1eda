"""The peers' own runs: they decide in a mixed way, by the rules that we read, the same whenever they are asked."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from benchmarks.agreement import rules
from benchmarks.agreement.cases import LATER, MAG, MASK, PEERS, THRESHOLDS, WINDOW, peer, ratios
from benchmarks.agreement.peers import cache_dit_blocks, deepcache, diffusers_hooks, smoothcache
from benchmarks.agreement.peers.watching import Watch, observe, uncached
from benchmarks.agreement.subjects import SUBJECTS, generate

FLUX, DIT, WAN, UNET = (SUBJECTS[name] for name in ("flux", "dit", "wan", "unet"))
STEPS = FLUX.steps
TIMES = [FLUX.timestep(step) for step in range(STEPS)]


def last_block(subject: str) -> str:
    return SUBJECTS[subject].block_paths(SUBJECTS[subject].make())[-1]


def some_part(name: str, subject: str) -> str:
    """A module that the peer skips at some steps."""
    if name == "dbcache-F2B1" or name.startswith("dbcache-F2B1-"):
        return SUBJECTS[subject].block_paths(SUBJECTS[subject].make())[-2]
    return "mid_block" if subject == "unet" else list(peer(name, subject).ran)[-1 if "faster" not in name else 0]


def subject_of(name: str) -> str:
    return "unet" if name.startswith("deepcache") else "dit" if name == "smoothcache" else "flux"


@pytest.mark.parametrize("subject", list(SUBJECTS))
def test_watching_changes_nothing(subject: str):
    plain = generate(SUBJECTS[subject].make(), SUBJECTS[subject], 0)
    watched = uncached(SUBJECTS[subject])
    assert torch.equal(plain.latents, watched.latents)
    assert all(all(ran) for ran in watched.ran.values())


@pytest.mark.parametrize("name", list(PEERS))
def test_decisions_are_mixed_and_repeatable(name: str):
    subject = subject_of(name)
    run = peer(name, subject)
    computed = run.computed(some_part(name, subject))
    assert computed[0] == 0
    assert 4 <= len(computed) <= STEPS - 4
    assert run.same(PEERS[name](SUBJECTS[subject]))
    assert not torch.equal(run.latents, uncached(SUBJECTS[subject]).latents)


def test_a_second_generation_is_as_clean_as_the_first():
    from diffusers.hooks import FirstBlockCacheConfig, TaylorSeerCacheConfig

    for held in (
        diffusers_hooks.Hooked(FLUX, FirstBlockCacheConfig(0.3)),
        diffusers_hooks.Hooked(FLUX, TaylorSeerCacheConfig(max_order=2)),
        cache_dit_blocks.Cached(FLUX, threshold=0.3, warmup=2, order=2),
        deepcache.Helped(UNET),
    ):
        first = held.generate()
        held.generate(seed=5)
        assert held.generate().same(first)


# -- the rules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subject", ["flux", "dit", "wan"])
def test_first_block_cache(subject: str):
    run = peer("first_block_cache", subject)
    first = next(iter(run.ran))
    computed, measured = rules.first_block_cache(run.residuals(first), THRESHOLDS[subject])
    assert run.computed(last_block(subject)) == computed
    assert (
        min(abs(d - THRESHOLDS[subject]) for d in measured) > 1e-3 * THRESHOLDS[subject]
    )  # no decision hangs on a bit


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dbcache-F1", {}),
        ("dbcache-F2", {}),
        ("dbcache-F2B1", {}),
        ("dbcache-F1-taylor2", {}),
        ("dbcache-F1-limits", {"max_cached": 9, "max_in_row": 2, "warmup_interval": 2, "max_accumulated": 6.0}),
        ("dbcache-F1-accumulated", {"max_accumulated": 3.0}),
        ("dbcache-F1-mask", {"mask": MASK}),
        ("dbcache-F1-static", {"mask": MASK, "static": True}),
    ],
)
@pytest.mark.parametrize("subject", ["flux", "dit", "wan"])
def test_dbcache(name: str, options: dict, subject: str):
    run = peer(name, subject)
    blocks = list(run.ran)
    residuals = run.residuals(blocks[0], blocks[1 if "F2" in name else 0])
    computed, measured = rules.dbcache(residuals, THRESHOLDS[subject], warmup=2, **options)
    assert run.computed(blocks[-2 if "B1" in name else -1]) == computed
    assert min((abs(d - THRESHOLDS[subject]) for d in measured), default=1) > 1e-3 * THRESHOLDS[subject]


@pytest.mark.parametrize("name", ["first_block_cache", "dbcache-F1"])
def test_guidance_branches_are_decided_apart(name: str):
    """Two calls a step: each branch follows the rule on its own residuals."""
    run = peer(name, "wan-separate")
    first, last = next(iter(run.ran)), list(run.ran)[-1]
    rule = rules.first_block_cache if name == "first_block_cache" else functools.partial(rules.dbcache, warmup=2)
    decisions = []
    for branch in (slice(0, None, 2), slice(1, None, 2)):
        computed, _ = rule(run.residuals(first)[branch], THRESHOLDS["wan-separate"])
        decisions.append(run.decisions(last, branch))
        assert [step for step, done in enumerate(decisions[-1]) if done == "C"] == computed
    assert decisions[0] != decisions[1]


@pytest.mark.parametrize(
    ("name", "options"),
    [("taylorseer-1", {}), ("taylorseer-2-after", {"interval": 4, "before": 2, "after": 20})],
)
def test_taylorseer_steps(name: str, options: dict):
    run = peer(name, "flux")
    assert {tuple(run.computed(path)) for path in run.ran} == {tuple(rules.taylorseer_steps(STEPS, **options))}


def test_taylorseer_starts_counting_one_step_after_its_warm_up():
    assert rules.taylorseer_steps(16, interval=5, before=3) == [0, 1, 2, 4, 9, 14]


@pytest.mark.parametrize("subject", ["flux", "dit", "wan"])
def test_mag_cache(subject: str):
    assert peer("mag_cache", subject).computed(last_block(subject)) == rules.mag_cache(ratios(subject), STEPS, **MAG)


def test_mag_ratios_are_those_of_an_uncached_run():
    model = FLUX.make()
    blocks = FLUX.block_paths(model)
    watch = Watch(model, [blocks[0], blocks[-1]])
    residuals = observe(model, FLUX, 0, watch).residuals(blocks[0], blocks[-1])
    norms = [residual.norm(dim=-1) for residual in residuals]
    expected = [1.0, *(((new / (old + 1e-8)).mean().item()) for old, new in itertools.pairwise(norms))]
    assert ratios("flux") == pytest.approx(expected, rel=1e-5)


def test_mag_cache_takes_ratios_of_another_length():
    given = list(ratios("flux")[::2])
    run = diffusers_hooks.mag_cache(FLUX, given, **MAG)
    assert run.computed(last_block("flux")) == rules.mag_cache(given, STEPS, **MAG)


def test_attention_broadcast():
    run = peer("attention_broadcast", "wan")
    for path, interval in ((path, 2 if path.endswith("attn1") else 3) for path in run.ran):
        assert run.computed(path) == rules.attention_broadcast(TIMES, interval, WINDOW["window"])


def test_faster_cache():
    run = peer("faster_cache", "wan")
    for path in run.ran:
        expected = rules.faster_cache_steps(TIMES, 2, (-1, 681)) if path.endswith("attn1") else list(range(STEPS))
        assert run.computed(path) == expected


def test_faster_cache_guesses_the_unconditional_half():
    """In a batched call: which calls run whole, and what stands for the missing half."""
    run = peer("faster_cache", "wan-batched")
    both, delta = rules.guidance_steps(TIMES), []
    for step, (output, factors) in enumerate(zip(run.outputs, rules.guidance_bands(TIMES, both), strict=True)):
        uncond, cond = output.transpose(1, 2).chunk(2)
        bands = rules.split_frequencies(cond)
        if step in both:
            delta = [u - c for u, c in zip(rules.split_frequencies(uncond), bands, strict=True)]
            continue
        guess = sum(c + factor * d for c, factor, d in zip(bands, factors, delta, strict=True))
        guess = torch.fft.ifft2(torch.fft.ifftshift(guess)).real
        torch.testing.assert_close(uncond, guess, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("branch", range(7))
def test_deepcache(branch: int):
    run = peer(f"deepcache-{branch}", "unet")
    block, layer = divmod(branch, 3)
    assert run.computed("mid_block") == rules.uniform(STEPS, 3)
    for path in run.ran:
        side, i, _, j = path.split(".") if "." in path else ("mid", "0", "", "0")
        level, position = (int(i), int(j)) if side == "down_blocks" else (2 - int(i), 2 - int(j))
        if "upsamplers" in path:
            position = 0  # they follow the last layer
        if "downsamplers" in path:
            position = 2
        runs_always = side != "mid" and (
            level < block or (level == block and (position < layer if side == "down_blocks" else position <= layer))
        )
        assert run.computed(path) == (list(range(STEPS)) if runs_always else rules.uniform(STEPS, 3)), path


def test_smoothcache():
    run = peer("smoothcache", "dit")
    for path in run.ran:
        wanted = MASK if path.endswith("attn1") else LATER
        assert run.computed(path) == [step for step, one in enumerate(wanted) if one]


def test_smoothcache_by_calibration():
    """The published rule on an uncached run, fed to the package's own helper."""
    model = DIT.make()
    paths = [f"{path}.attn1" for path in DIT.block_paths(model)]
    run = observe(model, DIT, 0, Watch(model, paths))
    values = [[passed[1] for passed in run.passed[path] if passed is not None] for path in paths]
    errors = rules.smoothcache_errors(values)
    schedule = rules.smoothcache_schedule(errors, 0.16, STEPS)
    assert 4 <= sum(schedule) <= STEPS - 4
    cached = smoothcache.smoothcache(DIT, {"attn1": schedule})
    assert cached.computed(paths[0]) == [step for step, one in enumerate(schedule) if one]


def test_smoothcache_schedule_asks_the_far_end_only():
    errors = [[0.9] * 5, [0.1] * 4, [0.9] * 3]
    assert rules.smoothcache_schedule(errors, 0.5, 6) == [1, 0, 0, 1, 0, 1]
    assert rules.smoothcache_schedule(errors, 0.01, 6) == [1] * 6
