"""``diffcache.compile`` as a user meets it: what it returns, what it says, and what it refuses."""

from __future__ import annotations

import contextlib
import functools
import itertools
from typing import Any

import pytest
import torch
from torch import nn

import diffcache
from diffcache import recipes
from diffcache.runtime import CachedDenoiser
from tests.generation import ITEMS, STEPS, Request, TextDiT, compiled, make, sample
from tests.pipelines import digits_pipeline, dit_pipeline, embeds, images, unet_pipeline
from tests.plain_denoisers import CounterDiT

EVERY_OTHER = recipes.uniform(interval=2)
DIGITS = [
    {"prompt": "a bold seven", "num_inference_steps": STEPS},
    {"prompt": "a thin three", "num_inference_steps": STEPS},
]


def compile_module(model: nn.Module | None = None, **options: Any) -> CachedDenoiser:
    options = {"sample": sample, "verbose": False, **options}
    return diffcache.compile(model or make(), list(ITEMS), **options)


@functools.cache
def searched() -> CachedDenoiser:
    return compile_module()


# -- a bare module ----------------------------------------------------------------------------------------------------


def test_a_bare_module_with_a_sampler() -> None:
    fast = searched()
    assert isinstance(fast, CachedDenoiser)
    reference, result = sample(fast.denoiser, Request(seed=9)), sample(fast, Request(seed=9))
    assert not torch.equal(result, reference)
    assert (result - reference).norm() < 0.1 * reference.norm()
    assert 1 / fast.schedule.flops_fraction >= 2.0


def test_the_original_is_left_as_it_was() -> None:
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reference, attributes = sample(model, Request(seed=9)), set(vars(model))
    state = torch.get_rng_state()
    fast = compile_module(model, recipe=EVERY_OTHER)
    assert fast.denoiser is model
    assert torch.equal(torch.get_rng_state(), state)
    assert set(vars(model)) == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(sample(model, Request(seed=9)), reference)


def test_exact_changes_no_bit() -> None:
    fast = compile_module(budget=diffcache.Exact())
    assert torch.equal(sample(fast, Request(seed=9)), sample(fast.denoiser, Request(seed=9)))
    assert fast.report is not None
    assert (fast.report.cached, fast.report.computed, fast.report.measured_error) == (0, STEPS, 0.0)
    assert fast.report.hoisted > 0


def test_exact_on_one_step() -> None:
    fast = diffcache.compile(make(), [Request(steps=1)], sample=sample, budget=diffcache.Exact(), verbose=False)
    assert torch.equal(sample(fast, Request(seed=9, steps=1)), sample(fast.denoiser, Request(seed=9, steps=1)))


@pytest.mark.parametrize("target", [0.02, 0.2])
def test_quality_is_met_on_the_calibration_prompts(target: float) -> None:
    report = compile_module(budget=diffcache.Quality(rel_l2=target)).report
    assert report is not None
    assert report.measured_error is not None
    assert report.measured_error <= target
    assert report.cached > 0
    within = [c["flops_fraction"] for c in report.considered if c["error"] <= target]
    assert report.flops_speedup == pytest.approx(1 / min(within)), "the fastest of those that meet it"


def test_the_report_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    for fast in (searched(), compiled(), compiled(site_recipe := recipes.uniform(interval=3, site="output"))):
        report = fast.report
        assert report is not None
        assert report.nodes == report.cached + report.hoisted + report.kept
        assert min(report.cached, report.hoisted, report.kept) > 0
        assert report.computed == len(fast.schedule.computed_steps())
        assert report.steps == STEPS
        assert report.flops_speedup == pytest.approx(1 / fast.schedule.flops_fraction)
        text = str(report)
        assert f"{report.cached} of {report.nodes} nodes are cached" in text
        assert f"{report.hoisted} hoisted" in text
        assert f"{report.kept} kept" in text
        assert all(row.site in text for row in fast.schedule.rows)
    assert fast.schedule.origin == str(site_recipe)
    assert capsys.readouterr() == ("", "")


