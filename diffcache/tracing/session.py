"""One recorded run: the patches that let the recorder see module calls, and the run itself."""

from __future__ import annotations

import inspect
import operator
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import fx, nn

from diffcache.tracing import tree
from diffcache.tracing.compiled import uncompiled
from diffcache.tracing.errors import CaptureError
from diffcache.tracing.executed import executed_code
from diffcache.tracing.opaque import opaque_functions
from diffcache.tracing.recorder import Recorder
from diffcache.tracing.scalars import Tracked, track
from diffcache.tracing.spec import TensorSpec
from diffcache.tracing.trace import Trace
from diffcache.tracing.watching import Patch, Patches, watch_modules

Bound = dict[str, Any]
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_VARIADIC: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def default_leaf(module: nn.Module, path: str) -> bool:
    """The deepest nodes: modules of ``torch.nn`` that are no containers, and scripted modules."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    home = type(module).__module__
    return home.startswith(("torch.nn.", "torch.ao.")) and not isinstance(module, _CONTAINERS)


def bind(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Bound:
    """Arguments by parameter name as passed (no defaults); ``*args`` and ``**kwargs`` keep their stars."""
    bound = signature.bind(*args, **kwargs).arguments
    return {_VARIADIC.get(signature.parameters[name].kind, "") + name: value for name, value in bound.items()}


def unbind(signature: inspect.Signature, bound: Bound) -> tuple[tuple[Any, ...], dict[str, Any]]:
    arguments = inspect.BoundArguments(signature, {name.lstrip("*"): value for name, value in bound.items()})  # type: ignore[arg-type]
    return arguments.args, arguments.kwargs


def write_input(container: Any, path: tree.Path, value: Any) -> None:
    """What a forward wrote into one of its arguments (a key-value cache object, say), written again."""
    tree.assign(container, path, value)


def own_copy(value: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides and offset; of a view into something much larger, an alias."""
    if type(value) is not torch.Tensor or value.layout != torch.strided:
        return value.detach()
    storage = value.untyped_storage()
    if storage.nbytes() > 4 * value.numel() * value.element_size() + 4096:
        return value.detach()
    with torch.no_grad():
        empty = torch.empty(0, dtype=value.dtype, device=value.device)
        return empty.set_(storage.clone(), value.storage_offset(), value.shape, value.stride())


def own_generator(value: torch.Generator) -> torch.Generator:
    """A generator that will draw the same numbers."""
    copy = torch.Generator(device=value.device)
    copy.set_state(value.get_state())
    return copy


