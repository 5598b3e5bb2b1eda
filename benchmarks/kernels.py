"""The kernels beside what they replace: correctness first, then times as ratios within one run.

    python -m benchmarks.kernels                 # a GPU where there is one, else this CPU

- *extrapolate*: share of the device's own copy bandwidth, counting each history tensor, the anchor and the result once;
- *variants*: the same for other block sizes and numbers of warps (a GPU only);
- *Taylor*: the same forecast by TaylorSeer's published code (``benchmarks/peers.py``), over ours;
- *gate*: relative change of a probe, over the three passes of plain torch;
- *modulated norm*: forecast, gated add, layer norm, scale and shift in one launch, over the same in plain torch.

On a GPU what counts is the work of the device, timed as ``benchmarks/timing.py`` says; "wall" is the host's clock over
many calls back to back, made as eager programs make them (``diffcache/direct.py``). On a CPU "ours" is the reference,
eager and through inductor: what most people try first.
"""

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import taylor_peers
from benchmarks.timing import MB, check, replayed, seconds, turns, wall
from diffcache import ops, predictors
from diffcache.direct import direct

WIDTH = 3072  # channels of a FLUX.1 value
extrapolate, extrapolate_modulate = direct(ops.extrapolate), direct(ops.extrapolate_modulate)
relative_change = direct(ops.relative_change)
VARIANTS = tuple(itertools.product((1024, 2048, 4096, 8192), (4, 8)))
found: dict[str, Any] = {}


def note(part: str, **numbers: Any) -> None:
    found.setdefault(part, []).append(numbers)


