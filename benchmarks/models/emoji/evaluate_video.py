"""What the video model draws for clips it has never seen: a sheet of frames to look at, a moving one, and figures.

    python -m benchmarks.models.emoji.evaluate_video

- *retrieval*: the share of clips whose nearest real clip of the same motion (mean cosine of EfficientNet-lite0 features
  of the third and the sixth frame) has the caption that was asked for, among all captions.
- *motion*: the share of clips that, of the real clips of the same caption in all motions, are nearest (squared error)
  to the one with the motion that was asked for.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers.utils import logging
from PIL import Image
from torch import Tensor

from benchmarks.models.emoji import autoencoder, clips, data, features
from benchmarks.models.emoji.evaluate import grid
from benchmarks.models.emoji.video import FOLDER
from benchmarks.models.emoji.video_pipeline import EmojiVideoPipeline

LOOKED_AT = [2, 5]  # frames whose features are compared

Asked = Sequence[tuple[str, str]]  # (caption, motion)


def generate(pipe: EmojiVideoPipeline, asked: Asked, batch: int = 16, **options: object) -> Tensor:
    """One clip [n, 8, 3, 64, 64] for each (caption, motion); its noise depends on its place alone."""
    drawn = []
    for start in range(0, len(asked), batch):
        part = asked[start : start + batch]
        noise = [torch.Generator().manual_seed(row) for row in range(start, start + len(part))]
        prompts = [clips.prompt(*pair) for pair in part]
        drawn.append(pipe(prompts, generator=noise, output_type="pt", **options).frames)
    return torch.cat(drawn)


class Gallery:
    """The real pictures of the video model's style, from which every real clip can be made."""

    def __init__(self, captions: Sequence[str]):
        real = data.load().where(captions=captions, styles=(clips.STYLE,))
        pictures = autoencoder.to_input(torch.from_numpy(real.pixels))
        self.pictures = dict(zip(real.captions, pictures, strict=True))

    def clip(self, caption: str, motion: str) -> Tensor:
        """Frames [8, 3, 64, 64] in 0 .. 1."""
        return (clips.clip(self.pictures[caption], motion) / 2 + 0.5).clamp(0, 1)

    def scores(self, drawn: Tensor, asked: Asked) -> dict[str, float]:
        captions = list(self.pictures)
        found, moved = [], []
        for motion in clips.MOTIONS:
            rows = [row for row, pair in enumerate(asked) if pair[1] == motion]
            if rows:
                real = [embed_clip(self.clip(caption, motion)) for caption in captions]
                likeness = torch.stack([embed_clip(drawn[row]) for row in rows]) @ torch.stack(real).T
                nearest = likeness.argmax(dim=1).tolist()
                found += [captions[best] == asked[row][0] for row, best in zip(rows, nearest, strict=True)]
        for row, (caption, motion) in enumerate(asked):
            errors = {m: (drawn[row] - self.clip(caption, m)).square().mean().item() for m in clips.MOTIONS}
            moved.append(min(errors, key=errors.__getitem__) == motion)
        return {"retrieval, top 1": float(np.mean(found)), "motion": float(np.mean(moved))}


def embed_clip(frames: Tensor) -> Tensor:
    return features.embed(frames[LOOKED_AT]).flatten() / len(LOOKED_AT)


def held_out(captions: Sequence[str]) -> tuple[Asked, Asked]:
    """Held-out (caption, motion) pairs of captions seen in other motions; and one of each caption never seen moving."""
    pairs, unseen = [], []
    for number, caption in enumerate(captions):
        if data.split_of(caption, clips.STYLE) == "train":
            pairs += [(caption, motion) for motion in clips.MOTIONS if clips.split_of(caption, motion) != "train"]
        else:
            unseen.append((caption, list(clips.MOTIONS)[number % len(clips.MOTIONS)]))
    return pairs, unseen


def kept_aside(captions: Sequence[str]) -> Asked:
    """A hundred of the training pairs that training on a GPU keeps aside."""
    pairs = [(caption, motion) for caption in captions for motion in clips.MOTIONS]
    return [pair for pair in pairs if clips.split_of(*pair) == "train" and data.kept_aside(*pair)][:100]


def chosen(asked: Asked, count: int) -> list[int]:
    """Rows drawn at random, the motions in turn."""
    order = np.random.default_rng(0).permutation(len(asked)).tolist()
    turns = [[row for row in order if asked[row][1] == motion] for motion in clips.MOTIONS]
    return [turn[place] for place in range(count) for turn in turns if place < len(turn)][:count]


def sheet(gallery: Gallery, drawn: Tensor, asked: Asked) -> Image.Image:
    """Two clips to a line, the real one above the drawn one."""
    rows = chosen(asked, 16)
    lines = []
    for left, right in zip(rows[::2], rows[1::2], strict=True):
        lines.append(torch.cat([gallery.clip(*asked[left]), gallery.clip(*asked[right])]))
        lines.append(torch.cat([drawn[left], drawn[right]]))
    return grid(lines)


def moving(drawn: Tensor, asked: Asked) -> list[Image.Image]:
    """Frames of a sheet of 4 x 8 drawn clips that move."""
    rows = drawn[chosen(asked, 32)]
    return [grid(list(rows[:, frame].split(8))) for frame in range(clips.FRAMES)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--aside", action="store_true", help="training pairs that training on a GPU keeps aside")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    pipe = EmojiVideoPipeline.from_pretrained(arguments.folder)
    pipe.set_progress_bar_config(disable=True)
    gallery = Gallery(pipe.text_encoder.config["captions"])
    report: dict[str, object] = {"steps": arguments.steps, "guidance": arguments.guidance}
    pairs, unseen = held_out(list(gallery.pictures))
    splits = {"aside": kept_aside(list(gallery.pictures))} if arguments.aside else {"pair": pairs, "unseen": unseen}
    for split, asked in splits.items():
        drawn = generate(pipe, asked, num_inference_steps=arguments.steps, guidance_scale=arguments.guidance)
        sheet(gallery, drawn, asked).save(data.CACHE / f"video-{split}.png")
        first, *rest = moving(drawn, asked)
        first.save(data.CACHE / f"video-{split}.gif", save_all=True, append_images=rest, duration=120, loop=0)
        report[split] = {"clips": len(asked)} | gallery.scores(drawn, asked)
        print(split, report[split], flush=True)
    (data.CACHE / "video.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
