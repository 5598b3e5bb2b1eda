"""Capture one variant: record twice, compare, check the graph against the forward bit for bit, or refuse."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import fx, nn

from diffcache.liveness import live_nodes
from diffcache.tracing import tree
from diffcache.tracing.compare import carried_over, first_difference, same_bits
from diffcache.tracing.errors import CaptureError, GuardFailed, Uncapturable, innermost_line
from diffcache.tracing.guards import undo
from diffcache.tracing.recorder import Trace
from diffcache.tracing.session import (
    Bound,
    default_leaf,
    escaped_inputs,
    input_specs,
    number_paths,
    own_copy,
    record,
    unbind,
)
from diffcache.tracing.spec import TensorSpec
from diffcache.tracing.state import changes, digest

_MAX_OPAQUE = 16


@dataclass
class Variant:
    """One straight-line graph and what must hold for it to be used."""

    graph_module: fx.GraphModule
    trace: Trace
    inputs: dict[tree.Path, TensorSpec]
    static: frozenset[tree.Path]
    opaque: dict[str, str]

    @property
    def layout_read(self) -> bool:
        return self.trace.layout_read

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the graph; on a failed guard put back what it had written and raise ``GuardFailed``."""
        if not self._restores:
            return self.graph_module(*args, **kwargs)
        saved = [(tensor, tensor.clone()) for tensor in self.trace.persistent]
        try:
            return self.graph_module(*args, **kwargs)
        except GuardFailed:
            with torch.no_grad():
                for tensor, value in saved:
                    tensor.copy_(value)
            raise

    def __post_init__(self) -> None:
        guarded = any(node.meta.get("guard") for node in self.trace.graph.nodes)
        self._restores = guarded and bool(self.trace.persistent)


@contextlib.contextmanager
def untouched(root: nn.Module) -> Iterator[None]:
    """Leave random generators and buffers as they were found."""
    tables = [(m, name, t) for m in root.modules() for name, t in (*m._buffers.items(), *vars(m).items())
              if isinstance(t, torch.Tensor) and not isinstance(t, nn.Parameter)]  # fmt: skip
    saved = [(t, t.detach().clone()) for _, _, t in tables if t.layout == torch.strided and not t.is_inference()]
    versions = [t._version for t, _ in saved]
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        with torch.no_grad():
            for (tensor, value), version in zip(saved, versions, strict=True):
                if tensor._version != version:
                    tensor.copy_(value)


def capture_variant(root: nn.Module, signature: inspect.Signature, bound: Bound, leaves: tuple[Any, ...] = ()) -> Variant:
    """Record ``root`` on these arguments. Runs the forward two or three times and the graph once; changes nothing.

    Raises:
        CaptureError: the forward cannot be replayed exactly; says where and why.
    """
    opaque: dict[str, str] = {}

    def is_leaf(module: nn.Module, path: str) -> bool:
        return path in opaque or default_leaf(module, path) or any(_matches(module, path, leaf) for leaf in leaves)

    while True:
        try:
            return _attempt(root, signature, bound, is_leaf, opaque)
        except Uncapturable as error:
            path = getattr(error, "module_path", "")
            if not path or path in opaque or len(opaque) >= _MAX_OPAQUE:
                raise CaptureError(f"{type(root).__name__} cannot be captured exactly: {error}") from error
            kind = type(root.get_submodule(path))
            opaque.update({p: str(error) for p, m in root.named_modules() if type(m) is kind and m is not root})


def _matches(module: nn.Module, path: str, leaf: Any) -> bool:
    return path == leaf if isinstance(leaf, str) else isinstance(module, leaf)