def test_the_counts_are_those_of_the_chosen_schedule() -> None:
    """Search tries several sites: the report must speak of the one that was kept."""
    fast = searched()
    assert fast.report is not None
    again = compile_module(
        recipe=recipes.steps(computed=fast.schedule.computed_steps(), site=fast.schedule.rows[0].site)
    )
    assert again.report is not None
    assert fast.report.kept == again.report.kept
    assert fast.report.hoisted == again.report.hoisted


def test_it_says_what_it_did_unless_told_not_to(capsys: pytest.CaptureFixture[str]) -> None:
    compile_module(recipe=EVERY_OTHER, verbose=None)
    out, err = capsys.readouterr()
    assert out == ""
    assert "nodes are cached on a forecast step" in err
    assert "CrCrCrCr" in err
    compile_module(recipe=EVERY_OTHER, verbose=True)
    assert "profile denoiser" in capsys.readouterr().err
    compile_module(recipe=EVERY_OTHER, verbose=False)
    assert capsys.readouterr().err == ""


def test_recipes_replace_the_search() -> None:
    fast = compile_module(recipe=recipes.evenly(computed=3, site="output", predictor="newton", order=1))
    assert fast.schedule.computed_steps() == (0, 2, 5)
    assert fast.schedule.rows[0].site == "output"


def test_compiling_again_starts_from_the_denoiser() -> None:
    fast = compiled()
    again = compile_module(fast, recipe=recipes.evenly(computed=3))
    assert again.denoiser is fast.denoiser
    assert again.schedule.computed_steps() == (0, 2, 5)


def test_disabled_passes_and_inductor_names_are_known() -> None:
    fast = compile_module(recipe=EVERY_OTHER, disable_passes=["hoist_step_invariant"])
    assert fast.report is not None
    assert fast.report.hoisted == 0
    assert torch.equal(sample(fast, Request(seed=9)), sample(compile_module(recipe=EVERY_OTHER), Request(seed=9)))


def test_the_stages_by_hand_give_what_compile_gives() -> None:
    found = diffcache.profile(make(), list(ITEMS), sample=sample, verbose=False)
    schedules = diffcache.search(found, diffcache.Speedup(2.0), proposals=6)
    fast = searched()
    origins = [c["origin"] for c in fast.report.considered] if fast.report else []
    assert [s.origin for s in schedules] == origins[: len(schedules)]
    assert fast.schedule.origin in origins
    chosen = next((s for s in schedules if s.origin == fast.schedule.origin), fast.schedule)
    assert torch.equal(sample(found.cached(chosen), Request(seed=9)), sample(fast, Request(seed=9)))


def test_a_sampler_that_expands_the_timestep_and_tells_more_than_the_branch() -> None:
    def as_video_pipelines_do(denoiser: Any, request: Request) -> torch.Tensor:
        x, prompt = request.latent(), request.embeds()
        with torch.no_grad():
            for index, t in enumerate(request.times()):
                t = t[0].expand(len(x))  # of one element and stride zero: contiguous, but not to be viewed
                enter = getattr(denoiser, "cache_context", lambda name, **details: contextlib.nullcontext())
                with enter("cond", step_index=index, num_inference_steps=request.steps):
                    x = x - denoiser(x, t, prompt) / request.steps
        return x

    fast = diffcache.compile(make(), [Request(seed=0)], sample=as_video_pipelines_do, recipe=EVERY_OTHER, verbose=False)
    expected = as_video_pipelines_do(make(), Request(seed=3))
    assert torch.allclose(as_video_pipelines_do(fast, Request(seed=3)), expected, atol=0.1)
    assert fast.steps_forecast == STEPS // 2


def test_a_sampler_may_return_nothing() -> None:
    def silent(denoiser: Any, item: Request) -> None:
        sample(denoiser, item)

    report = compile_module(sample=silent, recipe=EVERY_OTHER).report
    assert report is not None
    assert report.measured_error is not None
    assert 0 < report.measured_error < 0.5


# -- pipelines --------------------------------------------------------------------------------------------------------

