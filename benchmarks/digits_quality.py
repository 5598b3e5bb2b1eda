"""Bars of the digits model: quality at 8 of 28 computed steps, and how much of the FLOPs speed-up the clock shows.

    .venv/bin/python -m benchmarks.digits_quality [--computed 8] [--json out/digits_quality.json]

Schedules are calibrated on the calibration prompts and judged on other prompts and other seeds. PSNR is over
pictures in 0..1 against the uncached pipeline; times are medians of interleaved pairs in one run.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import diffcache
from benchmarks.models.digits.pipeline import DigitsPipeline
from benchmarks.models.digits.train import FOLDER
from diffcache import recipes
from diffcache.profiling import calibrate
from diffcache.report import psnr, relative_error
from diffcache.searching import cost_fraction
from diffcache.targets import find_targets

STEPS = 28
CALIBRATION = [
    ["a handwritten three", "a bold seven"],
    ["a thin zero", "a slanted eight"],
    ["a two", "a bold slanted five"],
]
PROMPTS = ["zero", "a bold one", "two", "a thin three", "a slanted four", "five", "a bold six", "the digit seven",
           "a thin eight", "a slanted nine", "a handwritten zero", "a thin slanted two"]  # fmt: skip
SEEDS = (77, 78, 79, 80)


def generate(pipe: Any, seed: int, steps: int = STEPS, guidance: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    out = pipe(PROMPTS, num_inference_steps=steps, generator=generator, output_type="np", guidance_scale=guidance)
    return torch.as_tensor(np.asarray(out.images), dtype=torch.float64)


def quality(pipe: Any, references: list[torch.Tensor], steps: int = STEPS) -> dict[str, float]:
    results = [generate(pipe, seed, steps) for seed in SEEDS]
    truth, result = torch.cat(references), torch.cat(results)
    return {"psnr": round(psnr(result, truth, 1.0), 2), "relative_l2": round(relative_error(result, truth), 5)}


def timing(pipe: Any, fast: Any, rounds: int = 7) -> dict[str, float]:
    """Whole generations in turn, A B A B; the denoiser's share alone as well."""
    pairs = []
    for model in (pipe, fast):
        generate(model, SEEDS[0])
    for _ in range(rounds):
        pair = []
        for model in (pipe, fast):
            start = time.perf_counter()
            generate(model, SEEDS[0])
            pair.append(time.perf_counter() - start)
        pairs.append(pair)
    ratios = sorted(a / b for a, b in pairs)
    return {
        "uncached_s": sorted(a for a, _ in pairs)[rounds // 2],
        "cached_s": sorted(b for _, b in pairs)[rounds // 2],
        "wall_speedup": ratios[rounds // 2],
        "low": ratios[0],
        "high": ratios[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--computed", type=int, default=8)
    parser.add_argument("--json", type=Path, default=Path("out/digits_quality.json"))
    options = parser.parse_args()
    pipe = DigitsPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    items = [{"prompt": prompts, "num_inference_steps": STEPS} for prompts in CALIBRATION]
    references = [generate(pipe, seed) for seed in SEEDS]

    target = find_targets(pipe, items, None, 0)[0]
    calibration = calibrate(target.denoiser, target.generate, len(items), name=target.name)
    stack = next(site for site in calibration.sites.values() if site.role == "stack")
    budget = diffcache.Speedup(
        0.999 / cost_fraction(calibration.profile, calibration.profile.site(stack.name), options.computed)
    )
    fast = diffcache.compile(pipe, items, budget=budget, verbose=True)
    computed = len(fast.schedule.computed_steps())
    rows = {"diffcache": quality(fast, references) | {"computed": computed, "site": fast.schedule.rows[0].site}}
    same = diffcache.compile(pipe, items, budget=budget, sites=["stack"], verbose=False)
    rows["diffcache, first block always computed"] = quality(same, references) | {
        "computed": len(same.schedule.computed_steps()),
        "site": stack.name,
    }
    rows[f"Euler, {options.computed} steps"] = quality(pipe, references, options.computed)
    for order in (1, 2):
        recipe = recipes.evenly(computed=options.computed, predictor="taylor", order=order, site=stack.name)
        taylor = diffcache.compile(pipe, items[:1], recipe=recipe, verbose=False)
        rows[f"Taylor {order}, even, {options.computed} of {STEPS}"] = quality(taylor, references)
    flops = 1 / fast.schedule.flops_fraction
    clock = timing(pipe, fast)
    result = {
        "rows": rows,
        "flops_speedup": flops,
        **clock,
        "share_of_flops_speedup": clock["wall_speedup"] / flops,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
