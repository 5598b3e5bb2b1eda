"""Which node stands for which value of the recorded forward."""

from __future__ import annotations

import types
import weakref
from typing import Any

import torch
from torch import fx, nn
from torch.multiprocessing.reductions import StorageWeakRef

from diffcache.tracing.errors import Uncapturable, user_line
from diffcache.tracing.scalars import Tracked
from diffcache.tracing.spec import TensorSpec
from diffcache.tracing.torch_calls import IMMEDIATE, leaves, storage_key, with_closure
from diffcache.tracing.trace import Trace


class Values:
    """The graph under construction and the nodes of tensors, tracked numbers and objects."""

    def __init__(self, root: nn.Module, trace: Trace):
        super().__init__()
        self.root, self.trace, self.graph = root, trace, trace.graph
        self.stack: list[int] = []
        self.node_count = 0
        self.names = self._tensor_names()
        self._nodes: dict[int, tuple[weakref.ref[Any], fx.Node]] = {}  # by identity, for as long as the tensor lives
        self._storages: dict[int, StorageWeakRef] = {}
        self._owned: set[int] = set()
        self._of_storage: dict[int, list[int]] = {}
        self.inputs: set[int] = set()  # storages of the inputs' own copies
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

    def bind(self, value: torch.Tensor, node: fx.Node, *, tainted: bool) -> None:
        """Let ``node`` stand for ``value`` from here on."""
        key = id(value)
        self._nodes[key] = self.trace.produced[key] = (weakref.ref(value), node)
        node.meta["tainted"] = tainted
        node.meta.setdefault("val", TensorSpec.of(value))
        storage = storage_key(value)
        node.meta["storage"] = storage
        if storage is not None:
            self._of_storage.setdefault(storage, []).append(key)
        if storage is not None and storage not in self._storages:
            self._storages[storage] = StorageWeakRef(value.untyped_storage())
            self._owned.add(storage)
        node.meta["fresh"] = storage is None or storage in self._owned

    def bind_input(self, value: torch.Tensor, node: fx.Node) -> None:
        """An input: like ``bind``, but a write to it is seen by the caller and so always live."""
        self.bind(value, node, tainted=True)
        self._owned.discard(storage_key(value) or 0)
        self.inputs.add(storage_key(value) or 0)

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
            if (twin := self._twin(value)) is not None:
                self._nodes[id(value)] = (weakref.ref(value), twin)
                return twin
            if storage_key(value) in self._owned:
                raise Uncapturable(
                    f"a tensor made from recorded ones by code that torch does not show, at {user_line()}"
                )
            name = f"_constant_{len(self.trace.attributes)}"
        if (storage := storage_key(value)) is not None and storage not in self._storages:
            self._storages[storage] = StorageWeakRef(value.untyped_storage())  # not owned: a write to it lasts
        node = self.graph.get_attr(name)
        self._place(node)
        self.trace.attributes[name] = value
        if unseen:
            self.trace.unseen[name] = user_line()
        self._nodes[id(value)] = (weakref.ref(value), node)
        node.meta.update(val=TensorSpec.of(value), tainted=False, storage=storage_key(value))
        return node

    def _twin(self, value: torch.Tensor) -> fx.Node | None:
        """The node of a recorded tensor that ``value`` is a second object for, as ``nn.Parameter(tensor)`` is."""
        for key in self._of_storage.get(storage_key(value) or 0, ()):
            other, node = self._nodes.get(key, (lambda: None, None))
            with torch._C.DisableTorchFunction():
                if (tensor := other()) is not None and (
                    tensor.shape == value.shape and tensor.stride() == value.stride() and tensor.dtype == value.dtype
                    and tensor.storage_offset() == value.storage_offset()
                    and type(value) in (torch.Tensor, nn.Parameter)
                ):  # fmt: skip
                    return node
        return None

    def keep(self, values: list[Any], writes: bool) -> None:
        """Copy what a call may change and that outlives the forward, so that recording leaves it untouched."""
        for value in values:
            if isinstance(value, torch.Generator):
                self.trace.generators.setdefault(id(value), (value, value.get_state()))
            if not isinstance(value, torch.Tensor) or (isinstance(value, nn.Parameter) and not writes):
                continue
            storage = storage_key(value)
            if storage is None or storage in self._owned or storage in self.trace.kept or storage in self.inputs:
                continue
            with torch._C.DisableTorchFunction(), torch.no_grad():
                whole = value if value._base is None else value._base
                self.trace.kept[storage] = (whole, whole.detach().clone())

    def _place(self, node: fx.Node) -> None:
        self.node_count += 1
        node.meta["call"] = self.stack[-1] if self.stack else -1
        node.meta["path"] = self.trace.calls[self.stack[-1]].path if self.stack else ""

    def argument(self, value: Any) -> Any:
        """A call's argument as fx wants it: tensors and tracked numbers as nodes, containers walked, objects named."""
        if isinstance(value, torch.Tensor):
            return self.node_of(value)
        if type(value) is Tracked:
            return value.node
        if isinstance(value, torch.Size):
            return tuple(value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(self.argument, value))
        if isinstance(value, list | tuple):
            return (
                type(value)(map(self.argument, value))
                if type(value) in (list, tuple)
                else list(map(self.argument, value))
            )
        if type(value) is dict:
            return {key: self.argument(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(self.argument(value.start), self.argument(value.stop), self.argument(value.step))
        if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0:
            return value.item()  # NumPy's float64 is a float, but prints as NumPy
        if isinstance(value, IMMEDIATE) or value is Ellipsis:
            return value
        if id(value) in self.objects:
            return self.objects[id(value)][1]
        return self.closure_node(value) if isinstance(value, types.FunctionType) else self.object_node(value)

    def closure_node(self, value: types.FunctionType) -> fx.Node:
        """A function passed to a torch call; what its closure holds of this forward's values becomes arguments."""
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        held = {k: self.argument(cell) for k, cell in enumerate(cells) if any(map(self._is_computed, leaves(cell)))}
        if not held:
            return self.object_node(value)
        parts: Any = (self.object_node(value, check=False), held)
        node = self.graph.call_function(with_closure, parts)
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
        if check and not callable(value) and any(map(self._is_computed, leaves(value))):
            raise Uncapturable(f"a {type(value).__name__} that holds a computed tensor is passed on at {user_line()}")
        name = f"_object_{len(self.trace.attributes)}"
        self.trace.attributes[name] = value
        node = self.graph.get_attr(name)
        self._place(node)
        node.meta.update(tainted=False, object=True, where=user_line())
        return node
