"""What a peer did, seen from outside: which modules' own forward ran at which call, and what went in and out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.agreement.subjects import Around, Subject, generate

Passed = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Run:
    """One generation under a peer.

    Attributes:
        latents: after the last step.
        outputs: of the denoiser, one per call.
        ran: path -> for every call, whether that module's own forward ran.
        passed: path -> for every call the hidden states that went in and came out, or None where it did not run.
    """

    latents: torch.Tensor
    outputs: tuple[torch.Tensor, ...]
    ran: dict[str, tuple[bool, ...]]
    passed: dict[str, tuple[Passed | None, ...]]

    def decisions(self, path: str, calls: slice = slice(None)) -> str:
        """One character per call, "C" computed and "." not; ``calls`` picks a guidance branch."""
        return "".join("C" if ran else "." for ran in self.ran[path][calls])

    def computed(self, path: str) -> list[int]:
        """The calls at which a module ran."""
        return [call for call, ran in enumerate(self.ran[path]) if ran]

    def residuals(self, first: str, last: str | None = None) -> list[torch.Tensor]:
        """What the blocks from ``first`` to ``last`` added to the hidden states at every call; both must always run."""
        pairs = zip(self.passed[first], self.passed[last or first], strict=True)
        return [end[1] - start[0] for start, end in pairs if start is not None and end is not None]

    def same(self, other: Run) -> bool:
        """Bit for bit the same latents and outputs, and the same modules run at the same calls."""
        pairs = [(self.latents, other.latents), *zip(self.outputs, other.outputs, strict=True)]
        return all(torch.equal(a, b) for a, b in pairs) and self.ran == other.ran


class Watch:
    """Wraps the forward of modules, before a peer wraps them: the wrapper runs when the peer lets the module run."""

    def __init__(self, model: nn.Module, paths: Iterable[str]):
        self.ran: dict[str, list[bool]] = {}
        self.passed: dict[str, list[Passed | None]] = {}
        for path in paths:
            self.ran[path], self.passed[path] = [], []
            module = model.get_submodule(path)
            module.forward = self._watched(path, module.forward)

    def _watched(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def watched(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            self.ran[path][-1] = True
            given = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            self.passed[path][-1] = _hidden(given, output)
            return output

        return watched

    def begin(self) -> None:
        """A call of the denoiser begins."""
        for path in self.ran:
            self.ran[path].append(False)
            self.passed[path].append(None)


def _hidden(given: torch.Tensor, output: Any) -> Passed | None:
    """The stream that a block carries: of several outputs the last tensor of the input's shape (text comes first)."""
    outputs = output if isinstance(output, tuple) else (output,)
    alike = [value for value in outputs if isinstance(value, torch.Tensor) and value.shape == given.shape]
    return (given.clone(), alike[-1].clone()) if alike else None


def observe(model: nn.Module, subject: Subject, seed: int, watch: Watch, around: Around | None = None) -> Run:
    """Run the sampler on a model that a peer has changed; ``watch`` was made before the peer changed it."""
    begun = len(next(iter(watch.ran.values()), []))
    forward = model.forward

    @functools.wraps(forward)
    def counted(*args: Any, **kwargs: Any) -> Any:
        watch.begin()
        return forward(*args, **kwargs)

    model.forward = counted
    try:
        made = generate(model, subject, seed, around)
    finally:
        model.forward = forward
    ran = {path: tuple(calls[begun:]) for path, calls in watch.ran.items()}
    passed = {path: tuple(calls[begun:]) for path, calls in watch.passed.items()}
    return Run(made.latents, made.outputs, ran, passed)


@functools.cache
def uncached(subject: Subject, seed: int = 0, paths: tuple[str, ...] = ()) -> Run:
    """The generation without any peer."""
    model = subject.make()
    return observe(model, subject, seed, Watch(model, paths or subject.block_paths(model)))
