"""Predictors: how a value that is not computed follows from values that were. All of them make weights.

- ``fixed``: weights from the times of the computed steps alone (``PREDICTORS``, ``weights``);
- ``mean_velocity``: the same for a whole schedule on the sampler's clock, where forecasts build on forecasts;
- ``fitted``: weights from a site's Gram matrix over calibration steps (``FITTED``, ``fitted_weights``);
- ``from_values``, ``by_token``, ``modal``: weights made on the device at run time, for each sample, from the history
  and a probe (``FROM_VALUES``, ``weights_from_values``);
- ``views``: different weights for a frequency band, a subspace or a cluster of channels of the same history.
"""

from diffcache.predictors import by_token, fixed, modal  # their rules register themselves
from diffcache.predictors.fitted import FITTED, fitted_weights
from diffcache.predictors.from_values import FROM_VALUES, ValueRule, weights_from_values
from diffcache.predictors.mean_velocity import mean_velocity_weights
from diffcache.predictors.registry import FREE, PREDICTORS, Predictor, predictor, weights
from diffcache.predictors.views import (
    MEASURES,
    PROJECTIONS,
    channel_table,
    channel_view,
    forecast_through,
    projection,
    weight_table,
)

__all__ = [
    "FITTED",
    "FREE",
    "FROM_VALUES",
    "MEASURES",
    "PREDICTORS",
    "PROJECTIONS",
    "Predictor",
    "ValueRule",
    "by_token",
    "channel_table",
    "channel_view",
    "fitted_weights",
    "fixed",
    "forecast_through",
    "mean_velocity_weights",
    "modal",
    "predictor",
    "projection",
    "weight_table",
    "weights",
    "weights_from_values",
]
