"""What a forward does besides returning: writes in place, buffers, its inputs, argument objects, random draws."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diffcache
from tests.toys import Toy, check_exact, inputs, latent, make

# -- writes in place, and views ------------------------------------------------------------------------------------


class Views(Toy):
    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = h.clone()
        h.view(-1, 8)[::2] += 1
        h.transpose(0, 1)[0] *= 2
        h[:, [0, 2]] = 0
        h[h > 1] = 0.5
        h[..., 0] **= 2
        return h


class Filled(Toy):
    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        out, other = torch.empty_like(h), h.new_empty(h.shape)
        for index in range(h.shape[1]):
            out[:, index] = h[:, index] * index
        torch.add(h, 1, out=other)
        return out + other


class InPlaceModules(Toy):
    def setup(self) -> None:
        self.relu = nn.ReLU(inplace=True)

    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        kept = h
        self.relu(h)
        F.silu(h, inplace=True)
        return kept + F.dropout(kept, 0.0, True, inplace=True)


@torch.library.custom_op("diffcache_tests::halve", mutates_args=("x",))
def halve(x: torch.Tensor) -> None:
    x.mul_(0.5)


class CustomOperator(Toy):
    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = h.clone()
        halve(h)
        return torch.ops.aten.add.Tensor(h, 1)


@pytest.mark.parametrize("kind", [Views, Filled, InPlaceModules, CustomOperator])
@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_writes_in_place(kind: type[Toy], around: Callable[..., Any]) -> None:
    check_exact(kind, around=lambda step: around())


# -- buffers, parameters, other tensors that last ------------------------------------------------------------------


class Buffers(Toy):
    def setup(self) -> None:
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("unread", torch.zeros(8))
        self.register_buffer("scratch", torch.zeros(2, 6, 8))

    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.mean.mul_(0.9).add_(h.mean((0, 1)), alpha=0.1)
        self.unread.view(2, 4)[1].add_(1)  # through a view, and never read again
        torch.mul(h, 2, out=self.scratch)
        out = self.scratch.clone()
        self.scratch.zero_()
        return out + self.mean * self.calls


class Weights(Toy):
    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.first.weight.mul_(0.99)
            self.last.weight.data.view(-1)[:8].mul_(0.9)
        return h


class KeptTensors(Toy):
    def setup(self) -> None:
        self.kept: Any = {"calls": torch.zeros(()), "list": [torch.zeros(8)]}

    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.kept["calls"] += 1
        self.kept["list"][0].add_(h.mean())
        return h * self.kept["calls"] + self.kept["list"][0]


class RunningStatistics(Toy):
    def setup(self) -> None:
        self.norm = nn.BatchNorm1d(6)

    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        shown = F.batch_norm(h, self.norm.running_mean, self.norm.running_var, training=True)
        return self.norm(shown)

    def alter(self, step: int) -> None:
        self.train(step < 4)


class Scratch(Toy):
    """Attributes that every call writes before it reads them are no state."""

    def setup(self) -> None:
        self.current: Any = None
        self.register_buffer("rates", torch.zeros(8), persistent=False)

    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.current = t
        self.rates = torch.arange(8.0) / h.shape[1]
        return h * self.current[0] + self.rates


@pytest.mark.parametrize("kind", [Buffers, Weights, KeptTensors, RunningStatistics, Scratch])
def test_what_lasts(kind: type[Toy]) -> None:
    captured = check_exact(kind)
    assert len(captured.variants) <= 2


@pytest.mark.parametrize("kind", [Buffers, Weights, KeptTensors, RunningStatistics])
def test_capture_leaves_what_lasts_untouched(kind: type[Toy]) -> None:
    model = make(kind).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        diffcache.capture(model, *inputs(0)[0])
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if isinstance(model, KeptTensors):
        assert model.kept["calls"] == 0
        assert not model.kept["list"][0].any()


# -- inputs and argument objects -----------------------------------------------------------------------------------


class WritesInput(Toy):
    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x[:, 1:].mul_(0.5)
        h = super().forward(x, t)
        x += h
        return x if t[0] > 500 else h


def test_inputs_written() -> None:
    check_exact(WritesInput)


class Aliases(Toy):
    def forward(self, x: torch.Tensor, t: torch.Tensor, other: Any) -> torch.Tensor:
        x.mul_(2)
        return super().forward(other, t)


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.view(2, 6, 8), lambda x: x.transpose(0, 1)[:2, :2]])
def test_one_tensor_given_twice(view: Callable[..., Any]) -> None:
    def given(step: int) -> Any:
        x = latent(step)
        return (x, inputs(step)[0][1], view(x)), {}

    check_exact(Aliases, given)


@dataclasses.dataclass
class Cache:
    keys: list[torch.Tensor]
    filled: int = 0
    extra: Any = None


class FillsCache(Toy):
    def forward(self, x: torch.Tensor, t: torch.Tensor, cache: Any, options: dict[str, Any]) -> torch.Tensor:
        h = super().forward(x, t)
        cache.keys.append(h)
        cache.filled += 1
        cache.extra = {"last": h * 2}
        options["seen"] = options.get("seen", 0) + 1
        options["value"].copy_(h)
        return h * options["seen"] + cache.keys[0]


def test_argument_objects_written() -> None:
    def given(step: int) -> Any:
        cache, options = Cache([latent(30)]), {"seen": step, "value": latent(31)}
        return (*inputs(step)[0], cache, options), {}

    check_exact(FillsCache, given)


# -- random draws --------------------------------------------------------------------------------------------------


class Draws(Toy):
    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        rows = torch.randperm(h.shape[1])[:3]
        h = h.clone()
        h[:, rows] = 0
        torch.rand(3)  # thrown away, but the stream moves on
        return F.dropout(h + torch.randn_like(h), 0.2, True)


class OwnGenerator(Toy):
    def setup(self) -> None:
        self.generator = torch.Generator().manual_seed(7)

    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return h + torch.randn(h.shape, generator=self.generator)


@pytest.mark.parametrize("kind", [Draws, OwnGenerator])
def test_random_draws(kind: type[Toy]) -> None:
    check_exact(kind)
    model, state = make(kind), torch.get_rng_state()
    own = model.generator.get_state() if isinstance(model, OwnGenerator) else state
    with torch.no_grad():
        diffcache.capture(model, *inputs(0)[0])
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(own, model.generator.get_state() if isinstance(model, OwnGenerator) else state)


def test_the_callers_generator_moves_as_in_eager() -> None:
    class Given(Toy):
        def forward(self, x: torch.Tensor, t: torch.Tensor, generator: Any = None) -> torch.Tensor:
            return super().forward(x + torch.randn(x.shape, generator=generator), t)

    ours, theirs = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    model, (args, _) = make(Given), inputs(0)
    with torch.no_grad():
        captured = diffcache.capture(model, *args, generator=ours)
        assert torch.equal(ours.get_state(), theirs.get_state())
        for _ in range(3):
            assert torch.equal(captured(*args, generator=ours), model(*args, generator=theirs))
        assert torch.equal(ours.get_state(), theirs.get_state())
    assert len(captured.variants) == 1


# -- what comes back -----------------------------------------------------------------------------------------------


class Returns(Toy):
    def forward(self, x: torch.Tensor, t: torch.Tensor) -> Any:
        h = super().forward(x, t)
        parts = {"a": [h, (h[:, :3], None)], 3: h.shape[1], "mean": h.mean().item(), "text": "s"}
        return types.SimpleNamespace(sample=h, parts=parts), Cache([h.transpose(1, 2)], filled=2), x, self.first.weight


class ReturnsNothing(Toy):
    def forward(self, x: torch.Tensor, t: torch.Tensor) -> None:
        x.copy_(super().forward(x, t))


class ThroughNumpy(Toy):
    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.sin(h.detach().numpy()))


class Gradient(Toy):
    """A gradient taken inside a call that is made without gradients."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            (slope,) = torch.autograd.grad(super().forward(x, t).sum(), x)
        return slope.detach()


@pytest.mark.parametrize("kind", [Returns, ReturnsNothing, ThroughNumpy, Gradient])
def test_what_comes_back(kind: type[Toy]) -> None:
    check_exact(kind)
