"""What running one torch call does that its name does not say, seen below Python at the level of aten ops."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffcache.tracing.torch_calls import storage_key

_TAGS = frozenset((torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output))
_INDEX = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default)


class DataWatch(TorchDispatchMode):
    """``seen``: an op ran whose output shape depends on the values of its inputs; ``written``: storages written to.

    Version counters tell of writes, too, but tensors made in inference mode have none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = False
        self.written: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.seen and not _TAGS.isdisjoint(func.tags):
            self.seen = func not in _INDEX or _has_mask(args[1])
        if func._schema.is_mutable:
            for value, argument in _bound(func._schema.arguments, args, kwargs or {}):
                if argument.is_write and isinstance(value, torch.Tensor):
                    self.written.add(storage_key(value) or 0)
        return func(*args, **(kwargs or {}))


def _bound(arguments: Any, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
    for index, argument in enumerate(arguments):
        yield (args[index] if index < len(args) else kwargs.get(argument.name)), argument


def _has_mask(indices: Any) -> bool:
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
