"""How programs are made and run, as one value that travels from ``compile`` to the programs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffcache.lower import check_backend
from diffcache.memory import SMALL_DTYPES
from diffcache.pipeline import disabled_passes


@dataclass(frozen=True)
class RunOptions:
    """Options of a ``CachedDenoiser``; see ``diffcache.compile``. Raises ValueError for what it does not know."""

    backend: str = "eager"
    disable_passes: tuple[str, ...] = ()
    history_dtype: str | None = None
    max_cache_bytes: int | None = None
    offload_history: bool = False

    def __post_init__(self) -> None:
        check_backend(self.backend)
        disabled_passes(self.disable_passes)
        if self.history_dtype is not None and self.history_dtype not in SMALL_DTYPES:
            raise ValueError(f"history_dtype is {self.history_dtype!r}; expected None or one of {list(SMALL_DTYPES)}")
        if self.max_cache_bytes is not None and self.max_cache_bytes < 0:
            raise ValueError(f"max_cache_bytes must be 0 or more, got {self.max_cache_bytes}")

    @property
    def small(self) -> torch.dtype | None:
        """The dtype history is stored in, if it is not that of the values."""
        return None if self.history_dtype is None else SMALL_DTYPES[self.history_dtype]
