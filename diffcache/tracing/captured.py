"""``diffcache.capture``: a denoiser as graphs, one per kind of call, each used only while its guards hold."""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from diffcache.tracing import tree
from diffcache.tracing.ambient import ambient
from diffcache.tracing.compiled import running_eagerly, uncompiled
from diffcache.tracing.errors import CaptureError, GuardFailed
from diffcache.tracing.printer import format_graph
from diffcache.tracing.reachable import is_numpy
from diffcache.tracing.session import Bound, bind
from diffcache.tracing.variant import Variant, capture_variant

MAX_VARIANTS = 64
_CAPTURING = threading.RLock()  # recording a forward patches torch.nn.Module for the whole process
Key = tuple[Any, ...]


def call_key(bound: Bound, static: frozenset[tree.Path], layout: bool) -> Key:
    """What must agree for a graph to fit a call: shapes, dtypes, devices, None-ness, flags, grad and autocast mode."""
    parts: list[Any] = [ambient(), torch.is_inference_mode_enabled()]
    for name, value in bound.items():
        if isinstance(value, torch.Tensor):
            parts.append((name, value.shape, value.dtype, value.device, value.stride() if layout else None))
            continue
        for path, leaf in tree.walk(value, (("item", name),)):
            if isinstance(leaf, torch.Tensor):
                parts.append((path, leaf.shape, leaf.dtype, leaf.device, leaf.stride() if layout else None))
            elif type(leaf) in (int, float):
                parts.append((path, type(leaf), leaf if path in static else None))
            else:
                parts.append((path, _leaf_key(leaf)))
    return tuple(parts)


