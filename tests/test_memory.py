"""History's memory: the plan against what is really held, the limit, small history, offloading."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

import diffcache
from diffcache import recipes
from diffcache.memory import entry_bytes, in_words, plan_memory
from diffcache.runtime import CachedDenoiser
from diffcache.schedule import COMPUTE, Forecast, Row, Schedule
from tests.generation import Request, make, sample, sample_on_gpu, schedule_of, shared_calibration, walk

ITEMS = [Request(seed=0), Request(seed=1, prompt=1)]


def test_the_plan_of_a_small_schedule() -> None:
    c, two = COMPUTE, Forecast((2, 0), (2.0, -1.0))
    schedule = Schedule(5, (Row("a", False, (c, Forecast((0,), (1.0,)), c, two, c)),))
    plan = plan_memory(schedule, {"a": 100}, streams=2)
    assert (plan.entries, plan.device_bytes, plan.host_bytes, plan.peak_step) == ({"a": 2}, 400, 0, 2)
    assert "2 x 100 B" in str(plan)
    # with offloading a step holds what it writes (step 2) or reads (step 3)
    away = plan_memory(schedule, {"a": 100}, streams=2, offload=True)
    assert (away.device_bytes, away.host_bytes) == (400, 400)
    reuse = Schedule(4, (Row("a", False, (c, c, Forecast((0,), (1.0,)), Forecast((1,), (1.0,)))),))
    assert plan_memory(reuse, {"a": 100}).device_bytes == 200
    assert plan_memory(reuse, {"a": 100}, offload=True).device_bytes == 100


@pytest.mark.parametrize("grid", ["CCfCfCrf", "CfffCfff", "CCCCCCCC"])
@pytest.mark.parametrize("site", ["stack0", "output"])
def test_the_plan_is_what_is_held(grid: str, site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = shared_calibration()
    denoiser = found.cached(schedule_of(found, {site: grid}))
    most = 0
    advance = CachedDenoiser._advance

    def watch(self: CachedDenoiser, *args: object) -> None:
        nonlocal most
        advance(self, *args)  # type: ignore[arg-type]
        held = [t for stream in self._streams for t in stream.history.values()]
        most = max(most, sum(t.numel() * t.element_size() for t in held))

    monkeypatch.setattr(CachedDenoiser, "_advance", watch)
    sample(denoiser, Request(seed=3))
    plan = found.memory(denoiser.schedule, denoiser.options)
    # the plan also counts what a step reads for the last time while it writes
    (one,) = plan.entry_bytes.values()
    assert most <= plan.device_bytes / plan.streams <= most + one


def limited(limit: int | None, **options: object) -> CachedDenoiser:
    return diffcache.compile(
        make(), ITEMS, sample=sample, budget=diffcache.Speedup(1.5), max_cache_bytes=limit, verbose=False, **options
    )


def test_the_search_stays_within_the_limit() -> None:
    free = limited(None)
    needed = shared_calibration().memory(free.schedule, free.options).device_bytes
    small = limited(needed - 1)
    assert small.schedule.rows
    assert shared_calibration().memory(small.schedule, small.options).device_bytes < needed
    assert small.report is not None
    assert "history:" in str(small.report)


def test_a_limit_that_nothing_meets_is_refused_with_what_would_do() -> None:
    with pytest.raises(ValueError, match=r"max_cache_bytes=10: the smallest needs .*history_dtype='int8'"):
        limited(10)


def test_a_larger_call_that_passes_the_limit_runs_in_full() -> None:
    found = shared_calibration()
    schedule = schedule_of(found, {"stack0": "CCfCfCrf"})
    allowed = found.memory(schedule, found.cached(schedule).options).device_bytes
    denoiser = found.cached(schedule, max_cache_bytes=allowed)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="diffcache")
        sample(denoiser, Request(seed=3))
    assert denoiser.steps_forecast
    denoiser.reset()
    large = Request(seed=3, tokens=100)
    with pytest.warns(UserWarning, match="max_cache_bytes allows .* computed in full"):
        result = sample(denoiser, large)
    assert not denoiser.steps_forecast
    assert torch.equal(result, sample(make(), large))


@pytest.mark.parametrize("dtype", ["int8", "float8"])
def test_small_history(dtype: str) -> None:
    found, request = shared_calibration(), Request(seed=3)
    schedule = schedule_of(found, {"stack0": "CCfCfCrf"})
    plain, small = found.cached(schedule), found.cached(schedule, history_dtype=dtype)
    reference, result = sample(plain, request), sample(small, request)
    assert small.steps_forecast == plain.steps_forecast > 0
    error = ((result - reference).norm() / reference.norm()).item()
    assert 0 < error < 0.01
    before, after = (found.memory(schedule, d.options).device_bytes for d in (plain, small))
    assert after / before == pytest.approx((16 + 4) / (16 * 4))  # 16 channels of one byte and a scale of four


def test_small_history_through_the_compiler() -> None:
    found, request = shared_calibration(), Request(seed=3)
    schedule = schedule_of(found, {"stack0": "CCfCfCrf"})
    expected = sample(found.cached(schedule, history_dtype="int8"), request)
    result = sample(found.cached(schedule, history_dtype="int8", backend="inductor"), request)
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4)


def test_nothing_is_quantized_where_rows_are_short_or_integers() -> None:
    found = shared_calibration()
    graph = found.captured.graph_module.graph
    sizes = [entry_bytes(graph, [found.sites["output"]], small) for small in (None, torch.int8)]
    assert sizes[0] == sizes[1]  # four channels: a scale for each would take as much again


def test_offloading_changes_nothing_on_a_cpu() -> None:
    found = shared_calibration()
    schedule = schedule_of(found, {"stack0": "CCfCfCrf"})
    request = Request(seed=3)
    assert torch.equal(
        sample(found.cached(schedule, offload_history=True), request), sample(found.cached(schedule), request)
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offloaded_history_waits_in_pinned_memory() -> None:
    fast = diffcache.compile(make().cuda(), ITEMS, sample=sample_on_gpu, verbose=False,
                             recipe=recipes.uniform(interval=2, predictor="taylor", order=1))  # fmt: skip
    away = CachedDenoiser(fast.captured, fast.schedule, fast.pattern, fast._find_sites,
                          options=replace(fast.options, offload_history=True))  # fmt: skip
    request, last = Request(seed=3), None
    for number, latent in enumerate(walk(away, request, device="cuda")):
        held = [t for stream in away._streams for t in stream.history.values()]
        assert all(t.is_pinned() for t in held)
        assert held or number == request.steps - 1
        last = latent
    assert last is not None
    assert torch.equal(last.cpu(), sample_on_gpu(fast, request))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"history_dtype": "int4"}, r"history_dtype is 'int4'; expected None or one of \['int8', 'float8'\]"),
        ({"max_cache_bytes": -1}, "max_cache_bytes must be 0 or more, got -1"),
    ],
    ids=str,
)
def test_refusals(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        diffcache.compile(make(), ITEMS, sample=sample, verbose=False, **options)


def test_options_are_saved(tmp_path) -> None:
    fast = diffcache.compile(make(), ITEMS, sample=sample, recipe=recipes.uniform(interval=2), verbose=False,
                             history_dtype="int8", max_cache_bytes=10**9)  # fmt: skip
    fast.save(tmp_path)
    loaded = diffcache.load(make(), tmp_path)
    assert loaded.options == fast.options
    assert torch.equal(sample(loaded, Request(seed=3)), sample(fast, Request(seed=3)))


def test_in_words() -> None:
    assert [in_words(n) for n in (12, 1200, 3_200_000, 4_500_000_000)] == ["12 B", "1.2 kB", "3.2 MB", "4.5 GB"]
