"""``CachedDenoiser``: runs a schedule. The only place that holds state between calls: streams with their history."""

from __future__ import annotations

import contextlib
import inspect
import threading
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn

from diffcache.call_pattern import CallPattern, host_value
from diffcache.deciding import checks_of, looked_at
from diffcache.each_sample import several
from diffcache.fingerprint import graph_fingerprint
from diffcache.memory import Kept, in_full, in_words, to_host
from diffcache.options import RunOptions
from diffcache.predictors import weight_table
from diffcache.programs import Carried, History, Program, Programs
from diffcache.report import CompileReport
from diffcache.schedule import Cell, Forecast, Forecasting, Schedule, Selected
from diffcache.sites import Site
from diffcache.streams import Stream, calling, close, input_at
from diffcache.token_programs import NEWEST, check_options
from diffcache.tracing import tree
from diffcache.tracing.captured import Captured
from diffcache.tracing.errors import CaptureError, GuardFailed, user_frame
from diffcache.tracing.session import Bound, unbind
from diffcache.tracing.variant import Variant

MAX_STREAMS = 16


class SiteFinder(Protocol):
    """Sites and probes of a variant by name, in the order of the names, without those it lacks; FLOPs by node."""

    def __call__(self, variant: Variant, bound: Bound, names: Sequence[str]) -> Sequence[Site]: ...

    def flops(self, variant: Variant, bound: Bound) -> Mapping[str, float]: ...


