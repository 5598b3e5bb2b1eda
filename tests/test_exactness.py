"""Capture: every family bit for bit at every step, or refused with the line and the reason."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import diffcache
from diffcache.tracing import tree
from diffcache.tracing.compare import same_bits
from tests.denoisers import CAPTURABLE, FAMILIES


def assert_same(ours: Any, theirs: Any) -> None:
    left, right = list(tree.walk(ours)), list(tree.walk(theirs))
    assert type(ours) is type(theirs)
    assert [path for path, _ in left] == [path for path, _ in right]
    for (path, x), (_, y) in zip(left, right, strict=True):
        if isinstance(x, torch.Tensor):
            assert same_bits(x, y), tree.show(path)


def seeded(model: Any, args: Any, kwargs: Any) -> Any:
    torch.manual_seed(11)
    with torch.no_grad():
        return model(*args, **kwargs)


@pytest.mark.parametrize("name", CAPTURABLE)
def test_exact_at_every_step_and_at_another_batch(name: str) -> None:
    entry = FAMILIES[name]
    model = entry.make_model()
    calls: list[int] = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    args, kwargs = entry.make_inputs(0)
    with torch.no_grad():
        captured = diffcache.capture(model, *args, **kwargs)
    assert len(calls) <= 4
    hook.remove()
    for step in (0, 1, 4, 7):
        args, kwargs = entry.make_inputs(step)
        assert_same(seeded(captured, args, kwargs), seeded(model, args, kwargs))
    args, kwargs = entry.make_inputs(3, batch=3)
    assert_same(seeded(captured, args, kwargs), seeded(model, args, kwargs))


@pytest.mark.parametrize("name", CAPTURABLE)
def test_parameters_are_shared(name: str) -> None:
    entry = FAMILIES[name]
    model = entry.make_model()
    args, kwargs = entry.make_inputs(0)
    captured = diffcache.capture(model, *args, **kwargs)
    own = {p.data_ptr() for p in model.parameters()}
    assert all(p.data_ptr() in own for p in captured.graph_module.parameters())


class Toy(nn.Module):
    """A denoiser to misuse: ``act`` does what a test wants done in the middle of forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.start()

    def start(self) -> None:
        pass

    def act(self, x: torch.Tensor, t: Any) -> torch.Tensor:
        return x

    def forward(self, x: torch.Tensor, t: Any) -> torch.Tensor:
        return self.second(self.act(torch.relu(self.first(x)), t))


def inputs(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(step)), torch.full((2,), 900 - 100 * step)


def test_the_printed_form_is_numbered_and_typed() -> None:
    text = str(diffcache.capture(Toy(), *inputs(0)))
    assert text.splitlines() == [
        "capture of Toy: 3 ops",
        "x: float32[2,3,4]",
        "t: int64[2]",
        "%2: float32[2,3,4] = first(x)  # first",
        "%3: float32[2,3,4] = relu(%2)",
        "%4: float32[2,3,4] = second(%3)  # second",
        "return %4",
    ]


class Counts(Toy):
    def start(self) -> None:
        self.calls = 0

    def act(self, x: torch.Tensor, t: Any) -> torch.Tensor:
        self.calls += 1
        return x * self.calls


class CountsInDict(Toy):
    def start(self) -> None:
        self.state = {"calls": 0}

    def act(self, x: torch.Tensor, t: Any) -> torch.Tensor:
        self.state["calls"] += 1
        return x * (2 if self.state["calls"] > 5 else 1)


class Remembers(Toy):
    def start(self) -> None:
        self.previous: torch.Tensor | None = None

    def act(self, x: torch.Tensor, t: Any) -> torch.Tensor:
        out = x if self.previous is None else x + 0.1 * self.previous
        self.previous = x
        return out


@pytest.mark.parametrize(
    ("kind", "line", "reason"),
    [
        (Counts, "self.calls += 1", "calls"),
        (CountsInDict, "self.state", "state"),
        (Remembers, "self.previous = x", "previous"),
    ],
)
def test_hidden_state_is_refused_with_its_line(kind: type[Toy], line: str, reason: str) -> None:
    model = kind()
    with pytest.raises(diffcache.CaptureError) as refusal:
        diffcache.capture(model, *inputs(0))
    assert line in str(refusal.value)
    assert reason in str(refusal.value)
    assert "test_exactness.py" in str(refusal.value)


