"""Capture one variant: record twice, compare, check the graph against the forward bit for bit, or refuse."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import fx, nn

from diffcache.liveness import live_nodes
from diffcache.tracing import tree
from diffcache.tracing.bits import same_bits
from diffcache.tracing.compare import carried_over, first_difference
from diffcache.tracing.errors import CaptureError, GuardFailed, Uncapturable, innermost_line
from diffcache.tracing.session import (
    Bound,
    default_leaf,
    escaped_inputs,
    input_specs,
    number_paths,
    own_copy,
    own_generator,
    record,
    unbind,
)
from diffcache.tracing.source_lines import forward_line, source_line
from diffcache.tracing.spec import TensorSpec
from diffcache.tracing.state import Kept, changes, digest
from diffcache.tracing.trace import Trace

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
        with self.restoring(args, kwargs):
            return self.graph_module.forward(*args, **kwargs)

    @contextlib.contextmanager
    def restoring(self, *values: Any) -> Iterator[None]:
        """Around a run of this graph, or of a program made from it, on ``values``: one that raises leaves no write."""
        if not self._restores:
            yield
            return
        saved = [(tensor, tensor.clone()) for tensor in self.trace.persistent]
        if self.trace.writes_inputs:
            leaves = [leaf for _, leaf in tree.walk(values)]
            saved += [(leaf, leaf.clone()) for leaf in leaves if isinstance(leaf, torch.Tensor)]
        random = RandomState(self.trace, *values) if self._draws else None
        try:
            yield
        except Exception:
            with torch.no_grad():
                for tensor, value in saved:
                    tensor.copy_(value)
            if random is not None:
                random.restore()
            raise

    def __post_init__(self) -> None:
        nodes = self.trace.graph.nodes
        self._draws = any(node.meta.get("random") for node in nodes)
        guarded = any(node.meta.get("guard") or node.meta.get("data_shaped") for node in nodes)
        self._restores = guarded and (bool(self.trace.persistent) or self._draws or self.trace.writes_inputs)


class RandomState:
    """The state of every generator that a call may draw from."""

    def __init__(self, trace: Trace, *values: Any):
        self._cpu = torch.get_rng_state()
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        self._cuda = torch.cuda.get_rng_state_all() if cuda else None
        given = [leaf for _, leaf in tree.walk(values) if isinstance(leaf, torch.Generator)]
        self._others = [(g, g.get_state()) for g in (*given, *(g for g, _ in trace.generators.values()))]

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
        for generator, state in self._others:
            generator.set_state(state)


@contextlib.contextmanager
def untouched(root: nn.Module) -> Iterator[None]:
    """Leave random generators and buffers as they were found."""
    tables = [(m, name, t) for m in root.modules() for name, t in (*m._buffers.items(), *vars(m).items())
              if isinstance(t, torch.Tensor) and not isinstance(t, nn.Parameter)]  # fmt: skip
    saved = [(t, t.detach().clone()) for _, _, t in tables if t.layout == torch.strided and not t.is_inference()]
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        with torch.no_grad():
            for tensor, value in saved:  # by value: some kernels write without counting up the version
                if not same_bits(tensor, value):
                    tensor.copy_(value)


def capture_variant(
    root: nn.Module, signature: inspect.Signature, bound: Bound, leaves: tuple[Any, ...] = ()
) -> Variant:
    """Record ``root`` on these arguments. Runs the forward two or three times and the graph once; changes nothing.

    Raises:
        CaptureError: the forward cannot be replayed exactly; says where and why.
    """
    opaque: dict[str, str] = {}
    if any(map(nn.parameter.is_lazy, (*root.parameters(), *root.buffers()))):
        raise CaptureError(f"{type(root).__name__} has uninitialized parameters: run it once before it is captured")

    if nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks:
        raise CaptureError(
            f"{type(root).__name__} cannot be captured while hooks on all modules are registered "
            "(register_module_forward_hook): they would run for the graph's own module, too"
        )

    def is_leaf(module: nn.Module, path: str) -> bool:
        return path in opaque or default_leaf(module, path) or any(_matches(module, path, leaf) for leaf in leaves)

    while True:
        before = Kept(root)
        try:
            return _attempt(root, signature, bound, is_leaf, opaque)
        except (CaptureError, Exception) as error:
            before.restore()
            if not isinstance(error, Uncapturable):
                raise
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
                escaped: frozenset[tree.Path] = getattr(error, "escaped", frozenset()) - self.static
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
        first = str(error).splitlines()[0] if str(error) else ""
        reason = f"it fails while it is recorded ({type(error).__name__}: {first})"
        raise CaptureError(_refusal(self.root, reason, innermost_line(error))) from error


def _attempt(
    root: nn.Module, signature: inspect.Signature, bound: Bound, is_leaf: Callable[..., bool], opaque: dict[str, str]
) -> Variant:
    recording = _Recording(root, signature, is_leaf, opaque)
    start = digest(root, {})
    first = recording.first(bound)
    codes = first.reads.codes
    filled = changes(start, digest(root, {}))
    middle = digest(root, codes)
    check = _perturbed(bound)
    try:
        second = recording.run(check)
    except (CaptureError, Uncapturable):
        raise
    except Exception:  # the moved inputs are not valid ones (an index out of range): record the given ones again
        check = bound
        second = recording.run(check)
    _refuse_state(root, second, changes(middle, digest(root, codes)))
    if place := carried_over(first, second):
        raise CaptureError(_refusal(root, "it reads a tensor that an earlier call computed from its inputs", place))
    chosen, latest = first, second
    difference = first_difference(first, second)
    if difference is not None and difference[0] != "guard" and filled:  # the first call filled a cache
        chosen, check = second, bound
    elif difference is not None:
        check = bound
        latest = recording.run(bound)
        if (
            first_difference(first, latest) is not None
        ):  # else the moved inputs took another path: guards tell them apart
            if first_difference(second, latest) is not None or carried_over(first, latest) is not None:
                raise CaptureError(_refusal(root, "two calls with equal inputs are different programs", difference[1]))
            chosen = latest  # a cache outside the module was filled
    chosen.reads = latest.reads  # of a call that found every cache filled
    chosen.reads.finish()
    variant = Variant(_graph_module(root, chosen), chosen, input_specs(chosen), recording.static, dict(opaque))
    _verify(root, signature, variant, check)
    return variant


def _perturbed(bound: Bound) -> Bound:
    """The same call a little further on: floating-point tensors scaled by 15/16, exact in every dtype."""

    def leaf(value: Any) -> Any:
        moved = isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
        return value.detach() * 0.9375 if moved else value

    return {name: tree.rebuild(value, leaf) for name, value in bound.items()}


def _refuse_state(root: nn.Module, second: Trace, changed: list[str]) -> None:
    """Refuse a forward that leaves the module different for the next call: hidden state."""
    lasting = second.reads.lasting()
    scratch = {w.name for key, w in second.reads.writes.items() if key not in second.reads.read_first}
    changed = [path for path in changed if path.rpartition(".")[2] not in scratch]
    if lasting:
        reason = f"attribute {lasting[0].name!r} of a module changes at every call"
        raise CaptureError(_refusal(root, reason, lasting[0].where))
    if changed:
        reason = f"Python state changes at every call: {', '.join(changed[:3])}"
        raise CaptureError(_refusal(root, reason, source_line(second.reads.codes, changed[0], root)))


def _refusal(root: nn.Module, reason: str, where: str) -> str:
    return (
        f"{type(root).__name__} cannot be captured exactly: {reason} ({where}). A graph would replay one call's value "
        "for all. Keep such state out of forward, or pass on_uncapturable='eager' to run this denoiser uncached."
    )


def _verify(root: nn.Module, signature: inspect.Signature, variant: Variant, bound: Bound) -> None:
    """On inputs that it was not recorded on, the graph must do what the forward does, bit for bit."""
    eager, inputs, drawn = _outcome(root, signature, variant, bound, lambda a, k: root(*a, **k))
    try:
        got, written, after = _outcome(root, signature, variant, bound, variant.run)
    except GuardFailed as error:
        raise CaptureError(
            _refusal(root, f"its guards fail on the call it was recorded from ({error})", forward_line(root))
        ) from error
    except Exception as error:
        raise CaptureError(
            _refusal(root, f"the recorded graph fails ({type(error).__name__}: {error})", forward_line(root))
        ) from error
    for what, ours, theirs in (("output", got, eager), ("what it writes into its inputs", written, inputs)):
        if (place := _difference(ours, theirs)) is not None:
            raise CaptureError(
                _refusal(root, f"the recorded graph does not reproduce it ({what}{place} differs)", forward_line(root))
            )
    if not torch.equal(drawn, after):
        raise CaptureError(_refusal(root, "the recorded graph draws other random numbers", forward_line(root)))


def _outcome(
    root: nn.Module, signature: inspect.Signature, variant: Variant, bound: Bound, call: Callable[..., Any]
) -> tuple[Any, Any, torch.Tensor]:
    """What a call returns, what its inputs are afterwards, and the state of the generator; all else is put back."""
    own = {name: tree.rebuild(value, _own) for name, value in bound.items()}
    args, kwargs = unbind(signature, own)
    with untouched(root):
        try:
            result = call(args, kwargs)
            result = tree.rebuild(
                result, lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf
            )
            return result, own, torch.get_rng_state()
        finally:
            variant.trace.put_back()


def _difference(ours: Any, theirs: Any) -> str | None:
    """The first place where two results are not the same, or None."""
    left, right = list(tree.walk(ours)), list(tree.walk(theirs))
    if [path for path, _ in left] != [path for path, _ in right] or type(ours) is not type(theirs):
        return ""
    for (path, x), (_, y) in zip(left, right, strict=True):
        if type(x) is not type(y):
            return tree.show(path)
        if isinstance(x, torch.Tensor) and not same_bits(x, y):
            return tree.show(path)
        if isinstance(x, int | float | str) and x != y and x == x:
            return tree.show(path)
    return None


def _own(leaf: Any) -> Any:
    if isinstance(leaf, torch.Generator):
        return own_generator(leaf)
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
    if getattr(holder, name, None) is value:  # inside a module of the model's own, which is left as it is
        return
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
