"""How the shipped models' values change from step to step, and where an error hurts.

    python -m benchmarks.trajectories --out docs/trajectories.png

For each model on the left, sites x steps: the relative L2 change of a site's value since the step before. On the right,
for the sites whose sensitivity is measured: how many times an error that is made at one step alone (relative, in
squares) is found again in the final picture.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
from diffusers.utils import logging
from matplotlib import pyplot as plt

import diffcache
from benchmarks.models import digits, emoji
from benchmarks.models.digits.pipeline import DigitsPipeline
from benchmarks.models.emoji.pipeline import EmojiPipeline, EmojiUNetPipeline
from benchmarks.models.emoji.video_pipeline import EmojiVideoPipeline
from diffcache import gram

STEPS = 28
EMOJI = ["red apple, noto style", "fox, fluent 3d style", "pizza, fluent flat style", "octopus, blob style"]
CLIPS = ["red apple, bouncing", "fox, moving left", "pizza, turning", "octopus, growing"]
DIGITS = ["a handwritten three", "a bold seven", "a thin zero", "a slanted eight"]
MODELS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "emoji-mmdit": (lambda: EmojiPipeline.from_pretrained(Path(emoji.__file__).parent / "mmdit"), EMOJI),
    "emoji-unet": (lambda: EmojiUNetPipeline.from_pretrained(Path(emoji.__file__).parent / "unet"), EMOJI),
    "emoji-video": (lambda: EmojiVideoPipeline.from_pretrained(Path(emoji.__file__).parent / "video"), CLIPS),
    "digits": (lambda: DigitsPipeline.from_pretrained(Path(digits.__file__).parent / "pipeline"), DIGITS),
}
INK = "#1b2733"
MOST_SITES = 40  # rows that can still be told apart
MOST_CHANGE = 0.3  # at the end of the colour scale: what changes more is rare


def measure(name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Change since the step before [steps - 1] of each site, and the sensitivities [steps] that were measured."""
    build, prompts = MODELS[name]
    pipe = build()
    pipe.set_progress_bar_config(disable=True)
    items = [{"prompt": prompts, "num_inference_steps": STEPS}]
    calibration = diffcache.profile(pipe, items, verbose=True)
    record = calibration.profile
    changes = {site.name: np.diagonal(gram.relative_l2(site.gram), offset=-1) for site in record.sites}
    sensitivity = {site: record.site(site).sensitivity for site in calibration.searchable}
    return changes, sensitivity


def short(site: str) -> str:
    """ "block:up_blocks.2.attentions.1" as "block up 2 attentions 1", so that names fit beside their rows."""
    return " .. ".join(end.replace("_blocks.", " ").replace(":", " ").replace(".", " ") for end in site.split(".."))


def draw(axes: Any, name: str, changes: dict[str, np.ndarray], sensitivity: dict[str, np.ndarray]) -> Any:
    left, right = axes
    names = list(changes)[:: -(-len(changes) // MOST_SITES)]
    shown = left.imshow(
        np.stack([changes[site] for site in names]), aspect="auto", cmap="viridis", vmin=0, vmax=MOST_CHANGE
    )
    left.set_yticks(range(len(names)), [short(site) for site in names], fontsize=6)
    left.set_xticks(range(0, STEPS - 1, 3), range(1, STEPS, 3), fontsize=7)
    left.set_title(f"{name}: change of each site since the step before", fontsize=9, color=INK, loc="left")
    for (site, values), style in zip(sensitivity.items(), ("-", "--", "-.", ":"), strict=False):
        right.semilogy(range(STEPS), np.maximum(values, 1e-8), style, lw=1.7, label=short(site))
    right.set_title("error in the result per error at one step", fontsize=9, color=INK, loc="left")
    right.legend(fontsize=6.5, frameon=False)
    right.tick_params(labelsize=7)
    right.spines[["top", "right"]].set_visible(False)
    right.grid(axis="y", lw=0.3)
    for axis in axes:
        axis.set_xlabel("denoising step", fontsize=7, color=INK)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=[*MODELS])
    parser.add_argument("--out", type=Path, default=Path("out/trajectories.png"))
    options = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    count = len(options.models)
    figure, axes = plt.subplots(
        count, 2, figsize=(11, 4.4 * count), layout="constrained", squeeze=False, width_ratios=(1.7, 1)
    )
    for row, name in zip(axes, options.models, strict=True):
        shown = draw(row, name, *measure(name))
    bar = figure.colorbar(shown, ax=axes[-1, 0], location="bottom", aspect=50, extend="max")
    bar.set_label("relative L2 change (0: the same value as at the step before)", fontsize=7)
    bar.ax.tick_params(labelsize=7)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=96)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