@dataclass
class _Recording:
    """The arguments of ``record`` that stay the same over one capture."""

    root: nn.Module
    signature: inspect.Signature
    is_leaf: Callable[[nn.Module, str], bool]
    opaque: dict[str, str]
    static: frozenset[tree.Path] = frozenset()
    track_items: bool = True

    def run(self, bound: Bound) -> Trace:
        with untouched(self.root):
            return record(self.root, self.signature, bound, self.is_leaf, self.static, self.track_items, self.opaque)

    def first(self, bound: Bound) -> Trace:
        """Record; numbers that Python uses itself, or that a torch call does not take as tracked, become constants."""
        while True:
            try:
                trace = self.run(bound)
            except (CaptureError, Uncapturable):
                raise
            except Exception as error:
                escaped = getattr(error, "escaped", frozenset()) - self.static
                if not escaped and not self.track_items:
                    self._explain(bound, error)
                if not escaped:
                    self.track_items, escaped = False, number_paths(bound)
                self.static |= escaped
                continue
            escaped = escaped_inputs(trace) - self.static
            if not escaped:
                return trace
            self.static |= escaped


    def _explain(self, bound: Bound, error: Exception) -> NoReturn:
        """The forward raised while recorded: its own error if it raises by itself, else a refusal."""
        args, kwargs = unbind(self.signature, {name: tree.rebuild(value, _own) for name, value in bound.items()})
        with untouched(self.root):
            self.root(*args, **kwargs)
        reason = f"it fails while it is recorded ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        raise CaptureError(_refusal(self.root, reason, innermost_line(error))) from error


def _attempt(
    root: nn.Module, signature: inspect.Signature, bound: Bound, is_leaf: Callable[..., bool], opaque: dict[str, str]
) -> Variant:
    recording = _Recording(root, signature, is_leaf, opaque)
    start = digest(root)
    first = recording.first(bound)
    middle = digest(root)
    other = _perturbed(bound)
    try:
        second = recording.run(other)
    except (CaptureError, Uncapturable):
        raise
    except Exception:  # the moved inputs are not valid ones (an index out of range): record the given ones again
        other = bound
        second = recording.run(other)
    _refuse_state(root, first, second, changes(middle, digest(root)))
    if place := carried_over(first, second):
        raise CaptureError(_refusal(root, "it reads a tensor that an earlier call computed from its inputs", place))
    chosen, check, expected = first, other, second
    difference = first_difference(first, second)
    if difference is not None and difference[0] != "guard" and changes(start, middle):  # the first call filled a cache
        chosen, check, expected = second, bound, first
    elif difference is not None:
        again = recording.run(bound)
        if first_difference(first, again) is None:  # the moved inputs took another path: guards tell them apart
            check, expected = bound, again
        elif first_difference(second, again) is None and carried_over(first, again) is None:
            chosen, check, expected = again, bound, first  # a cache outside the module was filled
        else:
            raise CaptureError(_refusal(root, "two calls with equal inputs are different programs", difference[1]))
    variant = Variant(_graph_module(root, chosen), chosen, input_specs(chosen), recording.static, dict(opaque))
    _verify(root, signature, variant, check, expected)
    return variant


def _perturbed(bound: Bound) -> Bound:
    """The same call a little further on: floating-point tensors scaled by 15/16, exact in every dtype."""

    def leaf(value: Any) -> Any:
        moved = isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
        return value.detach() * 0.9375 if moved else value

    return {name: tree.rebuild(value, leaf) for name, value in bound.items()}


def _refuse_state(root: nn.Module, first: Trace, second: Trace, changed: list[str]) -> None:
    """A forward that leaves the module different for the next call has hidden state: refuse, and undo the calls made."""
    lasting = second.reads.lasting()
    scratch = {w.name for key, w in second.reads.writes.items() if key not in second.reads.read_first}
    changed = [path for path in changed if path.rpartition(".")[2] not in scratch]
    if not changed and not lasting:
        return
    undo(second.reads)
    undo(first.reads)
    if lasting:
        reason = f"attribute {lasting[0].name!r} of a module changes at every call"
        raise CaptureError(_refusal(root, reason, lasting[0].where))
    reason = f"Python state changes at every call: {', '.join(changed[:3])}"
    raise CaptureError(_refusal(root, reason, _source_line(root, changed[0])))


def _refusal(root: nn.Module, reason: str, where: str) -> str:
    return (
        f"{type(root).__name__} cannot be captured exactly: {reason} ({where}). A graph would replay one call's value "
        "for all. Keep such state out of forward, or pass on_uncapturable='eager' to run this denoiser uncached."
    )


