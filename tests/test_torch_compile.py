"""torch.compile in every order: by us, around us, before us, and as a backend of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

import diffcache
from diffcache import recipes
from diffcache.runtime import CachedDenoiser
from tests.generation import Request, TextDiT, make, sample

ITEMS = [Request(seed=0), Request(seed=1, prompt=1)]
RECIPE = recipes.uniform(interval=2, predictor="taylor", order=1)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # another compiler rounds in another order


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(model: torch.nn.Module, **options: object) -> CachedDenoiser:
    return diffcache.compile(model, ITEMS, sample=sample, recipe=RECIPE, verbose=False, **options)


def expected(request: Request) -> torch.Tensor:
    return sample(compiled(make()), request)


def breaks() -> dict[str, int]:
    return dict(counters["graph_break"])


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def test_by_us_one_graph_a_program_and_no_recompilation() -> None:
    fast = compiled(make(), backend="inductor")
    request = Request(seed=3)
    result = sample(fast, request)
    count = graphs()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(4, 11):  # 56 steps
            sample(fast, Request(seed=seed))
    programs = next(p for (_, sites), p in fast._programs.items() if sites)
    assert graphs() == count
    # the uncompiled profile and judging do not count; the prologue is a graph as well
    assert len(programs._programs) == len(fast.schedule.distinct_columns())
    assert count <= 1 + len(programs._programs)
    assert not breaks()
    torch.testing.assert_close(result, expected(request), **CLOSE)


def test_other_batches_and_resolutions_compile_once_each() -> None:
    fast = compiled(make(), backend="inductor")
    for batch, tokens in ((1, 9), (3, 9), (1, 25)):
        request = Request(seed=3, batch=batch, tokens=tokens)
        first = sample(fast, request)
        count = graphs()
        assert torch.equal(sample(fast, request), first)
        assert graphs() == count  # nothing new the second time
    assert not breaks()


def test_around_us() -> None:
    fast = compiled(make())
    request = Request(seed=3)
    around = torch.compile(fast)
    result = sample(around, request)
    assert fast.options.backend == "inductor"
    count = graphs()
    assert count >= len(fast.schedule.distinct_columns())
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(sample(around, request), result)
    assert graphs() == count
    torch.testing.assert_close(result, expected(request), **CLOSE)


def regionally(model: TextDiT) -> TextDiT:
    for block in model.blocks:
        block.compile(fullgraph=True)
    return model


def replaced(model: TextDiT) -> TextDiT:
    model.blocks[1] = torch.compile(model.blocks[1])
    return model


@pytest.mark.parametrize("compile_before", [regionally, replaced, torch.compile], ids=["blocks", "replaced", "whole"])
def test_before_us(compile_before) -> None:
    fast = compiled(compile_before(make()))
    assert fast.options.backend == "inductor"
    request = Request(seed=3)
    torch.testing.assert_close(sample(fast, request), expected(request), **CLOSE)
    assert not breaks()
    graph = [str(node.target) for node in fast.captured.variants[0].graph_module.graph.nodes]
    assert any(name.startswith("blocks.1.") for name in graph)  # seen through, not one node


def test_before_us_and_still_eager_if_asked() -> None:
    assert compiled(regionally(make()), backend="eager").options.backend == "eager"
    assert compiled(make()).options.backend == "eager"
