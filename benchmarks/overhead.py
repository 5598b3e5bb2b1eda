"""What caching itself costs, on the machine at hand: ratios of interleaved pairs within one run.

    python -m benchmarks.overhead

- *no reuse*: a generation of the captured, compiled programs that reuse nothing, beside the same generation of the
  torch.compile'd denoiser; with hoisting it should take less than 1. The two run in lockstep, one step of each at a
  time, so that whatever else the machine does falls on both.
- *cached step*: a step whose blocks after the first are forecast, beside a denoiser that has the first block only, and
  is compiled as well: the same work without a cache.

On a CPU the time is that of this process on all its cores, on a GPU the host's clock around a synchronisation.
- *operations*: what a cached step of a FLUX-deep transformer (19 + 38 blocks) runs beyond what its head needs.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

import diffcache
from diffcache import recipes
from diffcache.graphs import count_ops
from diffcache.liveness import live_nodes
from diffcache.planning import plan_of
from diffcache.programs import Programs
from diffcache.schedule import GateSpec

STEPS = 8


def flux(double: int, single: int, dim: int, device: str) -> FluxTransformer2DModel:
    """FLUX's architecture in another size, with random weights."""
    torch.manual_seed(0)
    heads = dim // 32
    model = FluxTransformer2DModel(
        in_channels=64, num_layers=double, num_single_layers=single, attention_head_dim=32, num_attention_heads=heads,
        joint_attention_dim=dim, pooled_projection_dim=dim, guidance_embeds=False, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    return model.eval().to(device)


def conditions(
    dim: int, tokens: int, words: int, device: str, dtype: torch.dtype = torch.float32, pooled: int | None = None
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    side = int(tokens**0.5)
    places = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), dim=-1).reshape(-1, 2)
    prompt = {
        "encoder_hidden_states": torch.randn(1, words, dim, generator=generator),
        "pooled_projections": torch.randn(1, pooled or dim, generator=generator),
        "txt_ids": torch.zeros(words, 3),
        "img_ids": torch.cat([torch.zeros(side * side, 1), places.float()], dim=1),
    }
    return {name: value.to(device, value.dtype if "ids" in name else dtype) for name, value in prompt.items()}


def sampler(
    dim: int, tokens: int, words: int, device: str, dtype: torch.dtype = torch.float32, pooled: int | None = None,
    steps: int = STEPS,
) -> Callable[[Any, Any], torch.Tensor]:  # fmt: skip
    """Euler's method on the flow, for ``diffcache.compile``."""
    prompt = conditions(dim, tokens, words, device, dtype, pooled)

    @torch.no_grad()
    def sample(denoiser: Any, seed: int) -> torch.Tensor:
        x = torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
        for step in range(steps):
            t = torch.full((1,), 1 - step / steps, device=device, dtype=dtype)
            x = x - denoiser(hidden_states=x, timestep=t, return_dict=False, **prompt)[0] / steps
        return x

    return sample


def timed(run: Callable[[], Any], device: str) -> float:
    """Seconds: of this process on a CPU, whatever else runs there; by the clock on a GPU."""
    if device != "cuda":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(first: Callable[[], Any], second: Callable[[], Any], number: int, device: str) -> tuple[float, float]:
    """Both times; who goes first alternates with ``number``."""
    if number % 2:
        later = timed(second, device)
        return timed(first, device), later
    return timed(first, device), timed(second, device)


def paired(first: Callable[[], Any], second: Callable[[], Any], pairs: int, device: str) -> tuple[float, float, float]:
    """Median of first / second over interleaved pairs, and the quartiles."""
    for run in (first, second, first, second):
        run()
    times = [in_turn(first, second, number, device) for number in range(pairs)]
    return quartiles([a / b for a, b in times])


def quartiles(ratios: list[float]) -> tuple[float, float, float]:
    """The median, then the lower and the upper quartile."""
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, low, high


