"""A cached generation of a transformer of FLUX.1-dev's size, with random weights, on one GPU.

    python -m benchmarks.gpu.flux                         # bfloat16, 4096 image tokens, 512 words
    python -m benchmarks.gpu.flux --layers 4 8 --backend inductor    # fewer blocks of the same size: compiles sooner
    python -m benchmarks.gpu.flux --small --device cpu    # the same path in seconds, to see that it runs

Printed: that a generation without reuse is bit for bit the denoiser's, kernel launches of a cached step beside those of
the work that remains, host synchronisations of cached steps, and the time of a generation beside what its FLOPs allow.
With random weights only the cost means anything.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

import diffcache
from benchmarks.gpu.counting import hand_through, launches, synchronisations, unfused
from benchmarks.overhead import conditions, flux, paired, sampler
from diffcache import recipes
from diffcache.runtime import CachedDenoiser
from diffcache.schedule import Forecast, GateSpec

found: dict[str, Any] = {}
began = time.perf_counter()


def say(text: str, **numbers: Any) -> None:
    found.update(numbers)
    print(f"[{time.perf_counter() - began:6.1f} s] {text}", flush=True)


def dev(device: str, layers: tuple[int, int]) -> FluxTransformer2DModel:
    """The configuration of FLUX.1-dev's transformer (12 B parameters), without its distilled guidance input."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = FluxTransformer2DModel(guidance_embeds=False, num_layers=layers[0], num_single_layers=layers[1])
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Steps:
    """Single steps of a generation with everything they need on the device already."""

    def __init__(self, denoiser: Any, latent: torch.Tensor, prompt: dict[str, Any], count: int):
        self.denoiser, self.latent, self.prompt = denoiser, latent, prompt
        self.times = [torch.full((1,), 1 - k / count, dtype=latent.dtype, device=latent.device) for k in range(count)]

    def __call__(self, number: int) -> torch.Tensor:
        step = {"hidden_states": self.latent, "timestep": self.times[number], "return_dict": False}
        return self.denoiser(**step, **self.prompt)[0]


def first_cached(fast: CachedDenoiser) -> int:
    """A step that forecasts from as much history as any does."""
    counts = [
        sum(len(cell.steps) for cell in fast.schedule.column(step) if isinstance(cell, Forecast))
        for step in range(fast.schedule.steps)
    ]
    return counts.index(max(counts))


def count(fast: CachedDenoiser, steps: Steps, device: str) -> None:
    """Launches of a cached step beside those of its head, and synchronisations of all steps from the second on."""
    cached = first_cached(fast)

    def up_to(denoiser: CachedDenoiser, last: int, edit: bool = False) -> int:
        steps.denoiser, forecasts = denoiser, 0
        denoiser.reset()
        for number in range(last):
            steps(number)
            if edit and number == 0:
                forecasts = hand_through(denoiser, last)
        return forecasts

    names, forecasts = [], 0
    for denoiser in (fast, unfused(fast)):
        for _ in range(2):  # once to load and compile, once to count
            forecasts = up_to(denoiser, cached, edit=denoiser is not fast) or forecasts
            seen = launches(lambda: steps(cached), device)
        names.append(seen)
    ours, head = map(len, names)
    say(f"a cached step: {ours} launches, its head alone {head}: {ours - head} more for {forecasts} forecasts",
        launches=ours, head_launches=head, forecasts=forecasts)  # fmt: skip
    more, less = Counter(names[0]) - Counter(names[1]), Counter(names[1]) - Counter(names[0])
    say(f"only in the cached step: {dict(more)}; only in the head: {dict(less)}"[:1500], kernels=names[0])

    def rest(first: int) -> Callable[[], None]:
        return lambda: [steps(number) for number in range(first, fast.schedule.steps)] and None

    fresh = fast.with_schedule(fast.schedule)  # without the weights that earlier generations left on the device
    gate = GateSpec("accumulated_change", {"threshold": 1e9})
    gated = fast.with_schedule(replace(fast.schedule, rows=tuple(replace(r, gate=gate) for r in fast.schedule.rows)))
    for denoiser, which in ((fast, "a later"), (fresh, "the first"), (gated, "a gated")):
        up_to(denoiser, 1)
        before = denoiser.steps_forecast
        waits = synchronisations(rest(1), device)
        say(f"host synchronisations of {which} generation from its second step on: {len(waits)}, "
            f"{denoiser.steps_forecast - before} steps forecast",
            **{f"synchronisations of {which} generation": waits})  # fmt: skip
        for line, number in Counter(waits).most_common(8):
            print(f"    {number} x {line}"[:300])


