"""What can change after a capture: a graph is captured again or another one is used, never a stale one."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import enum
import types
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diffcache
from tests.denoisers import FAMILIES
from tests.toys import Toy, check_exact, differs, inputs, latent, make, run

FLAG = False


def double(h: torch.Tensor) -> torch.Tensor:
    return h * 2


def triple(h: torch.Tensor) -> torch.Tensor:
    return h * 3


shape_up = double


class Doubles(nn.Module):
    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h * 2


# -- what people change on a model -----------------------------------------------------------------------------------


class Inner(Toy):
    def setup(self) -> None:
        self.inner = Doubles()

    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.inner(h)


class ReplacedModule(Inner):
    def alter(self, step: int) -> None:
        if step == 2:
            self.inner = nn.GELU()


class InstanceForward(Inner):
    def alter(self, step: int) -> None:
        if step == 2:
            self.inner.forward = triple  # type: ignore[method-assign]


class ClassForward(Inner):
    def alter(self, step: int) -> None:
        multiple = 2 if step < 2 else 5
        Doubles.forward = lambda self, h: h * multiple  # type: ignore[method-assign]


class CompiledLater(Inner):
    def alter(self, step: int) -> None:
        if step == 2:
            self.inner.compile(backend="eager")


class HookAdded(Inner):
    def alter(self, step: int) -> None:
        if step == 1:
            self.hook = self.inner.register_forward_hook(lambda module, args, out: out + 1)
        if step == 2:
            self.first.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        if step == 4:
            self.hook.remove()


class ReplacedInList(Toy):
    def setup(self) -> None:
        self.stack = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        for layer in self.stack:
            h = layer(h)
        return h

    def alter(self, step: int) -> None:
        if step == 1:
            self.stack[1] = nn.GELU()
        if step == 3:
            self.stack.append(nn.SiLU())
        if step == 4:
            del self.stack[0]


class ReplacedInPlainList(Toy):
    def setup(self) -> None:
        self.stack = [Doubles(), Doubles()]

    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        for layer in self.stack:
            h = layer(h)
        return h

    def alter(self, step: int) -> None:
        if step == 2:
            self.stack[0] = nn.GELU()  # type: ignore[call-overload]


class Flag(Toy):
    flag = False

    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return h * 2 if self.flag else h

    def alter(self, step: int) -> None:
        if step == 2:
            self.flag = True


class ClassFlag(Flag):
    def alter(self, step: int) -> None:
        ClassFlag.flag = step > 2


class LateAttribute(Toy):
    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.extra(h) if hasattr(self, "extra") else h

    def alter(self, step: int) -> None:
        if step == 2:
            self.extra: Any = Doubles()
        if step == 4:
            del self.extra


class Scales(Toy):
    """Like an adapter's: a dictionary of scales and a list of those in use."""

    def setup(self) -> None:
        self.scales, self.active = collections.OrderedDict(a=2.0, b=3.0), ["a"]

    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        for name in self.active:
            h = h * self.scales[name]
        return h

    def alter(self, step: int) -> None:
        if step == 1:
            self.scales["a"] = 0.5
        if step == 3:
            self.active.append("b")


@dataclasses.dataclass
class Settings:
    scale: float = 2.0
    nested: Any = dataclasses.field(default_factory=lambda: types.SimpleNamespace(shift=1.0))


class Slotted:
    __slots__ = ("scale", "shift")

    def __init__(self, scale: float, shift: torch.Tensor | float) -> None:
        self.scale, self.shift = scale, shift


class Processor:
    """Like an attention processor: a class attribute that an instance may hide."""

    backend: str | None = None

    def __init__(self) -> None:
        self.settings, self.slotted = Settings(), Slotted(1.0, 0.0)

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        h = h * self.settings.scale * self.slotted.scale + self.settings.nested.shift
        return h * 7 if self.backend else h


class ProcessorChanges(Toy):
    def setup(self) -> None:
        self.processor = Processor()

    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.processor(h)

    def alter(self, step: int) -> None:
        if step == 1:
            self.processor.settings.scale = 3.0
        if step == 2:
            self.processor.settings.nested.shift = -1.0
        if step == 3:
            self.processor.slotted.scale = 0.5
        if step == 4:
            self.processor.backend = "other"
        if step == 5:
            self.processor = Processor()


