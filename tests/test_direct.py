"""Operations without the dispatcher: the same bits, launches repeated, and never where somebody looks on."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import fx

from diffcache import ops
from diffcache.direct import _direct, direct
from diffcache.kernels.starting import Recorded, Replay
from diffcache.lower import lower
from tests.test_ops import variants

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
kernels_run = pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="needs a GPU, or TRITON_INTERPRET=1")


def same(one: Any, other: Any) -> bool:
    pairs = zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]
    return all(a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b) for a, b in pairs)


def fresh(value: Any) -> Any:
    """Arguments of the same kind with other numbers; int8 and the scales of history stay what they are."""
    if isinstance(value, list):
        return [fresh(item) for item in value]
    if isinstance(value, torch.Tensor):
        return (torch.rand_like(value) + 0.5 if value.is_floating_point() else value.clone()).to(DEVICE)
    return value


@pytest.mark.parametrize("kind", variants())
def test_gives_the_bits_of_the_operation(kind: str) -> None:
    operation, arguments = variants()[kind]
    for _ in range(3):
        given = [fresh(argument) for argument in arguments]
        assert same(direct(operation)(*given), operation(*given))


@kernels_run
@pytest.mark.parametrize("kind", variants())
def test_launches_are_repeated_on_other_tensors(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "on_gpu", lambda *_: True)
    operation, arguments = variants()[kind]
    replays: list[Replay] = []

    def counted(replay: Replay, inputs: Any) -> Any:
        replays.append(replay)
        return start(replay, inputs)

    start = Replay.__call__
    monkeypatch.setattr(Replay, "__call__", counted)
    call = _direct(operation, ops.BODIES[operation])  # one that has not seen such a call in another test
    for number in range(3):
        given = [fresh(argument) for argument in arguments]
        expected = ops.BODIES[operation](Recorded([]), *given)
        assert same(call(*given), expected)
        assert len(replays) == number
    moved = [unaligned(argument) for argument in given]
    assert same(call(*moved), ops.BODIES[operation](Recorded([]), *moved))  # by code of its own
    assert same(call(*given), expected)


def unaligned(value: Any) -> Any:
    if isinstance(value, list):
        return [unaligned(item) for item in value]
    if not isinstance(value, torch.Tensor):
        return value
    room = torch.empty(value.numel() + 1, dtype=value.dtype, device=value.device)[1:]
    return room.as_strided(value.shape, value.stride(), room.storage_offset()).copy_(value)


@kernels_run
def test_one_tensor_in_two_places_is_not_taken_for_a_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "on_gpu", lambda *_: True)
    a, b = torch.randn(2, 9, 4, device=DEVICE)
    form = torch.tensor([1.0, -0.5], device=DEVICE)
    for history in ([a, a], [a, b], [b, b], [b, a]):
        torch.testing.assert_close(
            direct(ops.extrapolate)(None, history, form), ops.extrapolate_reference(None, history, form)
        )


@kernels_run
def test_tensors_that_had_to_be_copied_are_copied_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "on_gpu", lambda *_: True)
    form = torch.tensor([1.0, -0.5], device=DEVICE)
    for _ in range(3):
        history = [torch.randn(9, 4, device=DEVICE), torch.randn(4, 9, device=DEVICE).t()]
        torch.testing.assert_close(
            direct(ops.extrapolate)(None, history, form), ops.extrapolate_reference(None, history, form)
        )


def test_gradients_modes_transforms_and_subclasses_see_the_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    value, form = torch.randn(3), torch.tensor([1.0, -0.5])
    asked: list[str] = []

    def operation(*_: Any) -> torch.Tensor:
        asked.append("operation")
        return value

    operation._opname = "asked"  # type: ignore[attr-defined]
    monkeypatch.setitem(ops.BODIES, operation, lambda *_: asked.append("body") or value)
    call = direct(operation)

    def who(x: torch.Tensor = value) -> str:
        asked.clear()
        call(None, [value, x], form)
        return asked[0]

    assert who() == "body"
    x = value.clone().requires_grad_()
    assert who(x) == "operation"
    with torch.no_grad():
        assert who(x) == "body"
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        assert who() == "operation"
    with torch.overrides.TorchFunctionMode():
        assert who() == "operation"
    seen: list[str] = []
    torch.func.vmap(lambda row: seen.append(who(row)) or row)(torch.randn(2, 3))
    torch.jit.trace(lambda row: seen.append(who(row)) or row * 1, value, check_trace=False)
    with torch.autograd.forward_ad.dual_level():
        seen.append(who(torch.autograd.forward_ad.make_dual(value, value)))
    seen.append(who(torch.Tensor._make_subclass(type("Own", (torch.Tensor,), {}), value)))
    seen.append(who(torch.randn(3, dtype=torch.complex64).conj().imag))
    assert seen == ["operation"] * 5
    assert direct(ops.extrapolate)(None, [x, x], form).requires_grad


def test_an_eager_program_calls_them_and_its_graph_does_not_change() -> None:
    graph = fx.Graph()
    history, weights = graph.placeholder("history"), graph.placeholder("weights")
    graph.output(graph.call_function(ops.extrapolate, (None, [history], weights)))
    module = fx.GraphModule({}, graph)
    run = lower(module)
    assert ops.extrapolate in [node.target for node in module.graph.nodes]
    assert direct(ops.extrapolate) in [node.target for node in run.graph.nodes]  # type: ignore[attr-defined]
    value, form = torch.randn(3), torch.tensor([0.5])
    assert torch.equal(run(value, form), module(value, form))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")  # which traces through to the operation
    assert torch.equal(compiled(value, form), module(value, form))