def _source_line(root: nn.Module, path: str) -> str:
    """The line that most likely changes the state at ``path``: an assignment to that name in a method but ``__init__``."""
    names = [part for part in re.split(r"[^A-Za-z0-9_]+", path) if part.isidentifier()]
    for name in reversed(names):
        write = re.compile(rf"\b{name}\b(\[.*\])?\s*([-+*/|&]|//)?=(?!=)|\b{name}\.(append|add|pop|update|extend)|next\(.*\b{name}\b")
        for kind in {type(module) for module in root.modules()}:
            if kind.__module__.startswith(("torch.", "builtins")):
                continue
            if found := _search_methods(kind, write):
                return found
    forward = inspect.unwrap(root.forward)
    code = getattr(forward, "__code__", None)
    return f"{path}, in {os.path.basename(code.co_filename)}:{code.co_firstlineno}" if code else path


def _search_methods(kind: type, pattern: re.Pattern[str]) -> str | None:
    try:
        lines, start = inspect.getsourcelines(kind)
        file = os.path.basename(inspect.getsourcefile(kind) or "?")
    except (OSError, TypeError):
        return None
    method = ""
    for number, line in enumerate(lines, start):
        if line.lstrip().startswith("def "):
            method = line
        if method and "init" not in method and pattern.search(line.partition("#")[0]):
            return f"{file}:{number}: {line.strip()}"
    return None


def _verify(root: nn.Module, signature: inspect.Signature, variant: Variant, bound: Bound, expected: Trace) -> None:
    """The graph on inputs it was not recorded on must give the forward's result, bit for bit."""
    own = {name: tree.rebuild(value, _own) for name, value in bound.items()}
    args, kwargs = unbind(signature, own)
    try:
        with untouched(root):
            got = variant.run(args, kwargs)
    except GuardFailed as error:
        raise CaptureError(_refusal(root, "its guards fail on the call it was recorded from", str(error))) from error
    pairs = zip(tree.walk(got), tree.walk(expected.output), strict=False)
    for (path, ours), (_, theirs) in pairs:
        same = same_bits(ours, theirs) if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor) else True
        if not same:
            raise CaptureError(
                _refusal(root, "the recorded graph does not reproduce it", f"output{tree.show(path)} differs")
            )


def _own(leaf: Any) -> Any:
    return own_copy(leaf) if isinstance(leaf, torch.Tensor) else leaf


def _graph_module(root: nn.Module, trace: Trace) -> fx.GraphModule:
    """A GraphModule over the root's own modules and tensors: nothing is copied."""
    _drop_unused(trace.graph)
    holder = nn.Module()
    for node in trace.graph.nodes:
        if node.op == "call_module":
            _attach(holder, str(node.target), root.get_submodule(str(node.target)))
        elif node.op == "get_attr":
            _attach(holder, str(node.target), trace.attributes[str(node.target)])
    module = fx.GraphModule(holder, trace.graph, class_name=f"Captured{type(root).__name__}")
    for node in trace.graph.nodes:
        if node.op == "get_attr":
            _attach(module, str(node.target), trace.attributes[str(node.target)])
    return module


def _attach(holder: nn.Module, target: str, value: Any) -> None:
    *prefix, name = target.split(".")
    for part in prefix:
        if part not in holder._modules:
            holder.add_module(part, nn.Module())
        holder = holder.get_submodule(part)
    if isinstance(value, nn.Module):
        holder.add_module(name, value)
    elif isinstance(value, nn.Parameter):
        holder.register_parameter(name, value)
    elif isinstance(value, torch.Tensor):
        holder._buffers.pop(name, None)
        holder.register_buffer(name, value, persistent=False)
    else:
        object.__setattr__(holder, name, value)


def _drop_unused(graph: fx.Graph) -> None:
    """Remove what the forward computes and throws away, so that the printed graph is the program."""
    live = live_nodes(graph)
    for node in reversed(list(graph.nodes)):
        if node not in live:
            graph.erase_node(node)