class NumpyTable(Toy):
    def setup(self) -> None:
        self.table = np.ones(4)

    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return h * float(self.table[0])

    def alter(self, step: int) -> None:
        if step == 2:
            self.table[0] = 4


class ClosureChanges(Toy):
    def setup(self) -> None:
        self.held = held = [2.0]
        self.function = lambda h: h * held[0]

    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.function(h)

    def alter(self, step: int) -> None:
        if step == 2:
            self.held[0] = 5.0


class GlobalFlag(Toy):
    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return h * 2 if FLAG else h

    def alter(self, step: int) -> None:
        globals()["FLAG"] = step > 2


class GlobalFunction(Toy):
    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return shape_up(h)

    def alter(self, step: int) -> None:
        globals()["shape_up"] = double if step < 3 else triple


class TorchFunctionSwapped(Toy):
    gelu = staticmethod(F.gelu)

    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return F.gelu(h)

    def alter(self, step: int) -> None:
        F.gelu = TorchFunctionSwapped.gelu if step in (0, 5) else F.relu  # type: ignore[misc]


class Weights(Toy):
    """Replaced in every way there is; one weight is used by a module, one directly."""

    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return h @ self.first.weight

    def alter(self, step: int) -> None:
        if step == 1:
            self.first.weight.data = self.first.weight.data * 2
        if step == 2:
            self.first.weight = nn.Parameter(self.first.weight.data * 0.5)
        if step == 3:
            self.load_state_dict({k: v * 1.1 for k, v in self.state_dict().items()}, assign=True)
        if step == 4:
            self.load_state_dict({k: v * 1.1 for k, v in self.state_dict().items()})
        if step == 5:
            self.first.weight.mul_(0.9)


class PlainTensors(Toy):
    def setup(self) -> None:
        self.scale, self.kept = torch.ones(8), {"shift": torch.ones(8)}

    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return h * self.scale + self.kept["shift"]

    def alter(self, step: int) -> None:
        if step == 1:
            self.scale = torch.ones(8) * 2
        if step == 2:
            self.kept["shift"] = torch.ones(8) * 3
        if step == 3:
            self.scale.mul_(2)


