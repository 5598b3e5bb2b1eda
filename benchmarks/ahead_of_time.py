"""Compile every kernel to machine code for GPUs that are not here, and report what it needs.

    python -m benchmarks.ahead_of_time

Registers and spills are per thread; a spill is a value that found no register and goes through memory. The widest load
and store are in bits per thread: 128 is what the memory system likes best.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from diffcache.kernels.extrapolate import BLOCK, DENSE_BLOCK, MAX_HISTORY, dense_kernel, extrapolate_kernel
from diffcache.kernels.quantize import quantize_kernel
from diffcache.kernels.relative_change import BLOCK as CHANGE_BLOCK
from diffcache.kernels.relative_change import MAX_PARTS, partial_kernel, ratio_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
FLOAT8 = ("sm_90", "sm_100")  # what loads torch.float8_e4m3fn; elsewhere the reference runs
COLUMNS = 3072  # a row of a FLUX.1 value
STRIDES = ("out", "anchor", "history", "scale", "weight", "gate", "factor", "shift")


@dataclass(frozen=True)
class Case:
    """One specialisation of a kernel: pointer types by argument, and its compile-time arguments."""

    name: str
    kernel: Any
    pointers: dict[str, str]
    constants: dict[str, Any]
    targets: tuple[str, ...] = tuple(TARGETS)


@dataclass(frozen=True)
class Compiled:
    """What machine code for one target needs."""

    registers: int
    spills: int
    load_bits: int
    store_bits: int
    code: bytes


def extrapolation(name: str, value: str, history: str = "", targets: Any = tuple(TARGETS), **switches: Any) -> Case:
    """The kernel on dense tensors, with what ``switches`` turn on."""
    pointers = {"p_weights": "*fp32"}
    pointers |= {f"p_{part}": f"*{value}" for part in ("out", "modulated", "anchor", "gate", "factor", "shift")}
    pointers |= {f"p_h{age}": f"*{history or value}" for age in range(MAX_HISTORY)}
    pointers |= {f"p_s{age}": "*fp32" for age in range(MAX_HISTORY)}
    constants = {
        "K": 2, "HAS_ANCHOR": True, "HAS_GATE": False, "SCALED": bool(history), "TABLE": False, "MODULATE": False,
        "KEEP": True, "WIDE": tl.float64 if value == "fp64" else tl.float32, "ROWS": 1, "COLUMNS": BLOCK,
    } | switches  # fmt: skip
    if constants["MODULATE"]:
        constants["COLUMNS"] = triton.next_power_of_2(COLUMNS)
    # the launcher's strides of one: Triton makes them constants by itself
    constants |= {f"{operand}2": 1 for operand in STRIDES if operand != "scale"} | {"weight_k": 1}
    return Case(name, extrapolate_kernel, pointers, constants, targets)


def dense(name: str, value: str, **switches: Any) -> Case:
    """The kernel for tensors that lie alike without gaps."""
    pointers = {"p_weights": "*fp32", "p_out": f"*{value}", "p_anchor": f"*{value}"}
    pointers |= {f"p_h{age}": f"*{value}" for age in range(MAX_HISTORY)}
    wide = tl.float64 if value == "fp64" else tl.float32
    constants = {"K": 2, "HAS_ANCHOR": True, "WIDE": wide, "BLOCK": DENSE_BLOCK} | switches
    return Case(name, dense_kernel, pointers, constants)


def cases() -> Iterator[Case]:
    for count in range(1, MAX_HISTORY + 1):
        yield dense(f"dense extrapolate bf16, K = {count}", "bf16", K=count)
    for value in ("fp16", "fp32", "fp64"):
        yield dense(f"dense extrapolate {value}", value)
    for count in range(1, MAX_HISTORY + 1):
        yield extrapolation(f"extrapolate bf16, K = {count}", "bf16", K=count)
    for value in ("fp16", "fp32", "fp64"):
        yield extrapolation(f"extrapolate {value}", value)
    yield extrapolation("extrapolate bf16, tables and gate", "bf16", TABLE=True, HAS_GATE=True)
    yield extrapolation("extrapolate bf16, gate and modulated norm", "bf16", HAS_GATE=True, MODULATE=True)
    yield extrapolation("extrapolate bf16, modulated norm only", "bf16", MODULATE=True, KEEP=False)
    yield extrapolation("extrapolate bf16 of int8", "bf16", "i8")
    yield extrapolation("extrapolate bf16 of float8", "bf16", "fp8e4nv", FLOAT8)
    for small, targets in (("i8", tuple(TARGETS)), ("fp8e4nv", FLOAT8)):
        pointers = {"p_value": "*bf16", "p_anchor": "*bf16", "p_out": f"*{small}", "p_scale": "*fp32"}
        constants = {"LARGEST": 127.0, "HAS_ANCHOR": True, "ROUND": small == "i8", "COLUMNS": 4096}
        yield Case(f"quantize bf16 to {small}", quantize_kernel, pointers, constants, targets)
    for squared in (False, True):
        pointers = {"p_new": "*bf16", "p_old": "*bf16", "p_partial": "*fp32"}
        constants = {"SQUARED": squared, "WIDE": tl.float32, "BLOCK": CHANGE_BLOCK}
        yield Case(f"relative change, L{1 + squared}", partial_kernel, pointers, constants)
    yield Case("relative change, ratio", ratio_kernel, {"p_partial": "*fp32", "p_out": "*fp32"},
               {"SQUARED": True, "PARTS": MAX_PARTS})  # fmt: skip


def compile_case(case: Case, target: str) -> Compiled:
    """Machine code of one case. Raises what Triton raises where it cannot be compiled."""
    names = case.kernel.arg_names
    types = {name: case.pointers.get(name, "fp32" if name == "eps" else "i32") for name in names}
    types |= dict.fromkeys(case.constants, "constexpr")
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if types[name] not in ("constexpr", "fp32")
    }
    source = ASTSource(fn=case.kernel, signature=types, constexprs=case.constants, attrs=aligned)
    built = triton.compile(source, target=TARGETS[target])
    return _amd(built) if "hsaco" in built.asm else _nvidia(built)


def _nvidia(built: Any) -> Compiled:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    spills = int(_found(r"STACK:(\d+)", said)) // 4
    return Compiled(int(_found(r"REG:(\d+)", said)), spills, _widest(built.asm["ptx"], r"ld\.global"),
                    _widest(built.asm["ptx"], r"st\.global"), built.asm["cubin"])  # fmt: skip


def _widest(ptx: str, operation: str) -> int:
    """Bits that one thread moves at a time."""
    found = re.findall(operation + r"[\w.:]*?(?:\.v(\d))?\.b(\d+)", ptx)
    return max((int(count or 1) * int(bits) for count, bits in found), default=0)


def _amd(built: Any) -> Compiled:
    text = built.asm["amdgcn"]
    widths = {"ushort": 16, "ubyte": 8, "sbyte": 8, "short": 16, "byte": 8, "dword": 32, "b32": 32}

    def widest(operation: str) -> int:
        found = re.findall(rf"(?:global|buffer)_{operation}_(?:(\w*?byte|\w*?short)\w*|dword(?:x(\d))?|b(\d+))", text)
        return max(
            (widths[word] if word else int(bits or 32) * int(count or 1) for word, count, bits in found), default=0
        )

    registers = int(_found(r"\.vgpr_count:\s+(\d+)", text))
    spills = int(_found(r"\.vgpr_spill_count:\s+(\d+)", text)) + int(_found(r"\.sgpr_spill_count:\s+(\d+)", text))
    return Compiled(registers, spills, widest("load"), widest("store"), built.asm["hsaco"])


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, f"no {pattern} in what the compiler says; its output has changed"
    return match.group(1)


def main() -> None:
    print(f"triton {triton.__version__}; registers, spills, widest load and store in bits\n")
    print(f"{'':<44}" + "".join(f"{target:>18}" for target in TARGETS))
    for case in cases():
        line = f"{case.name:<44}"
        for target in TARGETS:
            if target not in case.targets:
                line += f"{'-':>18}"
                continue
            done = compile_case(case, target)
            line += f"{f'{done.registers} {done.spills} {done.load_bits} {done.store_bits}':>18}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
