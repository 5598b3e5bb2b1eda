"""What calibration sees of a pipeline: its latents, also through subclasses that hand arguments on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")

from benchmarks.models.digits.pipeline import DigitsPipeline
from diffcache.integrations import diffusers as pipelines
from tests.pipelines import digits_pipeline


class Forwarding(DigitsPipeline):
    """A user's own class: another default, everything else handed on."""

    def __call__(self, prompt: str, guidance_scale: float = 1.0, **options: Any) -> Any:
        return super().__call__(prompt, guidance_scale=guidance_scale, **options)


def forwarding() -> Forwarding:
    pipe = digits_pipeline()
    return Forwarding(**pipe.components)


def test_a_subclass_that_hands_arguments_on_returns_latents() -> None:
    pipe, item = forwarding(), {"prompt": "a bold seven", "num_inference_steps": 4}
    arguments = pipelines.call_arguments(pipe, item, seed=3)
    assert arguments["output_type"] == "latent"
    assert arguments["generator"].initial_seed() == 3
    result = pipelines.generate(pipelines.quiet(pipe), item, seed=3)
    assert result.shape == (64,)
    assert not torch.equal(result, pipelines.generate(pipelines.quiet(pipe), item, seed=4))


def test_a_subclass_still_refuses_what_no_base_takes() -> None:
    with pytest.raises(ValueError, match=r"takes no arguments \['colour'\]; it takes .*output_type"):
        pipelines.call_arguments(forwarding(), {"prompt": "one", "colour": "red"}, seed=0)


def test_a_pipeline_that_takes_anything_is_given_it() -> None:
    class Anything:
        def __call__(self, **options: Any) -> Any: ...

    assert pipelines.call_arguments(Anything(), {"prompt": "one", "colour": "red"}, seed=0)["colour"] == "red"


def test_pictures_count_as_results() -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    result = SimpleNamespace(images=[Image.fromarray(pixels)])
    assert pipelines.flat(vars(result)).tolist() == list(range(12))


def test_nothing_to_measure_is_an_error() -> None:
    class Silent:
        def __call__(self, prompt: str) -> str:
            return "done"

    with pytest.raises(ValueError, match="Silent returned nothing that errors can be measured on"):
        pipelines.generate(Silent(), "a prompt", seed=0)