class CastLater(Toy):
    """Reads the dtype of its weights; the inputs stay what they were."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        dtype = self.first.weight.dtype
        return super().forward(x.to(dtype), t.to(dtype)).float()

    def alter(self, step: int) -> None:
        if step in (2, 4):
            self.to(torch.bfloat16 if step == 2 else torch.float32)


class Modes(Toy):
    def setup(self) -> None:
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(6)

    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.norm(F.dropout(self.drop(h), 0.3, self.training))

    def alter(self, step: int) -> None:
        self.train(step in (2, 3))
        self.drop.train(step in (3, 4))


class Checkpointed(Toy):
    def setup(self) -> None:
        self.checkpointing = False

    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if self.checkpointing:
            return torch.utils.checkpoint.checkpoint(self.last, h, use_reentrant=False)
        return self.last(h)

    def alter(self, step: int) -> None:
        self.checkpointing = step > 2


CHANGES = [ReplacedModule, InstanceForward, ClassForward, HookAdded, ReplacedInList, ReplacedInPlainList,
           Flag, ClassFlag, LateAttribute, Scales, ProcessorChanges, NumpyTable, ClosureChanges, GlobalFlag,
           GlobalFunction, TorchFunctionSwapped, Weights, PlainTensors, CastLater, Modes, Checkpointed]  # fmt: skip


@pytest.mark.parametrize("kind", CHANGES)
def test_a_stale_graph_is_never_used(kind: type[Toy]) -> None:
    check_exact(kind)


@pytest.mark.slow
def test_a_module_compiled_after_capture() -> None:
    check_exact(CompiledLater)


# -- what people change around a call --------------------------------------------------------------------------------


class Surroundings(Toy):
    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            h = h.float() * 2
        if torch.backends.cuda.flash_sdp_enabled():
            h = h + 1
        return h + torch.ones(8)


AROUND = {
    "autocast": lambda step: torch.autocast("cpu", dtype=torch.bfloat16, enabled=step % 2 == 1),
    "inference mode": lambda step: torch.inference_mode() if step % 2 else contextlib.nullcontext(),
    "gradients": lambda step: torch.set_grad_enabled(step % 2 == 1),
    "attention": lambda step: nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH) if step % 2 else torch.no_grad(),
}


@pytest.mark.parametrize("name", AROUND)
def test_settings_around_the_call(name: str) -> None:
    captured = check_exact(Surroundings, around=AROUND[name])
    assert len(captured.variants) == 2


# -- values that are read ------------------------------------------------------------------------------------------


class Branch(Toy):
    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return h * 2 if t[0] > 500 else h


class ListIndex(Toy):
    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return h * [1.0, 2.0, 3.0][t[0].long() // 400] + sum(range(int(t[0]) // 300))


class Experts(Toy):
    def setup(self) -> None:
        self.experts, self.router = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), nn.Linear(8, 3)

    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        flat = h.reshape(-1, 8)
        choice, out = self.router(flat).argmax(-1), torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            rows = torch.where(choice == index)[0]
            if rows.numel():
                out[rows] = expert(flat[rows]) * rows.shape[0]
        return out.view_as(h)


class Masked(Toy):
    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        chosen = h[h[..., 0] > 0]
        return h + chosen.shape[0] + sum(row.mean() for row in chosen) + len(chosen.split(2))


class Caught(Toy):
    """An error that depends on values, caught: both outcomes must be told apart."""

    def between(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        try:
            torch.linalg.cholesky(torch.eye(3) * (t[0] - 500))
        except RuntimeError:
            return h * 2
        return h * 3


class DrawnBeforeBranch(Toy):
    """The guard fails after a draw and a write: both must be as if the wrong graph had not begun."""

    def setup(self) -> None:
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x.mul_(0.5)
        self.calls += 1
        h = super().forward(x + torch.randn_like(x), t) * self.calls
        return h * 2 if t[0] % 360 > 200 else h


@pytest.mark.parametrize(
    ("kind", "graphs"), [(Branch, 2), (ListIndex, 6), (Experts, 6), (Masked, 5), (Caught, 2), (DrawnBeforeBranch, 2)]
)
def test_values_that_python_read(kind: type[Toy], graphs: int) -> None:
    captured = check_exact(kind)
    assert len(captured.variants) <= graphs


# -- arguments -----------------------------------------------------------------------------------------------------


class Mode(enum.Enum):
    SMALL = 1
    LARGE = 2


class AnyArgument(Toy):
    def forward(self, x: torch.Tensor, t: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        h = super().forward(x, t)
        for value in (*rest, *(options[name] for name in sorted(options))):
            if isinstance(value, Slotted):
                h = h * value.scale + value.shift
            elif isinstance(value, Mode | types.SimpleNamespace):
                h = h * (value.value if isinstance(value, Mode) else value.scale)
            elif isinstance(value, torch.Generator):
                h = h + torch.randn(h.shape, generator=value)
            elif isinstance(value, np.ndarray):
                h = h * torch.from_numpy(value)
            elif isinstance(value, set | str | list | dict):
                h = h * len(value)
            elif value is not None:
                h = h * value
        return h


ARGUMENTS: dict[str, Any] = {
    "float": lambda step: 1.0 + step,
    "int": lambda step: 1 + step,
    "numpy float": lambda step: np.float32(1 + step),
    "numpy array": lambda step: np.full(8, 1 + step, dtype=np.float32),
    "enum": lambda step: Mode(1 + step % 2),
    "set": lambda step: {"a"} if step % 2 else set(),
    "string": lambda step: "ab" * (1 + step % 2),
    "list": lambda step: [latent(1)] * (1 + step % 3),
    "dict": lambda step: {"a": 1.0, "b": latent(2)} if step % 2 else {"a": 2.0},
    "None": lambda step: 2.0 if step % 2 else None,
    "slots": lambda step: Slotted(1.0 + step, latent(step + 40)),
    "object": lambda step: types.SimpleNamespace(scale=latent(step + 50)),
    "generator": lambda step: torch.Generator().manual_seed(step),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_of_every_kind(name: str) -> None:
    def given(step: int) -> Any:
        args, _ = inputs(step)
        value = ARGUMENTS[name](step)
        return ((*args, value), {}) if step % 2 else (args, {"option": value})

    check_exact(AnyArgument, given)


def test_positional_keyword_and_order() -> None:
    def given(step: int) -> Any:
        (x, t), _ = inputs(step)
        return [((x, t, 2.0), {"b": 3.0}), ((x, t), {"a": 2.0, "b": 3.0}), ((), {"b": 3.0, "t": t, "a": 2.0, "x": x})][
            step % 3
        ]

    captured = check_exact(AnyArgument, given)
    assert len(captured.variants) <= 3


class Counts(Toy):
    """A number of frames: shapes follow from it."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, frames: int = 1, scale: float = 1.0) -> torch.Tensor:
        h = super().forward(x, t)
        h = h.reshape(2, frames, -1, 8)
        parts = h.flatten(1, 2)[:, :frames].split([1, frames - 1], 1)
        grid = F.interpolate(h.flatten(1, 2), scale_factor=scale)
        return h.mean(1) * h.shape[2] + sum(p.shape[1] * (k + 1) for k, p in enumerate(parts)) + grid.shape[-1]


