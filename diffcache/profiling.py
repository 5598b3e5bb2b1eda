"""Calibration: run the prompts uncached, keep a sketch of every site's value at every step, measure sensitivity.

A value v of any size is kept as a random projection of ``SKETCH`` numbers (a count sketch with fixed signs), whose
inner products estimate <v, w>; memory does not grow with the model.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from torch import fx, nn

from diffcache import gram
from diffcache.call_pattern import CallPattern, LoggedCall, find_pattern, log_call
from diffcache.cost import Cost
from diffcache.finding import SiteFinder
from diffcache.guided_calls import with_branches
from diffcache.memory import MemoryPlan, entry_bytes, plan_memory, probe_entry
from diffcache.options import RunOptions
from diffcache.profile_record import Profile, SiteProfile
from diffcache.programs import Programs
from diffcache.progress import Report, silent
from diffcache.report import relative_error
from diffcache.runtime import CachedDenoiser
from diffcache.schedule import COMPUTE, Forecast, Row, Schedule
from diffcache.sites import Site
from diffcache.token_programs import TokenRegions
from diffcache.tracing.captured import Captured
from diffcache.tracing.errors import GuardFailed
from diffcache.tracing.session import Bound
from diffcache.tracing.variant import Variant

SKETCH = 4096
MAX_SITES = 48
# Schedules are searched for these sites and for others that stand for the same values (another anchor).
MEASURED_ROLES = ("stack", "output", "deepest")
SENSITIVITY_POINTS = 10

Generate = Callable[[nn.Module, int], torch.Tensor]  # (denoiser, index of the prompt) -> flat result


@dataclass
class Calibration:
    """All that calibrating one denoiser found."""

    name: str
    captured: Captured
    pattern: CallPattern
    sites: dict[str, Site]
    profile: Profile
    references: list[torch.Tensor] = field(repr=False)
    finder: SiteFinder = field(repr=False)
    graph: fx.Graph = field(repr=False)  # of the first call; later ones may have other shapes
    searchable: tuple[str, ...] = ()

    def cached(self, schedule: Schedule, **options: Any) -> CachedDenoiser:
        """The denoiser under a schedule over this calibration's sites."""
        run = RunOptions(**options)
        return CachedDenoiser(self.captured, schedule, self.pattern, self.finder, options=run, title=self.name)

    def memory(self, schedule: Schedule, options: RunOptions) -> MemoryPlan:
        """What history of a schedule costs at the calibrated shapes."""
        sites = [self.sites.get(row.site) or self.finder.first(row.site) for row in schedule.rows]
        sizes = entry_bytes(self.graph, sites, options.small)
        looks = [self.finder.first(name) for row in schedule.rows for name in row.probes]
        first = [replace(probe, values=probe.values[:1]) for probe in looks]
        sizes |= {probe_entry(name): size for name, size in entry_bytes(self.graph, first).items()}
        if schedule.is_online:
            sizes |= TokenRegions(self.captured.variants[0].graph_module, sites, self.finder.flops_by_node()).sizes(
                schedule
            )
        return plan_memory(schedule, sizes, streams=self.pattern.streams, offload=options.offload_history)


class _Observer(nn.Module):
    """Stands in for the denoiser during calibration: computes everything, logs the call, sketches every site."""

    def __init__(self, captured: Captured, finder: SiteFinder, wanted: Sequence[str] = (), most: int = MAX_SITES):
        super().__init__()
        self.wanted, self.most = tuple(wanted), most
        self.denoiser = captured.denoiser
        object.__setattr__(self, "captured", captured)
        self.finder, self.sites, self.everywhere, self.total = finder, [], set(), 0.0
        self.calls: list[LoggedCall] = []
        self.sketches: list[torch.Tensor] = []
        self._programs: dict[int, Programs] = {}
        self._context = threading.local()

    captured: Captured
    sites: list[Site]
    everywhere: set[str]  # sites of every graph seen: a branch on the timestep may lack some

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
        bound = self.captured.bind(args, kwargs)
        for variant in self.captured.candidates(bound):
            with contextlib.suppress(GuardFailed):
                return self._observe(variant, bound)
        return self._observe(self.captured.add(bound), bound)

    def _observe(self, variant: Variant, bound: Bound) -> Any:
        programs = self._programs.get(id(variant))
        if programs is None:
            cost, sites = self.finder.all(variant, bound)
            if not self.sites:
                asked = [self.finder.parts(variant, bound).named(name) for name in self.wanted]
                self.sites, self.total = _chosen(sites, cost, asked, self.most), cost.total
                self.everywhere = {site.name for site in self.sites}
            kept = list(self.finder(variant, bound, [site.name for site in self.sites]))
            programs = self._programs[id(variant)] = Programs(variant, (), kept, title="profile")
        cells = (COMPUTE,) * len(programs.sites)
        program = programs.observing()
        leaves = programs.leaves(bound)
        with variant.restoring(leaves):
            hoisted = programs.prologue(*leaves) if programs.prologue is not None else ()
            result, kept_values = program(leaves, hoisted, {}, cells, {})
        names = [site.name for site in programs.sites]
        self.everywhere &= set(names)
        by_site = {name: torch.zeros(SKETCH) for name in names}
        for (row, value), tensor in zip(program.writes, kept_values, strict=True):
            by_site[names[row]] = by_site[names[row]] + sketch(cast("torch.Tensor", tensor), salt=value)
        self.calls.append(log_call(bound, getattr(self._context, "name", "")))
        empty = torch.zeros(SKETCH)
        self.sketches.append(torch.stack([empty, *(by_site.get(site.name, empty) for site in self.sites)])[1:])
        return result


