"""What ``compile`` works on: the denoisers of a pipeline, or a bare one, each with a way to run generations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffcache.integrations import diffusers as pipelines
from diffcache.profiling import Generate
from diffcache.runtime import CachedDenoiser
from diffcache.tracing.compiled import is_compiled, uncompiled

Sample = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class Target:
    """One denoiser of a model, and how to run a whole generation with something else in its place.

    ``compiled`` says that it came compiled, whole or in part.
    """

    name: str
    denoiser: nn.Module
    generate: Generate
    compiled: bool


def find_targets(model: Any, calib_prompts: Sequence[Any], sample: Sample | None, seed: int) -> list[Target]:
    """The denoisers of a pipeline, or the bare denoiser itself.

    Raises:
        ValueError: no prompts; a bare module without ``sample``; nothing in the pipeline denoises.
    """
    if isinstance(calib_prompts, str) or not isinstance(calib_prompts, Sequence) or not calib_prompts:
        raise ValueError(
            f"calib_prompts must be a non-empty list of strings or dicts of pipeline arguments, got {calib_prompts!r}"
        )
    if pipelines.is_pipeline(model):
        if sample is not None:
            raise ValueError("sample= is only for a bare denoiser; a pipeline is called with each of calib_prompts")
        quiet = pipelines.quiet(model)

        def run(name: str) -> Generate:
            return lambda denoiser, index: pipelines.generate(
                pipelines.with_components(quiet, {name: denoiser}), calib_prompts[index], seed + index
            )

        found = pipelines.find_denoisers(model, calib_prompts[0], seed)
        return [Target(name, _uncompiled(module), run(name), is_compiled(module)) for name, module in found.items()]
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a diffusers pipeline or a torch.nn.Module, got {type(model).__name__}")
    if sample is None:
        raise ValueError(
            "a bare denoiser needs sample=: a function sample(denoiser, item) that runs one whole generation for one "
            "calibration item by calling denoiser(...), and returns the result"
        )
    return [Target("denoiser", _uncompiled(model), _sampler(sample, calib_prompts, seed), is_compiled(model))]


def _uncompiled(module: nn.Module) -> nn.Module:
    """What was compiled before, here or by ``torch.compile``, is compiled anew from the denoiser itself."""
    module = uncompiled(module)
    return module.denoiser if isinstance(module, CachedDenoiser) else module


def _sampler(sample: Sample, items: Sequence[Any], seed: int) -> Generate:
    def generate(denoiser: nn.Module, index: int) -> torch.Tensor:
        last: list[torch.Tensor] = []
        hook = denoiser.register_forward_hook(lambda module, args, out: last.append(pipelines.flat(out)))
        try:
            with pipelines.seeded(seed + index), torch.no_grad():
                result = pipelines.flat(sample(denoiser, items[index]))
        finally:
            hook.remove()
        return result if result.numel() or not last else last[-1]

    return generate