def values(count: int, size: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """``count`` tensors of ``size`` bytes, as [1, tokens, 3072], each a little off the one before."""
    rows = size // (WIDTH * dtype.itemsize)
    latest = torch.randn(1, rows, WIDTH, device=device)
    made = []
    for _ in range(count):
        made.append(latest.to(dtype))
        latest = latest + 0.1 * torch.randn_like(latest)
    return made


def copy_rate(size: int, dtype: torch.dtype, device: str) -> float:
    """Bytes a second, read and written, of the device's own copy: recorded or back to back, what is more."""
    pairs = [values(2, size, dtype, device) for _ in range(turns(2 * size) if device == "cuda" else 1)]
    calls = [lambda s=source, t=target: t.copy_(s) for source, target in pairs]
    times = [wall(calls, device, count=64 if device == "cuda" else 8)]
    if device == "cuda":
        times.append(replayed(calls))
    return 2 * size / min(times)


def bandwidth(size: int, dtype: torch.dtype, device: str) -> None:
    copied = copy_rate(size, dtype, device)
    line = f"{size / MB:6.0f} MB  copy {copied / 1e9:7.1f} GB/s"
    for count in (1, 2, 3):
        weights = torch.tensor(ops.difference_form([1.5, -0.25, -0.25][:count]), device=device)
        sets = [
            values(count + 1, size, dtype, device) for _ in range(turns((count + 2) * size) if device == "cuda" else 1)
        ]
        calls = [lambda s=s, w=weights: extrapolate(s[-1], s[:-1], w) for s in sets]
        check("extrapolate", calls[0](), ops.extrapolate_reference(sets[0][-1], sets[0][:-1], weights), 1e-2)
        rate = (count + 2) * size / seconds(calls, device)
        note("bandwidth", mb=size / MB, history=count, gb_per_s=rate / 1e9, copy_gb_per_s=copied / 1e9)
        line += f"   K={count} {rate / 1e9:7.1f} ({100 * rate / copied:5.1f} %)"
    print(line, flush=True)


def variants(size: int, dtype: torch.dtype, device: str) -> None:
    """The kernel by itself with other blocks: shares of the copy's bandwidth, the best first."""
    if device != "cuda" or size > 32 * MB:
        return
    copied = copy_rate(size, dtype, device)
    for count in (1, 2, 3):
        weights = torch.tensor(ops.difference_form([1.5, -0.25, -0.25][:count]), device=device)
        sets = [values(count + 1, size, dtype, device) for _ in range(turns((count + 2) * size))]
        shares = {
            f"{block}x{warps}": (count + 2) * size / replayed(dense(sets, weights, block, warps), repeats=3) / copied
            for block, warps in VARIANTS
        }
        note("variants", mb=size / MB, history=count, shares=shares)
        best = sorted(shares.items(), key=lambda item: -item[1])
        line = "  ".join(f"{name} {100 * share:.1f}" for name, share in best)
        print(f"{size / MB:6.0f} MB  K={count}  {line}", flush=True)


def dense(sets: list[list[Tensor]], weights: Tensor, block: int, warps: int) -> list[Callable[[], Tensor]]:
    """Calls of the kernel for dense tensors, checked."""
    from diffcache.kernels.extrapolate import MAX_HISTORY, dense_kernel, tl, triton

    numel, count = sets[0][0].numel(), len(sets[0]) - 1

    def launch(tensors: list[Tensor]) -> Tensor:
        anchor, history = tensors[-1], tensors[:-1]
        out = torch.empty_like(anchor)
        padded = (history + [anchor] * MAX_HISTORY)[:MAX_HISTORY]
        dense_kernel[(triton.cdiv(numel, block),)](
            out, anchor, *padded, weights, numel,
            K=count, HAS_ANCHOR=True, WIDE=tl.float32, BLOCK=block, num_warps=warps,
        )  # fmt: skip
        return out

    calls = [lambda s=s: launch(s) for s in sets]
    check("variant", calls[0](), ops.extrapolate_reference(sets[0][-1], sets[0][:-1], weights), 1e-2)
    return calls


def against_taylor(size: int, dtype: torch.dtype, device: str) -> None:
    steps, at = [12, 8, 4], 14
    for order, (name, peer) in itertools.product((1, 2), taylor_peers().items()):
        weights = torch.tensor(
            ops.difference_form(predictors.weights("taylor", steps[: order + 1], at, order=order)), device=device
        )
        sets = [
            values(order + 1, size, dtype, device) for _ in range(turns((order + 2) * size) if device == "cuda" else 1)
        ]
        ours = [lambda s=s, w=weights: extrapolate(None, s, w) for s in sets]
        theirs = [peer(s, steps[: order + 1], at) for s in sets]
        check(f"{name}, order {order}", ours[0](), theirs[0](), 3e-2)
        by_wall = wall(theirs, device) / wall(ours, device)
        line = f"{size / MB:6.1f} MB   order {order}: {name:>9} / ours   wall {by_wall:5.2f} x"
        numbers = {"mb": size / MB, "order": order, "peer": name, "wall": by_wall}
        if device == "cuda":
            numbers |= {"theirs_us": 1e6 * replayed(theirs), "ours_us": 1e6 * replayed(ours)}
            numbers |= {"device": numbers["theirs_us"] / numbers["ours_us"]}
            line += (f"   device {numbers['device']:5.2f} x"
                     f"   ({numbers['theirs_us']:7.1f} us / {numbers['ours_us']:6.1f} us)")  # fmt: skip
        elif name == next(iter(taylor_peers())):
            fused = torch.compile(ours[0], fullgraph=True, dynamic=False)
            check("inductor", fused(), ours[0](), 1e-2)
            line += f"   through inductor {wall(theirs, device) / wall([fused], device):5.2f} x"
        note("taylor", **numbers)
        print(line, flush=True)


def host(device: str) -> None:
    """What one call costs the host: tensors so small that the device has nothing to do."""
    history, weights = values(3, 16 * WIDTH * 2, torch.bfloat16, device), torch.ones(3, device=device)
    times = {"ours": wall([lambda: extrapolate(None, history, weights)], device, count=500)}
    times |= {"one add": wall([lambda: history[0] + history[1]], device, count=500)}
    for name, peer in taylor_peers().items():
        times[name] = wall([peer(history, [12, 8, 4], 14)], device, count=500)
    times["ours through the dispatcher"] = wall([lambda: ops.extrapolate(None, history, weights)], device, 500)
    times["relative change"] = wall([lambda: relative_change(history[0], history[1])], device, 500)
    if device == "cuda":
        factor, shift, gate_ = torch.randn(3, 1, 1, WIDTH, device=device).to(torch.bfloat16)
        anchor, *two = history
        modulation = (factor, shift, 1e-6, gate_, None, False)
        call = [lambda: extrapolate_modulate(anchor, two, weights[:2], *modulation)]
        times["modulated norm"] = wall(call, device, 500)
        times["kernel by Triton's launcher"] = wall(dense([[*history, history[0]]], weights, 2048, 4), device, 500)
    note("host", **{name: 1e6 * time for name, time in times.items()})
    print("  ".join(f"{name} {1e6 * time:.1f} us" for name, time in times.items()), flush=True)


def gate(size: int, dtype: torch.dtype, device: str) -> None:
    pairs = [values(2, size, dtype, device) for _ in range(turns(2 * size) if device == "cuda" else 1)]
    plain = [lambda p=p: (p[0] - p[1]).abs().mean() / p[1].abs().mean() for p in pairs]
    ours = [lambda p=p: relative_change(p[0], p[1]) for p in pairs]
    check("relative change", ours[0](), plain[0]()[None], 2e-2)
    compared("gate", size, plain, ours, device)


def modulated(size: int, dtype: torch.dtype, device: str) -> None:
    sets = [values(3, size, dtype, device) for _ in range(turns(3 * size) if device == "cuda" else 1)]
    gate_, factor, shift = (torch.randn(1, 1, WIDTH, device=device).to(dtype) for _ in range(3))
    weights = torch.tensor([1.0, -0.5], device=device)

    def plain(anchor: Tensor, newest: Tensor, older: Tensor) -> Tensor:
        value = anchor + gate_ * (newest - 0.5 * (older - newest))
        return torch.nn.functional.layer_norm(value, (WIDTH,), eps=1e-6) * factor + shift

    def ours(anchor: Tensor, newest: Tensor, older: Tensor) -> Tensor:
        return extrapolate_modulate(anchor, [newest, older], weights, factor, shift, 1e-6, gate_, None, False)[1]

    check("modulated norm", ours(*sets[0]), plain(*sets[0]), 2e-2)
    compared("modulated", size, [lambda s=s: plain(*s) for s in sets], [lambda s=s: ours(*s) for s in sets], device)


def compared(name: str, size: int, plain: list[Callable], ours: list[Callable], device: str) -> None:  # type: ignore[type-arg]
    ratio = seconds(plain, device) / seconds(ours, device)
    note(name, mb=size / MB, ratio=ratio)
    print(f"{size / MB:6.0f} MB    {ratio:5.2f} x", flush=True)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--sizes", type=int, nargs="*", help="MB of one tensor")
    parser.add_argument("--no-variants", action="store_true", help="leave out other block sizes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write all numbers there")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = arguments.device
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device == "cuda" else "float32"))
    sizes = [size * MB for size in arguments.sizes or ([8, 24, 64, 256] if device == "cuda" else [6, 24])]
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {arguments.threads} threads"
    print(f"torch {torch.__version__}, {name}, {dtype}")
    print("\nhost time of one call of order 2")
    host(device)
    for title, measure in (
        ("extrapolate with an anchor: GB/s, and the share of the copy's", bandwidth),
        ("the same forecast, TaylorSeer's published code / ours", against_taylor),
        ("relative change, plain torch / ours", gate),
        ("forecast, gated add and modulated norm, plain torch / ours", modulated),
        ("extrapolate by block x warps, % of the copy's bandwidth (GPU only)", variants),
    ):
        if measure is variants and arguments.no_variants:
            continue
        print(f"\n{title}", flush=True)
        for size in sizes:
            try:
                measure(size, dtype, device)
            except Exception as error:  # one measure that fails leaves the others
                note("failed", measure=title, mb=size / MB, error=repr(error))
                print(f"{size / MB:6.0f} MB  FAILED: {error!r}"[:300], flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(found, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
