"""Predictors: how a value that is not computed follows from values that were. All of them make weights.

- ``fixed``: weights from the times of the computed steps alone (``PREDICTORS``, ``weights``);
- ``mean_velocity``: the same for a whole schedule on the sampler's clock, where forecasts build on forecasts.
"""

from diffcache.predictors import fixed
from diffcache.predictors.mean_velocity import mean_velocity_weights
from diffcache.predictors.registry import FREE, PREDICTORS, Predictor, predictor, weights

__all__ = ["FREE", "PREDICTORS", "Predictor", "fixed", "mean_velocity_weights", "predictor", "weights"]
