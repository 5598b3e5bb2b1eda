"""Hidden state of every kind is refused with its line and reason, and undone; nothing else is ever raised."""

from __future__ import annotations

import collections
import itertools
import random
import time
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diffcache
from tests.toys import Toy, inputs, make

SHARED: dict[str, int] = {"n": 0}


class Record:
    calls = 0


RECORD = Record()


class Attribute(Toy):
    def setup(self) -> None:
        self.calls = 0

    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return h * (2 if self.calls > 3 else 1)


class ClassDefault(Toy):
    calls = 0

    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return h * (2 if self.calls > 3 else 1)


class Dictionary(Toy):
    def setup(self) -> None:
        self.kept = {"calls": 0}

    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.kept["calls"] += 1
        return h * (2 if self.kept["calls"] > 3 else 1)


class History(Toy):
    def setup(self) -> None:
        self.seen: Any = collections.deque(maxlen=3)

    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.seen.append(h.mean())
        return h + sum(self.seen)


class Previous(Toy):
    def setup(self) -> None:
        self.previous: torch.Tensor | None = None

    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = h if self.previous is None else h + self.previous
        self.previous = h
        return h


class FirstCall(Toy):
    def setup(self) -> None:
        self.reference: torch.Tensor | None = None

    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if self.reference is None:
            self.reference = h.mean()
        return h * self.reference


