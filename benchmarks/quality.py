"""Error of the shipped models' pictures and clips at several speeds, beside what the same cost buys otherwise.

    python -m benchmarks.quality --models emoji-mmdit emoji-unet emoji-video

Calibrated on pairs that the models were trained on, judged on held-out pairs and other seeds. PSNR is over values in
0..1 against the uncached pipeline. "Fewer steps" takes the same sampler with the steps that cost at least as much.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging

import diffcache
from benchmarks.models import emoji
from benchmarks.models.emoji import clips, data
from benchmarks.models.emoji.pipeline import EmojiPipeline, EmojiUNetPipeline
from benchmarks.models.emoji.video_pipeline import EmojiVideoPipeline
from diffcache import recipes
from diffcache.report import psnr, relative_error

STEPS = 28
FOLDER = Path(emoji.__file__).parent


@dataclass(frozen=True)
class Model:
    """A shipped pipeline, and the prompts it was trained on and those held out from it."""

    build: Callable[[], Any]
    result: str
    training: Sequence[str]
    held_out: Sequence[str]


def _pictures() -> dict[str, Sequence[str]]:
    wanted = {"training": [], "held_out": []}
    encoder = json.loads((FOLDER / "mmdit" / "text_encoder" / "config.json").read_text())
    for number, caption in enumerate(encoder["captions"]):
        style = encoder["styles"][number % len(encoder["styles"])]
        split = {"train": "training", "pair": "held_out"}.get(data.split_of(caption, style))
        if split:
            wanted[split].append(data.prompt(caption, style))
    return {name: _spread(prompts) for name, prompts in wanted.items()}


def _clips() -> dict[str, Sequence[str]]:
    wanted = {"training": [], "held_out": []}
    encoder = json.loads((FOLDER / "video" / "text_encoder" / "config.json").read_text())
    for number, caption in enumerate(encoder["captions"]):
        motion = encoder["styles"][number % len(encoder["styles"])]
        split = {"train": "training", "pair": "held_out"}[clips.split_of(caption, motion).replace("caption", "pair")]
        if data.split_of(caption, clips.STYLE) == "train":
            wanted[split].append(clips.prompt(caption, motion))
    return {name: _spread(prompts) for name, prompts in wanted.items()}


def _spread(prompts: Sequence[str], count: int = 12) -> list[str]:
    return [prompts[i * len(prompts) // count] for i in range(count)]


def models() -> dict[str, Model]:
    return {
        "emoji-mmdit": Model(lambda: EmojiPipeline.from_pretrained(FOLDER / "mmdit"), "images", **_pictures()),
        "emoji-unet": Model(lambda: EmojiUNetPipeline.from_pretrained(FOLDER / "unet"), "images", **_pictures()),
        "emoji-video": Model(lambda: EmojiVideoPipeline.from_pretrained(FOLDER / "video"), "frames", **_clips()),
    }


def generate(model: Model, pipe: Any, prompts: Sequence[str], seed: int, steps: int = STEPS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    done = pipe(list(prompts), num_inference_steps=steps, generator=generator, output_type="np")
    return torch.as_tensor(np.asarray(getattr(done, model.result)), dtype=torch.float64)


def rows(name: str, factors: Sequence[float], seeds: Sequence[int]) -> list[dict[str, Any]]:
    model = models()[name]
    pipe = model.build()
    pipe.set_progress_bar_config(disable=True)
    items = [{"prompt": list(model.training[i : i + 4]), "num_inference_steps": STEPS} for i in (0, 4, 8)]
    truth = torch.cat([generate(model, pipe, model.held_out, seed) for seed in seeds])
    found = []

    def judge(way: str, other: Any, computed: int, flops: float, steps: int = STEPS) -> None:
        result = torch.cat([generate(model, other, model.held_out, seed, steps) for seed in seeds])
        error = {"psnr": round(psnr(result, truth, 1.0), 1), "relative_l2": round(relative_error(result, truth), 4)}
        row = {"model": name, "way": way, "computed": computed, "flops": round(1 / flops, 2)} | error
        found.append(row)
        print(
            "{model:<12} {way:<34} {computed:>3} {flops:>6.2f} x {psnr:>6.1f} dB  {relative_l2}".format(**row),
            flush=True,
        )

    for factor in factors:
        fast = diffcache.compile(pipe, items, budget=diffcache.Speedup(factor), verbose=False)
        schedule = fast.schedule
        computed = len(schedule.computed_steps())
        judge(f"diffcache, Speedup({factor})", fast, computed, schedule.flops_fraction)
        for predictor, order in (("newton", 2), ("taylor", 1), ("taylor", 2), ("reuse", None)):
            recipe = recipes.evenly(computed=computed, predictor=predictor, order=order, site=schedule.rows[0].site)
            other = diffcache.compile(pipe, items[:1], recipe=recipe, verbose=False, judge_prompts=1)
            title = f"{predictor} {order or ''}, evenly spaced".replace(" ,", ",")
            judge(title, other, computed, other.schedule.flops_fraction)
        steps = math.ceil(schedule.flops_fraction * STEPS)
        judge("fewer steps", pipe, steps, steps / STEPS, steps)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=models(), default=[*models()])
    parser.add_argument("--factors", type=float, nargs="*", default=[2.0, 3.0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[77])
    parser.add_argument("--json", type=Path, default=Path("out/quality.json"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    found = [row for name in arguments.models for row in rows(name, arguments.factors, arguments.seeds)]
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
