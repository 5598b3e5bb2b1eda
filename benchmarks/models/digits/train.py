"""Train the digits denoiser by rectified flow and export it as a diffusers folder.

    python -m benchmarks.models.digits.train --minutes 15

Interrupted runs go on from the checkpoint, and so does a run that is given more minutes. The data are scikit-learn's
digits, each in six styles made by image operations.
"""

import argparse
import random
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from scipy import ndimage
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks.models.digits.pipeline import NUMBERS, SIDE, DigitsPipeline, WordEncoder, position_ids
from benchmarks.models.training import Trainer, optimizers

FOLDER = Path(__file__).parent / "pipeline"
WEIGHTS = ("", "bold", "thin")
SLANTS = ("", "slanted")
PROMPT_DROP = 0.1  # share of empty prompts, which is what guidance needs
EMA_HORIZON = 100  # steps


def styled(ink: np.ndarray, weight: str, slant: str) -> np.ndarray:
    """One digit (8x8, ink 1 on paper 0) with heavier or lighter strokes, upright or leaning to the right."""
    if weight == "bold":
        ink = np.clip(1.6 * ndimage.gaussian_filter(ink, 0.5), 0, 1)
    elif weight == "thin":
        ink = np.clip(1.5 * ink - 0.6, 0, 1)
    if slant:
        middle = (SIDE - 1) / 2
        ink = ndimage.affine_transform(ink, [[1, 0], [0.4, 1]], offset=[0, -0.4 * middle], order=1)
    return ink


def load_data() -> tuple[Tensor, list[tuple[str, str, str]]]:
    """Latents [n, 64, 1] in -1 .. 1 and, for each, (weight, slant, number)."""
    digits = load_digits()
    pictures, labels = [], []
    for weight, slant in product(WEIGHTS, SLANTS):
        pictures += [styled(ink, weight, slant) for ink in digits.images / 16]
        labels += [(weight, slant, NUMBERS[target]) for target in digits.target]
    ink = torch.tensor(np.stack(pictures), dtype=torch.float32)
    return 1 - 2 * ink.reshape(-1, SIDE * SIDE, 1), labels


def phrase(weight: str, slant: str, number: str, rng: random.Random) -> str:
    """One of the ways to ask for this digit, or now and then for anything."""
    if rng.random() < PROMPT_DROP:
        return ""
    styles = [style for style in (weight, slant) if style]
    rng.shuffle(styles)
    described = rng.choice([" ", " and "]).join(styles)
    article = rng.choice(["", "a", "the", "a handwritten"] if styles else ["", "a", "the digit", "a handwritten"])
    return " ".join(part for part in (article, described, number) if part)


def build() -> tuple[FluxTransformer2DModel, WordEncoder]:
    text_encoder = WordEncoder(dim=64)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=1,
        num_layers=4,
        num_single_layers=8,
        num_attention_heads=4,
        attention_head_dim=24,
        axes_dims_rope=(4, 10, 10),
        joint_attention_dim=64,
        pooled_projection_dim=64,
    )
    # Blocks start as the identity and the output as zero: a transformer trained for minutes needs that.
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and (name.endswith("norm.linear") or ".norm1" in name or name == "proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return transformer, text_encoder


class Draw:
    """Random pictures with one of the ways to ask for each."""

    def __init__(self, word_ids: Callable[[list[str]], Tensor], batch: int, seed: int):
        self.pictures, self.labels = load_data()
        self.word_ids, self.batch = word_ids, batch
        self.rng = random.Random(seed)

    def __call__(self) -> tuple[Tensor, Tensor]:
        chosen = self.rng.sample(range(len(self.labels)), self.batch)
        return self.pictures[chosen], self.word_ids([phrase(*self.labels[index], self.rng) for index in chosen])


def flow_loss(model: nn.ModuleDict, clean: Tensor, word_ids: Tensor) -> Tensor:
    """Squared error of the velocity at a random point of the straight line from picture to noise."""
    noise = torch.randn_like(clean)
    sigma = torch.sigmoid(torch.randn(len(clean)))  # logit-normal: the middle is where there is most to learn
    noisy = torch.lerp(clean, noise, sigma[:, None, None])
    tokens, pooled = model["text_encoder"](word_ids)
    img_ids, txt_ids = position_ids(tokens.shape[1], clean)
    velocity = model["transformer"](
        hidden_states=noisy,
        timestep=sigma,
        pooled_projections=pooled,
        encoder_hidden_states=tokens,
        txt_ids=txt_ids,
        img_ids=img_ids,
        return_dict=False,
    )[0]
    return (velocity - (noise - clean)).square().mean()


def export(trainer: Trainer, folder: Path) -> None:
    """Write the averaged weights in half precision, which halves the folder and changes no visible pixel."""
    pipeline = DigitsPipeline(
        transformer=trainer.average["transformer"],
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        text_encoder=trainer.average["text_encoder"],
    )
    pipeline.to(torch.float16).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoint", type=Path, default=Path("out/digits.ckpt"))
    parser.add_argument("--folder", type=Path, default=FOLDER)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    transformer, text_encoder = build()
    model = nn.ModuleDict({"transformer": transformer, "text_encoder": text_encoder})
    trainer = Trainer(model, optimizers(model, lambda name: "blocks" in name, 0.01, 2e-3), EMA_HORIZON)
    if arguments.checkpoint.exists():
        trainer.load(arguments.checkpoint)
        print(f"going on from step {trainer.step}")
    torch.manual_seed(trainer.step)
    draw = Draw(text_encoder.tokenize, arguments.batch, trainer.step)
    trainer.run(lambda: flow_loss(model, *draw()), arguments.minutes * 60, arguments.checkpoint)
    export(trainer, arguments.folder)
    print(f"wrote {arguments.folder} after {trainer.step} steps")


if __name__ == "__main__":
    main()