def _routes(recorder: Recorder) -> list[Patch]:
    """Patches that route module calls, TorchScript functions and NumPy conversions through the recorder."""
    thread = threading.get_ident()
    call, script, from_numpy = nn.Module.__call__, torch._C.ScriptFunction.__call__, torch.from_numpy

    def mine() -> bool:
        return recorder.active and not recorder.passive and threading.get_ident() == thread

    def call_module(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not mine() or not torch._C._is_torch_function_mode_enabled():
            return call(self, *args, **kwargs)
        # what was compiled is seen through: a program made of the parts is compiled as a whole
        return recorder.call_module(nn.Module._call_impl, uncompiled(self), args, kwargs)

    def call_script(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = lambda: script(self, *args, **kwargs)  # noqa: E731
        return recorder.opaque_call(self, args, kwargs, run) if mine() else run()

    def call_from_numpy(array: Any) -> torch.Tensor:
        value = from_numpy(array)
        if mine():
            recorder.literals[id(value)] = value
        return value

    script_class = torch._C.ScriptFunction
    return [
        (nn.Module, "__call__", call_module),
        (script_class, "__call__", call_script),
        (torch, "from_numpy", call_from_numpy),
    ]


def record(
    root: nn.Module,
    signature: inspect.Signature,
    bound: Bound,
    is_leaf: Callable[[nn.Module, str], bool],
    static: frozenset[tree.Path],
    track_items: bool = True,
    opaque: Collection[str] = (),
) -> Trace:
    """Run ``root`` once on ``bound`` and return its trace. Inputs are not changed; ``static`` numbers are constants.

    An exception of the forward itself carries the numbers that Python had used so far as ``escaped``.
    """
    recorder = Recorder(root, is_leaf, track_items=track_items, opaque=opaque)
    inputs = _place_inputs(recorder, bound, static)
    before = {name: tree.rebuild(value, lambda leaf: leaf) for name, value in inputs.items()}
    args, kwargs = unbind(signature, inputs)
    try:
        reads = recorder.trace.reads
        recorder.patches = Patches([*watch_modules(reads), *_routes(recorder)])
        with recorder.patches, opaque_functions(recorder), executed_code(reads.codes), recorder:
            recorder.active = True
            try:
                out = root(*args, **kwargs)
            finally:
                recorder.active = False
    except Exception as error:
        recorder.trace.put_back()
        error.escaped = escaped_inputs(recorder.trace)  # type: ignore[attr-defined]
        raise
    if recorder.trace.swallowed:
        raise CaptureError(
            f"{type(root).__name__} cannot be captured exactly: an error of a module is caught, after "
            f"{recorder.trace.swallowed}"
        )
    _replay_input_writes(recorder, before, inputs)
    recorder.graph.output(_output(recorder, out)).meta["deps"] = recorder.finish((out, inputs))
    recorder.trace.put_back()
    recorder.trace.output = tree.rebuild(out, lambda leaf: leaf.number if type(leaf) is Tracked else leaf)
    return recorder.trace


def _place_inputs(recorder: Recorder, bound: Bound, static: frozenset[tree.Path]) -> Bound:
    """Placeholders for the passed parameters, nodes for the tensors and numbers in them; the values to run on."""
    placeholders: dict[str, fx.Node] = {}
    for name in bound:
        node = recorder.graph.placeholder(name)
        node.meta.update(tainted=True, call=-1, path="")
        placeholders[name] = node

    def place(value: Any, node: fx.Node, path: tree.Path) -> Any:
        if isinstance(value, torch.Tensor):
            own = own_copy(value)  # an object of its own for every leaf; the caller's is never written
            recorder.bind_input(own, node)
            node.meta["input"] = path
            return own
        if isinstance(value, torch.Generator):
            copy = own_generator(value)
            recorder.objects[id(copy)] = (copy, node)
            return copy
        if type(value) in (int, float) and path not in static:
            node.meta.update(tainted=True, input=path)
            return track(value, node, recorder)
        if callable(value):
            recorder.trace.reads.note_held(value, tree.show(path))
        return value

    def enter(value: Any, node: fx.Node, path: tree.Path) -> Any:
        if not tree.is_container(value):
            return place(value, node, path)
        items = {}
        for step, item in tree.children(value):
            if any(
                isinstance(leaf, torch.Tensor | torch.Generator) or type(leaf) in (int, float)
                for _, leaf in tree.walk(item)
            ):
                function = operator.getitem if step[0] == "item" else getattr
                child = recorder.graph.call_function(function, (node, step[1]))
                child.meta.update(tainted=True, call=-1, path="", deps=())
                items[step] = enter(item, child, (*path, step))
            else:
                items[step] = tree.rebuild(item, lambda leaf: leaf)
        return tree.with_children(value, items)

    return {name: enter(value, placeholders[name], (("item", name),)) for name, value in bound.items()}


def _replay_input_writes(recorder: Recorder, before: Bound, after: Bound) -> None:
    """Nodes that write into argument objects what the forward wrote into them."""
    placeholders = {str(node.target): node for node in recorder.graph.nodes if node.op == "placeholder"}
    for name, value in after.items():
        for path, now in tree.differences(before[name], value):
            if not path:
                continue
            item = recorder.argument(now)
            node = recorder.graph.call_function(write_input, (placeholders[name], path, item))
            node.meta.update(writes=True, persistent=True, tainted=True, call=-1, path="", deps=())
            recorder.trace.effects.append(node)


def _output(recorder: Recorder, out: Any) -> Any:
    """The forward's return value as fx arguments; dataclasses and other objects are put together by a node."""
    if isinstance(out, torch.Tensor):
        return recorder.node_of(out)
    if type(out) is Tracked:
        return out.node
    if not tree.is_container(out):
        return recorder.argument(out)
    if type(out) in (list, tuple):
        return type(out)(_output(recorder, item) for item in out)
    if type(out) is dict:
        return {key: _output(recorder, item) for key, item in out.items()}
    if isinstance(out, tuple) and hasattr(out, "_fields"):
        node = recorder.graph.call_function(type(out), tuple(_output(recorder, item) for item in out))
    elif hasattr(type(out), "__dataclass_fields__"):
        fields = {
            name: _output(recorder, getattr(out, name)) for name, f in type(out).__dataclass_fields__.items() if f.init
        }
        node = recorder.graph.call_function(type(out), (), fields)
    else:
        attributes = (
            {name: _output(recorder, item) for name, item in vars(out).items()} if hasattr(out, "__dict__") else {}
        )
        items = {key: _output(recorder, item) for key, item in out.items()} if isinstance(out, Mapping) else {}
        if not isinstance(out, Mapping) and not hasattr(out, "__dict__"):
            raise CaptureError(f"the forward returns a {type(out).__name__}, whose parts cannot be reached")
        parts: Any = (recorder.object_node(type(out)), attributes, items)
        node = recorder.graph.call_function(tree.rebuild_object, parts)
    node.meta.update(tainted=True, call=-1, path="", deps=(), assembles=True)
    return node


def input_specs(trace: Trace) -> dict[tree.Path, TensorSpec]:
    return {
        node.meta["input"]: node.meta["val"]
        for node in trace.graph.nodes
        if "input" in node.meta and "val" in node.meta
    }


def escaped_inputs(trace: Trace) -> frozenset[tree.Path]:
    """Numbers among the inputs whose value Python used itself (a range, a shape)."""
    found, todo, seen = set(), list(trace.escaped), set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if "input" in node.meta and "val" not in node.meta:
            found.add(node.meta["input"])
        todo.extend(n for n in node.all_input_nodes if "val" not in n.meta)
    return frozenset(found)


def number_paths(bound: Bound) -> frozenset[tree.Path]:
    return frozenset(
        path
        for name, value in bound.items()
        for path, leaf in tree.walk(value, (("item", name),))
        if type(leaf) in (int, float)
    )