def _chosen(sites: Sequence[Site], cost: Cost, asked: Sequence[Site] = (), most: int = MAX_SITES) -> list[Site]:
    """Sites worth profiling: all that were asked for, named roles, then those that save most."""
    worthwhile = [site for site in sites if site.flops_saved > 0.01 * cost.total]
    first = [
        site for site in worthwhile if site.role in ("stack", "stack0", "stack2", "output", "deepest", "deep", "cut")
    ]
    rest = [site for site in worthwhile if site not in first]
    others = [site for site in first + rest if site not in asked]
    return [*dict.fromkeys(asked), *others][: max(most, len(asked))]


_SIGNS: dict[tuple[int, int, torch.device], torch.Tensor] = {}


def sketch(value: torch.Tensor, salt: int = 0) -> torch.Tensor:
    """A projection to ``SKETCH`` numbers: E<sketch(v), sketch(w)> = <v, w>; a small v is only reordered.

    Summed where the value lies, with the same signs on every device; only the sums travel to the host.
    """
    flat = value.detach().flatten().to(torch.float32)
    rows = math.ceil(flat.numel() / SKETCH)
    key = (rows, salt, flat.device)
    if key not in _SIGNS:
        generator = torch.Generator().manual_seed(1009 * salt + 17)
        signs = torch.randint(0, 2, (rows, SKETCH), generator=generator, dtype=torch.int8) * 2 - 1
        _SIGNS[key] = signs.to(flat.device)
    padded = torch.nn.functional.pad(flat, (0, rows * SKETCH - flat.numel())).view(rows, SKETCH)
    return (padded * _SIGNS[key]).sum(0).cpu()


def calibrate(
    denoiser: nn.Module,
    generate: Generate,
    prompts: int,
    *,
    name: str = "denoiser",
    leaf_modules: Sequence[Any] = (),
    sensitivity_prompts: int = 1,
    min_steps: int = 4,
    wanted: Sequence[str] = (),
    most_sites: int = MAX_SITES,
    report: Report = silent,
) -> Calibration:
    """Profile one denoiser over ``prompts`` generations.

    ``wanted`` names sites that must be among those measured, whatever they save: ``blocks[8:-2]`` and the other forms
    of ``ranges`` are made on request. At most ``most_sites`` are measured, those of named roles first.

    Raises:
        ValueError: the sampler never calls the denoiser, calls it fewer than ``min_steps`` times, or gives NaN; or
            the denoiser has no site of a wanted name.
        CaptureError: the denoiser cannot be captured exactly.
    """
    captured = Captured(denoiser, leaf_modules=leaf_modules)
    finder = SiteFinder(captured)
    observer = _Observer(captured, finder, wanted, most_sites)
    generations: list[list[LoggedCall]] = []
    sketches: list[list[torch.Tensor]] = []
    references = []
    for index in range(prompts):
        report(f"profile {name}", index, prompts)
        observer.calls, observer.sketches = [], []
        result = generate(observer, index)
        if not observer.calls:
            raise ValueError(
                f"generating calibration prompt {index} never called the denoiser ({name}); sample(denoiser, item) "
                "must run one whole generation by calling the denoiser it is given"
            )
        if not bool(torch.isfinite(result).all()):
            raise ValueError(
                f"calibration prompt {index} gives NaN or infinity without any caching; check the model's dtype"
            )
        generations.append(observer.calls)
        sketches.append(observer.sketches)
        references.append(result)
    report(f"profile {name}", prompts, prompts)
    pattern = with_branches(find_pattern(generations, min_steps), generations)
    for index, calls in enumerate(generations):
        steps = max(Counter(call.stream for call in calls).values())
        if steps != pattern.steps:
            raise ValueError(
                f"calibration prompt {index} calls {name} at {steps} steps, prompt 0 at {pattern.steps}; calibrate "
                "with one step count, the one you generate with"
            )
    profile = _profile(observer, pattern, generations, sketches)
    sites = {site.name: site for site in observer.sites if site.name in observer.everywhere}
    graph = captured.variants[0].graph_module.graph
    calibration = Calibration(name, captured, pattern, sites, profile, references, finder, graph)
    return measure_sensitivity(calibration, generate, sensitivity_prompts, report)


