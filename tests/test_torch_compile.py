"""torch.compile in every order: by us, around us, before us, and as a backend of its own."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

import diffcache
from diffcache import recipes
from diffcache.integrations import dynamo
from diffcache.runtime import CachedDenoiser
from tests.generation import Request, TextDiT, make, sample, sample_on_gpu

ITEMS = [Request(seed=0), Request(seed=1, prompt=1)]
RECIPE = recipes.uniform(interval=2, predictor="taylor", order=1)
needs_gpu = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
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
    programs = next(p for (_, sites, _), p in fast._programs.items() if sites)
    assert graphs() == count
    # the uncompiled profile and judging do not count; the prologue is a graph as well
    columns = programs._scheduled()
    assert len(columns) == len(fast.schedule.distinct_columns())
    assert count <= 1 + len(columns)
    assert not breaks()
    torch.testing.assert_close(result, expected(request), **CLOSE)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_recorded_programs(device: str) -> None:
    run = sample if device == "cpu" else sample_on_gpu
    fast = diffcache.compile(make().to(device), ITEMS, sample=run, recipe=RECIPE, verbose=False, backend="cudagraphs")
    request = Request(seed=3)
    first = run(fast, request)
    for _ in range(3):
        assert torch.equal(run(fast, request), first)
    torch.testing.assert_close(first, expected(request), **CLOSE)


def test_other_batches_and_resolutions_compile_once_each() -> None:
    fast = compiled(make(), backend="inductor")
    for batch, tokens in ((1, 9), (3, 9), (1, 25)):
        request = Request(seed=3, batch=batch, tokens=tokens)
        first = sample(fast, request)
        count = graphs()
        assert torch.equal(sample(fast, request), first)
        assert graphs() == count  # nothing new the second time
    assert not breaks()


def test_a_cold_start_shows_progress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fast = compiled(make(), backend="inductor")
    for programs in fast._programs.values():
        programs._programs.clear()
    sample(fast, Request(seed=3))
    assert "compiling" not in capsys.readouterr().err  # no terminal, nothing said
    for programs in fast._programs.values():
        programs._programs.clear()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    sample(fast, Request(seed=3))
    said = capsys.readouterr().err
    assert "compiling denoiser-" in said
    assert "(once)" in said


def test_compiled_programs_survive_a_restart() -> None:
    sample(compiled(make(), backend="inductor"), Request(seed=3))
    torch._dynamo.reset()  # what a new process starts with: the cache on the disk
    counters.clear()
    sample(compiled(make(), backend="inductor"), Request(seed=3))
    assert counters["inductor"]["fxgraph_cache_hit"] == graphs()
    assert not counters["inductor"]["fxgraph_cache_miss"]


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


# -- as a backend: exact passes only ----------------------------------------------------------------------------------


@pytest.fixture
def hoistings(monkeypatch: pytest.MonkeyPatch) -> list[dynamo.Hoisting]:
    """What the backend makes, in order."""
    made: list[dynamo.Hoisting] = []
    begin = dynamo.Hoisting.__init__
    monkeypatch.setattr(dynamo.Hoisting, "__init__", lambda self, module: (begin(self, module), made.append(self))[0])
    return made


def count(calls: list[int], run):
    def counted(*args):
        calls.append(1)
        return run(*args)

    return counted


def test_backend_is_registered() -> None:
    if not installed():
        pytest.skip("diffcache is not installed, only imported")
    assert "diffcache" in torch.compiler.list_backends()


def installed() -> bool:
    return any(entry.name == "diffcache" for entry in importlib.metadata.entry_points(group="torch_dynamo_backends"))


def test_backend_hoists_what_does_not_change(hoistings) -> None:
    model = make()
    fast = torch.compile(model, backend=dynamo.backend)
    for seed in (3, 4):
        request = Request(seed=seed, prompt=seed)  # another prompt: hoisted again
        torch.testing.assert_close(sample(fast, request), sample(model, request), **CLOSE)
    (hoisting,) = hoistings
    calls: list[int] = []
    hoisting._prologue = count(calls, hoisting._prologue)
    sample(fast, Request(seed=5, prompt=5))
    assert len(calls) == 1  # of eight steps
    body, prologue, _ = dynamo.split(hoisting.module, frozenset(hoisting._watched))
    products = [sum("mm" in str(n.target) for n in part.graph.nodes) for part in (hoisting.module, body, prologue)]
    assert products[1] == products[0] - 2  # the two layers on the prompt
    assert products[2] == 2


def test_backend_sees_changed_weights(hoistings) -> None:
    model, request = make(), Request(seed=3)
    fast = torch.compile(model, backend=dynamo.backend)
    sample(fast, request)
    with torch.no_grad():
        model.text[0].weight.mul_(1.5)
    torch.testing.assert_close(sample(fast, request), sample(model, request), **CLOSE)


def test_backend_returns_memory_of_its_own() -> None:
    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            context = self.text(prompt)
            return x * context.sum(), context[:, 1:]

    model, prompt = Both().eval(), torch.randn(2, 4)
    fast = torch.compile(model, backend=dynamo.backend)
    with torch.no_grad():
        for step in range(4):
            x = torch.full((2, 4), float(step))
            result, expected = fast(x, prompt), model(x, prompt)
            torch.testing.assert_close(result, expected, **CLOSE)
            result[1].zero_()


def test_backend_draws_random_numbers_every_time() -> None:
    fast = torch.compile(lambda x, p: x + torch.rand_like(p), backend=dynamo.backend)
    x, p = torch.zeros(100), torch.zeros(100)
    with torch.no_grad():
        results = [fast(x.clone(), p) for _ in range(4)]
    assert not torch.equal(results[2], results[3])


def test_backend_leaves_training_to_inductor(hoistings) -> None:
    layer, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
    torch.compile(layer, backend=dynamo.backend)(x).sum().backward()
    expected = torch.autograd.grad(layer(x).sum(), layer.weight)[0]
    torch.testing.assert_close(layer.weight.grad, expected)
    assert not hoistings
