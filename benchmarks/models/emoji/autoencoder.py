"""Train the autoencoder of the emoji models: 64 x 64 RGB to 8 x 8 latents of 16 channels and back.

    python -m benchmarks.models.emoji.autoencoder --minutes 30
    python -m benchmarks.models.emoji.autoencoder --minutes 60 --decoder-only

The second form goes on with the latents fixed, so that denoisers which were trained on them stay valid.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from benchmarks.models.emoji import data
from benchmarks.models.training import Trainer, optimizers

FOLDER = Path("out/emoji/vae")
KL = 1e-4  # weight of the latents' distance from a normal distribution, per latent number against per pixel
FAVOURED = ("Animals & Nature", "Food & Drink")  # groups drawn as often as all others together


def build() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=data.SIDE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def to_input(pixels: Tensor) -> Tensor:
    """uint8 [n, 64, 64, 3] to float [n, 3, 64, 64] in -1 .. 1."""
    return pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.channels_last) / 127.5 - 1


class Draw:
    """Random training pictures, half of them from the favoured groups, half of them mirrored."""

    def __init__(self, batch: int, seed: int):
        train = data.load().where(split="train")
        self.pixels = torch.from_numpy(train.pixels)
        weights = torch.tensor([group in FAVOURED for group in train.groups], dtype=torch.float32)
        self.weights = weights / weights.sum() + (1 - weights) / (1 - weights).sum()
        self.batch = batch
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self) -> Tensor:
        rows = torch.multinomial(self.weights, self.batch, generator=self.generator)
        images = to_input(self.pixels[rows])
        return images.flip(-1) if torch.rand((), generator=self.generator) < 0.5 else images


def reconstruction_loss(model: nn.Module, images: Tensor, kl_weight: float) -> Tensor:
    """Squared error with a little absolute error, which keeps edges sharp, and the latents' KL divergence."""
    posterior = model.encode(images).latent_dist
    restored = model.decode(posterior.sample()).sample
    difference = restored - images
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return difference.square().mean() + 0.05 * difference.abs().mean() + kl_weight * kl


@torch.no_grad()
def psnr(model: AutoencoderKL, pixels: Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in dB of encoding (its mean) and decoding."""
    values = []
    for part in pixels.split(64):
        images = to_input(part)
        restored = model.decode(model.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
        values.append(-10 * torch.log10(((restored - images) / 2).square().mean(dim=(1, 2, 3))))
    return torch.cat(values).mean().item()


@torch.no_grad()
def export(model: AutoencoderKL, folder: Path) -> None:
    """Write the folder, with the factor that brings the training latents to unit variance.

    No shift: the mean is small, and Stable Diffusion's pipeline knows of none.
    """
    train = torch.from_numpy(data.load().where(split="train", groups=FAVOURED).pixels)
    latents = torch.cat([model.encode(to_input(part)).latent_dist.mode() for part in train.split(64)])
    model.register_to_config(shift_factor=0.0, scaling_factor=round(1 / latents.square().mean().sqrt().item(), 4))
    model.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="of all runs from this checkpoint together")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--decoder-only", action="store_true")
    parser.add_argument("--checkpoint", type=Path, default=Path("out/emoji/vae.ckpt"))
    parser.add_argument("--folder", type=Path, default=FOLDER)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    model = build().to(memory_format=torch.channels_last)
    # The first and last convolutions see pixels and latents, whose scales are given; all others see normalised values.
    trainer = Trainer(model, optimizers(model, lambda name: "resnets" in name or "samplers" in name, 0.01, 1e-3), 200)
    if arguments.checkpoint.exists():
        trainer.load(arguments.checkpoint)
        print(f"going on from step {trainer.step}")
    if arguments.decoder_only:
        model.encoder.requires_grad_(False)
    draw = Draw(arguments.batch, trainer.step)
    kl_weight = 0.0 if arguments.decoder_only else KL
    trainer.run(lambda: reconstruction_loss(model, draw(), kl_weight), arguments.minutes * 60, arguments.checkpoint)

    model = trainer.average
    everything = data.load()
    scores = {
        f"{split}, {'all groups' if not groups else 'favoured groups'}": psnr(
            model, torch.from_numpy(everything.where(split=split, groups=groups).pixels)
        )
        for split in ("pair", "caption")
        for groups in (None, FAVOURED)
    }
    export(model, arguments.folder)
    (arguments.folder / "training.json").write_text(json.dumps({"psnr": scores, "curve": trainer.curve}))
    print("PSNR of held-out pictures:", ", ".join(f"{name} {value:.2f} dB" for name, value in scores.items()))


if __name__ == "__main__":
    main()
