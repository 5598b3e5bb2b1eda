"""diffcache: a compiler that makes diffusion models reuse work between denoising steps."""

from diffcache import recipes
from diffcache.budget import Exact, Quality, Speedup
from diffcache.compiler import compile, profile, search
from diffcache.runtime import CachedDenoiser
from diffcache.saving import load
from diffcache.schedule import Schedule
from diffcache.tracing.captured import Captured, capture
from diffcache.tracing.errors import CaptureError

__version__ = "0.1.0"
__all__ = [
    "CachedDenoiser",
    "CaptureError",
    "Captured",
    "Exact",
    "Quality",
    "Schedule",
    "Speedup",
    "capture",
    "compile",
    "load",
    "profile",
    "recipes",
    "search",
]
