"""Numbers on their way from a device to the host, read later without waiting for what was queued after them."""

from __future__ import annotations

import torch


class HostRead:
    """A copy of a small tensor to the host: begun at once behind what is queued, waited for only when it is asked for.

    On CUDA the copy goes to pinned memory and an event marks its end, so that ``get`` waits for this event alone while
    the device goes on with what the host queued since. Values of other devices are copied at once. Later writes into
    the tensor do not change what is read.
    """

    def __init__(self, tensor: torch.Tensor):
        source = tensor.detach()
        self._arrived: torch.cuda.Event | None = None
        if source.device.type != "cuda":
            self._host = source.to("cpu", copy=True)
            return
        self._host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        self._host.copy_(source, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record(torch.cuda.current_stream(source.device))

    def ready(self) -> bool:
        """Whether ``get`` would return without waiting."""
        return self._arrived is None or self._arrived.query()

    def get(self) -> torch.Tensor:
        """The values, on the CPU."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host
