"""Whether running one torch call made shapes depend on data, seen below Python at the level of aten ops."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_TAGS = frozenset((torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output))
_INDEX = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default)


class DataWatch(TorchDispatchMode):
    """``seen`` becomes true when an op runs whose output shape depends on the values of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.seen and not _TAGS.isdisjoint(func.tags):
            self.seen = func not in _INDEX or _has_mask(args[1])
        return func(*args, **(kwargs or {}))


def _has_mask(indices: Any) -> bool:
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
