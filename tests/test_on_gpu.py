"""What only a GPU can show: operations against their references, no waiting of the host, launches of a cached step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import diffcache
from benchmarks.gpu.counting import hand_through, launches, synchronisations, unfused
from diffcache import ops, recipes
from diffcache.profiling import sketch
from diffcache.runtime import CachedDenoiser
from diffcache.schedule import GateSpec
from tests.generation import Request, make, sample_on_gpu, walk
from tests.test_ops import variants

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

ITEMS = [Request(seed=0), Request(seed=1, prompt=1)]


def moved(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.cuda()
    return [moved(item) for item in value] if isinstance(value, list) else value


def first(result: object) -> torch.Tensor:
    assert isinstance(result, torch.Tensor | tuple)
    return result if isinstance(result, torch.Tensor) else max(result, key=torch.Tensor.numel)


@pytest.mark.parametrize("kind", variants())
def test_operations_agree_with_their_references(kind: str) -> None:
    operation, arguments = variants()[kind]
    expected = first(operation(*arguments))
    moved_arguments = [moved(argument) for argument in arguments]
    close = {"rtol": 1e-4, "atol": 1.0 if kind == "quantize" else 1e-5}  # int8: the last bit may be rounded either way
    torch.testing.assert_close(first(operation(*moved_arguments)).cpu(), expected, **close)
    compiled = torch.compile(lambda: operation(*moved_arguments), fullgraph=True, dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(first(compiled()).cpu(), expected, **close)


@pytest.mark.parametrize("kind", variants())
def test_opcheck(kind: str) -> None:
    operation, arguments = variants()[kind]
    torch.library.opcheck(operation, tuple(moved(argument) for argument in arguments))


@pytest.mark.parametrize("shape", [(1, 4096, 3072), (1, 1001, 333)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_large_bfloat16_against_double(shape: tuple[int, ...], count: int) -> None:
    anchor, *history = (torch.randn(shape, device="cuda").to(torch.bfloat16) for _ in range(count + 1))
    form = torch.tensor(ops.difference_form([1.5, -0.25, -0.25][:count]), device="cuda")
    exact = ops.extrapolate_reference(anchor.double(), [h.double() for h in history], form)
    result = ops.extrapolate(anchor, history, form).double()
    assert ((result - exact).norm() / exact.norm()).item() < 4e-3


def test_sketches_are_the_same_on_every_device() -> None:
    value = torch.randn(3, 5000)
    torch.testing.assert_close(sketch(value.cuda(), salt=2), sketch(value, salt=2), rtol=1e-5, atol=1e-5)


def compiled(**options: object) -> CachedDenoiser:
    recipe = recipes.uniform(interval=4, predictor="taylor", order=2)
    return diffcache.compile(make().cuda(), ITEMS, sample=sample_on_gpu, recipe=recipe, verbose=False, **options)


def test_the_host_never_waits_in_a_cached_generation() -> None:
    fast = compiled()
    gate = GateSpec("accumulated_change", {"threshold": 1e9})
    gated = replace(fast.schedule, rows=tuple(replace(row, gate=gate) for row in fast.schedule.rows))
    # the second one has no weights on the device yet
    for denoiser in (fast, fast.with_schedule(fast.schedule), fast.with_schedule(gated)):
        denoiser.reset()
        walker = walk(denoiser, Request(seed=3), device="cuda")
        next(walker)  # brings the inputs to the device
        assert synchronisations(lambda w=walker: [None for _ in w] and None, "cuda") == []
        assert denoiser.steps_forecast == 6


def test_a_cached_step_launches_its_head_and_one_kernel_a_forecast() -> None:
    fast = compiled()
    other = unfused(fast)
    next(walk(other, Request(seed=3), device="cuda"))
    forecasts = hand_through(other, 5)
    assert forecasts == 1
    counts = []
    for denoiser in (fast, other):
        for _ in range(2):  # the first time kernels are compiled
            denoiser.reset()
            walker = walk(denoiser, Request(seed=3), device="cuda")
            for _ in range(5):
                next(walker)
            seen = launches(lambda w=walker: next(w), "cuda")
        counts.append(len(seen))
    assert counts[0] <= counts[1] + forecasts
