"""Record one real forward as a torch.fx graph: real tensors flow, Python runs, every torch call becomes a node.

The recorder is a ``TorchFunctionMode``. Calls of ``torch.nn`` modules become ``call_module`` nodes, torch functions and
methods ``call_function`` and ``call_method`` nodes, tensors of the module ``get_attr`` nodes. What the forward reads
from tensor values becomes a guard node; what mutates is found by version counters and ordered by ``meta["deps"]``.
"""

from __future__ import annotations

import contextlib
import operator
import types
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from diffcache.tracing.ambient import ambient, wrap
from diffcache.tracing.datawatch import DataWatch
from diffcache.tracing.errors import Uncapturable, user_line
from diffcache.tracing.expect import expect, expect_error
from diffcache.tracing.guards import ModuleReads
from diffcache.tracing.scalars import Tracked, plain, track
from diffcache.tracing.spec import TensorSpec
from diffcache.tracing.torch_calls import (
    FAILS_BY_VALUE,
    LAYOUT,
    METADATA,
    RAW,
    SHAPE,
    TENSOR_PROPERTIES,
    call_name,
    call_target,
    generator_states,
    invoke,
    is_getter,
    is_setter,
    leaves,
    may_write,
    shapes_by_number,
    splits,
    storage_key,
    version_of,
    written_unseen,
)
from diffcache.tracing.trace import ModuleCall, Trace
from diffcache.tracing.values import Values
from diffcache.tracing.watching import Patches