def each_step(fast: CachedDenoiser, steps: Steps, device: str) -> None:
    """Milliseconds of every step of one generation."""
    steps.denoiser = fast
    fast.reset()
    times = []
    for number in range(fast.schedule.steps):
        wait(device)
        start = time.perf_counter()
        steps(number)
        wait(device)
        times.append(1e3 * (time.perf_counter() - start))
    say("ms of each step: " + " ".join(f"{t:.2f}" for t in times), step_ms=times)


def whole(fast: CachedDenoiser, plain: Any, sample: Any, pairs: int, device: str) -> None:
    allowed = 1 / fast.schedule.flops_fraction
    for name, denoiser in (("uncached", plain), ("cached", fast)):
        sample(denoiser, 3)
        wait(device)
        start = time.perf_counter()
        sample(denoiser, 3)
        wait(device)
        say(f"one generation {name}: {time.perf_counter() - start:.3f} s", **{name: time.perf_counter() - start})
    middle, low, high = paired(lambda: sample(plain, 3), lambda: sample(fast, 3), pairs, device)
    say(f"generation: {middle:.3f} x ({low:.3f} to {high:.3f}) of {allowed:.3f} x that the FLOPs allow: "
        f"{100 * middle / allowed:.1f} %", speedup=middle, allowed=allowed, share=middle / allowed)  # fmt: skip


def hold(file: Path | None) -> None:
    """Wait, two minutes at most, for a file that another job makes when it leaves the device alone."""
    end = time.perf_counter() + 120
    while file is not None and not file.exists() and time.perf_counter() < end:
        time.sleep(0.2)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--backend", choices=("eager", "inductor", "cudagraphs"), default="eager")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, nargs=2, default=(19, 38))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--interval", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--after", type=Path, help="time nothing before this file exists")
    parser.add_argument("--json", type=Path, help="write all numbers there")
    arguments = parser.parse_args()
    device = arguments.device
    say(f"torch {torch.__version__}, {torch.cuda.get_device_name() if device == 'cuda' else device}")
    torch.manual_seed(0)
    model = flux(2, 4, 64, device) if arguments.small else dev(device, tuple(arguments.layers))
    dtype = model.dtype
    wait(device)
    say(f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} B parameters")
    width, tokens, words = (64, 64, 8) if arguments.small else (4096, 4096, 512)
    pooled = width if arguments.small else 768
    sample = sampler(width, tokens, words, device, dtype, pooled, arguments.steps)
    recipe = recipes.uniform(interval=arguments.interval, predictor="taylor", order=2)
    fast = diffcache.compile(model, [0], sample=sample, recipe=recipe, backend=arguments.backend, verbose=False)
    say(f"compiled\n{fast.report}")
    plain = model if arguments.backend == "eager" else torch.compile(model, fullgraph=True, dynamic=False)
    latent = torch.randn(1, tokens, 64, device=device, dtype=dtype)
    steps = Steps(fast, latent, conditions(width, tokens, words, device, dtype, pooled), arguments.steps)
    ours = steps(0)
    steps.denoiser = plain
    close = torch.equal(ours, steps(0)) if arguments.backend == "eager" else \
        bool((ours - steps(0)).float().norm() <= 2e-2 * ours.float().norm())  # fmt: skip
    say(f"a computed step gives what the denoiser gives: {'yes' if close else 'NO'}", correct=close)
    hold(arguments.after)
    if close:  # a red check prints no speed
        each_step(fast, steps, device)
        whole(fast, plain, sample, arguments.pairs, device)
    if arguments.backend == "eager":
        count(fast, steps, device)
    if device == "cuda":
        say(f"memory at its peak: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
