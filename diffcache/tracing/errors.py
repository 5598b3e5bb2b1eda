"""What capture raises: a denoiser that cannot be recorded exactly, and a guard that does not hold."""

from __future__ import annotations

import linecache
import os
import sys
import traceback
from types import FrameType

import torch

_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_TORCH = os.path.dirname(os.path.abspath(torch.__file__))


class CaptureError(ValueError):
    """A denoiser cannot be captured exactly; the message names the line of user code and the reason."""


class Uncapturable(Exception):
    """Raised while recording: this region cannot become nodes. The innermost module may still become one node."""


class GuardFailed(Exception):
    """A value that the recorded forward read from a tensor is different in this call."""


def user_frame() -> FrameType | None:
    """The innermost frame that is neither torch's nor ours: the line of the denoiser's author."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((_OURS, _TORCH)) and not name.startswith("<"):
            return frame
        frame = frame.f_back
    return None


def innermost_line(error: BaseException) -> str:
    """The innermost line of the denoiser's author in an exception's traceback."""
    frames = [f for f, _ in traceback.walk_tb(error.__traceback__)]
    ours = [f for f in frames if not f.f_code.co_filename.startswith((_OURS, _TORCH, "<"))]
    return _describe(ours[-1]) if ours else "<unknown line>"


def user_line() -> str:
    """``file.py:12 in forward: x = x.item()`` of the innermost user frame."""
    frame = user_frame()
    return _describe(frame) if frame is not None else "<unknown line>"


def _describe(frame: FrameType) -> str:
    name, number = frame.f_code.co_filename, frame.f_lineno
    text = linecache.getline(name, number).strip()
    return f"{os.path.basename(name)}:{number} in {frame.f_code.co_name}: {text}"