def test_numbers_that_make_shapes() -> None:
    def given(step: int) -> Any:
        return (*inputs(step)[0], 1 + step % 3), {"scale": 1.0 + step % 2}

    check_exact(Counts, given)


# -- library models ------------------------------------------------------------------------------------------------


def compare_after(changes: list[Any], family: str) -> None:
    entry = FAMILIES[family]
    model, eager = entry.make_model(), entry.make_model()
    with torch.no_grad():
        args, kwargs = entry.make_inputs(0)
        captured = diffcache.capture(model, *args, **kwargs)
        for step, change in enumerate(changes, 1):
            change(eager)
            expected = run(eager, entry.make_inputs(step % 8), 5)
            change(model)
            assert not differs(run(captured, entry.make_inputs(step % 8), 5), expected), f"change {step}"


def add_adapter(model: Any, name: str) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(len(name))
    config = peft.LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q", "to_v"])
    model.add_adapter(config, adapter_name=name)


@pytest.mark.parametrize("family", ["flux", pytest.param("sdxl_unet", marks=pytest.mark.slow)])
def test_adapters_switched_after_capture(family: str) -> None:
    compare_after(
        [
            lambda m: add_adapter(m, "one"),
            lambda m: add_adapter(m, "other"),
            lambda m: m.set_adapter("one"),
            lambda m: m.set_adapters(["one", "other"], [0.5, 0.25]),
            lambda m: m.set_adapters(["one", "other"], [0.5, 2.0]),
            lambda m: m.disable_adapters(),
            lambda m: m.enable_adapters(),
            lambda m: m.fuse_lora(lora_scale=0.7),
            lambda m: m.unfuse_lora(),
            lambda m: m.delete_adapters("other"),
        ],
        family,
    )


class HalfProcessor:
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, attention: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out = self.inner(attention, hidden_states, *args, **kwargs)
        return tuple(o * 0.5 for o in out) if isinstance(out, tuple) else out * 0.5


@pytest.mark.parametrize("family", ["flux", pytest.param("sdxl_unet", marks=pytest.mark.slow)])
def test_a_model_of_a_library_changed_after_capture(family: str) -> None:
    def offload(model: Any) -> None:
        pytest.importorskip("accelerate").cpu_offload(model, torch.device("cpu"))

    compare_after(
        [
            lambda m: m.fuse_qkv_projections(),
            lambda m: m.unfuse_qkv_projections(),
            lambda m: m.set_attn_processor({k: HalfProcessor(p) for k, p in m.attn_processors.items()}),
            lambda m: m.enable_gradient_checkpointing(),
            offload,
            lambda m: pytest.importorskip("accelerate.hooks").remove_hook_from_module(m, recurse=True),
            lambda m: m.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32),
        ],
        family,
    )


def test_unchanged_calls_are_not_captured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = FAMILIES["flux"]
    model = entry.make_model()
    with torch.no_grad():
        captured = diffcache.capture(model, **entry.make_inputs(0)[1])
        monkeypatch.setattr(type(model), "__call__", None, raising=False)
        for step in range(4):
            captured(**entry.make_inputs(step)[1])
    assert len(captured.variants) == 1


def test_state_left_by_a_capture_is_none() -> None:
    model = make(Modes).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random, (args, kwargs) = torch.get_rng_state(), inputs(0)
    kept = [value.clone() for value in args]
    with torch.no_grad():
        diffcache.capture(model, *args, **kwargs)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(args, kept, strict=True))
