"""What training small models on a CPU needs: an optimizer in float32, a moving average, checkpoints that resume."""

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are made orthogonal, in float32: torch's own uses bfloat16, which many CPUs only emulate.

    Convolutions are taken as matrices of [out, in x kernel].
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:  # frozen
                    continue
                mean = self.state[weight].setdefault("mean", torch.zeros_like(weight))
                mean.lerp_(weight.grad, 1 - group["momentum"])
                direction = torch.lerp(weight.grad, mean, group["momentum"]).flatten(1)
                rows, columns = direction.shape
                scale = group["lr"] * max(1.0, rows / columns) ** 0.5
                weight.sub_(orthogonal(direction).view(weight.shape), alpha=scale)


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix, nearly, with all singular values equal to one: five Newton-Schulz steps."""
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.T


def optimizers(model: nn.Module, is_matrix: Callable[[str], bool], muon: float, adam: float) -> list:
    """Muon for the weights whose names say so, where it halves the steps needed; AdamW for all else."""
    matrices = [p for name, p in model.named_parameters() if p.ndim >= 2 and is_matrix(name)]
    chosen = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [Muon(matrices, lr=muon), torch.optim.AdamW(others, lr=adam, weight_decay=0.0, betas=(0.9, 0.98))]


def cosine(progress: float) -> float:
    """Share of the full learning rate: short warm-up, then cosine to zero."""
    return min(1.0, progress / 0.02) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


class Trainer:
    """A model, its moving average over `horizon` steps and its optimizers: what a checkpoint holds."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        horizon: int,
        autocast: torch.dtype | None = None,
    ):
        self.model, self.optimizers, self.horizon, self.autocast = model, optimizers, horizon, autocast
        self.average = copy.deepcopy(model).requires_grad_(False).eval()
        self.base_rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
        self.step, self.seconds = 0, 0.0
        self.curve: list[tuple[int, float, float]] = []  # step, seconds, mean loss since the last entry

    def run(self, loss: Callable[[], Tensor], budget: float, checkpoint: Path, every: int = 200) -> None:
        """Train until `budget` seconds, counted over all runs from this checkpoint, are spent."""
        losses: list[float] = []
        last = time.monotonic()
        while self.seconds < budget:
            with torch.autocast(next(self.model.parameters()).device.type, self.autocast, enabled=bool(self.autocast)):
                value = loss()
            self._update(value, self.seconds / budget)
            losses.append(value.item())
            now = time.monotonic()
            self.seconds, last = self.seconds + now - last, now
            if self.step % every == 0:
                self.curve.append((self.step, self.seconds, float(np.mean(losses))))
                print(f"step {self.step}  {self.seconds:.0f} s  loss {self.curve[-1][2]:.5f}", flush=True)
                losses.clear()
                self.save(checkpoint)
        self.save(checkpoint)

    def _update(self, loss: Tensor, progress: float) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, base in zip(self.optimizers, self.base_rates, strict=True):
            optimizer.param_groups[0]["lr"] = base * cosine(progress)
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        decay = min(1 - 1 / self.horizon, self.step / (self.step + 10))
        with torch.no_grad():
            for mean, value in zip(self.average.parameters(), self.model.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)

    def save(self, path: Path) -> None:
        """Written beside and then moved, so that a stop while writing leaves the last checkpoint whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {name: getattr(self, name).state_dict() for name in ("model", "average")}
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        torch.save(state | {"step": self.step, "seconds": self.seconds, "curve": self.curve}, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True, map_location=next(self.model.parameters()).device)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds, self.curve = state["step"], state["seconds"], state["curve"]
