"""The shipped digits pipeline loads offline and behaves as a diffusers pipeline does."""

import pytest
import torch

pytest.importorskip("diffusers")

from benchmarks.models.digits.pipeline import DigitsPipeline
from benchmarks.models.digits.train import FOLDER

PROMPTS = ["a bold seven", "the digit three"]


@pytest.fixture(scope="module")
def pipe() -> DigitsPipeline:
    pipe = DigitsPipeline.from_pretrained(FOLDER, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: DigitsPipeline, seed: int = 0, **arguments) -> torch.Tensor:
    arguments = {"prompt": PROMPTS, "num_inference_steps": 4, "output_type": "pt"} | arguments
    return pipe(generator=torch.Generator().manual_seed(seed), **arguments).images


def test_weights_load_in_single_precision(pipe: DigitsPipeline):
    assert pipe.transformer.dtype == torch.float32
    assert pipe.text_encoder.dtype == torch.float32


def test_shape_and_range(pipe: DigitsPipeline):
    images = draw(pipe)
    assert images.shape == (2, 1, 8, 8)
    assert images.min() >= 0
    assert images.max() <= 1


def test_the_generator_decides(pipe: DigitsPipeline):
    assert torch.equal(draw(pipe, seed=1), draw(pipe, seed=1))
    assert not torch.equal(draw(pipe, seed=1), draw(pipe, seed=2))


def test_the_prompt_decides(pipe: DigitsPipeline):
    assert not torch.equal(draw(pipe, prompt="a one"), draw(pipe, prompt="a zero"))


@pytest.mark.parametrize(("scale", "calls"), [(1.0, ["cond"]), (3.0, ["cond", "uncond"])])
def test_guidance_runs_as_separate_calls(pipe: DigitsPipeline, monkeypatch, scale: float, calls: list[str]):
    entered = []
    enter = pipe.transformer.cache_context
    monkeypatch.setattr(pipe.transformer, "cache_context", lambda name: entered.append(name) or enter(name))
    draw(pipe, guidance_scale=scale)
    assert entered == calls * 4


def test_given_latents_are_used(pipe: DigitsPipeline):
    latents = torch.randn(2, 64, 1, generator=torch.Generator().manual_seed(3))
    assert torch.equal(draw(pipe, seed=0, latents=latents), draw(pipe, seed=1, latents=latents))
    with pytest.raises(ValueError, match="need"):
        draw(pipe, latents=latents[:1])


def test_callback_sees_every_step(pipe: DigitsPipeline):
    steps = []

    def stop_at_zero(pipe, step, timestep, tensors):
        steps.append(step)
        return {"latents": torch.zeros_like(tensors["latents"])}

    images = draw(pipe, callback_on_step_end=stop_at_zero)
    assert steps == [0, 1, 2, 3]
    assert (images == 0.5).all()


def test_unknown_words_are_refused(pipe: DigitsPipeline):
    with pytest.raises(ValueError, match=r"unknown word 'eleven'.*seven"):
        pipe("a handwritten eleven")


def test_output_types(pipe: DigitsPipeline):
    assert draw(pipe, prompt="one", output_type="latent").shape == (1, 64, 1)
    assert draw(pipe, prompt="one", output_type="np").shape == (1, 8, 8, 1)
    assert draw(pipe, prompt="one", output_type="pil")[0].size == (128, 128)
    with pytest.raises(ValueError, match="output_type"):
        draw(pipe, output_type="jpg")
