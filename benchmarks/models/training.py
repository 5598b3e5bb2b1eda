"""What training small models needs: an optimizer in float32, a moving average, checkpoints that resume, CUDA graphs."""

import copy
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are made orthogonal, in float32: torch's own uses bfloat16, which many CPUs only emulate.

    Convolutions are taken as matrices of [out, in x kernel]. `decay` pulls the weights towards zero by this times the
    learning rate at each step.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: Tensor, momentum: float = 0.95, decay: float = 0.0):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            alike = defaultdict(list)  # many small products of one shape are one batched product
            for weight in group["params"]:
                if weight.grad is not None:  # not frozen
                    alike[weight.shape].append(weight)
            for shape, weights in alike.items():
                for weight in weights:
                    if "mean" not in self.state[weight]:
                        self.state[weight]["mean"] = torch.zeros_like(weight)
                grads, means = [weight.grad for weight in weights], [self.state[weight]["mean"] for weight in weights]
                torch._foreach_lerp_(means, grads, 1 - group["momentum"])
                directions = torch._foreach_lerp(grads, means, group["momentum"])  # Nesterov's
                matrices = torch.stack([direction.flatten(1) for direction in directions])
                rows, columns = matrices.shape[1:]
                change = orthogonal(matrices) * (group["lr"] * max(1.0, rows / columns) ** 0.5)
                if group["decay"]:
                    torch._foreach_mul_(weights, 1 - group["lr"] * group["decay"])
                torch._foreach_sub_(weights, list(change.reshape(-1, *shape)))


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest matrices [n, rows, columns], nearly, whose singular values are all one: five Newton-Schulz steps."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.mT


def optimizers(
    model: nn.Module, is_matrix: Callable[[str], bool], muon: float, adam: float, decay: float = 0.0
) -> list[torch.optim.Optimizer]:
    """Muon for the weights whose names say so, where it halves the steps needed; AdamW for all else.

    Learning rates are tensors beside the weights, so that a captured step reads those of its time.
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim >= 2 and is_matrix(name)]
    chosen = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in chosen]
    device = others[0].device
    rates = [torch.tensor(rate, device=device) for rate in (muon, adam)]
    on_gpu = device.type == "cuda"
    adamw = torch.optim.AdamW(others, lr=rates[1], weight_decay=0.0, betas=(0.9, 0.98), fused=True, capturable=on_gpu)
    return [Muon(matrices, rates[0], decay=decay), adamw]


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
        self.base_rates = [float(optimizer.param_groups[0]["lr"]) for optimizer in optimizers]
        self.device = next(model.parameters()).device
        self.new_share = torch.zeros((), device=self.device)  # of the newest weights in the average
        self.loss_sum = torch.zeros((), device=self.device)
        self.under_way: deque[torch.cuda.Event] = deque()
        self.step, self.seconds = 0, 0.0
        self.curve: list[tuple[int, float, float]] = []  # step, seconds, mean loss since the last entry

    def run(
        self,
        loss: Callable[[], Tensor],
        budget: float,
        checkpoint: Path | None = None,
        every: int = 200,
        captured: bool = False,
        watch: Callable[[], None] = lambda: None,
    ) -> None:
        """Train until `budget` seconds, counted over all runs from this checkpoint, are spent.

        With `captured`, a step on a GPU is one CUDA graph: `loss` must then draw all it needs on the device. `watch` is
        called with every entry of the curve.
        """
        started, last = self.step, time.monotonic()
        one_step = self._capture(loss) if captured else lambda: self._update(loss)
        while self.seconds < budget:
            self._set(self.seconds / budget)
            one_step()
            self.step += 1
            self._wait()
            now = time.monotonic()
            self.seconds, last = self.seconds + now - last, now
            if self.step % every == 0:
                mean = self.loss_sum.item() / min(every, self.step - started)
                self.loss_sum.zero_()
                self.curve.append((self.step, self.seconds, mean))
                print(f"step {self.step}  {self.seconds:.0f} s  loss {mean:.5f}", flush=True)
                watch()
                if checkpoint:
                    self.save(checkpoint)
        if checkpoint:
            self.save(checkpoint)

    def autocasting(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.autocast, enabled=bool(self.autocast), cache_enabled=False)

    def _set(self, progress: float) -> None:
        """Learning rates and the average's pace of the next step, without waiting for the device."""
        for optimizer, base in zip(self.optimizers, self.base_rates, strict=True):
            optimizer.param_groups[0]["lr"].fill_(base * cosine(progress))
        self.new_share.fill_(max(1 / self.horizon, 10 / (self.step + 11)))

    def _update(self, loss: Callable[[], Tensor]) -> None:
        """One step, all of it work of the device."""
        with self.autocasting():
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            self.loss_sum += value
            means, values = list(self.average.parameters()), list(self.model.parameters())
            apart = torch._foreach_sub(values, means)
            torch._foreach_mul_(apart, self.new_share)
            torch._foreach_add_(means, apart)

    def _capture(self, loss: Callable[[], Tensor]) -> Callable[[], None]:
        """The step as a CUDA graph, after three steps at no learning rate that make every buffer."""
        self._set(0.0)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._update(loss)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._update(loss)
        self.loss_sum.zero_()
        return graph.replay

    def _wait(self) -> None:
        """Let the host be two steps ahead of a GPU and no more, so that the clock means something."""
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            self.under_way.append(event)
            if len(self.under_way) > 2:
                self.under_way.popleft().synchronize()

    def save(self, path: Path) -> None:
        """Written beside and then moved, so that a stop while writing leaves the last checkpoint whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {name: getattr(self, name).state_dict() for name in ("model", "average")}
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        torch.save(state | {"step": self.step, "seconds": self.seconds, "curve": self.curve}, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True, map_location=self.device)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds, self.curve = state["step"], state["seconds"], state["curve"]
