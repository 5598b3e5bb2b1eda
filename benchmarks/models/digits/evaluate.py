"""Does the denoiser draw the digit that was asked for? A classifier trained on the real digits says.

python -m benchmarks.models.digits.evaluate --grid out/digits.png
"""

import argparse
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.base import ClassifierMixin
from sklearn.svm import SVC

from benchmarks.models.digits.pipeline import NUMBERS, SIDE, DigitsPipeline
from benchmarks.models.digits.train import FOLDER, SLANTS, WEIGHTS, load_data


def train_classifier() -> ClassifierMixin:
    """A support vector machine over the real digits in all styles."""
    pictures, labels = load_data()
    return SVC(gamma="scale").fit(pictures.flatten(1).numpy(), [NUMBERS.index(number) for *_, number in labels])


def draw(pipe: DigitsPipeline, prompts: list[str], seed: int, steps: int, guidance: float) -> np.ndarray:
    """One picture [8, 8] in 0 .. 1 for each prompt, from its own noise."""
    generators = [torch.Generator().manual_seed(seed * len(prompts) + number) for number in range(len(prompts))]
    pictures = pipe(
        prompts, num_inference_steps=steps, guidance_scale=guidance, generator=generators, output_type="np"
    ).images
    return pictures[..., 0]


def save_grid(rows: list[np.ndarray], path: Path, scale: int = 8) -> None:
    """Enlarged pictures, one row for each set."""
    lines = [np.concatenate([np.pad(picture, 1, constant_values=0.6) for picture in row], axis=1) for row in rows]
    pixels = (np.concatenate(lines) * 255).round().astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.repeat(scale, axis=0).repeat(scale, axis=1)).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--grid", type=Path, help="write all pictures to this PNG")
    arguments = parser.parse_args()

    pipe = DigitsPipeline.from_pretrained(arguments.folder)
    pipe.set_progress_bar_config(disable=True)
    classifier = train_classifier()
    rows, hits, started = [], [], time.monotonic()
    for weight, slant in product(WEIGHTS, SLANTS):
        style = " ".join(part for part in ("a", weight, slant) if part)
        prompts = [f"{style} {number}" for number in NUMBERS]
        style_hits = []
        for seed in range(arguments.seeds):
            pictures = draw(pipe, prompts, seed, arguments.steps, arguments.guidance)
            latents = 2 * pictures.reshape(-1, SIDE * SIDE) - 1
            style_hits.append(classifier.predict(latents) == np.arange(len(NUMBERS)))
            rows.append(pictures)
        print(f"{style + ' ...':20} {np.mean(style_hits):6.1%} recognised")
        hits += style_hits
    seconds = time.monotonic() - started
    print(f"{'all':20} {np.mean(hits):6.1%} of {np.size(hits)} pictures, {seconds / len(hits):.1f} s for ten")
    print(
        "by digit:", ", ".join(f"{name} {rate:.0%}" for name, rate in zip(NUMBERS, np.mean(hits, axis=0), strict=True))
    )
    if arguments.grid:
        save_grid(rows, arguments.grid)


if __name__ == "__main__":
    main()
