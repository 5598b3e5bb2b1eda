"""Record one real forward as a torch.fx graph: real tensors flow, Python runs, every torch call becomes a node.

The recorder is a ``TorchFunctionMode``. Calls of ``torch.nn`` modules become ``call_module`` nodes, torch functions and
methods ``call_function`` and ``call_method`` nodes, tensors of the module ``get_attr`` nodes. What the forward reads
from tensor values becomes a guard node; what mutates is found by version counters and ordered by ``meta["deps"]``.
"""

from __future__ import annotations

import contextlib
import operator
import types
import weakref
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from diffcache.tracing import tree
from diffcache.tracing.ambient import ambient, wrap
from diffcache.tracing.datawatch import DataWatch
from diffcache.tracing.errors import Uncapturable, user_line
from diffcache.tracing.expect import expect
from diffcache.tracing.guards import ModuleReads
from diffcache.tracing.scalars import Tracked, plain, track
from diffcache.tracing.spec import TensorSpec

METADATA = frozenset(
    "size dim ndimension numel nelement stride storage_offset is_contiguous element_size get_device is_floating_point "
    "is_complex is_signed is_inference is_shared is_pinned is_same_size is_tensor result_type can_cast promote_types "
    "__len__ __hash__ __repr__ __format__ _is_view has_names is_conj is_neg is_coalesced is_distributed "
    "dense_dim sparse_dim __dir__ __reduce_ex__ __deepcopy__ _is_zerotensor is_storage register_hook broadcast_shapes "
    "retain_grad is_nested __dlpack_device__".split()
)
LAYOUT = frozenset(("stride", "is_contiguous", "storage_offset"))
SHAPE = frozenset(("size", "numel", "nelement", "__len__", "shape"))
RAW = frozenset(("data_ptr", "untyped_storage", "storage", "__dlpack__", "_typed_storage", "set_", "resize_"))


@dataclass
class ModuleCall:
    """One call of a module that is not a leaf: names of the nodes that entered and left it, in order."""

    path: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...] = ()
    nodes: tuple[int, int] = (0, 0)
    parent: int = -1
    leaf: bool = False


@dataclass
class Trace:
    """What recording one forward gives."""

    graph: fx.Graph
    attributes: dict[str, Any]
    calls: list[ModuleCall]
    reads: ModuleReads
    output: Any = None
    produced: dict[int, tuple[weakref.ref[Any], fx.Node]] = field(default_factory=dict)
    unseen: dict[str, str] = field(default_factory=dict)
    escaped: list[fx.Node] = field(default_factory=list)
    layout_read: bool = False
    persistent: list[torch.Tensor] = field(default_factory=list)
    effects: list[fx.Node] = field(default_factory=list)