PIPELINES: dict[str, tuple[Any, str, list[Any], dict[str, Any]]] = {
    "digits": (digits_pipeline, "transformer", DIGITS, {"prompt": "a slanted two"}),
    "dit": (
        dit_pipeline,
        "transformer",
        [{"class_labels": [label], "num_inference_steps": STEPS} for label in (3, 7)],
        {"class_labels": [5]},
    ),
    "unet": (unet_pipeline, "unet", [embeds(0), embeds(1)], embeds(5)),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_comes_back_as_a_pipeline(name: str) -> None:
    build, component, items, item = PIPELINES[name]
    pipe = build()
    parts, reference = dict(pipe.components), images(pipe, item, 1)
    fast = diffcache.compile(pipe, items, recipe=EVERY_OTHER, verbose=False)
    assert type(fast) is type(pipe)
    assert dict(pipe.components) == parts, "the original has its own components"
    assert isinstance(getattr(fast, component), CachedDenoiser)
    assert getattr(fast, component).denoiser is parts[component]
    assert all(fast.components[key] is part for key, part in parts.items() if key != component)
    assert getattr(fast, component).config is parts[component].config
    assert getattr(fast, component).dtype is parts[component].dtype
    first, second = images(fast, item, 1), images(fast, item, 1)
    assert torch.equal(first, second)
    assert not torch.equal(first, reference)
    assert torch.equal(images(pipe, item, 1), reference)
    assert fast.report.computed == 4
    assert "CrCrCrCr" in str(fast.schedule)
    assert not getattr(fast, component)._streams


@pytest.mark.parametrize("name", PIPELINES)
def test_exact_on_a_pipeline(name: str) -> None:
    build, _, items, item = PIPELINES[name]
    pipe = build()
    fast = diffcache.compile(pipe, items[:1], budget=diffcache.Exact(), verbose=False)
    assert torch.equal(images(fast, item, 1), images(pipe, item, 1))
    if name != "unet":  # at another step count, too
        assert torch.equal(images(fast, item, 1, num_inference_steps=5), images(pipe, item, 1, num_inference_steps=5))


def test_an_interrupted_pipeline_starts_clean() -> None:
    pipe = digits_pipeline()
    fast = diffcache.compile(pipe, DIGITS, recipe=EVERY_OTHER, verbose=False)
    expected = images(fast, {"prompt": "a slanted two"}, 1)

    def stop(pipe: Any, step: int, t: Any, tensors: Any) -> dict[str, Any]:
        if step == 3:
            raise KeyboardInterrupt
        return {}

    for prompt in ("a slanted two", "the nine"):
        with pytest.raises(KeyboardInterrupt):
            images(fast, {"prompt": prompt}, 2, callback_on_step_end=stop)
        assert torch.equal(images(fast, {"prompt": "a slanted two"}, 1), expected)


def test_other_step_counts_of_a_pipeline_run_in_full_once_warned() -> None:
    pipe = digits_pipeline()
    fast = diffcache.compile(pipe, DIGITS, recipe=EVERY_OTHER, verbose=False)
    with pytest.warns(UserWarning, match="computed in full") as caught:
        result = images(fast, {"prompt": "a slanted two"}, 1, num_inference_steps=11)
    assert len([w for w in caught if "diffcache" in str(w.message)]) == 1
    assert torch.equal(result, images(pipe, {"prompt": "a slanted two"}, 1, num_inference_steps=11))


def test_a_batch_of_prompts_and_no_guidance() -> None:
    pipe = digits_pipeline()
    fast = diffcache.compile(pipe, DIGITS, recipe=EVERY_OTHER, verbose=False)
    for more in ({"prompt": ["a two", "a bold one", "nine"]}, {"prompt": "a two", "guidance_scale": 1.0}):
        forecast = fast.transformer.steps_forecast
        result, reference = images(fast, more, 1), images(pipe, more, 1)
        assert fast.transformer.steps_forecast > forecast
        assert 0 < (result - reference).norm() < 0.2 * reference.norm()


def test_a_list_of_generators_is_used_afresh_each_time() -> None:
    items = [{"prompt": ["a two", "a six"], "num_inference_steps": STEPS}]
    items[0]["generator"] = [torch.Generator().manual_seed(seed) for seed in (1, 2)]  # type: ignore[assignment]
    fast = diffcache.compile(digits_pipeline(), items, budget=diffcache.Exact(), verbose=False)
    assert fast.report.measured_error == 0.0


class TwoStage:
    """A pipeline with one denoiser for high and one for low noise, and nothing of diffusers."""

    def __init__(self) -> None:
        self.components = {"high": make(seed=1), "low": make(seed=2), "scheduler": object()}
        self.high, self.low = self.components["high"], self.components["low"]

    def __call__(self, prompt: int, seed: int = 0, num_inference_steps: int = 12) -> torch.Tensor:
        request = Request(seed=seed, prompt=prompt, steps=num_inference_steps)
        x, cond = request.latent(), request.embeds()
        with torch.no_grad():
            for step, t in enumerate(request.times()):
                denoiser = self.high if step < num_inference_steps // 2 else self.low
                x = x - denoiser(x, t, cond) / num_inference_steps
        return x


def test_two_denoisers_in_turn() -> None:
    pipe = TwoStage()
    fast = diffcache.compile(pipe, [{"prompt": 1}, {"prompt": 2, "seed": 5}], recipe=EVERY_OTHER, verbose=False)
    assert isinstance(fast, TwoStage)
    assert set(fast.report) == set(fast.schedule) == {"high", "low"}
    assert all(report.computed == 3 for report in fast.report.values())
    result, reference = fast(7), pipe(7)
    assert (fast.high.steps_forecast, fast.low.steps_forecast) == (3, 3)
    assert 0 < (result - reference).norm() < 0.2 * reference.norm()
    assert torch.equal(fast(7), result)
    exact = diffcache.compile(pipe, [{"prompt": 1}], budget=diffcache.Exact(), verbose=False)
    assert torch.equal(exact(7), reference)


# -- bad input --------------------------------------------------------------------------------------------------------


def few_steps(denoiser: Any, item: Request) -> torch.Tensor:
    return sample(denoiser, Request(seed=item.seed, steps=3))


def never(denoiser: Any, item: Request) -> torch.Tensor:
    return item.latent()


@pytest.mark.parametrize(
    ("message", "prompts", "options"),
    [
        ("calib_prompts must be a non-empty list", [], {}),
        ("calib_prompts must be a non-empty list of strings.* got 'a cat'", "a cat", {}),
        ("a bare denoiser needs sample=", list(ITEMS), {"sample": None}),
        (r"prompt 0 never called the denoiser.*must\s+run one whole generation", list(ITEMS), {"sample": never}),
        ("called 3 times in 1 streams of at most 3 steps", list(ITEMS), {"sample": few_steps}),
        (
            r"no site is named 'attn:layers.0'.*stack0:blocks.0..blocks.2",
            list(ITEMS),
            {"recipe": recipes.uniform(site="attn:layers.0")},
        ),
        (r"budget must be Speedup\(...\), Quality\(...\) or Exact\(\), got 2.0", list(ITEMS), {"budget": 2.0}),
        ("unknown backend 'tensorrt'; expected one of", list(ITEMS), {"backend": "tensorrt"}),
        (r"unknown passes \['fuse'\] to disable; known: \[.*'hoist", list(ITEMS), {"disable_passes": ["fuse"]}),
        ("cannot be disabled", list(ITEMS), {"disable_passes": ["apply_schedule"]}),
        ("on_uncapturable is 'ignore'; expected 'raise' or 'eager'", list(ITEMS), {"on_uncapturable": "ignore"}),
        (r"Speedup\(100\) is out of reach.*Ask for less than", list(ITEMS), {"budget": diffcache.Speedup(100.0)}),
        ("leaves nothing to reuse", list(ITEMS), {"budget": diffcache.Quality(rel_l2=1e-9)}),
        (r"uniform\(interval=1.* leaves nothing to reuse", list(ITEMS), {"recipe": recipes.uniform(interval=1)}),
        ("recipe must be one of diffcache.recipes", list(ITEMS), {"recipe": "uniform"}),
        ("judge_prompts must be at least 1", list(ITEMS), {"judge_prompts": 0}),
        ("proposals must be at least 1", list(ITEMS), {"proposals": 0}),
        (
            "calibration prompt 1 calls denoiser at 16 steps, prompt 0 at 8",
            [Request(), Request(steps=16)],
            {"recipe": EVERY_OTHER},
        ),
    ],
    ids=itertools.count(),
)
def test_bad_input_to_compile(message: str, prompts: Any, options: dict[str, Any]) -> None:
    options = {"sample": sample, "verbose": False, **options}
    with pytest.raises(ValueError, match=message):
        diffcache.compile(make(), prompts, **options)


def test_bad_input_to_a_pipeline() -> None:
    pipe = digits_pipeline()
    with pytest.raises(
        ValueError, match=r"DigitsPipeline takes no arguments \['steps'\]; it takes \[.*'num_inference_ste"
    ):
        diffcache.compile(pipe, [{"prompt": "a two", "steps": 8}])
    with pytest.raises(ValueError, match="a calibration prompt is a string or a dict of pipeline arguments, got int"):
        diffcache.compile(pipe, [3])
    with pytest.raises(ValueError, match=r"was called 4 times or more.*calibrate with at least 4 steps"):
        diffcache.compile(pipe, [{"prompt": "a two", "num_inference_steps": 1}])
    with pytest.raises(ValueError, match=r"expected a diffusers pipeline or a torch\.nn\.Module, got str"):
        diffcache.compile("flux", ["a two"])
    with pytest.raises(ValueError, match=r"sample=.*only for a bare denoiser"):
        diffcache.compile(pipe, ["a two"], sample=sample)


@pytest.mark.parametrize("budget", [diffcache.Speedup(2.0), diffcache.Exact()], ids=["speedup", "exact"])
def test_nan_in_the_result_is_an_error(budget: Any) -> None:
    model = make()
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="calibration prompt 0 gives NaN or infinity without any caching"):
        compile_module(model, budget=budget)


