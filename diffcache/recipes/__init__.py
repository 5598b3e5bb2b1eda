"""Recipes: published methods, and the baselines, as a few lines over one decomposition (see ``base``)."""

from diffcache.recipes.base import METHODS, Method, Part, Plan, Predict, Recipe, method
from diffcache.recipes.baselines import evenly, steps, uniform

__all__ = ["METHODS", "Method", "Part", "Plan", "Predict", "Recipe", "evenly", "method", "steps", "uniform"]
