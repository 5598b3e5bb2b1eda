"""Compile the emoji pipeline, generate pictures it was not calibrated on, show what that cost and what it changed."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import diffcache
from benchmarks.models.emoji.pipeline import EmojiPipeline
from demo import figures
from diffcache import gram, recipes
from diffcache.report import psnr, relative_error

MODEL = Path(__file__).parent.parent / "benchmarks" / "models" / "emoji" / "mmdit"
STEPS = 28
CALIBRATION = [
    ["red apple, noto style", "fox, fluent 3d style"],
    ["tiger face, blob style", "pizza, fluent flat style"],
    ["octopus, fluent gradient style", "cherry blossom, noto style"],
]
HELD_OUT = ["watermelon, fluent 3d style", "panda, fluent gradient style", "strawberry, fluent flat style",
            "butterfly, noto style", "tomato, blob style", "hamburger, fluent gradient style", "unicorn, noto style",
            "doughnut, blob style"]  # fmt: skip
HELD_OUT_SEEDS = (1234, 4321)


@dataclass
class Row:
    """One way of generating the held-out pictures, and what it cost."""

    name: str
    images: NDArray[np.float64]
    seconds: float
    full_steps: str
    flops: float


def generate(pipe: Any, steps: int, seeds: tuple[int, ...]) -> tuple[NDArray[np.float64], float]:
    """Held-out pictures [N, H, W, 3] in 0..1 and the seconds they took (the median over seeds, summed)."""
    images, seconds = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        start = time.perf_counter()
        result = pipe(HELD_OUT, num_inference_steps=steps, generator=generator, output_type="np")
        seconds.append(time.perf_counter() - start)
        images.append(np.asarray(result.images, dtype=np.float64))
    return np.concatenate(images), float(np.median(seconds)) * len(seeds)


def compare(pipe: Any, fast: Any, seeds: tuple[int, ...], quick: bool) -> list[Row]:
    """Uncached, cached, and what else the same number of full steps could buy."""
    schedule = fast.schedule
    computed = len(schedule.computed_steps())
    ways: list[tuple[str, Any, int, str, float]] = [
        ("uncached", pipe, STEPS, f"{STEPS}", 1.0),
        ("diffcache", fast, STEPS, f"{computed} of {STEPS}", schedule.flops_fraction),
        (f"fewer steps ({computed})", pipe, computed, f"{computed}", computed / STEPS),
    ]
    site = schedule.rows[0].site
    for order in () if quick else (1, 2):
        recipe = recipes.evenly(computed=computed, predictor="taylor", order=order, site=site)
        taylor = diffcache.compile(pipe, _items(CALIBRATION[:1]), recipe=recipe, verbose=False, judge_prompts=1)
        ways.append(
            (f"Taylor {order}, even spacing", taylor, STEPS, f"{computed} of {STEPS}", taylor.schedule.flops_fraction)
        )
    rows = []
    for name, model, steps, full, flops in ways:
        if model is not pipe:
            generate(model, steps, seeds[:1])  # a first generation of eight pictures captures and makes programs
        images, seconds = generate(model, steps, seeds)
        rows.append(Row(name, images, seconds, full, flops))
    return rows


def _items(batches: list[list[str]]) -> list[dict[str, Any]]:
    return [{"prompt": prompts, "num_inference_steps": STEPS} for prompts in batches]


def print_table(console: Console, rows: list[Row]) -> None:
    reference = rows[0]
    table = Table(title=f"{len(reference.images)} pictures from prompts and seeds not used for calibration")
    for column in ("", "full steps", "seconds", "speed-up", "FLOPs saved", "PSNR", "relative L2"):
        table.add_column(column, justify="left" if not column else "right")
    truth = torch.from_numpy(reference.images)
    for row in rows:
        images = torch.from_numpy(row.images)
        same = row is reference
        table.add_row(
            row.name, row.full_steps, f"{row.seconds:.2f}", f"{reference.seconds / row.seconds:.2f}x",
            f"{100 * (1 - row.flops):.0f} %", "-" if same else f"{psnr(images, truth, 1.0):.1f} dB",
            "-" if same else f"{relative_error(images, truth):.4f}", style="bold" if row.name == "diffcache" else None,
        )  # fmt: skip
    console.print(table)


def draw(fast: Any, rows: list[Row], out: Path) -> list[Path]:
    schedule, profile = fast.schedule, fast.transformer.profile
    uncached, cached = rows[0], rows[1]
    speed = uncached.seconds / cached.seconds
    quality = psnr(torch.from_numpy(cached.images), torch.from_numpy(uncached.images), 1.0)
    files = [out / "pictures.png", out / "schedule.png", out / "similarity.png"]
    title = f"Same prompts, same seeds: {speed:.1f} times faster, PSNR {quality:.1f} dB"
    figures.picture_grid(uncached.images[: len(HELD_OUT)], cached.images[: len(HELD_OUT)], HELD_OUT, title, files[0])
    figures.schedule_grid(schedule, files[1])
    shown = list(dict.fromkeys([schedule.rows[0].site, "output", *(site.name for site in profile.sites)]))[:3]
    figures.similarity_map(
        {n: gram.relative_l2(profile.site(n).gram) for n in shown if n in {s.name for s in profile.sites}}, files[2]
    )
    return files


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer prompts and baselines")
    parser.add_argument("--speedup", type=float, default=2.5, help="FLOPs speed-up to ask for (default 2.5)")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the pictures")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)  # the model is small: a second thread gains little, and loses much beside a busy process
    console = Console(soft_wrap=True)
    diffusers.utils.logging.set_verbosity_error()  # it does not expect our prompt encoder's class, and says so
    diffusers.utils.logging.disable_progress_bar()  # of loading seven components
    pipe = EmojiPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    parameters = sum(p.numel() for p in pipe.transformer.parameters())
    console.print(
        f"A text-to-emoji pipeline of diffusers' own parts, {parameters / 1e6:.1f} M parameters in its denoiser, "
        f"{STEPS} steps."
    )
    console.print("Calibrating, searching and judging (live on the error stream) ...")
    calibration = CALIBRATION[:2] if options.quick else CALIBRATION
    fast = diffcache.compile(pipe, _items(calibration), budget=diffcache.Speedup(options.speedup), verbose=True)
    rows = compare(pipe, fast, HELD_OUT_SEEDS[:1] if options.quick else HELD_OUT_SEEDS, options.quick)
    print_table(console, rows)
    for file in draw(fast, rows, options.out):
        console.print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