def no_reuse(dim: int, tokens: int, pairs: int, device: str, hoist: bool) -> tuple[float, float, float]:
    model, sample = flux(2, 4, dim, device), sampler(dim, tokens, 32, device)
    disabled = () if hoist else ("hoist_step_invariant",)
    exact = diffcache.compile(model, [0], sample=sample, budget=diffcache.Exact(), backend="inductor",
                              disable_passes=disabled, verbose=False)  # fmt: skip
    plain = torch.compile(model, fullgraph=True, dynamic=False)
    expected = sample(plain, 3)
    assert torch.allclose(sample(exact, 3), expected, atol=1e-3 * expected.abs().max().item()), "results differ"
    times: list[tuple[float, float]] = []

    def lockstep(**step: Any) -> Any:
        results: list[Any] = []
        times.append(in_turn(lambda: exact(**step), lambda: results.append(plain(**step)), len(times), device))
        return results[0]

    for _ in range(pairs + 1):
        sample(lockstep, 3)
    generations = [times[n : n + STEPS] for n in range(STEPS, len(times), STEPS)]  # the first warms up
    return quartiles([sum(a for a, _ in g) / sum(b for _, b in g) for g in generations])


def cached_step(dim: int, tokens: int, pairs: int, device: str) -> tuple[float, float, float]:
    """Generations that compute one step and forecast the rest, less that step, beside a denoiser of one block."""
    model, sample = flux(2, 4, dim, device), sampler(dim, tokens, 32, device)
    recipe = recipes.steps(computed=(0, 1), predictor="taylor", order=1)
    fast = diffcache.compile(model, [0], sample=sample, recipe=recipe, backend="inductor", verbose=False)
    alone = torch.compile(flux(1, 0, dim, device), fullgraph=True, dynamic=False)
    prompt = conditions(dim, tokens, 32, device)
    x = torch.randn(1, tokens, 64, device=device)
    times = [torch.tensor([1 - step / STEPS], device=device) for step in range(STEPS)]

    @torch.no_grad()
    def call(denoiser: Any, step: int) -> Any:
        return denoiser(hidden_states=x, timestep=times[step], return_dict=False, **prompt)[0]

    def begin() -> None:
        call(fast, 0)
        call(fast, 1)

    ratios = []
    for _ in range(pairs):
        begin()
        for step in range(2, STEPS - 1):  # each can be run once
            ours, theirs = in_turn(lambda s=step: call(fast, s), lambda s=step: call(alone, s), step, device)
            ratios.append(ours / theirs)
        call(fast, STEPS - 1)
    return quartiles(ratios)


def operations(gated: bool, device: str, depth: tuple[int, int] = (19, 38)) -> tuple[int, int, int]:
    """Of a FLUX-deep transformer: ops of a full step, of a cached one, and what its head needs."""
    dim, tokens = 64, 16
    model, sample = flux(*depth, dim, device), sampler(dim, tokens, 8, device)
    calibration = diffcache.profile(model, [0], sample=sample, verbose=False, sensitivity_prompts=0)
    site = next(s for s in calibration.sites.values() if s.role == "stack0")
    schedule = recipes.uniform(interval=2, site=site.name, predictor="taylor", order=2).schedule(plan_of(calibration))
    if gated:
        gate = GateSpec("accumulated_change", {"threshold": 1e9})
        schedule = replace(schedule, rows=tuple(replace(row, gate=gate) for row in schedule.rows))
    fast = calibration.cached(schedule)
    sample(fast, 3)
    programs: Programs = next(p for (_, sites, _), p in fast._programs.items() if sites)
    cached = programs.program(schedule, STEPS - 1).module
    graph = programs.body.graph
    nodes = {node.meta.get("captured_as", node.name): node for node in graph.nodes}
    head = [node for node in live_nodes(graph, [nodes[value] for value in site.values]) if node.op.startswith("call_")]
    return count_ops(programs.full().module.graph), count_ops(cached.graph), len(head)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    size = (arguments.dim, arguments.tokens, arguments.pairs, arguments.device)
    print(f"torch {torch.__version__}, {arguments.device}, {arguments.threads} threads; median (quartiles) of ratios")

    def show(name: str, found: tuple[float, float, float]) -> None:
        print(f"{name:<58} {found[0]:.3f} ({found[1]:.3f} to {found[2]:.3f})", flush=True)

    show("no reuse, programs / torch.compile, without hoisting", no_reuse(*size, hoist=False))
    show("no reuse, programs / torch.compile, with hoisting", no_reuse(*size, hoist=True))
    show("cached step / a denoiser of that work alone", cached_step(*size))
    for gate in (False, True):
        full, cached, head = operations(gate, arguments.device)
        kind = "gated" if gate else "fixed"
        print(f"operations of a FLUX-deep {kind} step: {full} in full, {cached} cached, of which the head needs {head}")


if __name__ == "__main__":
    main()