class _Same:
    """An object that is only equal to itself; kept alive, so that no other can take its identity."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def _leaf_key(leaf: Any) -> Any:
    """An argument that is neither tensor nor number, by value where it has one, else by identity."""
    if isinstance(leaf, torch.Generator):
        return leaf.device
    if is_numpy(leaf, "ndarray"):
        return leaf.shape, leaf.dtype.str, leaf.tobytes() if leaf.dtype != object else _Same(leaf)
    if isinstance(leaf, set):
        return frozenset(leaf)
    try:
        hash(leaf)
    except TypeError:
        return _Same(leaf)
    return type(leaf), leaf


class Captured(nn.Module):
    """A denoiser's graphs behind its own signature.

    ``graph_module`` is the graph of the latest kind of call; it takes the same arguments as the denoiser. A call of a
    new kind (another shape, dtype or flag, a branch on a tensor's value, a changed module) is captured when it comes.
    """

    def __init__(self, denoiser: nn.Module, *, leaf_modules: Sequence[Any] = (), on_uncapturable: str = "raise"):
        super().__init__()
        if on_uncapturable not in ("raise", "eager"):
            raise ValueError(f"on_uncapturable is {on_uncapturable!r}; expected 'raise' or 'eager'")
        denoiser = uncompiled(denoiser)
        object.__setattr__(self, "denoiser", denoiser)
        self.signature = inspect.signature(denoiser.forward)
        self.leaf_modules, self.on_uncapturable = tuple(leaf_modules), on_uncapturable
        self.variants: list[Variant] = []
        self._table: dict[Key, list[Variant]] = {}
        self._ways: list[tuple[frozenset[tree.Path], bool]] = [(frozenset(), False)]
        self.refused: str | None = None

    denoiser: nn.Module

    @property
    def graph_module(self) -> fx.GraphModule:
        if not self.variants:
            raise CaptureError(f"nothing is captured: {self.refused or 'no call was made yet'}")
        return self.variants[-1].graph_module

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
        return bind(self.signature, args, kwargs)

    def candidates(self, bound: Bound) -> list[Variant]:
        """Variants whose signature fits the call and whose module guards hold, the last used first."""
        found = []
        for way in self._ways:
            for variant in self._table.get((way, call_key(bound, *way)), ()):
                if variant.trace.reads.changed() is None:
                    found.append(variant)
        return found

    def serve(self, bound: Bound, run: Callable[[Variant], Any]) -> Any:
        """Run something on the first variant whose guards hold; this kind of call is captured if there is none.

        Raises:
            CaptureError: it cannot be replayed exactly.
        """
        tried: list[Variant] = []
        while True:
            variant = self._untried(bound, tried)
            if variant is None:
                with _CAPTURING:  # another thread may have captured this kind of call in the meantime
                    variant = self._untried(bound, tried) or self.add(bound)
            try:
                return run(variant)
            except GuardFailed:
                tried.append(variant)

    def _untried(self, bound: Bound, tried: Sequence[Variant]) -> Variant | None:
        return next((v for v in self.candidates(bound) if all(v is not t for t in tried)), None)

    def add(self, bound: Bound) -> Variant:
        """Capture this kind of call.

        Raises:
            CaptureError: it cannot be replayed exactly.
        """
        self._forget_stale()
        if len(self.variants) >= MAX_VARIANTS:
            raise CaptureError(
                f"{type(self.denoiser).__name__} needs more than {MAX_VARIANTS} graphs: its forward takes another path "
                f"or reads another value, at almost every call ({_last_guard(self.variants[-1])}). "
                "Pass on_uncapturable='eager' to run such calls uncached."
            )
        with running_eagerly(self.denoiser):
            variant = capture_variant(self.denoiser, self.signature, bound, self.leaf_modules)
        way = (variant.static, variant.layout_read)
        if way not in self._ways:
            self._ways.append(way)
        self._table.setdefault((way, call_key(bound, *way)), []).insert(0, variant)
        self.variants.append(variant)
        return variant

    def _forget_stale(self) -> None:
        """Drop graphs of a module tree that is no more (a LoRA switched, a processor swapped)."""
        stale = {id(v) for v in self.variants if v.trace.reads.changed() is not None}
        self.variants = [v for v in self.variants if id(v) not in stale]
        self._table = {key: kept for key, vs in self._table.items() if (kept := [v for v in vs if id(v) not in stale])}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.graph_module(*args, **kwargs)
        if self.refused is not None:
            return self.denoiser(*args, **kwargs)
        bound = self.bind(args, kwargs)
        for variant in self.candidates(bound):
            try:
                return variant.run(args, kwargs)
            except GuardFailed:
                continue
            except torch.OutOfMemoryError:
                raise
            except Exception:  # what eager would do with such a call is told by capturing it, which runs it
                continue
        try:
            variant = self.add(bound)
        except CaptureError as error:
            if self.on_uncapturable == "raise":
                raise
            warnings.warn(f"runs uncached: {error}", stacklevel=2)
            self.refused = str(error)
            return self.denoiser(*args, **kwargs)
        return variant.run(args, kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["denoiser"], name)

    def __str__(self) -> str:
        if not self.variants:
            return f"capture of {type(self.denoiser).__name__}: uncaptured ({self.refused})"
        return format_graph(self.graph_module, title=f"capture of {type(self.denoiser).__name__}")

    __repr__ = __str__


def _last_guard(variant: Variant) -> str:
    guards = [node for node in variant.trace.graph.nodes if node.meta.get("guard")]
    return str(guards[-1].meta.get("where")) if guards else "no guard"


def capture(
    denoiser: nn.Module,
    *args: Any,
    leaf_modules: Sequence[Any] = (),
    on_uncapturable: str = "raise",
    **kwargs: Any,
) -> Captured:
    """Capture a denoiser as a ``torch.fx`` graph by recording real calls with these arguments.

    Args:
        denoiser: any ``torch.nn.Module``; it is left as it was.
        *args, **kwargs: one call's arguments, as a sampler would pass them.
        leaf_modules: module classes or paths to keep as single nodes, besides the modules of ``torch.nn``.
        on_uncapturable: "raise", or "eager" to run uncached what cannot be replayed exactly.

    Returns:
        A callable with the denoiser's signature, bit-exact against it; ``.graph_module`` is the graph.

    Raises:
        CaptureError: the forward cannot be replayed exactly; names the line of user code and the reason.
    """
    captured = Captured(denoiser, leaf_modules=leaf_modules, on_uncapturable=on_uncapturable)
    try:
        captured.add(captured.bind(args, kwargs))
    except CaptureError as error:
        if on_uncapturable == "raise":
            raise
        captured.refused = str(error)
        warnings.warn(f"runs uncached: {error}", stacklevel=2)
    functools.update_wrapper(captured, denoiser.forward, assigned=("__doc__",), updated=())
    return captured
