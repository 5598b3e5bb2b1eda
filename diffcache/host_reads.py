"""Numbers on their way from a device to the host."""

from __future__ import annotations

from torch import Tensor


class HostRead:
    """A small tensor that is wanted on the host: begun here, waited for in ``get``."""

    def __init__(self, tensor: Tensor):
        self._tensor = tensor.detach()

    def get(self) -> Tensor:
        return self._tensor.cpu()
