"""The shipped video model loads offline, follows its prompt and generator, and can be cached."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffcache
from benchmarks.models.emoji import clips, video_pipeline
from benchmarks.models.emoji.video_pipeline import EmojiVideoPipeline

FOLDER = Path(video_pipeline.__file__).parent / "video"
PROMPTS = ["red apple, bouncing", "fox, moving left"]


@pytest.fixture(scope="module")
def pipe() -> EmojiVideoPipeline:
    loaded = EmojiVideoPipeline.from_pretrained(FOLDER, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw(pipe: EmojiVideoPipeline, seed: int = 0, **options) -> torch.Tensor:
    options = {"prompt": PROMPTS, "num_inference_steps": 3, "output_type": "pt"} | options
    return pipe(generator=torch.Generator().manual_seed(seed), **options).frames


def test_prompt_and_generator_decide(pipe: EmojiVideoPipeline) -> None:
    first = draw(pipe, seed=1)
    assert first.shape == (2, clips.FRAMES, 3, 64, 64)
    assert torch.equal(draw(pipe, seed=1), first)
    assert not torch.equal(draw(pipe, seed=2), first)
    assert not torch.equal(draw(pipe, seed=1, prompt=PROMPTS[::-1]), first)


def test_words_outside_the_table_are_refused(pipe: EmojiVideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.models.emoji.prompts.PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match="near it: red apple"):
        draw(pipe, prompt="a red apple, bouncing")


def test_the_motion_is_in_the_clip(pipe: EmojiVideoPipeline) -> None:
    motions = ["moving right", "moving left", "falling", "rising"]
    frames = draw(pipe, prompt=[f"red apple, {motion}" for motion in motions], num_inference_steps=10)
    ink = (1 - frames).mean(dim=2)
    places = torch.linspace(-1, 1, 64)
    x = (ink.sum(dim=2) * places).sum(dim=2) / ink.sum(dim=(2, 3))
    y = (ink.sum(dim=3) * places).sum(dim=2) / ink.sum(dim=(2, 3))
    moved = torch.stack([x[:, -1] - x[:, 0], y[:, -1] - y[:, 0]], dim=1)
    expected = torch.tensor([[0.64, 0.0], [-0.64, 0.0], [0.0, 0.64], [0.0, -0.64]])
    torch.testing.assert_close(moved, expected, rtol=0, atol=0.1)


def test_weights_fit_into_git() -> None:
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) < 30e6


def test_it_can_be_cached(pipe: EmojiVideoPipeline) -> None:
    calibration = [{"prompt": prompt, "num_inference_steps": 10} for prompt in ("tiger, growing", "pizza, turning")]
    fast = diffcache.compile(pipe, calibration, budget=diffcache.Speedup(1.8), verbose=False)
    assert fast.transformer.report.flops_speedup >= 1.8
    expected, result = (draw(p, seed=5, num_inference_steps=10) for p in (pipe, fast))
    assert ((result - expected).norm() / expected.norm()).item() < 0.1
    assert not torch.equal(result, expected)
