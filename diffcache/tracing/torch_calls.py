"""How a torch call is named and called, and what can be learned of its tensors."""

from __future__ import annotations

import sys
import types
from typing import Any

import torch

from diffcache.tracing import tree
from diffcache.tracing.scalars import Tracked

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
IMMEDIATE = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.layout,
              torch.memory_format, range)  # fmt: skip
TENSOR_PROPERTIES = frozenset(("T", "mT", "H", "mH", "real", "imag", "data", "grad"))
_METHOD_NAMES = {
    id(method): name for name, method in vars(torch.Tensor).items() if callable(method)
}  # x ** 2 calls a "pow"
_GETTER = type(torch.Tensor.shape.__get__)  # type: ignore[attr-defined]

_ELEMENTWISE = frozenset(
    "add sub mul div true_divide floor_divide remainder fmod pow rsub neg lt le gt ge eq ne lerp clamp clip clamp_min "
    "clamp_max addcmul addcdiv where full_like fill fill_ masked_fill masked_fill_ tensor as_tensor scalar_tensor "
    "maximum minimum isclose dropout alpha_dropout gelu leaky_relu elu threshold nan_to_num __setitem__ select to "
    "item exp log layer_norm rms_norm group_norm softmax scaled_dot_product_attention under "
    "autocast_under grad_under".split()
)
_SHAPING_FLOATS = frozenset("arange range interpolate upsample linspace logspace affine_grid".split())
_SPLITS = frozenset(
    "split chunk unbind tensor_split hsplit vsplit dsplit unsafe_chunk unsafe_split "
    "split_with_sizes __iter__ nonzero where".split()
)
FAILS_BY_VALUE = frozenset("cholesky inv inverse solve solve_triangular lu_factor eigh svd qr lstsq ldl_factor".split())
_RUNNING_STATISTICS = {"batch_norm": 1, "instance_norm": 1}


def may_write(name: str, kwargs: Any) -> bool:
    """Whether a call's name says that it writes into an argument."""
    return name.endswith("_") or "out" in kwargs or name.startswith(("__i", "__set"))


def written_unseen(name: str, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """Running statistics, which normalisation in training mode updates without counting up their version."""
    first = _RUNNING_STATISTICS.get(name)
    if first is None:
        return []
    values = [*args[first : first + 2], kwargs.get("running_mean"), kwargs.get("running_var")]
    return [value for value in values if isinstance(value, torch.Tensor)]


def splits(name: str) -> bool:
    """Whether a call returns as many tensors as the size of its argument says."""
    return name in _SPLITS


def shapes_by_number(name: str, args: Any, kwargs: Any) -> bool:
    """Whether the shape of a call's result may depend on the tracked numbers among its arguments."""
    bare = name.strip("_").removeprefix("r") if name.startswith("__r") else name.strip("_")
    if bare in _ELEMENTWISE or bare in (
        "i" + word for word in ("add", "sub", "mul", "truediv", "floordiv", "pow", "mod")
    ):
        return False
    if bare in ("truediv", "floordiv", "mod", "radd", "rsub", "rmul"):
        return False
    if bare == "full":
        return any(_is_whole(leaf) for leaf in leaves((args[:1], kwargs.get("size"))))
    if bare == "getitem":
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(
            isinstance(step, slice) and any(map(_is_whole, (step.start, step.stop, step.step))) for step in index
        )
    if bare in _SHAPING_FLOATS:
        return True
    return any(_is_whole(leaf) for leaf in leaves((args, kwargs)))


def _is_whole(value: Any) -> bool:
    return type(value) is Tracked and type(value.number) is int


def call_name(func: Any) -> str:
    if is_getter(func) or is_setter(func):
        return func.__self__.__name__
    return getattr(func, "__name__", type(func).__name__)


def is_getter(func: Any) -> bool:
    return isinstance(func, _GETTER) and func.__name__ == "__get__"


def is_setter(func: Any) -> bool:
    return isinstance(func, _GETTER) and func.__name__ == "__set__"


def call_target(func: Any, name: str, args: Any) -> tuple[Any, Any]:
    """How the graph calls it: properties by getattr, methods by name, everything else as the function itself."""
    if is_getter(func):
        return getattr, (args[0], name)
    name = name if getattr(torch.Tensor, name, None) is func else _METHOD_NAMES.get(id(func), name)
    descriptor = isinstance(func, types.MethodDescriptorType | types.WrapperDescriptorType | types.FunctionType)
    if descriptor and args and isinstance(args[0], torch.Tensor) and getattr(torch.Tensor, name, None) is func:
        return name, args
    if (
        isinstance(func, types.FunctionType)
        and getattr(sys.modules.get(func.__module__), func.__name__, None) is not func
    ):
        return invoke, (func, *args)  # a wrapper or an inner function: printing its name would not find it
    return func, args


def leaves(value: Any) -> list[Any]:
    """Leaves of an argument or output: lists, tuples, mappings and plain objects are walked."""
    if isinstance(value, torch.Tensor):
        return [value]
    found = []
    for _, leaf in tree.walk(value):
        found += [leaf.start, leaf.stop, leaf.step] if isinstance(leaf, slice) else [leaf]
    return found


def storage_key(value: torch.Tensor) -> int | None:
    try:
        with torch._C.DisableTorchFunction():
            return value.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # sparse, nested and wrapper tensors have no storage
        return None


def version_of(value: torch.Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return 0 if value.is_inference() else value._version


def generator_states() -> Any:
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
