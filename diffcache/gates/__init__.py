"""Gates: at run time, may this step follow the schedule's forecast, or must it be computed in full?

One small class each, registered by name; ``base`` says what a gate is shown and when.
"""

from diffcache.gates import accumulating, basic, bounded, checking, guidance, watching
from diffcache.gates.base import GATES, Gate, Moment, gate, make_gate

__all__ = [
    "GATES",
    "Gate",
    "Moment",
    "accumulating",
    "basic",
    "bounded",
    "checking",
    "gate",
    "guidance",
    "make_gate",
    "watching",
]
