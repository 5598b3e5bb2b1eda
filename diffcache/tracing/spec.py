"""Shape, dtype and device of a value, without the value."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What is known of a tensor before the program runs."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str

    @staticmethod
    def of(value: torch.Tensor) -> TensorSpec:
        with torch._C.DisableTorchFunction():
            return TensorSpec(tuple(value.shape), value.dtype, str(value.device))

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}[{','.join(map(str, self.shape))}]"