class CachedDenoiser(nn.Module):
    """A denoiser that follows a reuse schedule, with the signature, attributes and state dict of the one it wraps.

    It counts the calls of each stream (a sequence of calls with the same conditions), starts afresh at every
    generation, and computes in full, saying so once, whatever does not match what it was calibrated for.
    """

    def __init__(
        self,
        captured: Captured,
        schedule: Schedule,
        pattern: CallPattern,
        find_sites: SiteFinder,
        *,
        options: RunOptions = RunOptions(),  # noqa: B008  (frozen)
        title: str = "denoiser",
    ):
        super().__init__()
        self.denoiser = captured.denoiser
        object.__setattr__(self, "captured", captured)
        check_options(schedule.rows, options)
        self.schedule, self.pattern, self.options, self.title = schedule, pattern, options, title
        self.report: CompileReport | None = None
        self.graphs: frozenset[str] = frozenset()  # fingerprints of what a loaded schedule was made for
        self._find_sites = find_sites
        self._programs: dict[tuple[int, tuple[str, ...], tuple[str, ...]], Programs] = {}
        self._streams: list[Stream] = []
        self._weights: dict[Any, torch.Tensor] = {}
        self._lock = threading.RLock()
        self._context = threading.local()
        self._said: set[str] = set()
        self._looks = looked_at(schedule)
        self._checks = {schedule.rows[row].site: rows for row, rows in checks_of(schedule).values()}
        self._probes = tuple(sorted(set(self._checks).union(*self._looks.values())))
        self.logs: deque[tuple[str, list[str]]] = deque(maxlen=MAX_STREAMS)
        self._several = several(self)
        self.reset()
        self.training = self.denoiser.training

    captured: Captured

    # -- what makes it look like the denoiser ------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("denoiser"), name)

    @property
    def __signature__(self) -> inspect.Signature:
        return self.captured.signature

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.denoiser.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.denoiser.load_state_dict(*args, **kwargs)

    @contextlib.contextmanager
    def cache_context(self, name: str, **details: Any) -> Iterator[None]:
        """Name the guidance branch of the calls inside, as diffusers' pipelines do; they tell more than is needed."""
        before = getattr(self._context, "name", "")
        self._context.name = name
        try:
            yield
        finally:
            self._context.name = before

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a CachedDenoiser holds captured graphs and open generations, which are neither copied nor pickled; write "
            "it with save(folder) and put it on another copy of the model with diffcache.load(model, folder)"
        )

    def reset(self) -> None:
        """Forget every stream and the counts: the next call starts a generation."""
        with self._lock:
            self._streams.clear()
            self.logs.clear()
            self.steps_computed = self.steps_forecast = 0
            self.flops = self.flops_in_full = 0.0

    @property
    def decisions(self) -> list[tuple[str, list[str]]]:
        """The newest streams: the guidance branch if it was named, and the printed column of each step so far."""
        return [(name, list(log)) for name, log in self.logs if log]

    def with_schedule(self, schedule: Schedule) -> CachedDenoiser:
        """The same denoiser under another schedule; captures and programs are shared."""
        other = CachedDenoiser(
            self.captured, schedule, self.pattern, self._find_sites, options=self.options, title=self.title
        )
        other._programs = self._programs
        return other

    # -- one call ----------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (self._compiled if torch.compiler.is_compiling() else self._run)(*args, **kwargs)

    @torch.compiler.disable(
        reason="diffcache keeps count of the steps in Python and compiles each program as one graph"
    )
    def _compiled(self, *args: Any, **kwargs: Any) -> Any:
        """What ``torch.compile`` of this module comes to: from now on the programs are compiled."""
        if self.options.backend == "eager":
            self.options, self._programs = replace(self.options, backend="inductor"), {}
        return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if self.captured.refused is not None:
            return self.denoiser(*args, **kwargs)
        bound = self.captured.bind(args, kwargs)
        with self._lock:
            stream, step = self._place(bound)
        try:
            if self._several is None or step is None:
                result = self.perform(bound, stream, step)
            else:
                self._several.join(stream, self._streams)
                result = self._several.run(bound, stream, step)
        except BaseException:  # an interrupted generation leaves nothing behind
            self._forget(stream, *(stream.generation.streams if stream.generation is not None else ()))
            raise
        if step == self.schedule.steps - 1:
            self._forget(stream)
        return result

    def _forget(self, *streams: Stream) -> None:
        with self._lock:
            self._streams = [stream for stream in self._streams if all(stream is not other for other in streams)]

    def perform(self, bound: Bound, stream: Stream, step: int | None) -> Any:
        """Run a call as one step of a stream; in full if the step is None."""
        try:
            return self.captured.serve(bound, lambda variant: self._step(variant, bound, stream, step))
        except CaptureError as error:
            if self.captured.on_uncapturable == "raise":
                raise
            self.captured.refused = str(error)
            self.say_once(f"runs uncached: {error}")
            args, kwargs = unbind(self.captured.signature, bound)
            return self.denoiser(*args, **kwargs)

    def _step(self, variant: Variant, bound: Bound, stream: Stream, step: int | None) -> Any:
        programs = self.programs(variant, bound)
        leaves, column = programs.leaves(bound), None
        written: History = {}
        try:
            with variant.restoring(leaves):
                hoisted = self._hoisted(stream, programs, leaves)
                if step is None or not programs.sites:
                    result, _ = self._count(programs, programs.full())(leaves, hoisted, {}, (), {})
                else:
                    stream.deciding.begin(step, input_at(bound, self.pattern.probe))
                    result, column, written = self._scheduled(stream, programs, leaves, hoisted)
        except GuardFailed:
            stream.deciding.undo()
            raise
        stream.flops = programs.full().flops
        self._advance(stream, step, column, written, result)
        return result

    def _scheduled(
        self, stream: Stream, programs: Programs, leaves: list[Any], hoisted: Sequence[Any]
    ) -> tuple[Any, list[Cell], History]:
        """One step segment by segment: each runs, its probes are looked at, and what hangs on them is decided."""
        deciding, step = stream.deciding, stream.deciding.step
        column: list[Cell] = list(self.schedule.column(step))
        carried: Carried = {}
        written: History = {}
        result: Any = None
        for segment, rows in enumerate(programs.rows):
            for on_trial in deciding.columns(column, rows, stream.history, programs.regions):
                program = self._count(programs, programs.program(self.schedule, step, column, segment))
                if on_trial:
                    program.refuse_effects()
                weights = self._step_weights(program, column, leaves)
                result, kept = program(leaves, hoisted, stream.history, column, weights, carried)
                for (row, value), tensor in zip(program.writes, kept, strict=True):
                    written[programs.kept_as(row, value, step)] = tensor
                shown = zip(program.probes, result if program.probes else (), strict=True)
                deciding.show({name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in shown})
        return result, column, written

    def _count(self, programs: Programs, program: Program) -> Program:
        self.flops += program.flops
        self.flops_in_full += programs.full().flops if not program.probes else 0.0
        return program

    def programs(self, variant: Variant, bound: Bound) -> Programs:
        """The programs of a variant; its sites are found by name, so a schedule applies at another resolution."""
        names = tuple(row.site for row in self.schedule.rows)
        key = (id(variant), names, (*self._probes, *map(str, self._checks.items())))
        found = self._programs.get(key)
        if found is None:
            wanted = (*names, *self._probes)
            sites = self._find_sites(variant, bound, wanted) if names else ()
            if len(sites) != len(wanted):
                missing = sorted(set(wanted) - {site.name for site in sites})
                if names:
                    self.say_once(f"sites {missing} are not in the graph of this call, which is computed in full")
                sites = ()
            if names and self.graphs and graph_fingerprint(variant.graph_module.graph) not in self.graphs:
                self.say_once(
                    "graph of this call is not the one the schedule was calibrated on; compile again if it drifts"
                )
            found = self._make_programs(variant, bound, sites, names)
            if sites and not self._fits(found):
                found = self._make_programs(variant, bound, (), names)
            found.check_order(self.schedule, self._looks)
            self._programs[key] = found
        return found

    def _make_programs(self, variant: Variant, bound: Bound, sites: Sequence[Site], names: Sequence[str]) -> Programs:
        return Programs(
            variant,
            self.pattern.invariant,
            sites[: len(names)],
            probes=sites[len(names) :],
            checks=self._checks,
            flops=self._find_sites.flops(variant, bound),
            options=self.options,
            title=self._program_title(names),
        )

    def _fits(self, programs: Programs) -> bool:
        """Whether history stays within ``max_cache_bytes`` at the shapes of this call."""
        allowed = self.options.max_cache_bytes
        needed = programs.memory(self.schedule, self.pattern).device_bytes
        if allowed is None or needed <= allowed:
            return True
        self.say_once(
            f"history of this call would take {in_words(needed)}, max_cache_bytes allows {in_words(allowed)}: it is "
            "computed in full. Raise the limit, or compile with history_dtype='int8' or offload_history=True"
        )
        return False

    def _program_title(self, names: Sequence[str]) -> str:
        """Tells the programs of different sites apart in dumps."""
        site = "".join(c if c.isalnum() else "_" for c in "+".join(names))
        return f"{self.title}-{site[:60] or 'exact'}"

    def _place(self, bound: Bound) -> tuple[Stream, int | None]:
        """The stream of this call and its step, or None if it does not follow the schedule (then it runs in full)."""
        owner = (getattr(self._context, "name", ""), threading.get_ident(), torch.is_grad_enabled())
        invariants = [leaf for path in self.pattern.invariant if (leaf := input_at(bound, path)) is not None]
        latent = input_at(bound, self.pattern.probe)
        found = [stream for stream in reversed(self._streams) if stream.serves(owner, invariants)]
        follows = self.schedule.rows or self.schedule.guidance is not None
        clock = host_value(input_at(bound, self.pattern.clock)) if follows else None
        if clock is None:  # nothing to follow, or a timestep on a device: count calls
            stream = found[0] if found else self._begin(owner, invariants)
            if stream.position + 1 >= self.schedule.steps:
                stream.restart()
            stream.latent = latent
            return stream, stream.position + 1
        caller = calling(found, invariants, latent)
        table = self.schedule.clock or self.pattern.clock_values
        expected = caller.position + 1 if caller is not None else 0
        if caller is not None and caller.on_schedule and expected < len(table) and close(clock, table[expected]):
            # an older generation with equal conditions that this one has overtaken was interrupted
            older = set(found[found.index(caller) + 1 :])
            self._streams = [s for s in self._streams if s not in older or s.position >= caller.position]
        elif close(clock, table[0]):
            caller, expected = self._begin(owner, invariants), 0
        else:
            for stream in found if caller is None else [caller]:
                stream.on_schedule = False
            self.say_once(
                f"timestep {clock:g} is not what the schedule was calibrated for at step {expected} "
                f"({f'{table[expected]:g}' if expected < len(table) else 'the generation had ended'}); such calls are "
                "computed in full. Calibrate with the step count, resolution and sampler that you generate with."
            )
            return caller or self._begin(owner, invariants, on_schedule=False), None
        caller.latent = latent
        return caller, expected

    def _begin(self, owner: tuple[Any, ...], invariants: list[Any], on_schedule: bool = True) -> Stream:
        stream = Stream(owner, invariants, self.schedule)
        stream.on_schedule = on_schedule
        self.logs.append((owner[0], stream.deciding.log))
        self._streams.append(stream)
        del self._streams[:-MAX_STREAMS]
        return stream

    def _hoisted(self, stream: Stream, programs: Programs, leaves: list[Any]) -> Sequence[Any]:
        if programs.prologue is None:
            return ()
        state = programs.hoisted_state()
        known = stream.hoisted.get(programs)
        if known is None or known[0] != state:
            known = stream.hoisted[programs] = (state, programs.prologue(*leaves))
        return known[1]

    def _step_weights(self, program: Program, column: Sequence[Cell], leaves: list[Any]) -> dict[int, torch.Tensor]:
        device = next((leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor)), torch.device("cpu"))
        return {row: self._on_device(column[row], device) for row in program.weights}

    def _on_device(self, cell: Cell, device: torch.device) -> torch.Tensor:
        """Weights in difference form; each is copied to the device once."""
        cell = cell.forecast if isinstance(cell, Selected) else cell
        assert isinstance(cell, Forecast)
        key = (cell.weights, cell.view, device)
        found = self._weights.get(key)
        if found is None:
            host = weight_table(cell.weights, cell.view)
            host = host.pin_memory() if device.type == "cuda" else host
            found = self._weights[key] = host.to(device, non_blocking=True)
        return found

    def _advance(
        self, stream: Stream, step: int | None, column: Sequence[Cell] | None, written: History, result: Any
    ) -> None:
        forecast = stream.partial or (column is not None and any(isinstance(cell, Forecasting) for cell in column))
        self.steps_forecast += forecast
        self.steps_computed += not forecast
        if step is None:
            return
        if column is not None:
            stream.deciding.finish(column, self._watched(stream, written, result))
        kept = {key: _detached(value) for key, value in written.items()}
        stream.keep(step, {key: to_host(v) for key, v in kept.items()} if self.options.offload_history else kept)

    def _watched(self, stream: Stream, written: History, result: Any) -> dict[int, list[torch.Tensor]]:
        """What each gate of the stream watches, at this step."""
        seen: dict[int, list[torch.Tensor]] = {}
        for number, gate in enumerate(stream.deciding.gates):
            if gate.watch == "output":
                tensors = (leaf for _, leaf in tree.walk(result) if isinstance(leaf, torch.Tensor))
                seen[number] = [next(tensors).detach()]
            elif gate.watch == "rows":
                rows = set(stream.deciding.rows_of[number])
                kept = [kept for (row, _, made), kept in written.items() if row in rows and made != NEWEST]
                seen[number] = [in_full(value).detach() for value in kept]
        return seen

    def say_once(self, message: str) -> None:
        kind = message.partition(" ")[0]
        if kind not in self._said:
            self._said.add(kind)
            frame = user_frame()  # the line that called the denoiser, however deep we are
            place = (frame.f_code.co_filename, frame.f_lineno) if frame is not None else (__file__, 1)
            warnings.warn_explicit(f"diffcache: {message}", UserWarning, *place)

    def extra_repr(self) -> str:
        return f"schedule of {len(self.schedule.rows)} sites x {self.schedule.steps} steps"


def _detached(kept: Kept) -> Kept:
    return kept if isinstance(kept, tuple) or not kept.requires_grad else kept.detach()
