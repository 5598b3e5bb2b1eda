"""How kernels are started: where torch may look on, or once more just as they were started before.

Most of what a launch costs the host is finding out: what the operation means for such arguments, and which machine code
Triton made for them. For tensors of the same layouts the answer is the same, so ``Recorded`` writes it down and
``Replay`` starts the same kernels on other tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import wrap_triton

ALIGNED = 16  # bytes: for such addresses Triton makes code of its own


class Start:
    """Makes the results and starts the kernels of one operation; ``torch.compile`` takes both into its graph."""

    def empty(self, *size: int, like: Tensor | None = None, dtype: torch.dtype | None = None, **where: Any) -> Tensor:
        """New memory of that size, or laid out like another tensor."""
        return torch.empty(size, dtype=dtype, **where) if like is None else torch.empty_like(like, dtype=dtype)

    def __call__(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        """Tensors come first among the arguments; constants in the order in which the kernel names them."""
        # Triton launches on the current device, which need not be the tensors'
        with torch.cuda.device(arguments[0].device) if arguments[0].is_cuda else contextlib.nullcontext():
            self._start(kernel, grid, arguments, constants)

    def _start(self, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> Any:
        return wrap_triton(kernel)[grid](*arguments, **constants)


class Launch(NamedTuple):
    """One kernel with its grid; which tensors it gets, by number, and what follows them."""

    run: Callable[..., Any]
    tensors: Callable[[list[Any]], tuple[Any, ...]]
    rest: tuple[Any, ...]


class Recorded(Start):
    """Starts kernels by Triton alone, and remembers them.

    Args:
        inputs: the operation's tensors; what it makes is numbered after them.
    """

    def __init__(self, inputs: Sequence[Tensor]):
        self.inputs, self.launches = inputs, list[Launch]()
        self.made: list[Tensor] = []
        self.likes: list[int | None] = []  # the number of the tensor that each was made like
        self._numbers = {id(tensor): number for number, tensor in enumerate(inputs)}
        # one tensor in two places does not tell which of them a kernel reads
        self.complete = len(self._numbers) == len(inputs) and not any(t.data_ptr() % ALIGNED for t in inputs)
        self.interpreted = False

    def empty(self, *size: int, like: Tensor | None = None, dtype: torch.dtype | None = None, **where: Any) -> Tensor:
        made = super().empty(*size, like=like, dtype=dtype, **where)
        self._numbers[id(made)] = len(self.inputs) + len(self.made)
        self.made.append(made)
        self.likes.append(None if like is None else self._numbers.get(id(like)))
        return made

    def _start(self, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        compiled = kernel[grid](*arguments, **constants)
        count = next((n for n, value in enumerate(arguments) if not isinstance(value, Tensor)), len(arguments))
        numbers = [self._numbers.get(id(tensor)) for tensor in arguments[:count]]
        self.complete &= None not in numbers  # else there is a copy, which would have to be made again
        rest = (*arguments[count:], *constants.values())
        self.interpreted = compiled is None
        launcher = (
            kernel[grid] if compiled is None else compiled[(*grid, 1, 1)[:3]]
        )  # a compiled one wants three numbers
        self.launches.append(Launch(launcher, itemgetter(*numbers), rest))

    def replay(self, result: Any) -> Replay | None:
        """What gives the operation's result for other tensors of these layouts; None if it did more than launch."""
        results = result if isinstance(result, tuple) else (result,)
        made = {id(tensor): number for number, tensor in enumerate(self.made, len(self.inputs))}
        if not self.complete or not self.launches or any(id(tensor) not in made for tensor in results):
            return None
        numbers = [made[id(tensor)] for tensor in results]
        return Replay(self, numbers if isinstance(result, tuple) else numbers[0])


class Replay:
    """The launches of a recorded operation, for tensors of the same shapes, strides, dtypes and device."""

    def __init__(self, recorded: Recorded, results: list[int] | int):
        self.device = recorded.inputs[0].device
        self.launches, self.results, self.interpreted = recorded.launches, results, recorded.interpreted
        self.making = [(like, made.shape, made.dtype) for like, made in zip(recorded.likes, recorded.made, strict=True)]

    def __call__(self, inputs: Sequence[Tensor]) -> Any:
        """The result; None for tensors at addresses that the code was not made for."""
        addresses, bits = [tensor.data_ptr() for tensor in inputs], 0
        for address in addresses:
            bits |= address
        if bits % ALIGNED:
            return None
        if self.device.type != "cuda" or torch.cuda.current_device() == self.device.index:
            return self._start(inputs, addresses)
        with torch.cuda.device(self.device):
            return self._start(inputs, addresses)

    def _start(self, inputs: Sequence[Tensor], addresses: list[int]) -> Any:
        tensors = [*inputs]
        for like, size, dtype in self.making:
            made = (
                torch.empty(size, dtype=dtype, device=self.device)
                if like is None
                else torch.empty_like(tensors[like], dtype=dtype)
            )
            tensors.append(made)
            addresses.append(made.data_ptr())
        # the interpreter wants the tensors; a launch takes addresses, and then does not ask the driver whose they are
        given: list[Any] = tensors if self.interpreted else addresses
        for run, chosen, rest in self.launches:
            run(*chosen(given), *rest)
        return tensors[self.results] if isinstance(self.results, int) else tuple([tensors[n] for n in self.results])
