"""Train emoji-unet and emoji-video (or emoji-mmdit) side by side on one GPU, in a few minutes.

    python -m benchmarks.gpu.train_emoji prepare                           # where npm and MiniLM are: out/emoji_gpu
    python -m benchmarks.gpu.train_emoji train --seconds 290 --out "$OUT"  # on the GPU, which needs out/emoji_gpu
    python -m benchmarks.gpu.train_emoji join --source DIR                 # back here: folders under out/emoji_trained
    python -m benchmarks.models.emoji.evaluate unet --folder out/emoji_trained/unet-last --aside

The autoencoder and the scales of the prompts' table are those that are shipped. Training on two cores ended long after
the 1 125 pictures were known by heart (loss 0.05, and 0.25 on pairs held out), so a GPU must not do more of the same.
Half of the draws are of all other groups and styles, which show how a thing looks in another style. And pictures are
mirrored, turned, shrunk and shifted, and the prompt says how, so that nothing of it is drawn when nothing is said
(augmentation that does not leak: Karras et al., 2022).

Some training pairs are kept aside to validate. Two snapshots of the average come back: the one with the least loss on
those, and the last. A training step is one CUDA graph: these models are too small for a GPU to wait for Python.
"""

import argparse
import copy
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from benchmarks.models.emoji import autoencoder, clips, data, denoisers, video
from benchmarks.models.emoji.prompts import DIM, PromptEncoder
from benchmarks.models.emoji.train import GROUPS, PROMPT_DROP, STYLES, is_matrix
from benchmarks.models.training import Trainer, optimizers

PREPARED, TRAINED = Path("out/emoji_gpu"), Path("out/emoji_trained")
SHIPPED = Path(data.__file__).parent
PART = 15 << 20  # bytes of a file that comes back
TO_WRITE = 6.0  # seconds kept for that

OURS = 0.5  # of the draws: the groups and styles that the model is for
COPIES, MOVED = 8, 0.5  # of each picture, and of the draws


@dataclass(frozen=True)
class Model:
    """What one of the shipped folders is trained with."""

    denoiser: str  # its folder in the shipped one
    build: Callable[[], nn.Module]
    loss: Callable[..., Tensor]
    batch: int
    dropout: float = 0.0


MODELS = {
    "unet": Model("unet", denoisers.build_unet, denoisers.v_loss, 256, dropout=0.1),
    "mmdit": Model("transformer", denoisers.build_mmdit, denoisers.flow_loss, 512, dropout=0.1),
    "video": Model("transformer", video.build, video.flow_loss, 128),
}


def prepare() -> None:
    """Pictures, prompts' embeddings and autoencoder: what the GPU machine, which has neither npm nor MiniLM, needs."""
    torch.set_num_threads(1)  # short sentences one by one: more threads only wait for each other
    PREPARED.mkdir(parents=True, exist_ok=True)
    captions = sorted(set(data.load().captions))
    shutil.copy(data.CACHE / "emoji.npz", PREPARED)
    shutil.copytree(SHIPPED / "unet/vae", PREPARED / "vae", dirs_exist_ok=True)
    shutil.copytree(SHIPPED / "video/text_encoder", PREPARED / "video_encoder", dirs_exist_ok=True)
    shipped = PromptEncoder.from_pretrained(SHIPPED / "unet/text_encoder").config
    scales = shipped["token_scale"], shipped["pooled_scale"]
    encoder = PromptEncoder.of(captions, data.STYLES, scales=scales)
    encoder.half().save_pretrained(PREPARED / "encoder")
    size = sum(file.stat().st_size for file in PREPARED.rglob("*") if file.is_file())
    print(f"{PREPARED}: {size / 2**20:.0f} MiB")


