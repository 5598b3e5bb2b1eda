"""Guard nodes: what the recorded forward read from tensor values must still be so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffcache.tracing.errors import GuardFailed


def expect(value: Any, recorded: Any) -> None:
    """Raise ``GuardFailed`` unless ``value`` equals what the recorded forward read."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        same = value.shape == recorded.shape and bool((value == recorded).all())
    else:
        same = value == recorded or (value != value and recorded != recorded)
    if not same:
        raise GuardFailed(f"recorded with {recorded!r}, now {value!r}")


def expect_error(kind: type[Exception], function: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> None:
    """Raise ``GuardFailed`` unless the call fails as it did when it was recorded, in a ``try`` of the forward's own."""
    try:
        getattr(args[0], function)(*args[1:], **kwargs) if isinstance(function, str) else function(*args, **kwargs)
    except kind:
        return
    raise GuardFailed(f"recorded with {kind.__name__}, now without")
