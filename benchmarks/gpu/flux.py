"""A cached generation of a transformer of FLUX.1-dev's size, with random weights, on one GPU.

    python -m benchmarks.gpu.flux                     # bfloat16, 4096 image tokens, 512 words
    python -m benchmarks.gpu.flux --small --device cpu    # the same path in seconds, to see that it runs

Printed: kernel launches of a cached step beside those of the work that remains, host synchronisations of a cached
step, and the time of a generation beside what its FLOPs allow. With random weights only the cost means anything.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

import diffcache
from benchmarks.overhead import STEPS, conditions, flux, sampler
from diffcache import recipes


def dev(device: str) -> FluxTransformer2DModel:
    """The configuration of FLUX.1-dev's transformer (12 B parameters), without its distilled guidance input."""
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            return FluxTransformer2DModel(guidance_embeds=False).eval()
        finally:
            torch.set_default_dtype(before)


def launches(run: Callable[[], Any], device: str) -> int:
    """Kernels that one call starts."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=kinds) as seen:
        run()
    wanted = torch.autograd.DeviceType.CUDA if device == "cuda" else torch.autograd.DeviceType.CPU
    return sum(event.device_type == wanted for event in seen.events())


def synchronisations(run: Callable[[], Any], device: str) -> int:
    """How often the host waited for the device."""
    if device != "cuda":
        return 0
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in said)


def seconds(run: Callable[[], Any], device: str) -> float:
    run()
    times = []
    for _ in range(3):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--backend", choices=("eager", "inductor"), default="eager")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = arguments.device
    model = flux(2, 4, 64, device) if arguments.small else dev(device)
    dtype = model.dtype
    width, tokens, words = (64, 64, 8) if arguments.small else (4096, 4096, 512)
    pooled = width if arguments.small else 768
    sample = sampler(width, tokens, words, device, dtype, pooled)
    recipe = recipes.uniform(interval=4, predictor="taylor", order=2)
    fast = diffcache.compile(model, [0], sample=sample, recipe=recipe, backend=arguments.backend, verbose=False)
    print(f"torch {torch.__version__}, {device}, {sum(p.numel() for p in model.parameters()) / 1e9:.2f} B parameters")
    print(fast.report)

    prompt = conditions(width, tokens, words, device, dtype, pooled)
    x = torch.randn(1, tokens, 64, device=device, dtype=dtype)

    def step(number: int) -> None:
        t = torch.full((1,), 1 - number / STEPS, dtype=dtype)
        fast(hidden_states=x, timestep=t.to(device), return_dict=False, **prompt)

    fast.reset()
    for number in range(5):
        step(number)
    cached = launches(lambda: step(5), device)
    waits = synchronisations(lambda: step(6), device)
    fast.reset()
    print(f"a cached step: {cached} launches, {waits} host synchronisations")
    uncached, with_cache = seconds(lambda: sample(model, 3), device), seconds(lambda: sample(fast, 3), device)
    allowed = 1 / fast.schedule.flops_fraction
    print(f"generation: {uncached / with_cache:.2f} x of {allowed:.2f} x that the FLOPs allow "
          f"({100 * uncached / with_cache / allowed:.0f} %)")  # fmt: skip


if __name__ == "__main__":
    main()