def test_on_uncapturable_eager_runs_uncached() -> None:
    model, twin = Counts(), Counts()
    with pytest.warns(UserWarning, match="uncached"):
        captured = diffcache.capture(model, *inputs(0), on_uncapturable="eager")
    model.calls = 0
    for step in range(3):
        assert torch.equal(captured(*inputs(step)), twin(*inputs(step)))


class Branches(Toy):
    def act(self, x: torch.Tensor, t: Any) -> torch.Tensor:
        return x * 2 if t[0].item() < 600 else x


class Routes(Toy):
    """A mixture of experts: shapes and paths depend on the data."""

    def start(self) -> None:
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def act(self, x: torch.Tensor, t: Any) -> torch.Tensor:
        flat = x.reshape(-1, 4)
        chosen, out = flat[:, :3].argmax(-1), torch.zeros_like(flat)
        for k, expert in enumerate(self.experts):
            rows = torch.where(chosen == k)[0]
            if rows.numel() == 0:
                continue
            out[rows] = expert(flat[rows])
        return out.view_as(x)


class WritesViews(Toy):
    def act(self, x: torch.Tensor, t: Any) -> torch.Tensor:
        x[:, :1] *= 0.5
        x.view(-1, 4)[::2].add_(1.0)
        return x


class CountsInBuffer(Toy):
    def start(self) -> None:
        self.register_buffer("n", torch.zeros((), dtype=torch.long))

    def act(self, x: torch.Tensor, t: Any) -> torch.Tensor:
        self.n += 1
        return x * 2 if self.n.item() > 4 else x


@pytest.mark.parametrize("kind", [Branches, Routes, WritesViews, CountsInBuffer])
def test_values_and_writes(kind: type[Toy]) -> None:
    model = kind()
    twin = copy.deepcopy(model)
    captured = diffcache.capture(model, *inputs(0))
    for step in range(8):
        assert torch.equal(captured(*inputs(step)), twin(*inputs(step))), step


def test_a_python_timestep_is_followed_not_frozen() -> None:
    class Scales(Toy):
        def act(self, x: torch.Tensor, t: Any) -> torch.Tensor:
            return x * (1 + t / 1000) + torch.full((4,), t)

    model = Scales()
    captured = diffcache.capture(model, inputs(0)[0], 900.0)
    for step in range(6):
        x, t = inputs(step)[0], 900.0 - 100 * step
        assert torch.equal(captured(x, t), model(x, t))
    assert len(captured.variants) == 1


def test_a_stale_graph_is_never_used() -> None:
    class Scaled(Toy):
        def start(self) -> None:
            self.scale = 1.0

        def act(self, x: torch.Tensor, t: Any) -> torch.Tensor:
            return x * self.scale

    model = Scaled()
    captured = diffcache.capture(model, *inputs(0))
    changes = [
        lambda: setattr(model, "scale", 0.5),
        lambda: model.second.register_forward_hook(lambda m, a, out: out * 3),
        lambda: setattr(model, "first", nn.Linear(4, 4)),
        lambda: setattr(model.second, "weight", nn.Parameter(torch.ones(4, 4))),
        lambda: model.second.weight.data.mul_(2),
        lambda: model.register_forward_hook(lambda m, a, out: out - 1),
    ]
    for change in changes:
        change()
        assert torch.equal(captured(*inputs(1)), model(*inputs(1)))


def test_lora_switched_after_capture() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["first", "second"], init_lora_weights=False)
    model = peft.inject_adapter_in_model(config, Toy())
    captured = diffcache.capture(model, *inputs(0))
    layer = model.first
    with_lora = captured(*inputs(1))
    assert torch.equal(with_lora, model(*inputs(1)))
    for adapters in (False, True):
        for module in (model.first, model.second):
            module.enable_adapters(adapters)
        assert torch.equal(captured(*inputs(1)), model(*inputs(1)))
    layer.set_scale("default", 0.25)
    assert torch.equal(captured(*inputs(1)), model(*inputs(1)))
    assert not torch.equal(captured(*inputs(1)), with_lora)


def test_capture_leaves_everything_as_it_was() -> None:
    class Draws(CountsInBuffer):
        def act(self, x: torch.Tensor, t: Any) -> torch.Tensor:
            return super().act(x, t) + torch.randn_like(x)

    model = Draws()
    x, t = inputs(0)
    before, state = x.clone(), torch.get_rng_state()
    diffcache.capture(model, x, t)
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert int(model.n) == 0


def test_fullgraph_compiles() -> None:
    captured = diffcache.capture(Toy(), *inputs(0))
    compiled = torch.compile(captured.graph_module, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*inputs(2)), captured(*inputs(2)))