def _profile(
    observer: _Observer,
    pattern: CallPattern,
    generations: Sequence[Sequence[LoggedCall]],
    sketches: Sequence[Sequence[torch.Tensor]],
) -> Profile:
    rows = []
    for calls, kept in zip(generations, sketches, strict=True):
        for stream in range(1 + max(call.stream for call in calls)):
            values = [value for call, value in zip(calls, kept, strict=True) if call.stream == stream]
            if len(values) == pattern.steps:
                rows.append(torch.stack(values).double().transpose(0, 1))  # [sites, steps, SKETCH]
    grams = np.stack([(v @ v.transpose(1, 2)).numpy() for v in rows])  # [streams, sites, steps, steps]
    sites = tuple(
        SiteProfile(site.name, site.residual, site.flops_saved, site.bytes_kept, grams[:, k], np.ones(pattern.steps))
        for k, site in enumerate(observer.sites)
        if site.name in observer.everywhere and np.isfinite(grams[:, k]).all() and grams[:, k].any()
    )
    return Profile(pattern.steps, observer.total, sites, pattern.clock_values)


def measure_sensitivity(
    calibration: Calibration,
    generate: Generate,
    prompts: int,
    report: Report = silent,
    points: int = SENSITIVITY_POINTS,
) -> Calibration:
    """Forecast one site at one step only, by reuse, and compare what the result loses with what the value lost.

    Measured at ``points`` steps for each of the sites that schedules are searched for; in between it is smooth over the
    steps on a logarithmic scale.
    """
    steps, record = calibration.pattern.steps, calibration.profile
    profiled = {site.name for site in record.sites}
    sites = [s for s in calibration.sites.values() if s.role in MEASURED_ROLES and s.name in profiled]
    if not sites and record.sites:
        sites = [calibration.sites[record.sites[0].name]]
    where = sorted({round(k) for k in np.linspace(1, steps - 1, min(points, steps - 1))})
    stage, done, total = f"sensitivity of {calibration.name}", 0, len(sites) * len(where) * prompts
    measured: dict[str, np.ndarray] = {}
    for site in sites if prompts else ():
        base = calibration.cached(_one_reuse(site, steps, 1, record))
        ratios = []
        for step in where:
            denoiser = base.with_schedule(_one_reuse(site, steps, step, record))
            local = max(gram.forecast_error(record.site(site.name).gram, [step - 1], step, [1.0]), 1e-12)
            errors = []
            for prompt in range(prompts):
                report(stage, done, total)
                errors.append(relative_error(generate(denoiser, prompt), calibration.references[prompt]) ** 2)
                done += 1
            ratios.append(max(sum(errors) / prompts / local, 1e-12))
        measured[site.name] = np.exp(np.interp(range(steps), where, np.log(ratios)))
    report(stage, total, total)
    return _with_sensitivity(calibration, measured)


def _with_sensitivity(calibration: Calibration, measured: dict[str, np.ndarray]) -> Calibration:
    """Sites that stand for the same values share a measurement, in units of each site's own size."""
    record, known = calibration.profile, {}
    for site in record.sites:
        values = calibration.sites[site.name].values
        twin = next((name for name in measured if name == site.name), None) or next(
            (name for name in measured if calibration.sites[name].values == values), None
        )
        if twin is not None:
            known[site.name] = measured[twin] * float(site.scale.mean() / record.site(twin).scale.mean())
    sites = tuple(replace(site, sensitivity=known.get(site.name, site.sensitivity)) for site in record.sites)
    return replace(calibration, profile=replace(record, sites=sites), searchable=tuple(known))


def _one_reuse(site: Site, steps: int, step: int, profile: Profile) -> Schedule:
    cells = tuple(Forecast((step - 1,), (1.0,)) if k == step else COMPUTE for k in range(steps))
    return Schedule(steps, (Row(site.name, site.residual, cells),), clock=profile.clock, origin="sensitivity")
