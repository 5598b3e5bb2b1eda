"""Capture over the families: other precisions and sizes, few forwards, readable graphs that torch.compile takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import diffcache
from diffcache.tracing import tree
from tests.denoisers import CAPTURABLE, FAMILIES
from tests.toys import Toy, differs, inputs, make, run

STEPS = (0, 2, 5, 8)


def cast(call: Any) -> Any:
    half = lambda leaf: leaf.bfloat16() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf  # noqa: E731
    args, kwargs = call
    return tree.rebuild(args, half), tree.rebuild(kwargs, half)


@pytest.mark.parametrize("name", CAPTURABLE)
def test_exact_in_bfloat16(name: str) -> None:
    entry = FAMILIES[name]
    model = entry.make_model().bfloat16()
    with torch.no_grad():
        try:
            model(*cast(entry.make_inputs(0))[0], **cast(entry.make_inputs(0))[1])
        except RuntimeError as error:
            pytest.skip(f"eager itself fails: {error}")
        args, kwargs = cast(entry.make_inputs(0))
        captured = diffcache.capture(model, *args, **kwargs)
        for step in STEPS:
            call = cast(entry.make_inputs(step))
            assert not differs(run(captured, call, step), run(model, call, step)), f"step {step}"


@pytest.mark.parametrize("name", CAPTURABLE)
def test_exact_at_other_batches_and_sizes(name: str) -> None:
    entry = FAMILIES[name]
    model = entry.make_model()
    with torch.no_grad():
        args, kwargs = entry.make_inputs(0)
        captured = diffcache.capture(model, *args, **kwargs)
        for scale in entry.scales:
            call = entry.make_inputs(4, batch=1, scale=scale)
            assert not differs(run(captured, call, 1), run(model, call, 1)), f"scale {scale}"


@pytest.mark.parametrize("name", CAPTURABLE)
def test_few_forwards(name: str) -> None:
    entry = FAMILIES[name]
    model = entry.make_model()
    calls: list[int] = []
    inner = model.forward
    model.forward = lambda *args, **kwargs: (calls.append(1), inner(*args, **kwargs))[1]  # type: ignore[method-assign]
    with torch.no_grad():
        args, kwargs = entry.make_inputs(0)
        diffcache.capture(model, *args, **kwargs)
    assert len(calls) <= 4


@pytest.mark.parametrize("name", ["dit", "skip_dit", "inplace", "flux", "sd3"])
def test_fullgraph_compiles(name: str) -> None:
    entry = FAMILIES[name]
    model = entry.make_model()
    args, kwargs = entry.make_inputs(0)
    with torch.no_grad():
        captured = diffcache.capture(model, *args, **kwargs)
        torch._dynamo.reset()
        compiled = torch.compile(captured.graph_module, fullgraph=True, backend="eager")
        for step in (0, 3):
            call = entry.make_inputs(step)
            assert not differs(run(compiled, call, 1), run(model, call, 1))


class Small(Toy):
    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = h.clone()
        h[:, 0] = 0
        return h * 2 if t[0] > 500 else h


def test_the_printed_form_is_what_it_was(golden: Any) -> None:
    with torch.no_grad():
        captured = diffcache.capture(make(Small), *inputs(0)[0])
        again = diffcache.capture(make(Small), *inputs(1)[0])
    golden(str(captured))
    assert str(again) == str(captured)
