"""What calibration measures for recipes, against denoisers whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import diffcache
from diffcache.measuring import measure_changes
from diffcache.profiling import Calibration
from tests.generation import ITEMS, STEPS, Request, make, sample


class Product(nn.Module):
    """``v = t W x`` with an orthogonal W: ``|dv| / |v|`` is ``|dx| / |x|`` and ``|dt| / t``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)
        nn.init.eye_(self.layer.weight)

    def forward(self, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * t.reshape(-1, 1, 1) / 1000


def calibrated(model: nn.Module) -> Calibration:
    return diffcache.profile(model, list(ITEMS), sample=sample, sensitivity_prompts=0, verbose=False)


def generate(denoiser: nn.Module, index: int) -> torch.Tensor:
    return sample(denoiser, ITEMS[index])


def test_derivatives_of_a_known_denoiser() -> None:
    found = measure_changes(calibrated(Product()), generate, 2, ["latent", "timestep"], "derivative")
    lengths, x = [], ITEMS[0].latent()
    for t in ITEMS[0].times():
        lengths.append(float(x.norm()))
        with torch.no_grad():
            x = x - Product()(x, t, x) / STEPS
    assert found["latent"].shape == (2, STEPS, 1)
    np.testing.assert_allclose(found["latent"][0, :, 0], 1 / np.array(lengths), rtol=1e-3)
    times = [float(t[0]) for t in ITEMS[0].times()]
    np.testing.assert_allclose(found["timestep"][0, :, 0], 1 / np.array(times), rtol=1e-3)


def test_pooled_is_the_mean_over_samples_and_tokens() -> None:
    model = make()
    calibration, seen = calibrated(model), []
    found = measure_changes(calibration, generate, 1, ["stack_input"], "pooled")["stack_input"]
    handle = model.embed.register_forward_hook(lambda module, args, out: seen.append(out.mean((0, 1))))
    sample(model, Request(seed=0, prompt=0))
    handle.remove()
    np.testing.assert_allclose(found[0], torch.stack(seen).detach().double().numpy(), atol=1e-6)


def test_what_cannot_be_measured_is_refused() -> None:
    calibration = calibrated(make())
    with pytest.raises(ValueError, match=r"unknown measure 'l3'; known: .*'derivative'"):
        measure_changes(calibration, generate, 1, ["stack_input"], "l3")
    with pytest.raises(ValueError, match=r"against 'latent' and 'timestep', got \['prompt'\]"):
        measure_changes(calibration, generate, 1, ["prompt"], "derivative")
    with pytest.raises(ValueError, match=r"no sites or probes \['nowhere'\]"):
        measure_changes(calibration, generate, 1, ["nowhere"], "pooled")