class Recorder(TorchFunctionMode):
    """Records one call of ``root``. ``is_leaf(module, path)`` says which modules become one node."""

    def __init__(
        self, root: nn.Module, is_leaf: Callable[[nn.Module, str], bool], *, track_items: bool = True,
        opaque: Collection[str] = (),
    ):  # fmt: skip
        super().__init__()
        self.opaque = opaque
        self.root, self.is_leaf, self.track_items = root, is_leaf, track_items
        self.graph = fx.Graph()
        self.trace = Trace(self.graph, {}, [], ModuleReads())
        self.active = self.passive = False
        self.base = ambient()
        self.stack: list[int] = []
        self.node_count = 0
        self.paths = {id(module): path for path, module in reversed(list(root.named_modules(remove_duplicate=False)))}
        self.names = self._tensor_names()
        self._nodes: dict[int, tuple[weakref.ref[Any], fx.Node]] = {}  # by identity, for as long as the tensor lives
        self._writers: dict[int, fx.Node] = {}
        self._storages: dict[int, StorageWeakRef] = {}
        self._owned: set[int] = set()
        self.objects: dict[int, tuple[Any, fx.Node]] = {}  # what opaque calls return besides tensors
        self.literals: dict[int, torch.Tensor] = {}  # made from NumPy data: equal data is the same constant

    def _tensor_names(self) -> dict[int, str]:
        """Parameters, buffers, and tensors kept as plain attributes, by identity."""
        names: dict[int, str] = {}
        for path, module in self.root.named_modules():
            prefix = f"{path}." if path else ""
            for table in (module._parameters, module._buffers, vars(module)):
                for name, value in table.items():
                    if isinstance(value, torch.Tensor):
                        names.setdefault(id(value), prefix + name)
        return names

    # -- nodes and the tensors they stand for ------------------------------------------------------------------

    def bind(self, value: torch.Tensor, node: fx.Node, *, tainted: bool) -> None:
        """Let ``node`` stand for ``value`` from here on."""
        key = id(value)
        self._nodes[key] = self.trace.produced[key] = (weakref.ref(value), node)
        node.meta["tainted"] = tainted
        node.meta.setdefault("val", TensorSpec.of(value))
        storage = _storage_key(value)
        node.meta["storage"] = storage
        if storage is not None and storage not in self._storages:
            self._storages[storage] = StorageWeakRef(value.untyped_storage())
            self._owned.add(storage)

    def bind_input(self, value: torch.Tensor, node: fx.Node) -> None:
        """An input: like ``bind``, but a write to it is seen by the caller and so always live."""
        self.bind(value, node, tainted=True)
        self._owned.discard(_storage_key(value) or 0)

    def node_of(self, value: torch.Tensor) -> fx.Node:
        """The node that stands for a tensor; tensors of the module and constants get one at their first use."""
        entry = self._nodes.get(id(value))
        if entry is not None and entry[0]() is value:
            return entry[1]
        if torch._C._functorch.is_functorch_wrapped_tensor(value):
            raise Uncapturable(f"a tensor inside vmap or grad at {user_line()}")
        name = self.names.get(id(value))
        unseen = name is None and id(value) not in self.literals
        if name is None:
            if _storage_key(value) in self._owned:
                raise Uncapturable(f"a tensor made from recorded ones by code that torch does not show, at {user_line()}")
            name = f"_constant_{len(self.trace.attributes)}"
        node = self.graph.get_attr(name)
        self._place(node)
        self.trace.attributes[name] = value
        if unseen:
            self.trace.unseen[name] = user_line()
        self._nodes[id(value)] = (weakref.ref(value), node)
        node.meta.update(val=TensorSpec.of(value), tainted=False, storage=_storage_key(value))
        return node

    def _place(self, node: fx.Node) -> None:
        self.node_count += 1
        node.meta["call"] = self.stack[-1] if self.stack else -1
        node.meta["path"] = self.trace.calls[self.stack[-1]].path if self.stack else ""

    def argument(self, value: Any) -> Any:
        """A call's argument as fx wants it: tensors and tracked numbers as nodes, containers walked, objects by name."""
        if isinstance(value, torch.Tensor):
            return self.node_of(value)
        if type(value) is Tracked:
            return value.node
        if isinstance(value, torch.Size):
            return tuple(value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(self.argument, value))
        if isinstance(value, list | tuple):
            return type(value)(map(self.argument, value)) if type(value) in (list, tuple) else list(map(self.argument, value))
        if type(value) is dict:
            return {key: self.argument(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(self.argument(value.start), self.argument(value.stop), self.argument(value.step))
        if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0:
            return value.item()  # NumPy's float64 is a float, but prints as NumPy
        if isinstance(value, _IMMEDIATE) or value is Ellipsis:
            return value
        if id(value) in self.objects:
            return self.objects[id(value)][1]
        return self.closure_node(value) if isinstance(value, types.FunctionType) else self.object_node(value)

    def closure_node(self, value: types.FunctionType) -> fx.Node:
        """A function passed to a torch call; what its closure holds of this forward's values becomes arguments."""
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        held = {k: self.argument(cell) for k, cell in enumerate(cells) if any(map(self._is_computed, _leaves(cell)))}
        if not held:
            return self.object_node(value)
        node = self.graph.call_function(with_closure, (self.object_node(value, check=False), held))
        self._place(node)
        node.meta.update(tainted=any(n.meta.get("tainted") for n in node.all_input_nodes), deps=())
        return node

    def _is_computed(self, leaf: Any) -> bool:
        if type(leaf) is Tracked:
            return True
        entry = self._nodes.get(id(leaf)) if isinstance(leaf, torch.Tensor) else None
        return entry is not None and entry[0]() is leaf

    def object_node(self, value: Any, *, check: bool = True) -> fx.Node:
        """A Python object passed to a torch call, kept as an attribute of the graph."""
        if check and not callable(value) and any(map(self._is_computed, _leaves(value))):
            raise Uncapturable(f"a {type(value).__name__} that holds a computed tensor is passed on at {user_line()}")
        name = f"_object_{len(self.trace.attributes)}"
        self.trace.attributes[name] = value
        node = self.graph.get_attr(name)
        self._place(node)
        node.meta.update(tainted=False, object=True)
        return node

    # -- recording ---------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.active or self.passive:
            return func(*args, **kwargs)
        name = _name(func)
        if name in RAW or (name == "data" and _is_setter(func)):
            raise Uncapturable(f"{name} of a tensor is used at {user_line()}")
        if name in METADATA or name == "_set_grad_enabled" or (name == "type" and len(args) == 1) or (_is_getter(func) and name not in _TENSOR_PROPERTIES):
            value = func(*plain(args), **plain(kwargs))
            return self._shape_read(func, name, args, kwargs, value) if name in SHAPE else self._note_layout(name, value)
        target, nargs = _target(func, name, args)
        op = "call_method" if isinstance(target, str) else "call_function"
        return self.record(op, target, nargs, kwargs, lambda: func(*plain(args), **plain(kwargs)), name)

    def record(
        self, op: str, target: Any, args: Any, kwargs: Any, run: Callable[[], Any], name: str, *, opaque: bool = False
    ) -> Any:
        """Run one torch call and add its node; of an ``opaque`` call nothing is known, so its shapes are not trusted."""
        tensors = [leaf for leaf in _leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        nargs, nkwargs = self.argument(tuple(args)), self.argument(dict(kwargs))
        before, rng, watch = [_version(t) for t in tensors], _rng(), DataWatch()
        with contextlib.nullcontext() if opaque or op == "call_module" else watch:
            out = run()
        written = [t for t, version in zip(tensors, before, strict=True) if _version(t) != version]
        if not written and name.endswith("_") and not name.endswith("__") and any(map(torch.is_inference, tensors)):
            written = tensors[:1]
        if not tensors and not any(isinstance(leaf, torch.Tensor) for leaf in _leaves(out)) and out is None:
            return out  # a setting such as torch.manual_seed's bookkeeping, no tensor in sight
        now = ambient()
        if now != self.base:
            op, target, nargs, nkwargs = self._under(now, op, target, nargs, nkwargs)
        node = self.graph.create_node(op, target, nargs, nkwargs, name=self._node_name(name))
        self._place(node)
        node.meta["where"] = None
        random = rng != _rng()
        if random:
            node.meta["random"] = True
        tainted = random or any(n.meta.get("tainted") for n in node.all_input_nodes)
        node.meta["deps"] = tuple({w for t in tensors if (w := self._writers.get(_storage_key(t) or 0)) is not None})
        tainted = tainted or any(d.meta.get("tainted") for d in node.meta["deps"])
        node.meta["tainted"] = tainted
        node.meta["data_shaped"] = opaque or watch.seen or any(n.meta.get("data_shaped") for n in node.all_input_nodes)
        self._mark_written(node, written, tainted)
        return self._bind_output(out, node, name, tainted, written)

    def _mark_written(self, node: fx.Node, written: list[torch.Tensor], tainted: bool) -> None:
        if written:
            node.meta["writes"] = True
        for tensor in written:
            storage = _storage_key(tensor)
            if storage is None:
                continue
            self._writers[storage] = node
            if storage not in self._owned:
                node.meta["persistent"] = True
                self.trace.persistent.append(tensor)

    def _bind_output(self, out: Any, node: fx.Node, name: str, tainted: bool, written: list[torch.Tensor]) -> Any:
        if isinstance(out, torch.Tensor):
            self.bind(out, node, tainted=tainted)
            return out
        if isinstance(out, tuple | list) and any(isinstance(leaf, torch.Tensor) for leaf in _leaves(out)):
            self._bind_items(out, node, tainted)
            return out
        if out is None or out is NotImplemented:
            return out
        if name == "item" and type(out) in (int, float) and self.track_items:
            return track(out, node, self)
        if any(isinstance(leaf, torch.Tensor) for leaf in _leaves(out)):  # a value of its own kind, such as a block mask
            self.objects[id(out)] = (out, node)
            return out
        return self._guarded(node, out) if node.all_input_nodes else out

    def _bind_items(self, out: Any, node: fx.Node, tainted: bool) -> None:
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
                    self._bind_items(item, child, tainted)

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
        keys = {_storage_key(leaf) for leaf in _leaves(out) if isinstance(leaf, torch.Tensor)}
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

    def _note_layout(self, name: str, value: Any) -> Any:
        if name in LAYOUT:
            self.trace.layout_read = True
        return value

    def _shape_read(self, func: Any, name: str, args: Any, kwargs: Any, value: Any) -> Any:
        """A shape is a constant of the graph, unless it depends on data: then its numbers are followed."""
        entry = self._nodes.get(id(args[0]))
        if entry is None or entry[0]() is not args[0] or not entry[1].meta.get("data_shaped"):
            return value
        target, nargs = _target(func, name, args)
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
                with self._aside():
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
        for leaf in _leaves(value):
            entry = self._nodes.get(id(leaf)) if isinstance(leaf, torch.Tensor) else None
            if entry is not None and entry[0]() is leaf:
                found.append(entry[1].name)
        return tuple(found)


_IMMEDIATE = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.layout,
              torch.memory_format, range)  # fmt: skip
_TENSOR_PROPERTIES = frozenset(("T", "mT", "H", "mH", "real", "imag", "data", "grad"))
_GETTER = type(torch.Tensor.shape.__get__)  # type: ignore[attr-defined]


def _name(func: Any) -> str:
    if _is_getter(func) or _is_setter(func):
        return func.__self__.__name__
    return getattr(func, "__name__", type(func).__name__)


def _is_getter(func: Any) -> bool:
    return isinstance(func, _GETTER) and func.__name__ == "__get__"


def _is_setter(func: Any) -> bool:
    return isinstance(func, _GETTER) and func.__name__ == "__set__"


def _target(func: Any, name: str, args: Any) -> tuple[Any, Any]:
    """How the graph calls it: properties by getattr, methods by name, everything else as the function itself."""
    if _is_getter(func):
        return getattr, (args[0], name)
    descriptor = isinstance(func, types.MethodDescriptorType | types.WrapperDescriptorType | types.FunctionType)
    if descriptor and args and isinstance(args[0], torch.Tensor) and getattr(torch.Tensor, name, None) is func:
        return name, args
    return func, args


def _leaves(value: Any) -> list[Any]:
    """Leaves of an argument or output: lists, tuples, mappings and plain objects are walked."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for _, leaf in tree.walk(value)]


def _storage_key(value: torch.Tensor) -> int | None:
    try:
        with torch._C.DisableTorchFunction():
            return value.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # sparse, nested and wrapper tensors have no storage
        return None


def _version(value: torch.Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return 0 if value.is_inference() else value._version


def _rng() -> Any:
    state: list[Any] = [torch.default_generator.get_state().numpy().tobytes()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state += [g.get_offset() for g in torch.cuda.default_generators]
    return state


def with_closure(function: types.FunctionType, held: dict[int, Any]) -> types.FunctionType:
    """``function`` with some of its closure cells holding other values."""
    cells = tuple(types.CellType(held[k]) if k in held else c for k, c in enumerate(function.__closure__ or ()))
    copy = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def invoke(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call an object that has no name a program could print (a TorchScript function)."""
    return function(*args, **kwargs)