def moved(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures [n, 3, 64, 64] mirrored, shrunk, turned and shifted at random, and how much of each [n, 5]."""
    how = torch.rand(len(pictures), 5, device=pictures.device) * 2 - 1
    how[:, 0] = (how[:, 0] > 0).float()
    how[:, 1].abs_()
    mirrored, scale, angle = 1 - 2 * how[:, 0], 1 - 0.15 * how[:, 1], 0.2 * how[:, 2]
    cos, sin = angle.cos() / scale, angle.sin() / scale
    across = torch.stack([mirrored * cos, mirrored * sin, 0.1 * how[:, 3]], dim=1)
    down = torch.stack([-sin, cos, 0.1 * how[:, 4]], dim=1)
    grid = F.affine_grid(torch.stack([across, down], dim=1), list(pictures.shape), align_corners=False)
    return 1 - F.grid_sample(1 - pictures, grid, align_corners=False), how  # white comes in at the edges


class Draw:
    """Random latents of training pictures, plain and moved, with their prompts' embeddings, all on the device."""

    def __init__(self, emoji: data.Emoji, vae: AutoencoderKL, encoder: PromptEncoder, batch: int):
        self.batch, self.device, self.joined = batch, vae.device, encoder.config["joined"]
        pairs = list(zip(emoji.captions, emoji.styles, strict=True))
        ours = [g in GROUPS and s in STYLES for g, s in zip(emoji.groups, emoji.styles, strict=True)]
        often, seldom, self.aside = [], [], []
        for row, (mine, pair) in enumerate(zip(ours, pairs, strict=True)):
            (seldom if not mine else self.aside if data.kept_aside(*pair) else often).append(row)
        repeats = max(1, round(OURS / (1 - OURS) * len(seldom) / len(often)))
        self.rows = torch.tensor(often * repeats + seldom, device=self.device)
        self.moved = MOVED
        embedded = encoder.encode([data.prompt(*pair) for pair in pairs])
        self.tokens, self.pooled = embedded.last_hidden_state.to(self.device), embedded.pooler_output.to(self.device)
        self.latents, self.how = self._encode(torch.from_numpy(emoji.pixels), vae)
        self.directions = torch.randn(5, DIM, device=self.device)

    @torch.no_grad()
    def _encode(self, pixels: Tensor, vae: AutoencoderKL) -> tuple[Tensor, Tensor]:
        """Latents [1 + COPIES, n, 16, 8, 8], the first as they are, and how the others were moved."""
        latents, hows = [], []
        for number in range(1 + COPIES):
            for part in pixels.split(512):
                pictures, how = autoencoder.to_input(part.to(self.device)), torch.zeros(len(part), 5)
                if number:
                    pictures, how = moved(pictures)
                latents.append(vae.encode(pictures).latent_dist.mode().contiguous() * vae.config["scaling_factor"])
                hows.append(how.to(self.device))
        shape = (1 + COPIES, len(pixels))
        return torch.cat(latents).unflatten(0, shape), torch.cat(hows).unflatten(0, shape)

    def validation(self) -> "Draw":
        """The same of the pictures kept aside, none of them moved."""
        other = copy.copy(self)
        other.rows, other.moved = torch.tensor(self.aside, device=self.device), 0.0
        return other

    def __call__(self) -> tuple[Tensor, Tensor, Tensor]:
        """Latents [batch, 16, 8, 8], token embeddings [batch, 8 or 10, 384], pooled [batch, 768]."""
        rows = self.rows[torch.randint(len(self.rows), (self.batch,), device=self.device)]
        chance = torch.rand(2, self.batch, device=self.device)
        copies = torch.randint(1, 1 + COPIES, (self.batch,), device=self.device) * (chance[0] < self.moved)
        kept = (chance[1] >= PROMPT_DROP).float()
        tokens, pooled = self.tokens[rows] * kept[:, None, None], self.pooled[rows] * kept[:, None]
        said = self.how[copies, rows] @ self.directions  # zero for plain ones; joined to what is said of the style
        pooled = pooled + F.pad(said, (DIM, 0))
        if self.joined:
            tokens = tokens + F.pad(said[:, None], (0, 0, tokens.shape[1] - 1, 0))
        return self.latents[copies, rows], tokens, pooled


def draws(name: str, emoji: data.Emoji, batch: int, device: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """What the model of this name is trained with, and what it is validated with."""
    vae = AutoencoderKL.from_pretrained(PREPARED / "vae").to(device)
    if name != "video":
        encoder = PromptEncoder.from_pretrained(PREPARED / "encoder").float()
        encoder.register_to_config(joined=name == "unet")
        draw = Draw(emoji.where(split="train"), vae, encoder, batch)
        return draw, draw.validation()
    encoder = PromptEncoder.from_pretrained(PREPARED / "video_encoder").float()

    def clips_that(aside: bool) -> video.Draw:
        def wanted(caption: str, motion: str) -> bool:
            return clips.split_of(caption, motion) == "train" and data.kept_aside(caption, motion) == aside

        return video.Draw(emoji, vae, encoder, batch, wanted)

    return clips_that(aside=False), clips_that(aside=True)


class Watch:
    """The average's loss on what is kept aside, at each entry of the curve, and the weights at the least of it."""

    def __init__(self, trainer: Trainer, loss: Callable[[nn.Module], Tensor]):
        self.trainer, self.loss = trainer, loss
        self.curve: list[tuple[int, float, float]] = []  # step, seconds, loss
        self.best: tuple[int, dict[str, Tensor]] = (0, {})

    @torch.no_grad()
    def __call__(self) -> None:
        trainer = self.trainer
        with trainer.autocasting():
            value = torch.stack([self.loss(trainer.average) for _ in range(8)]).mean().item()
        print(f"  kept aside: {value:.5f}", flush=True)
        if value < min((before for *_, before in self.curve), default=float("inf")):
            self.best = trainer.step, copy.deepcopy(trainer.average.state_dict())
        self.curve.append((trainer.step, trainer.seconds, value))


def train_one(name: str, out: Path, until: float, device: str, captured: bool, small: bool) -> None:
    """Train one model until the clock says `until`, and write its snapshots."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model, emoji = MODELS[name], data.load(PREPARED)
    batch = 4 if small else model.batch
    if small:
        emoji = emoji.where(captions=sorted(set(emoji.where(groups=GROUPS).captions))[:12])
    draw, validation = draws(name, emoji, batch, device)
    denoiser = model.build().to(device)
    for module in denoiser.modules():
        if isinstance(module, nn.Dropout):
            module.p = model.dropout
    rates = optimizers(denoiser, is_matrix, 0.01, 1e-3, decay=0.1)
    trainer = Trainer(denoiser, rates, horizon=500, autocast=torch.bfloat16 if device == "cuda" else None)
    watch = Watch(trainer, lambda average: model.loss(average, *validation()))
    budget = until - time.time() - TO_WRITE
    if budget <= 0:
        raise ValueError(f"{name}: reading the data took {-budget:.0f} s longer than --seconds; give more")
    print(f"{name}: {budget:.0f} s for training", flush=True)
    every = 2 if small else 200
    trainer.run(lambda: model.loss(denoiser, *draw()), budget, every=every, captured=captured, watch=watch)
    watch()
    print(f"{name}: {trainer.step} steps, {batch * trainer.step / budget:.0f} samples/s", flush=True)
    write(trainer.average.state_dict(), trainer, watch, batch, out / f"{name}-last")
    step, weights = watch.best
    if step < trainer.step:
        write(weights, trainer, watch, batch, out / f"{name}-best")


def write(weights: dict[str, Tensor], trainer: Trainer, watch: Watch, batch: int, path: Path) -> None:
    """The weights in half precision, with the curves, in parts `path`.0, `path`.1 ..."""
    curves = {"curve": trainer.curve, "kept aside": watch.curve}
    keys = ("step", "seconds", "loss")
    rounded = {
        name: [dict(zip(keys, (step, round(spent), round(loss, 4)), strict=True)) for step, spent, loss in curve]
        for name, curve in curves.items()
    }
    training = json.dumps({"batch": batch, "best of kept aside": watch.best[0], **rounded})
    content = save({key: value.half().cpu().contiguous() for key, value in weights.items()}, {"training": training})
    for number, start in enumerate(range(0, len(content), PART)):
        path.with_name(f"{path.name}.{number}").write_bytes(content[start : start + PART])


def train(names: list[str], out: Path, until: float, options: list[str]) -> None:
    """A process for each model. One whose step cannot be captured starts again without, in the time that is left."""
    out.mkdir(parents=True, exist_ok=True)

    def run(name: str) -> int:
        command = [sys.executable, "-m", "benchmarks.gpu.train_emoji", "train", "--models", name, "--alone"]
        command += ["--out", str(out), "--until", str(until), *options]
        code = subprocess.run(command).returncode
        if code and until - time.time() > 30:
            print(f"{name} failed ({code}); again without a CUDA graph", flush=True)
            code = subprocess.run([*command, "--eager"]).returncode
        return code

    with ThreadPoolExecutor(len(names)) as pool:
        failed = [name for name, code in zip(names, pool.map(run, names), strict=True) if code]
    for file in sorted(out.iterdir()):
        print(f"{file.name}  {file.stat().st_size / 2**20:.1f} MiB")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def join(source: Path) -> None:
    """A whole folder under out/emoji_trained for each snapshot: the shipped one with another denoiser."""
    for first in sorted(source.glob("*-*.0")):
        snapshot = first.stem
        name = snapshot.split("-")[0]
        folder = TRAINED / snapshot
        shutil.copytree(SHIPPED / name, folder, dirs_exist_ok=True)
        parts = sorted(source.glob(f"{snapshot}.*"), key=lambda part: int(part.suffix[1:]))
        whole = TRAINED / f"{snapshot}.safetensors"
        whole.write_bytes(b"".join(part.read_bytes() for part in parts))
        with safe_open(whole, "pt") as file:
            training = file.metadata()["training"]
        weights = load_file(whole)
        place = folder / MODELS[name].denoiser / "diffusion_pytorch_model.safetensors"
        shapes = [{key: value.shape for key, value in side.items()} for side in (weights, load_file(place))]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{snapshot} does not fit the shipped {place}: was it trained from another commit?")
        save_file(weights, place, {"format": "pt"})
        (folder / "training.json").write_text(training + "\n")
        whole.unlink()
        print(f"wrote {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("prepare", "train", "join"))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["unet", "video"])
    parser.add_argument("--seconds", type=float, default=290, help="of the clock, for everything")
    parser.add_argument("--out", type=Path, default=Path("out/emoji_parts"))
    parser.add_argument("--source", type=Path, default=Path("out/emoji_parts"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--eager", action="store_true", help="no CUDA graph")
    parser.add_argument("--small", action="store_true", help="few pictures in batches of four: to see that it runs")
    parser.add_argument("--alone", action="store_true", help="train in this process")
    parser.add_argument("--until", type=float, help="in place of --seconds: the time (of time.time()) to end at")
    arguments = parser.parse_args()
    until = arguments.until or time.time() + arguments.seconds
    if arguments.stage == "prepare":
        prepare()
    elif arguments.stage == "join":
        join(arguments.source)
    elif arguments.alone:
        captured = arguments.device == "cuda" and not arguments.eager
        train_one(arguments.models[0], arguments.out, until, arguments.device, captured, arguments.small)
    else:
        passed = [f"--{flag}" for flag in ("eager", "small") if getattr(arguments, flag)]
        train(arguments.models, arguments.out, until, [*passed, "--device", arguments.device])


if __name__ == "__main__":
    main()
