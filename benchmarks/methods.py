"""Every recipe on the shipped trained models: FLOPs, time and distance to the uncached result, beside the baselines.

    python -m benchmarks.methods [--models emoji-mmdit emoji-unet emoji-video] [--only teacache fora] [--settings 1]

Calibrated on pairs that the models were trained on, judged on held-out pairs and other seeds. PSNR is over values in
0..1 against the uncached pipeline. Time is that of the process over whole generations on one thread, uncached and
cached in turn, which other work on the machine disturbs little; the ratio is the median over the rounds. Rows are
written to ``benchmarks/results/methods.json`` as they are found, and what stands there is not measured again (delete
the file, or rows of it, to do so): the baselines and the middle setting of every recipe first. "Fewer steps" takes the
same sampler, ``Speedup`` is the search of ``diffcache.compile``.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

import diffcache
from benchmarks.method_settings import SETTINGS, Settings
from benchmarks.quality import STEPS, Model, generate, models
from diffcache.compiler import ALL_SITES
from diffcache.planning import plan_of
from diffcache.profiling import calibrate
from diffcache.recipes import METHODS
from diffcache.report import psnr, relative_error
from diffcache.runtime import CachedDenoiser
from diffcache.saving import attach
from diffcache.targets import find_targets

RESULTS = Path(__file__).parent / "results" / "methods.json"
BASELINES: dict[str, list[Settings]] = {
    "fewer steps": [{"steps": steps} for steps in (24, 20, 17, 14, 12, 10, 8, 7)],
    "Speedup": [{"factor": factor} for factor in (1.3, 1.5, 2.0, 2.5, 3.0, 4.0)],
}


class Bench:
    """One model: calibrated once, and judged under one schedule after the other."""

    def __init__(self, name: str, model: Model, prompts: int, seeds: Sequence[int], rounds: int):
        self.name, self.model, self.seeds, self.rounds = name, model, seeds, rounds
        self.pipe = model.build()
        self.pipe.set_progress_bar_config(disable=True)
        self.prompts = list(model.held_out[:prompts])
        self.items = [{"prompt": list(model.training[i : i + 4]), "num_inference_steps": STEPS} for i in (0, 4)]
        self.truth = torch.cat([self._generate(self.pipe, seed) for seed in seeds])
        target = find_targets(self.pipe, self.items, None, 0)[0]
        self.target = target.name
        self.calibration = calibrate(
            target.denoiser, target.generate, len(self.items), name=target.name, most_sites=ALL_SITES
        )
        self.plan = plan_of(self.calibration, target.generate, 1)

    def _generate(self, pipe: Any, seed: int, steps: int = STEPS) -> torch.Tensor:
        return generate(self.model, pipe, self.prompts, seed, steps)

    def row(self, way: str, setting: Settings) -> dict[str, Any]:
        """One row of the table; a refusal is a row, too."""
        found: dict[str, Any] = {"model": self.name, "way": way, "setting": setting}
        try:
            if way == "fewer steps":
                return found | {"flops": setting["steps"] / STEPS} | self._judged(self.pipe, setting["steps"])
            if way == "Speedup":
                budget = diffcache.Speedup(setting["factor"])
                fast = diffcache.compile(self.pipe, self.items, budget=budget, verbose=False)
                denoiser = fast.components[self.target]
            else:
                schedule = METHODS[way].make(**setting).schedule(self.plan)
                denoiser = self.calibration.cached(schedule)
                fast = attach(self.pipe, {self.target: denoiser})
            denoiser.reset()
            return found | self._judged(fast) | _measured(denoiser)
        except ValueError as error:
            return found | {"refused": str(error)[:200]}

    def _judged(self, other: Any, steps: int = STEPS) -> dict[str, Any]:
        """Error over all seeds, then whole generations in turn."""
        result = torch.cat([self._generate(other, seed, steps) for seed in self.seeds])
        ratios = []
        for _ in range(self.rounds):
            start = time.process_time()
            self._generate(self.pipe, self.seeds[0])
            middle = time.process_time()
            self._generate(other, self.seeds[0], steps)
            ratios.append((middle - start) / (time.process_time() - middle))
        return {
            "time": round(statistics.median(ratios), 3),
            "psnr": round(psnr(result, self.truth, 1.0), 2),
            "relative_l2": round(relative_error(result, self.truth), 5),
        }


def _measured(denoiser: CachedDenoiser) -> dict[str, Any]:
    """What was really computed on the held-out prompts, and what history took at their shapes."""
    names = tuple(row.site for row in denoiser.schedule.rows)
    programs = next((p for (_, sites, _), p in denoiser._programs.items() if sites == names and p.sites), None)
    plan = programs.memory(denoiser.schedule, denoiser.pattern) if programs is not None else None
    return {
        "flops": round(denoiser.flops / denoiser.flops_in_full, 4),
        "sites": len(denoiser.schedule.rows),
        "entries": sum(plan.entries.values()) if plan is not None else 0,
        "megabytes": round(plan.device_bytes / 1e6, 3) if plan is not None else 0.0,
    }


def wanted(names: Sequence[str], only: Sequence[str], settings: int) -> Iterator[tuple[str, str, Settings]]:
    """(model, way, setting) in the order of importance."""
    recipes = {recipe: SETTINGS.get(recipe, [{}]) for recipe in METHODS}
    for number in range(settings):
        for name in names:
            ways = {way: choices[number : number + 1] for way, choices in recipes.items()}
            for way, choices in {**ways, **(BASELINES if number == 0 else {})}.items():
                if not only or way in only:
                    yield from ((name, way, setting) for setting in choices)


def key(row: dict[str, Any]) -> str:
    return json.dumps([row["model"], row["way"], row["setting"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=models(), default=[*models()])
    parser.add_argument("--only", nargs="*", default=[], help="recipes and baselines")
    parser.add_argument("--settings", type=int, default=3, help="how many of each recipe's settings")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="*", default=[77])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--nice", type=int, default=10)
    parser.add_argument("--json", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    os.nice(arguments.nice)
    rows = json.loads(arguments.json.read_text()) if arguments.json.exists() else []
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    known, bench = {key(row) for row in rows}, None
    for name, way, setting in wanted(arguments.models, arguments.only, arguments.settings):
        if key({"model": name, "way": way, "setting": setting}) in known:
            continue
        if bench is None or bench.name != name:
            bench = None
            gc.collect()
            bench = Bench(name, models()[name], arguments.prompts, arguments.seeds, arguments.rounds)
        row = bench.row(way, setting)
        rows.append(row)
        text = ",\n".join(json.dumps(row) for row in rows)
        arguments.json.write_text(f"[\n{text}\n]\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
