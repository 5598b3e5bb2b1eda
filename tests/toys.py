"""A denoiser of two linear layers with one overridable line between them, and the check that its capture is exact."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import diffcache
from diffcache.tracing import tree
from diffcache.tracing.bits import same_bits

STEPS = 6
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Toy(nn.Module):
    """``between`` is what a test overrides; ``setup`` gives it modules, buffers and state."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.time, self.last = nn.Linear(8, 8), nn.Linear(1, 8), nn.Linear(8, 8)
        self.setup()

    def setup(self) -> None:
        pass

    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return h

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> Any:
        h = self.first(x) + self.time(t[:, None] / 1000)[:, None]
        return self.last(F.silu(self.between(h, t)))

    def alter(self, step: int) -> None:
        """What somebody does to the model before a step."""


def latent(step: int) -> torch.Tensor:
    return torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(step))


def inputs(step: int) -> Arguments:
    return (latent(step), torch.full((2,), 999.0 - 180 * step)), {}


def make(kind: type[Toy]) -> Toy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().eval()


def differs(ours: Any, theirs: Any) -> bool:
    left, right = list(tree.walk(ours)), list(tree.walk(theirs))
    if type(ours) is not type(theirs) or [path for path, _ in left] != [path for path, _ in right]:
        return True
    pairs = [(x, y) for (_, x), (_, y) in zip(left, right, strict=True)]
    return any(not same_bits(x, y) if isinstance(x, torch.Tensor) else x != y for x, y in pairs if _plain(x))


def _plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor | int | float | str)


def run(model: nn.Module, call: Arguments, seed: int) -> Any:
    torch.manual_seed(seed)
    return model(*call[0], **call[1])


def check_exact(
    kind: type[Toy],
    given: Callable[[int], Arguments] = inputs,
    *,
    steps: int = STEPS,
    around: Callable[[int], contextlib.AbstractContextManager[Any]] = lambda step: contextlib.nullcontext(),
) -> diffcache.Captured:
    """A capture of one model against another of equal weights, both altered alike, over several steps."""
    model, eager = make(kind), make(kind)
    with torch.no_grad():
        with around(0):
            captured = diffcache.capture(model, *given(0)[0], **given(0)[1])
        for step in range(steps):
            eager.alter(step)
            theirs = given(step)
            with around(step):
                expected = run(eager, theirs, step)
            model.alter(step)  # after the other has run: what is altered may be shared by both
            ours = given(step)
            with around(step):
                got = run(captured, ours, step)
            assert not differs(got, expected), f"step {step}"
            assert not differs(ours, theirs), f"step {step}: the inputs after the call"
    assert list(model.state_dict()) == list(eager.state_dict())
    for (name, a), b in zip(model.state_dict().items(), eager.state_dict().values(), strict=True):
        assert same_bits(a, b), name
    return captured
