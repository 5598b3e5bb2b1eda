"""The kernels beside what they replace: correctness first, then times as ratios within one run.

    python -m benchmarks.kernels                 # a GPU where there is one, else this CPU

- *extrapolate*: share of the device's own copy bandwidth, counting each history tensor, the anchor and the result once;
- *Taylor*: the same forecast as TaylorSeer's published code computes it (diffusers' hook and cache-dit: one tensor
  operation for each term, factors built on the way), over ours;
- *gate*: relative change of a probe, over the three passes of plain torch;
- *modulated norm*: forecast, gated add, layer norm, scale and shift in one launch, over the same in plain torch.

On a CPU "ours" is the reference, eager and through inductor: what most people try first.
"""

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from diffcache import ops

MB = 1 << 20


def taylor_as_published(derivatives: list[Tensor], elapsed: int) -> Tensor:
    """TaylorSeer: ``sum_i D_i k^i / i!``, one operation after the other."""
    result = torch.zeros_like(derivatives[0])
    for order, derivative in enumerate(derivatives):
        result = result + (1 / math.factorial(order)) * derivative * (elapsed**order)
    return result


def seconds(run: Callable[[], object], device: str, repeats: int) -> float:
    """Of one call, the median."""
    run()
    times = []
    if device == "cuda":
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
    else:
        for _ in range(repeats):
            start_time = time.perf_counter()
            run()
            times.append(time.perf_counter() - start_time)
    return statistics.median(times)


def check(name: str, result: Tensor, expected: Tensor, tolerance: float) -> None:
    """A red check prints no speed."""
    error = ((result.float() - expected.float()).norm() / expected.float().norm()).item()
    if not error <= tolerance:
        sys.exit(f"{name} is wrong: relative error {error:.2e}, allowed {tolerance:.0e}")


def values(count: int, size: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Tensors of ``size`` bytes, as [1, tokens, 3072]."""
    rows = size // (3072 * dtype.itemsize)
    return [torch.randn(1, rows, 3072, device=device).to(dtype) for _ in range(count)]


def bandwidth(size: int, dtype: torch.dtype, device: str, repeats: int) -> None:
    source, target = values(2, size, dtype, device)
    copied = 2 * size / seconds(lambda: target.copy_(source), device, repeats)
    line = f"{size / MB:6.0f} MB  copy {copied / 1e9:7.1f} GB/s"
    for count in (1, 2, 3):
        anchor, *history = values(count + 1, size, dtype, device)
        weights = torch.tensor(ops.difference_form([1.5, -0.25, -0.25][:count]), device=device)
        run = lambda a=anchor, h=history, w=weights: ops.extrapolate(a, h, w)  # noqa: E731
        check("extrapolate", run(), ops.extrapolate_reference(anchor, history, weights), 1e-2)
        moved = (count + 2) * size / seconds(run, device, repeats)
        line += f"   K={count} {100 * moved / copied:5.1f} %"
    print(line, flush=True)


def against_taylor(size: int, dtype: torch.dtype, device: str, repeats: int) -> None:
    line = f"{size / MB:6.0f} MB "
    for order in (1, 2):
        history = values(order + 1, size, dtype, device)
        differences = [history[0].float()]
        level = [h.float() for h in history]
        while len(level) > 1:
            level = [new - old for new, old in itertools.pairwise(level)]
            differences.append(level[0])
        derivatives = [d.to(dtype) for d in differences]
        binomial = {1: [2.0, -1.0], 2: [2.5, -2.0, 0.5]}[order]  # of unit gaps, one step ahead
        weights = torch.tensor(ops.difference_form(binomial), device=device)
        ours = lambda h=history, w=weights: ops.extrapolate(None, h, w)  # noqa: E731
        theirs = lambda d=derivatives: taylor_as_published(d, 1)  # noqa: E731
        check(f"Taylor of order {order}", ours(), theirs(), 3e-2)
        line += f"   order {order}: {seconds(theirs, device, repeats) / seconds(ours, device, repeats):5.2f} x"
        if device == "cpu":
            fused = torch.compile(ours, fullgraph=True, dynamic=False)
            with torch.no_grad():
                check("inductor", fused(), ours(), 1e-2)
                line += f" (inductor {seconds(theirs, device, repeats) / seconds(fused, device, repeats):5.2f} x)"
    print(line, flush=True)


def gate(size: int, dtype: torch.dtype, device: str, repeats: int) -> None:
    new, old = values(2, size, dtype, device)
    plain = lambda: (new - old).abs().mean() / old.abs().mean()  # noqa: E731
    ours = lambda: ops.relative_change(new, old)  # noqa: E731
    check("relative change", ours(), plain()[None], 2e-2)
    print(
        f"{size / MB:6.0f} MB    {seconds(plain, device, repeats) / seconds(ours, device, repeats):5.2f} x", flush=True
    )


def modulated(size: int, dtype: torch.dtype, device: str, repeats: int) -> None:
    anchor, newest, older = values(3, size, dtype, device)
    gate_, factor, shift = (torch.randn(1, 1, 3072, device=device).to(dtype) for _ in range(3))
    weights = torch.tensor([1.0, -0.5], device=device)

    def plain() -> Tensor:
        value = anchor + gate_ * (newest - 0.5 * (older - newest))
        return torch.nn.functional.layer_norm(value, (3072,), eps=1e-6) * factor + shift

    def ours() -> Tensor:
        return ops.extrapolate_modulate(anchor, [newest, older], weights, factor, shift, 1e-6, gate_, None, False)[1]

    check("modulated norm", ours(), plain(), 2e-2)
    print(
        f"{size / MB:6.0f} MB    {seconds(plain, device, repeats) / seconds(ours, device, repeats):5.2f} x", flush=True
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--sizes", type=int, nargs="*", help="MB of one tensor")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = arguments.device
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device == "cuda" else "float32"))
    sizes = [size * MB for size in arguments.sizes or ([8, 24, 64, 256] if device == "cuda" else [6, 24])]
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {arguments.threads} threads"
    print(f"torch {torch.__version__}, {name}, {dtype}")
    for title, measure in (
        ("extrapolate with an anchor, share of copy bandwidth", bandwidth),
        ("Taylor as published / ours", against_taylor),
        ("relative change, plain torch / ours", gate),
        ("forecast, gated add and modulated norm, plain torch / ours", modulated),
    ):
        print(f"\n{title}")
        for size in sizes:
            measure(size, dtype, device, arguments.repeats)


if __name__ == "__main__":
    main()
