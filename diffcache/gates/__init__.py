"""Gates: at run time, may this step follow the schedule's forecast, or must it be computed in full?

One small class each, registered by name; ``base`` says what a gate is shown and when.
"""

from diffcache.gates import basic, guidance
from diffcache.gates.base import GATES, Gate, Moment, gate, make_gate

__all__ = ["GATES", "Gate", "Moment", "basic", "gate", "guidance", "make_gate"]
