"""Recipes about guidance with samplers that guide, end to end: T-GATE against itself written out with hooks."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from diffcache import recipes
from diffcache.compiler import ALL_SITES
from diffcache.planning import plan_of
from diffcache.profiling import Calibration, calibrate
from diffcache.recipes import Plan, Recipe
from diffcache.report import relative_error
from diffcache.runtime import CachedDenoiser
from tests.denoisers import FAMILIES, STEPS, Arguments
from tests.generation import Quiet

SCALE = 3.0
CASES = [("pixart", "batched"), ("pixart", "separate"), ("wan", "separate"), ("sdxl_unet", "batched")]


def arguments(name: str, step: int, x: torch.Tensor, text: torch.Tensor) -> Arguments:
    """One call's arguments for a batch of latents and the text that goes with each."""
    args, kwargs = FAMILIES[name].make_inputs(step, batch=len(x))
    if "encoder_hidden_states" in kwargs:
        kwargs["encoder_hidden_states"] = text
    else:
        args = (args[0], args[1], text)
    if args:
        return (x, *args[1:]), kwargs
    return (), {**kwargs, "sample": x}


def texts(name: str, item: int) -> dict[str, torch.Tensor]:
    """The unconditional text, the same for all, and that of the item."""
    args, kwargs = FAMILIES[name].make_inputs(0, batch=1)
    like = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[2]
    drawn = {"uncond": -1, "cond": item}
    return {
        branch: torch.randn(like.shape, generator=torch.Generator().manual_seed(100 + seed))
        for branch, seed in drawn.items()
    }


def call(denoiser: Any, name: str, step: int, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    args, kwargs = arguments(name, step, x, text)
    with torch.no_grad():
        out = denoiser(*args, **kwargs)
    out = out if isinstance(out, torch.Tensor) else out[0] if isinstance(out, tuple) else out.sample
    return out[:, : x.shape[1]]


def latent(name: str, item: int) -> torch.Tensor:
    args, kwargs = FAMILIES[name].make_inputs(0, batch=1)
    shape = args[0].shape if args else kwargs["sample"].shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(item))


def guide(denoiser: nn.Module, name: str, mode: str, item: int) -> torch.Tensor:
    """Euler steps with classifier-free guidance, the unconditional branch first."""
    x, text = latent(name, item), texts(name, item)
    for step in range(STEPS):
        if mode == "batched":
            uncond, cond = call(denoiser, name, step, torch.cat([x, x]), torch.cat([*text.values()])).chunk(2)
        else:
            uncond, cond = (call(denoiser, name, step, x, one) for one in text.values())
        x = x - (uncond + SCALE * (cond - uncond)) / STEPS
    return x


@functools.cache
def found(name: str, mode: str) -> tuple[Calibration, Plan]:
    def sample(denoiser: nn.Module, item: int) -> torch.Tensor:
        return guide(denoiser, name, mode, item)

    made = calibrate(FAMILIES[name].make_model(), sample, 2, name=name, sensitivity_prompts=0, most_sites=ALL_SITES)
    return made, plan_of(made, sample, 1)


def cached(name: str, mode: str, recipe: Recipe) -> CachedDenoiser:
    calibration, plan = found(name, mode)
    return calibration.cached(recipe.schedule(plan))


@pytest.mark.parametrize(("name", "mode"), CASES)
@pytest.mark.parametrize(
    "recipe",
    [
        recipes.t_gate(),
        recipes.fastercache_guided(),
        recipes.dyncfgcache(threshold=1.0),
        recipes.adaptive_guidance(0.5),
    ],
    ids=str,
)
def test_guided_recipes_save_work_and_repeat_themselves(name: str, mode: str, recipe: Recipe) -> None:
    fast, eager = cached(name, mode, recipe), found(name, mode)[0].captured.denoiser
    with Quiet():
        first = guide(fast, name, mode, 5)
        assert torch.equal(guide(fast, name, mode, 5), first)
    assert 0 < relative_error(first, guide(eager, name, mode, 5)) < 0.5
    assert fast.flops < 0.95 * fast.flops_in_full
    left_out = [sum(column[0] == "-" for column in columns) for _, columns in fast.decisions]
    assert max(left_out) >= 3, left_out


class TGate:
    """Cross-attention as the mean of both branches from the gate step on, one branch then; hooks on a plain model."""

    def __init__(self, model: nn.Module, cross: str, own: str):
        self.kept: dict[tuple[str, str], torch.Tensor] = {}
        self.mode, self.branch = "compute", "cond"
        self.modules = {path: module for path, module in model.named_modules() if path.endswith((cross, own))}
        self.cross = cross

    @contextmanager
    def hooked(self) -> Iterator[None]:
        forwards = {path: module.forward for path, module in self.modules.items()}
        for path, module in self.modules.items():
            module.forward = functools.partial(self._forward, path, forwards[path])
        try:
            yield
        finally:
            for module in self.modules.values():
                del module.forward

    def _forward(self, path: str, forward: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        cross = path.endswith(self.cross)
        if self.mode == "folded" and cross:
            return (self.kept[path, "cond"] + self.kept[path, "uncond"]) / 2
        if self.mode == "paused" and not cross:
            return self.kept[path, self.branch]
        self.kept[path, self.branch] = forward(*args, **kwargs)
        return self.kept[path, self.branch]


@pytest.mark.parametrize(("name", "mode"), [case for case in CASES if case[0] != "sdxl_unet"])
def test_t_gate_is_t_gate(name: str, mode: str) -> None:
    """Gate 4 of 10: self-attention at steps 0, 1, 2, then from 4 on; cross-attention and guidance end at step 4."""
    model = FAMILIES[name].make_model()
    gated, x, text = TGate(model, "attn2", "attn1"), latent(name, 5), texts(name, 5)
    with gated.hooked():
        for step in range(STEPS):
            gated.mode = "folded" if step >= 4 else "paused" if step == 3 else "compute"
            results = {}
            for gated.branch in ("cond",) if step >= 4 else ("uncond", "cond"):
                results[gated.branch] = call(model, name, step, x, text[gated.branch])
            cond, uncond = results["cond"], results.get("uncond", results["cond"])
            x = x - (uncond + SCALE * (cond - uncond)) / STEPS
    fast = cached(name, mode, recipes.t_gate(gate=0.4, warm_up=2, before=5))
    assert relative_error(guide(fast, name, mode, 5), x) < 1e-5
