"""JSON files of ours: what they are and of which version, checked before anything is read."""

from __future__ import annotations

import json
from typing import Any


def read_document(text: str, kind: str, newest: int) -> dict[str, Any]:
    """A schedule file as plain values. Raises ValueError for what is none, and for one of a newer version."""
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"this is no schedule file: it is not JSON ({error}); expected the output of to_json()"
        ) from error
    if not isinstance(document, dict) or document.get("format") != kind:
        raise ValueError(f"this is JSON but no schedule file: it lacks 'format': '{kind}'")
    version = document.get("version")
    if not isinstance(version, int) or version < 1:
        raise ValueError(f"this schedule file has no usable version number (got {version!r}, expected 1 to {newest})")
    if version > newest:
        raise ValueError(
            f"this schedule file has version {version}, this diffcache reads up to {newest}; upgrade diffcache"
        )
    return document