class Recorder(Values, TorchFunctionMode):
    """Records one call of ``root``. ``is_leaf(module, path)`` says which modules become one node."""

    def __init__(
        self, root: nn.Module, is_leaf: Callable[[nn.Module, str], bool], *, track_items: bool = True,
        opaque: Collection[str] = (),
    ):  # fmt: skip
        super().__init__(root, Trace(fx.Graph(), {}, [], ModuleReads()))
        self.opaque, self.is_leaf, self.track_items = opaque, is_leaf, track_items
        self.active = self.passive = False
        self.base = ambient()
        self.paths = {id(module): path for path, module in reversed(list(root.named_modules(remove_duplicate=False)))}
        self._writers: dict[int, fx.Node] = {}
        self.patches = Patches([])

    # -- recording ---------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.active or self.passive:
            return func(*args, **kwargs)
        name = call_name(func)
        if name in RAW or (name == "data" and is_setter(func)):
            raise Uncapturable(f"{name} of a tensor is used at {user_line()}")
        if (
            name in METADATA
            or name == "_set_grad_enabled"
            or (name == "type" and len(args) == 1)
            or (is_getter(func) and name not in TENSOR_PROPERTIES)
        ):
            value = func(*plain(args), **plain(kwargs))
            self._note_fact(name, args)
            return (
                self._shape_read(func, name, args, kwargs, value) if name in SHAPE else self._note_layout(name, value)
            )
        target, nargs = call_target(func, name, args)
        op = "call_method" if isinstance(target, str) else "call_function"
        return self.record(op, target, nargs, kwargs, lambda: func(*plain(args), **plain(kwargs)), name)

    def record(
        self, op: str, target: Any, args: Any, kwargs: Any, run: Callable[[], Any], name: str, *, opaque: bool = False
    ) -> Any:
        """Run one torch call and add its node; of an ``opaque`` call nothing is known, its shapes are not trusted."""
        given = leaves((args, kwargs))
        tensors = [leaf for leaf in given if isinstance(leaf, torch.Tensor)]
        nargs, nkwargs = self.argument(tuple(args)), self.argument(dict(kwargs))
        self.keep(given, may_write(name, kwargs))
        before, rng = [version_of(t) for t in tensors], generator_states()
        inference = any(map(torch.is_inference, tensors))
        watch = DataWatch()
        with watch if not opaque and (inference or op != "call_module") else contextlib.nullcontext():
            try:
                out = run()
            except Uncapturable:
                raise
            except Exception as error:
                self._note_error(op, target, nargs, nkwargs, error)
                raise
        written = [t for t, version in zip(tensors, before, strict=True) if version_of(t) != version]
        written += [
            t
            for t in (*tensors, *written_unseen(name, args, kwargs))
            if t.is_inference() and storage_key(t) in watch.written
        ]
        written += written_unseen(name, args, kwargs)
        if not tensors and not any(isinstance(leaf, torch.Tensor) for leaf in leaves(out)) and out is None:
            return out  # a setting such as torch.manual_seed's bookkeeping, no tensor in sight
        now = ambient()
        if now != self.base:
            op, target, nargs, nkwargs = self._under(now, op, target, nargs, nkwargs)
        node = self.graph.create_node(op, target, nargs, nkwargs, name=self._node_name(name))
        self._place(node)
        node.meta["where"] = user_line()
        random = rng != generator_states() or any(isinstance(leaf, torch.Generator) for leaf in given)
        if random:
            node.meta["random"] = True
        tainted = random or any(n.meta.get("tainted") for n in node.all_input_nodes)
        node.meta["deps"] = tuple({w for t in tensors if (w := self._writers.get(storage_key(t) or 0)) is not None})
        tainted = tainted or any(d.meta.get("tainted") for d in node.meta["deps"])
        node.meta["tainted"] = tainted
        numbers = any(type(leaf) is Tracked for leaf in given) and shapes_by_number(name, args, kwargs)
        shaped = opaque or (watch.seen and op != "call_module") or numbers
        node.meta["data_shaped"] = shaped or any(n.meta.get("data_shaped") for n in node.all_input_nodes)
        self._mark_written(node, written, tainted)
        return self._bind_output(out, node, name, tainted, written)

    def _mark_written(self, node: fx.Node, written: list[torch.Tensor], tainted: bool) -> None:
        if written:
            node.meta["writes"] = True
        for tensor in written:
            storage = storage_key(tensor)
            if storage is None:
                continue
            self._writers[storage] = node
            if storage not in self._owned:
                node.meta["persistent"] = True
                if storage in self.inputs:
                    self.trace.writes_inputs = True
                else:
                    self.trace.persistent.append(tensor)

    def _bind_output(self, out: Any, node: fx.Node, name: str, tainted: bool, written: list[torch.Tensor]) -> Any:
        if isinstance(out, torch.Tensor):
            self.bind(out, node, tainted=tainted)
            return out
        if isinstance(out, tuple | list) and any(isinstance(leaf, torch.Tensor) for leaf in leaves(out)):
            self._bind_items(out, node, name, tainted)
            return out
        if out is None or out is NotImplemented:
            return out
        if name == "item" and type(out) in (int, float) and self.track_items:
            return track(out, node, self)
        if any(isinstance(leaf, torch.Tensor) for leaf in leaves(out)):  # a value of its own kind, such as a block mask
            self.objects[id(out)] = (out, node)
            return out
        return self._guarded(node, out) if node.all_input_nodes else out

    def _bind_items(self, out: Any, node: fx.Node, name: str, tainted: bool) -> None:
        if node.meta.get("data_shaped") and splits(name):
            self.guard(self.record_scalar(len, (node,)), len(out))
        node.meta["val"] = tuple(TensorSpec.of(item) if isinstance(item, torch.Tensor) else None for item in out)
        shaped = node.meta.get("data_shaped")
        for index, item in enumerate(out):
            if isinstance(item, torch.Tensor | tuple | list):
                child = self.graph.call_function(operator.getitem, (node, index))
                self._place(child)
                child.meta.update(tainted=tainted, deps=node.meta["deps"], data_shaped=shaped)
                if isinstance(item, torch.Tensor):
                    self.bind(item, child, tainted=tainted)
                else:
                    self._bind_items(item, child, "", tainted)

    def _under(self, now: Any, op: str, target: Any, args: Any, kwargs: Any) -> tuple[str, Any, Any, Any]:
        """The same op inside the settings that hold now: its callee becomes an argument."""
        function, leading = wrap(self.base, now)
        if op == "call_method":
            callee: Any = target
        elif op == "call_module":
            self.trace.attributes[target] = self.root.get_submodule(target)
            callee = self.graph.get_attr(target)
            self._place(callee)
            callee.meta.update(tainted=False, object=True)
        else:
            callee = self.object_node(target)
        return "call_function", function, (*leading, callee, *args), kwargs

    def _node_name(self, name: str) -> str:
        path = self.trace.calls[self.stack[-1]].path if self.stack else ""
        return f"{path}_{name}".replace(".", "_").strip("_") or name

    def finish(self, out: Any) -> tuple[fx.Node, ...]:
        """Mark the nodes whose memory is written later; the writes that must be done before ``out`` is returned."""
        for node in self.graph.nodes:
            if node.meta.get("storage") in self._writers:
                node.meta["mutated"] = True
            if not node.users and call_name(node.target).removeprefix("linalg_") in FAILS_BY_VALUE:
                node.meta["guard"] = True  # nothing but whether it raises was wanted of it
        keys = {storage_key(leaf) for leaf in leaves(out) if isinstance(leaf, torch.Tensor)}
        return tuple({self._writers[key] for key in keys if key in self._writers})

    def record_scalar(self, function: Any, operands: Any) -> fx.Node:
        """A node for arithmetic or a comparison on tracked numbers."""
        nodes = (o if isinstance(o, fx.Node) else self.argument(o) for o in operands)
        node = self.graph.call_function(function, tuple(nodes))
        self._place(node)
        node.meta.update(tainted=any(n.meta.get("tainted") for n in node.all_input_nodes), deps=())
        return node

    # -- guards ------------------------------------------------------------------------------------------------

    def guard(self, node: fx.Node, value: Any, *, escape: bool = False) -> None:
        """Let the graph hold only while ``node`` gives ``value``; ``escape``: Python went on with the value itself."""
        if escape:
            self.trace.escaped.append(node)
        guard = self.graph.call_function(expect, (node, self.argument(value)))
        self._place(guard)
        guard.meta.update(guard=True, tainted=bool(node.meta.get("tainted")), deps=(), where=user_line())

    def _guarded(self, node: fx.Node, out: Any) -> Any:
        self.guard(node, out)
        return out

    def _note_error(self, op: str, target: Any, args: Any, kwargs: Any, error: Exception) -> None:
        """A torch call raised. If the forward goes on all the same, the graph must see it raise again."""
        if op == "call_module":
            self.trace.swallowed = self.trace.swallowed or user_line()
            return
        callee = target if op == "call_method" else self.object_node(target)
        kind = self.object_node(type(error))
        node = self.graph.call_function(expect_error, (kind, callee, *args), kwargs)
        self._place(node)
        node.meta.update(guard=True, tainted=True, deps=(), where=user_line())

    def _note_fact(self, name: str, args: Any) -> None:
        """A property of a tensor that is the module's own must be the same when the graph is used."""
        if args and isinstance(args[0], torch.Tensor):
            entry = self._nodes.get(id(args[0]))
            if entry is None or entry[1].op == "get_attr":
                self.trace.reads.note_fact(args[0], name)

    def _note_layout(self, name: str, value: Any) -> Any:
        if name in LAYOUT:
            self.trace.layout_read = True
        return value

    def _shape_read(self, func: Any, name: str, args: Any, kwargs: Any, value: Any) -> Any:
        """A shape is a constant of the graph, unless it depends on data: then its numbers are followed."""
        entry = self._nodes.get(id(args[0]))
        if entry is None or entry[0]() is not args[0] or not entry[1].meta.get("data_shaped"):
            return value
        target, nargs = call_target(func, name, args)
        create = self.graph.call_method if isinstance(target, str) else self.graph.call_function
        node = create(target, self.argument(tuple(nargs)), self.argument(dict(kwargs)))
        self._place(node)
        node.meta.update(tainted=True, deps=())
        if not self.track_items:
            return self._guarded(node, value)
        if isinstance(value, int):
            return track(value, node, self)
        numbers = [self.record_scalar(operator.getitem, (node, index)) for index in range(len(value))]
        return tuple(track(number, child, self) for number, child in zip(value, numbers, strict=True))

    def opaque_call(self, function: Any, args: Any, kwargs: Any, run: Callable[[], Any]) -> Any:
        """A call that traces or compiles inside, as one node."""
        name = getattr(function, "__name__", type(function).__name__)

        def unseen() -> Any:
            self.passive = True
            try:
                return run()
            finally:
                self.passive = False

        with self._aside():
            if not isinstance(function, types.FunctionType):
                return self.record("call_function", invoke, (function, *args), kwargs, unseen, name, opaque=True)
            return self.record("call_function", function, args, kwargs, unseen, name, opaque=True)

    # -- modules -----------------------------------------------------------------------------------------------

    def call_module(self, original: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """What ``nn.Module.__call__`` does while recording: a leaf becomes a node, others are entered."""
        path = self.paths.get(id(module))
        if path is None or (module is not self.root and isinstance(module, nn.ModuleList)):
            return original(module, *args, **kwargs)
        self.trace.reads.note_hooks(module)
        leaf = module is not self.root and self.is_leaf(module, path)
        call = ModuleCall(path, type(module).__name__, self._names((args, kwargs)), leaf=leaf,
                          parent=self.stack[-1] if self.stack else -1)  # fmt: skip
        self.trace.calls.append(call)
        self.stack.append(len(self.trace.calls) - 1)
        start = self.node_count
        try:
            if leaf:
                run = lambda: original(module, *plain(args), **plain(kwargs))  # noqa: E731
                with self._aside(), self._leaf(module):
                    out = self.record("call_module", path, args, kwargs, run, "", opaque=path in self.opaque)
            else:
                out = original(module, *args, **kwargs)
        except Uncapturable as error:
            if not hasattr(error, "module_path"):
                error.module_path = path  # type: ignore[attr-defined]
            raise
        finally:
            self.stack.pop()
        call.outputs, call.nodes = self._names(out), (start, self.node_count)
        return out

    @contextlib.contextmanager
    def _leaf(self, module: nn.Module) -> Iterator[None]:
        self.trace.reads.in_leaf = True
        try:
            yield
        finally:
            self.trace.reads.in_leaf = False

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """Off the mode stack: ``torch.nn`` looks for function modes to choose its fast paths."""
        stack = torch.overrides._get_current_function_mode_stack()
        if stack and stack[-1] is self:
            with torch.overrides._pop_mode_temporarily():
                yield
        else:  # another mode lies on top (a default device): stay, and let everything pass
            self.passive = True
            try:
                yield
            finally:
                self.passive = False

    def _names(self, value: Any) -> tuple[str, ...]:
        found = []
        for leaf in leaves(value):
            entry = self._nodes.get(id(leaf)) if isinstance(leaf, torch.Tensor) else None
            if entry is not None and entry[0]() is leaf:
                found.append(entry[1].name)
        return tuple(found)