def draw(denoiser: Any, item: Request) -> torch.Tensor:
    """A sampler for the plain denoisers: square latents and class labels."""
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(item.seed))
    with torch.no_grad():
        for t in item.times():
            x = x - denoiser(x, t, torch.tensor([item.prompt % 10])) / item.steps
    return x


def test_an_uncapturable_denoiser_is_refused_or_runs_uncached() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CounterDiT().eval()
    with pytest.raises(diffcache.CaptureError, match=r"(?s)CounterDiT cannot be captured exactly.*calls"):
        diffcache.compile(model, list(ITEMS), sample=draw, verbose=False)
    with pytest.warns(UserWarning, match="runs uncached: CounterDiT cannot be captured"):
        fast = diffcache.compile(model, list(ITEMS), sample=draw, on_uncapturable="eager", verbose=False)
    model.calls = 0
    expected = draw(model, Request())
    model.calls = 0
    assert torch.equal(draw(fast, Request()), expected)
    assert fast.report is None or fast.report.cached == 0


class Lookup(nn.Module):
    """No matrix product and no repeated module: only its output can be cached."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        return x * (1 - t / 1000).reshape(-1, 1, 1) + prompt.mean()


def test_a_denoiser_without_a_matrix_product() -> None:
    fast = compile_module(Lookup(), budget=diffcache.Exact())
    assert torch.equal(sample(fast, Request(seed=4)), sample(Lookup(), Request(seed=4)))
    fast = compile_module(Lookup(), recipe=recipes.uniform(site="output"))
    assert torch.isfinite(sample(fast, Request(seed=4))).all()


class HalfTime(TextDiT):
    """Takes another path in the second half of the steps: its sites are not those of the first half."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        c = self.text(prompt).mean(1) * (t[:, None] / 1000)
        h = self.embed(x)
        for index, block in enumerate(self.blocks):
            if index < 2 or t[0].item() < 500:
                h = block(h, c)
        return self.head(h)


@pytest.mark.parametrize("site", ["output", "block:blocks.0", "attn:blocks.1.attn"])
def test_a_denoiser_with_two_paths(site: str) -> None:
    """A schedule goes on over the change of path; what only one path has is no site."""
    model = make(HalfTime)
    with pytest.raises(ValueError, match=r"no site is named 'attn:blocks\.2\.attn'"):
        compile_module(model, recipe=recipes.uniform(site="attn:blocks.2.attn"))
    fast = compile_module(model, recipe=recipes.uniform(interval=3, site=site))
    result, reference = sample(fast, Request(seed=9)), sample(model, Request(seed=9))
    assert (result - reference).norm() < 0.3 * reference.norm()
    assert torch.equal(sample(fast, Request(seed=9)), result)
