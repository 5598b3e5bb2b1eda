"""Train an emoji denoiser in the latents of the autoencoder and export it as a diffusers folder.

    python -m benchmarks.models.emoji.train mmdit --minutes 120
    python -m benchmarks.models.emoji.train unet --minutes 120

Interrupted runs go on from the checkpoint, and so does a run that is given more minutes.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from benchmarks.models.emoji import autoencoder, data
from benchmarks.models.emoji.denoisers import KINDS
from benchmarks.models.emoji.pipeline import export
from benchmarks.models.emoji.prompts import PromptEncoder, phrase_tokenizer
from benchmarks.models.training import Trainer, optimizers

GROUPS = ("Animals & Nature", "Food & Drink")  # what two CPU cores can learn in hours
STYLES = ("fluent 3d", "fluent gradient", "fluent flat", "noto", "blob")
PROMPT_DROP = 0.1  # share of empty prompts, which is what guidance needs


def known_phrases() -> tuple[list[str], list[str]]:
    """Captions and styles of the shipped table: captions held out too, since it holds no picture."""
    return sorted(set(data.load().where(groups=GROUPS, styles=STYLES).captions)), list(STYLES)


class Draw:
    """Random latents of training pictures with their prompts' embeddings; some prompts are empty."""

    def __init__(self, vae: AutoencoderKL, encoder: PromptEncoder, batch: int):
        config, device = encoder.config, vae.device
        train = data.load().where(split="train", captions=config["captions"], styles=config["styles"])
        with torch.no_grad():
            parts = torch.from_numpy(train.pixels).split(64)
            modes = [vae.encode(autoencoder.to_input(part.to(device))).latent_dist.mode() for part in parts]
        self.latents = torch.cat(modes).contiguous() * vae.config["scaling_factor"]
        prompts = [data.prompt(caption, style) for caption, style in zip(train.captions, train.styles, strict=True)]
        embedded = encoder.encode(prompts)
        self.tokens, self.pooled = embedded.last_hidden_state.to(device), embedded.pooler_output.to(device)
        self.batch = batch

    def __call__(self) -> tuple[Tensor, Tensor, Tensor]:
        """Latents [batch, 16, 8, 8], token embeddings [batch, 8 or 10, 384], pooled [batch, 768]."""
        rows = torch.randint(len(self.latents), (self.batch,), device=self.latents.device)
        kept = (torch.rand(self.batch, device=self.latents.device) >= PROMPT_DROP).to(self.latents)
        return self.latents[rows], self.tokens[rows] * kept[:, None, None], self.pooled[rows] * kept[:, None]


def is_matrix(name: str) -> bool:
    """Weights of blocks whose inputs are normalised; modulations and embeddings are left to AdamW."""
    return "block" in name and "norm" not in name and "time_emb" not in name


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--minutes", type=float, default=120, help="of all runs from this checkpoint together")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vae", type=Path, default=autoencoder.FOLDER)
    parser.add_argument("--checkpoint", type=Path, help="default: out/emoji/KIND.ckpt")
    parser.add_argument("--folder", type=Path, help="default: the folder beside this file")
    return parser.parse_args()


def write_curve(trainer: Trainer, batch: int, folder: Path) -> None:
    """`training.json`: the loss over steps and seconds."""
    curve = [{"step": step, "seconds": round(spent), "loss": round(loss, 4)} for step, spent, loss in trainer.curve]
    (folder / "training.json").write_text(json.dumps({"batch": batch, "curve": curve}) + "\n")


def main() -> None:
    arguments = parse()
    checkpoint = arguments.checkpoint or data.CACHE / f"{arguments.kind}.ckpt"
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    build, loss, pipeline = KINDS[arguments.kind]
    model = build()
    trainer = Trainer(model, optimizers(model, is_matrix, 0.01, 1e-3), horizon=150)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    if checkpoint.exists():
        trainer.load(checkpoint)
        print(f"going on from step {trainer.step}")
    torch.manual_seed(arguments.seed + trainer.step)
    vae = AutoencoderKL.from_pretrained(arguments.vae)
    encoder = PromptEncoder.of(*known_phrases(), joined=arguments.kind == "unet")
    draw = Draw(vae, encoder, arguments.batch)
    trainer.run(lambda: loss(model, *draw()), arguments.minutes * 60, checkpoint)

    folder = arguments.folder or Path(__file__).parent / arguments.kind
    tokenizer = phrase_tokenizer(encoder.config["captions"], encoder.config["styles"])
    export(pipeline(trainer.average, vae, encoder, tokenizer), folder)
    write_curve(trainer, arguments.batch, folder)
    print(f"wrote {folder} after {trainer.step} steps")


if __name__ == "__main__":
    main()
