"""Passes: plain functions from graph module to graph module, one per file; the runner is ``diffcache.pipeline``."""
