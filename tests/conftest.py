"""Shared by all tests: one thread, so that many can run side by side, and texts kept in ``tests/golden``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"

torch.set_num_threads(1)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Compare a text with ``tests/golden/<test>.txt``; with UPDATE_GOLDEN=1 write it instead."""
    path = GOLDEN / f"{request.node.name}.txt"

    def compare(text: str) -> None:
        if os.environ.get("UPDATE_GOLDEN"):
            GOLDEN.mkdir(exist_ok=True)
            path.write_text(text.rstrip("\n") + "\n")
        assert path.is_file(), f"{path.name} is missing; write it with UPDATE_GOLDEN=1 and read it before you commit"
        assert text.rstrip("\n") + "\n" == path.read_text()

    return compare