class Closure(Toy):
    def setup(self) -> None:
        calls, inner = 0, self.last.forward

        def forward(x: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return inner(x) * (2 if calls > 3 else 1)

        self.last.forward = forward  # type: ignore[method-assign]


class Iterator(Toy):
    def setup(self) -> None:
        self.scales = itertools.cycle([1.0, 1.0, 1.0, 1.0, 2.0])

    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return h * next(self.scales)


class Array(Toy):
    def setup(self) -> None:
        self.calls = np.zeros(1)

    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.calls[0] += 1
        return h * (2 if self.calls[0] > 3 else 1)


class Global(Toy):
    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        SHARED["n"] += 1
        return h * (2 if SHARED["n"] > 3 else 1)


class GlobalObject(Toy):
    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        RECORD.calls += 1
        return h * (2 if RECORD.calls > 3 else 1)


def with_default(h: torch.Tensor, calls: list[int] = [0]) -> torch.Tensor:  # noqa: B006  (that is the point)
    calls[0] += 1
    return h * (2 if calls[0] > 3 else 1)


class MutableDefault(Toy):
    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return with_default(h)


class PythonRandom(Toy):
    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return h * (2 if random.random() < 0.1 else 1)


class NumpyGenerator(Toy):
    def setup(self) -> None:
        self.draws = np.random.default_rng(0)

    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return h * (2 if self.draws.random() < 0.1 else 1)


class Clock(Toy):
    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return h * time.perf_counter()


class FreshGenerator(Toy):
    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return h + torch.randn(h.shape, generator=torch.Generator().manual_seed(3))


class DataSetter(Toy):
    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h.data = h.data * 2
        return h


class ExactType(Toy):
    """Asks for the type of a number itself, which the recorder cannot pretend."""

    def forward(self, x: torch.Tensor, t: Any) -> torch.Tensor:
        x = x * 2 if type(t) is float else x
        return super().forward(x, torch.full((2,), t))


class Uninitialized(Toy):
    def setup(self) -> None:
        self.lazy = nn.LazyLinear(8)

    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.lazy(h)


STATE: list[tuple[type[Toy], str, str]] = [
    (Attribute, "attribute 'calls'", "self.calls += 1"),
    (ClassDefault, "attribute 'calls'", "self.calls += 1"),
    (Dictionary, "kept", 'self.kept["calls"] += 1'),
    (History, "seen", "self.seen.append(h.mean())"),
    (Previous, "attribute 'previous'", "self.previous = h"),
    (FirstCall, "an earlier call computed", "reference"),
    (Closure, "closure calls", "calls += 1"),
    (Iterator, "scales", "next(self.scales)"),
    (Array, "calls", "self.calls[0] += 1"),
    (Global, "SHARED", 'SHARED["n"] += 1'),
    (GlobalObject, "RECORD", "RECORD.calls += 1"),
    (MutableDefault, "with_default default calls", "calls[0] += 1"),
    (PythonRandom, "python random state", "random.random()"),
    (NumpyGenerator, "draws", "self.draws.random()"),
    (Clock, "two calls with equal inputs", "time.perf_counter()"),
    (FreshGenerator, "two calls with equal inputs", "torch.Generator()"),
    (DataSetter, "data of a tensor", "h.data = h.data * 2"),
    (Uninitialized, "uninitialized parameters", "run it once"),
]


@pytest.mark.parametrize(("kind", "reason", "line"), STATE, ids=lambda value: getattr(value, "__name__", ""))
def test_refused_with_the_reason_and_the_line(kind: type[Toy], reason: str, line: str) -> None:
    args, kwargs = inputs(0)
    with torch.no_grad(), pytest.raises(diffcache.CaptureError) as caught:
        diffcache.capture(make(kind), *args, **kwargs)
    assert reason in str(caught.value)
    assert line in str(caught.value)


def state_of(model: Toy) -> Any:
    values = {name: value for name, value in vars(model).items() if not name.startswith("_")}
    shown = repr(
        {name: list(value) if isinstance(value, collections.deque) else value for name, value in values.items()}
    )
    return shown, random.getstate(), torch.get_rng_state().tolist(), SHARED["n"], ClassDefault.calls


@pytest.mark.parametrize("kind", [kind for kind, *_ in STATE if kind not in (Iterator, Global)])
def test_a_refused_capture_leaves_no_trace(kind: type[Toy]) -> None:
    model = make(kind)
    before = state_of(model)
    args, kwargs = inputs(0)
    with torch.no_grad(), pytest.raises(diffcache.CaptureError):
        diffcache.capture(model, *args, **kwargs)
    assert state_of(model) == before


def test_closures_and_iterators_are_put_back() -> None:
    closure, iterator = make(Closure), make(Iterator)
    args, kwargs = inputs(0)
    for model in (closure, iterator):
        with torch.no_grad(), pytest.raises(diffcache.CaptureError):
            diffcache.capture(model, *args, **kwargs)
    assert closure.last.forward.__closure__[0].cell_contents == 0  # type: ignore[attr-defined]
    assert [next(iterator.scales) for _ in range(5)] == [1, 1, 1, 1, 2]  # type: ignore[call-overload]


def test_a_number_whose_exact_type_matters_is_refused() -> None:
    with torch.no_grad(), pytest.raises(diffcache.CaptureError, match="does not reproduce it"):
        diffcache.capture(make(ExactType), inputs(0)[0][0], 999.0)


def test_eager_fallback_runs_uncached_and_warns_once() -> None:
    model, eager = make(Attribute), make(Attribute)
    args, kwargs = inputs(0)
    with torch.no_grad():
        with pytest.warns(UserWarning, match="runs uncached"):
            captured = diffcache.capture(model, *args, on_uncapturable="eager", **kwargs)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for step in range(6):
                args, kwargs = inputs(step)
                assert torch.equal(captured(*args, **kwargs), eager(*args, **kwargs))


def test_what_eager_raises_is_raised_as_it_is() -> None:
    model = make(Toy)
    (x, t), _ = inputs(0)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            diffcache.capture(model, x[..., :3], t)
        captured = diffcache.capture(model, x, t)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            captured(x[..., :3], t)
        with pytest.raises(TypeError, match="missing a required argument"):
            captured(x)
        assert torch.equal(captured(x, t), model(x, t))


class Endless(Toy):
    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return h * F.sigmoid(torch.tensor(hash(h.mean().item()) % 1000 / 1000))


@pytest.mark.slow
def test_another_path_at_every_call_is_refused_in_the_end() -> None:
    with torch.no_grad():
        captured = diffcache.capture(make(Endless), *inputs(0)[0])
        with pytest.raises(diffcache.CaptureError, match="needs more than 64 graphs"):  # noqa: PT012
            for step in range(70):
                captured(*inputs(step)[0])
