"""Train the digits denoiser by rectified flow and export it as a diffusers folder.

    python -m benchmarks.models.digits.train --minutes 15

Interrupted runs go on from the checkpoint, and so does a run that is given more minutes. The data are scikit-learn's
digits, each in six styles made by image operations.
"""

import argparse
import copy
import math
import random
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from scipy import ndimage
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks.models.digits.pipeline import NUMBERS, SIDE, DigitsPipeline, WordEncoder, position_ids

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


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are made orthogonal, in float32: torch's own uses bfloat16, which many CPUs only emulate."""

    def __init__(self, matrices: list[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for matrix in group["params"]:
                mean = self.state[matrix].setdefault("mean", torch.zeros_like(matrix))
                mean.lerp_(matrix.grad, 1 - group["momentum"])
                direction = orthogonal(torch.lerp(matrix.grad, mean, group["momentum"]))
                rows, columns = matrix.shape
                matrix.sub_(direction, alpha=group["lr"] * max(1.0, rows / columns) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix, nearly, with all singular values equal to one: five Newton-Schulz steps."""
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.T


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, where it halves the steps needed; AdamW for all else."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "blocks" in name]
    chosen = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        Muon(matrices, lr=0.01),
        torch.optim.AdamW(others, lr=2e-3, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def rate(progress: float) -> float:
    """Share of the full learning rate: short warm-up, then cosine to zero."""
    return min(1.0, progress / 0.02) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


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


class Trainer:
    """Weights, their moving average and the optimizers: what a checkpoint holds."""

    def __init__(self, seed: int):
        torch.manual_seed(seed)
        transformer, text_encoder = build()
        self.model = nn.ModuleDict({"transformer": transformer, "text_encoder": text_encoder})
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizers = optimizers(self.model)
        self.base_rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self.step, self.seconds = 0, 0.0

    def update(self, loss: Tensor, progress: float) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, base in zip(self.optimizers, self.base_rates, strict=True):
            optimizer.param_groups[0]["lr"] = base * rate(progress)
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        decay = min(1 - 1 / EMA_HORIZON, self.step / (self.step + 10))
        for mean, value in zip(self.average.parameters(), self.model.parameters(), strict=True):
            mean.lerp_(value.detach(), 1 - decay)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {name: getattr(self, name).state_dict() for name in ("model", "average")}
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        torch.save(state | {"step": self.step, "seconds": self.seconds}, path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]


def train(trainer: Trainer, budget: float, batch: int, checkpoint: Path) -> None:
    """Train until `budget` seconds, counted over all runs from this checkpoint, are spent."""
    pictures, labels = load_data()
    rng = random.Random(trainer.step)
    torch.manual_seed(trainer.step)
    tokenize = trainer.model["text_encoder"].tokenize
    losses: list[float] = []
    last = time.monotonic()
    while trainer.seconds < budget:
        chosen = rng.sample(range(len(labels)), batch)
        word_ids = tokenize([phrase(*labels[index], rng) for index in chosen])
        loss = flow_loss(trainer.model, pictures[chosen], word_ids)
        trainer.update(loss, trainer.seconds / budget)
        losses.append(loss.item())
        now = time.monotonic()
        trainer.seconds, last = trainer.seconds + now - last, now
        if trainer.step % 100 == 0:
            print(f"step {trainer.step}  {trainer.seconds:.0f} s  loss {np.mean(losses):.4f}", flush=True)
            losses.clear()
            trainer.save(checkpoint)


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
    trainer = Trainer(arguments.seed)
    if arguments.checkpoint.exists():
        trainer.load(arguments.checkpoint)
        print(f"going on from step {trainer.step}")
    train(trainer, arguments.minutes * 60, arguments.batch, arguments.checkpoint)
    trainer.save(arguments.checkpoint)
    export(trainer, arguments.folder)
    print(f"wrote {arguments.folder} after {trainer.step} steps")


if __name__ == "__main__":
    main()
