"""Numbers that published methods want of uncached generations: how a site's or a probe's value changes over steps.

Enters: names of sites or probes and a measure. Leaves: for each name ``[streams, steps, gaps]``, the measure of the
value at a step against the one ``gap`` steps before (gaps count from 1); NaN where there is none. Only the last
``gaps`` values of each stream are kept while a generation runs.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffcache.call_pattern import log_call
from diffcache.cells import COMPUTE
from diffcache.ops import relative_change
from diffcache.profiling import Calibration, Generate
from diffcache.programs import Programs
from diffcache.sites import Site
from diffcache.streams import input_at
from diffcache.tracing import tree
from diffcache.tracing.errors import GuardFailed
from diffcache.tracing.session import Bound, unbind
from diffcache.tracing.variant import Variant

Array = NDArray[np.float64]
Measure = Callable[[Tensor, Tensor], Tensor]  # (the value, an earlier one) -> a number for each sample

MEASURES: dict[str, Measure] = {}


def measure(name: str) -> Callable[[Measure], Measure]:
    """Register a measure under ``name``."""

    def register(rule: Measure) -> Measure:
        assert name not in MEASURES, name
        MEASURES[name] = rule
        return rule

    return register


@measure("l1")
def l1(new: Tensor, old: Tensor) -> Tensor:
    """``mean|new - old| / mean|old|`` (TeaCache, FBCache)."""
    return relative_change(new, old)


@measure("l1_of_new")
def l1_of_new(new: Tensor, old: Tensor) -> Tensor:
    """``mean|new - old| / mean|new|`` (SmoothCache, Block Caching)."""
    return relative_change(old, new)


@measure("l2")
def l2(new: Tensor, old: Tensor) -> Tensor:
    """``|new - old|_2 / |old|_2``."""
    return relative_change(new, old, 2)


@measure("norm_ratio")
def norm_ratio(new: Tensor, old: Tensor) -> Tensor:
    """``mean over tokens of |new|_2 / |old|_2``, norms over channels (MagCache)."""
    ratio = new.float().norm(dim=-1) / old.float().norm(dim=-1).clamp_min(1e-12)
    return ratio.reshape(len(ratio), -1).mean(1)


@measure("cosine_distance")
def cosine_distance(new: Tensor, old: Tensor) -> Tensor:
    """``mean over tokens of 1 - cos(new, old)`` (CEM)."""
    distance = 1 - nn.functional.cosine_similarity(new.float(), old.float(), dim=-1)
    return distance.reshape(len(distance), -1).mean(1)


@measure("mse")
def mse(new: Tensor, old: Tensor) -> Tensor:
    """``mean (new - old)^2`` (Foresight)."""
    return (new.float() - old.float()).square().reshape(len(new), -1).mean(1)


def measure_changes(
    calibration: Calibration,
    generate: Generate,
    prompts: int,
    names: Sequence[str],
    how: str,
    gaps: int = 1,
    raw: bool = False,
) -> dict[str, Array]:
    """Run uncached generations and measure.

    Args:
        names: sites or probes of the calibrated denoiser.
        how: one of ``MEASURES``; of a site with several values their mean. Or "pooled": each value's (the first one's)
            mean over samples and tokens, ``[streams, steps, channels]``. Or "derivative" of the output, against the
            names "latent" and "timestep": see ``_Moving``.
        gaps: how many earlier steps each value is compared with.
        raw: measure values as they are, not less their anchors.

    Raises:
        ValueError: an unknown measure, or a name that this denoiser has no site or probe of.
    """
    if how not in (*MEASURES, "pooled", "derivative"):
        raise ValueError(f"unknown measure '{how}'; known: {sorted([*MEASURES, 'pooled', 'derivative'])}")
    kind = {"pooled": _Pooling, "derivative": _Moving}.get(how, _Watcher)
    watcher = kind(calibration, tuple(names), MEASURES.get(how, l1), gaps, raw)
    found: dict[str, list[Array]] = {name: [] for name in names}
    for index in range(prompts):
        watcher.begin()
        generate(watcher, index)
        for stream in watcher.numbers.values():
            for place, name in enumerate(names):
                found[name].append(np.stack([row[place] for row in stream]))
    return {name: np.stack(streams) for name, streams in found.items()}


class _Watcher(nn.Module):
    """Stands in for the denoiser: computes everything and measures the values at each call."""

    def __init__(self, calibration: Calibration, names: tuple[str, ...], rule: Measure, gaps: int, raw: bool):
        super().__init__()
        self.denoiser = calibration.captured.denoiser
        object.__setattr__(self, "calibration", calibration)
        self.names, self.rule, self.gaps, self.raw = names, rule, gaps, raw
        self._programs: dict[int, Programs] = {}
        self._context = threading.local()
        self.begin()

    calibration: Calibration

    def begin(self) -> None:
        """A new generation."""
        self.numbers: dict[Any, list[list[Array]]] = {}  # stream -> step -> name -> [gaps]
        self._earlier: dict[Any, list[list[list[Tensor]]]] = {}  # stream -> values of the steps before, newest first

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("denoiser"), name)

    @contextlib.contextmanager
    def cache_context(self, name: str, **details: Any) -> Any:
        self._context.name = name
        try:
            yield
        finally:
            self._context.name = ""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        captured = self.calibration.captured
        bound = captured.bind(args, kwargs)
        for variant in captured.candidates(bound):
            with contextlib.suppress(GuardFailed):
                return self._observe(variant, bound)
        return self._observe(captured.add(bound), bound)

    def _observe(self, variant: Variant, bound: Bound) -> Any:
        programs = self._programs.get(id(variant))
        if programs is None:
            programs = self._programs[id(variant)] = Programs(variant, (), self._sites(variant, bound), title="measure")
        program, leaves = programs.observing(), programs.leaves(bound)
        with variant.restoring(leaves):
            hoisted = programs.prologue(*leaves) if programs.prologue is not None else ()
            result, kept = program(leaves, hoisted, {}, (COMPUTE,) * len(programs.sites), {})
        values: list[list[Tensor]] = [[] for _ in self.names]
        for (row, _), value in zip(program.writes, kept, strict=True):
            values[row].append(value.detach())  # type: ignore[union-attr]
        self._note(self._stream(bound), values)
        return result

    def _sites(self, variant: Variant, bound: Bound) -> list[Site]:
        sites = list(self.calibration.finder(variant, bound, self.names))
        missing = [name for name in self.names if name not in {site.name for site in sites}]
        if missing:
            raise ValueError(f"{self.calibration.name} has no sites or probes {missing}, which were to be measured")
        return [site.without_anchors() for site in sites] if self.raw else sites

    def _stream(self, bound: Bound) -> Any:
        call = log_call(bound, getattr(self._context, "name", ""))
        return (call.context, *(call.digests.get(path) for path in self.calibration.pattern.invariant))

    def _note(self, stream: Any, values: list[list[Tensor]]) -> None:
        earlier = self._earlier.setdefault(stream, [])
        row = []
        for place, parts in enumerate(values):
            numbers = np.full(self.gaps, np.nan)
            for gap, before in enumerate(earlier):
                pairs = zip(parts, before[place], strict=True)
                numbers[gap] = float(torch.stack([self.rule(new, old).mean() for new, old in pairs]).mean())
            row.append(numbers)
        self.numbers.setdefault(stream, []).append(row)
        earlier.insert(0, values)
        del earlier[self.gaps :]


class _Pooling(_Watcher):
    """Notes what each value is like at each step: its mean over samples and tokens."""

    def _note(self, stream: Any, values: list[list[Tensor]]) -> None:
        pooled = [parts[0].float().reshape(-1, parts[0].shape[-1]).mean(0).double().cpu().numpy() for parts in values]
        self.numbers.setdefault(stream, []).append(pooled)


_MOVED = 0.01  # of the latent's length
_PART_OF_A_STEP = 0.1


class _Moving(_Watcher):
    """Calls the denoiser again with a moved latent or time and notes ``|v' - v|_2 / |v|_2`` per unit of the move.

    The latent moves by 1 % of its length in a random direction, the time by a tenth of the sampler's mean step (one at
    least where it is an integer). Both moves are in the units of the inputs; without a timestep that is 0.
    """

    def __init__(self, calibration: Calibration, names: tuple[str, ...], *rest: Any):
        if unknown := sorted(set(names) - {"latent", "timestep"}):
            raise ValueError(f"derivatives are taken against 'latent' and 'timestep', got {unknown}")
        super().__init__(calibration, names, *rest)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.calibration.captured.bind(args, kwargs)
        result = self.denoiser(*args, **kwargs)
        moves = {"latent": self._moved_latent, "timestep": self._moved_time}
        row = [np.array([self._change(bound, _first(result), *moves[name](bound))]) for name in self.names]
        self.numbers.setdefault(self._stream(bound), []).append(row)
        return result

    def _change(self, bound: Bound, output: Tensor, path: tree.Path | None, moved: Any, distance: Any) -> float:
        if path is None or moved is None:
            return 0.0
        args, kwargs = unbind(self.calibration.captured.signature, tree.with_leaves(bound, {path: moved}))
        other = _first(self.denoiser(*args, **kwargs))
        return float((_length(other - output) / _length(output).clamp_min(1e-12) / distance).mean())

    def _moved_latent(self, bound: Bound) -> tuple[tree.Path | None, Any, Any]:
        path = self.calibration.pattern.probe
        latent = input_at(bound, path)
        if not isinstance(latent, Tensor):
            return path, None, None
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0)).to(latent)
        distance = _MOVED * _length(latent)
        scale = (distance / _length(noise)).reshape(-1, *[1] * (latent.ndim - 1)).to(latent.dtype)
        return path, latent + noise * scale, distance

    def _moved_time(self, bound: Bound) -> tuple[tree.Path | None, Any, Any]:
        path, times = self.calibration.pattern.clock, self.calibration.pattern.clock_values
        time = input_at(bound, path)
        if time is None or len(times) < 2:
            return path, None, None
        step = _PART_OF_A_STEP * abs(times[0] - times[-1]) / (len(times) - 1)
        whole = isinstance(time, int) or (isinstance(time, Tensor) and not time.is_floating_point())
        distance = max(1, round(step)) if whole else step
        late = float(time.min() if isinstance(time, Tensor) else time) < distance  # times end at zero
        return path, time + distance if late else time - distance, distance


def _first(result: Any) -> Tensor:
    """The first tensor that a denoiser returned."""
    return next(leaf for _, leaf in tree.walk(result) if isinstance(leaf, Tensor)).float()


def _length(value: Tensor) -> Tensor:
    """The 2-norm of each sample."""
    return value.float().reshape(len(value), -1).norm(dim=1)
