"""Process-wide settings that change what an op computes: autocast, attention back ends, precision, default dtype.

An op recorded while they differ from those at the entry of ``forward`` is recorded as ``under(settings, op, ...)``, so
that every node of the graph stands on its own and no region has to be kept together by later passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Settings = tuple[Any, ...]


def ambient() -> Settings:
    """The settings now, as a comparable value."""
    cuda = torch.backends.cuda
    on_cpu, on_cuda = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
    return (
        on_cpu,
        torch.get_autocast_dtype("cpu") if on_cpu else None,
        on_cuda,
        torch.get_autocast_dtype("cuda") if on_cuda else None,
        torch.is_autocast_cache_enabled(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_grad_enabled(),
    )


def _set(settings: Settings) -> None:
    cuda = torch.backends.cuda
    for device, enabled, dtype in (("cpu", *settings[:2]), ("cuda", *settings[2:4])):
        torch.set_autocast_enabled(device, enabled)
        if dtype is not None:
            torch.set_autocast_dtype(device, dtype)
    torch.set_autocast_cache_enabled(settings[4])
    cuda.enable_flash_sdp(settings[5])
    cuda.enable_mem_efficient_sdp(settings[6])
    cuda.enable_math_sdp(settings[7])
    torch.set_default_dtype(settings[8])
    if torch.get_float32_matmul_precision() != settings[9]:
        torch.set_float32_matmul_precision(settings[9])
    if torch.are_deterministic_algorithms_enabled() != settings[10]:
        torch.use_deterministic_algorithms(settings[10])
    torch.set_grad_enabled(settings[11])


def under(settings: Settings, function: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)`` (a name: that method of the first argument) under the settings of its recording."""
    before = ambient()
    _set(settings)
    try:
        return _call(function, args, kwargs)
    finally:
        _set(before)


def autocast_under(
    enabled: bool, dtype: torch.dtype | None, device: str, function: Callable[..., Any] | str, *args: Any, **kwargs: Any
) -> Any:
    """The common case of ``under``, in words that torch.compile understands."""
    with torch.autocast(device, dtype=dtype, enabled=enabled):
        return _call(function, args, kwargs)


def grad_under(enabled: bool, function: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Any:
    """``under`` where only the recording of gradients is switched."""
    with torch.set_grad_enabled(enabled):
        return _call(function, args, kwargs)


def _call(function: Callable[..., Any] | str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if isinstance(function, str):
        return getattr(args[0], function)(*args[1:], **kwargs)
    return function(*args, **kwargs)


def wrap(before: Settings, now: Settings) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The function and leading arguments that replay an op recorded under ``now`` in a call made under ``before``."""
    if before[4:] == now[4:]:
        for device, k in (("cpu", 0), ("cuda", 2)):
            others = tuple(i for i in range(4) if i not in (k, k + 1))
            if all(before[i] == now[i] for i in others):
                return autocast_under, (now[k], now[k + 1], device)
    if before[:-1] == now[:-1]:
        return grad_under, (now[-1],)
    return under, (now,)
