"""What an emoji model draws for prompts it has never seen: a grid to look at, and figures.

    python -m benchmarks.models.emoji.evaluate mmdit

- *retrieval*: the share of pictures whose nearest real picture of the same style (cosine of EfficientNet-lite0
  features) has the caption that was asked for, among all captions; *through the autoencoder* is the same figure of the
  real held-out pictures after encoding and decoding them, which no denoiser in its latents can be expected to beat.
- *style*: the share whose nearest real picture over all styles is of the style that was asked for.
- *KID*: kernel distance to the real pictures of the same prompts.
"""

import argparse
import json
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from PIL import Image
from torch import Tensor

from benchmarks.models.emoji import autoencoder, data, features
from benchmarks.models.emoji.pipeline import EmojiPipeline, EmojiUNetPipeline

PIPELINES = {"mmdit": EmojiPipeline, "unet": EmojiUNetPipeline}
SPLITS = {"pair": "captions seen in other styles", "caption": "captions never seen"}
GUTTER = 2  # pixels between the pictures of a grid


def to_images(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def kept_aside(emoji: data.Emoji) -> data.Emoji:
    train = emoji.where(split="train")
    pairs = zip(train.captions, train.styles, strict=True)
    return train.at([row for row, pair in enumerate(pairs) if data.kept_aside(*pair)])


def generate(pipe: DiffusionPipeline, asked: data.Emoji, batch: int = 32, **options: object) -> Tensor:
    """One picture [n, 3, 64, 64] for each row; its noise depends on the row's place alone."""
    pictures = []
    for start in range(0, len(asked), batch):
        rows = range(start, min(start + batch, len(asked)))
        prompts = [data.prompt(asked.captions[row], asked.styles[row]) for row in rows]
        noise = [torch.Generator().manual_seed(row) for row in rows]
        pictures.append(pipe(prompts, generator=noise, output_type="pt", **options).images)
    return torch.cat(pictures)


class Gallery:
    """The real pictures that drawn ones are compared with: all splits, so that the right one is always there."""

    def __init__(self, captions: Collection[str], styles: Collection[str]):
        self.real = data.load().where(captions=captions, styles=styles)
        self.embedded = features.embed(to_images(self.real.pixels))

    def scores(self, images: Tensor, asked: data.Emoji) -> dict[str, float]:
        likeness = features.embed(images) @ self.embedded.T
        same_style = torch.tensor([[style == real for real in self.real.styles] for style in asked.styles])
        ranked = likeness.masked_fill(~same_style, -1).argsort(dim=1, descending=True)[:, :5].tolist()
        captions = [[self.real.captions[row] for row in best] for best in ranked]
        wanted = list(zip(captions, asked.captions, strict=True))
        styles = [self.real.styles[row] for row in likeness.argmax(dim=1).tolist()]
        return {
            "retrieval, top 1": float(np.mean([found[0] == caption for found, caption in wanted])),
            "retrieval, top 5": float(np.mean([caption in found for found, caption in wanted])),
            "style": float(np.mean([found == style for found, style in zip(styles, asked.styles, strict=True)])),
        }


@torch.no_grad()
def reconstruct(pipe: DiffusionPipeline, pixels: np.ndarray) -> Tensor:
    images = autoencoder.to_input(torch.from_numpy(pixels))
    return (pipe.vae.decode(pipe.vae.encode(images).latent_dist.mode()).sample / 2 + 0.5).clamp(0, 1)


def grid(rows: list[Tensor]) -> Image.Image:
    """Rows of pictures [n, 3, 64, 64] with a gutter between them."""
    step = data.SIDE + GUTTER
    sheet = np.full((len(rows) * step, max(map(len, rows)) * step, 3), 255, np.uint8)
    for r, row in enumerate(rows):
        for c, image in enumerate((row.permute(0, 2, 3, 1).clamp(0, 1) * 255).round().byte().numpy()):
            sheet[r * step : r * step + data.SIDE, c * step : c * step + data.SIDE] = image
    return Image.fromarray(sheet)


def sheet(drawn: Tensor, asked: data.Emoji, columns: int = 16) -> Image.Image:
    """Real pictures above those drawn for the same words."""
    order = np.random.default_rng(0).permutation(len(asked))[: 4 * columns]
    rows = []
    for start in range(0, len(order), columns):
        part = order[start : start + columns].tolist()
        rows += [to_images(asked.pixels[part]), drawn[part]]
    return grid(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=PIPELINES)
    parser.add_argument("--folder", type=Path, help="default: the folder beside this file")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--aside", action="store_true", help="the training pairs that training on a GPU keeps aside")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    folder = arguments.folder or Path(__file__).parent / arguments.kind

    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()  # it does not expect our prompt encoder's class, and says so
    pipe = PIPELINES[arguments.kind].from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    gallery = Gallery(pipe.text_encoder.config["captions"], pipe.text_encoder.config["styles"])
    report: dict[str, object] = {"steps": arguments.steps, "guidance": arguments.guidance}
    for split, meaning in SPLITS.items() if not arguments.aside else (("aside", "kept aside"),):
        asked = kept_aside(gallery.real) if arguments.aside else gallery.real.where(split=split)
        drawn = generate(pipe, asked, num_inference_steps=arguments.steps, guidance_scale=arguments.guidance)
        sheet(drawn, asked).save(data.CACHE / f"{arguments.kind}-{split}.png")
        found = gallery.scores(drawn, asked)
        restored = gallery.scores(reconstruct(pipe, asked.pixels), asked)
        found["retrieval, top 1, through the autoencoder"] = restored["retrieval, top 1"]
        found["KID"] = features.kernel_distance(features.pooled(drawn), features.pooled(to_images(asked.pixels)))
        report[split] = {"pictures": len(asked)} | found
        print(f"{meaning}, {len(asked)} pictures:", ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    (data.CACHE / f"{arguments.kind}.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
