"""Counts of one call: what it starts on the device, and how often the host waits for the device."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from diffcache.lower import lower
from diffcache.ops import extrapolate
from diffcache.runtime import CachedDenoiser


def launches(run: Callable[[], Any], device: str) -> list[str]:
    """Names of the kernels, copies and fills that one call starts on the device; of its operators on a CPU."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=kinds) as seen:
        run()
        if device == "cuda":
            torch.cuda.synchronize()
    wanted = torch.autograd.DeviceType.CUDA if device == "cuda" else torch.autograd.DeviceType.CPU
    return [
        event.name
        for event in seen.events()
        if event.device_type == wanted and not getattr(event, "is_user_annotation", False)
    ]


def synchronisations(run: Callable[[], Any], device: str) -> list[str]:
    """One message for each time the host waited for the device."""
    if device != "cuda":
        run()
        return []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [
        f"{warning.filename}:{warning.lineno}: {warning.message}"
        for warning in said
        if "synchroniz" in str(warning.message)
    ]


def unfused(cached: CachedDenoiser) -> CachedDenoiser:
    """The same denoiser, its forecasts as operations of their own, with programs of its own."""
    other = cached.with_schedule(cached.schedule)
    other._programs = {}
    other.options = replace(cached.options, disable_passes=(*cached.options.disable_passes, "fuse_forecasts"))
    return other


def hand_through(denoiser: CachedDenoiser, step: int) -> int:
    """Let column ``step`` of an ``unfused`` denoiser hand the newest history on instead of forecasting.

    What is left is what the column computes anyway: the anchors of its sites and what the head needs. To be called once
    the first step has made the programs, which must be eager ones. Returns how many forecasts the column had.
    """
    assert denoiser.options.backend == "eager", "a compiled program cannot be edited"
    forecasts = 0
    for programs in [programs for programs in denoiser._programs.values() if programs.sites]:
        program = programs.program(denoiser.schedule, step)
        module = program.module
        for node in [node for node in module.graph.nodes if node.target is extrapolate]:
            node.replace_all_uses_with(node.args[1][0])
            module.graph.erase_node(node)
            forecasts += 1
        module.recompile()
        program.run = lower(module)
    return forecasts
