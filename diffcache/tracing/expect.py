"""Guard nodes: what the recorded forward read from tensor values must still be so."""

from __future__ import annotations

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
