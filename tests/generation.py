"""Whole generations for the tests: a tiny denoiser, samplers that call it as pipelines do, and its calibration."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import diffcache
from diffcache.profiling import Calibration
from diffcache.recipes import Recipe
from diffcache.runtime import CachedDenoiser
from diffcache.schedule import COMPUTE, Forecast, GateSpec, Online, Row, Schedule
from tests.plain_denoisers import Block, timestep_embedding

STEPS = 8


class TextDiT(nn.Module):
    """Three blocks on image tokens, each with cross-attention-like keys of the prompt that no step changes."""

    def __init__(self, dim: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, dim), nn.Linear(dim, 4)
        self.time = nn.Linear(32, dim)
        self.text = nn.Sequential(nn.Linear(8, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))

    def forward(self, x: torch.Tensor, t: torch.Tensor | float, prompt: torch.Tensor) -> torch.Tensor:
        if not isinstance(t, torch.Tensor):
            t = x.new_ones(x.shape[0]) * t
        c = self.time(timestep_embedding(t, 32)) + self.text(prompt).mean(1)
        h = self.embed(x)
        for block in self.blocks:
            h = block(h, c)
        return self.head(h)


class Unconditional(TextDiT):
    """The latent and the timestep are all it takes."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x, t, x.new_ones(1, 2, 8))


class TokenDiT(TextDiT):
    """Conditions spread over rows: of a single row BLAS makes a vector product, and eager would depend on the batch."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        c = self.time(timestep_embedding(t, 32)[:, None].expand(-1, 8, -1)) + self.text(prompt).mean(1, keepdim=True)
        h = self.embed(x)
        for block in self.blocks:
            shift1, scale1, gate1, shift2, scale2, gate2 = block.ada(c)[:, :1].chunk(6, dim=-1)
            h = h + gate1 * block.attn(block.norm1(h) * (1 + scale1) + shift1)
            h = h + gate2 * block.mlp(block.norm2(h) * (1 + scale2) + shift2)
        return self.head(h)


def make(kind: type[TextDiT] = TextDiT, seed: int = 0) -> TextDiT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind().eval()


@dataclass(frozen=True)
class Request:
    """What one generation is asked for."""

    seed: int = 0
    prompt: int = 0
    batch: int = 1
    steps: int = STEPS
    tokens: int = 9
    python_time: bool = False

    def latent(self) -> torch.Tensor:
        rows = [
            torch.randn(self.tokens, 4, generator=torch.Generator().manual_seed(self.seed + i))
            for i in range(self.batch)
        ]
        return torch.stack(rows)

    def embeds(self) -> torch.Tensor:
        rows = [
            torch.randn(5, 8, generator=torch.Generator().manual_seed(100 + self.prompt + i)) for i in range(self.batch)
        ]
        return torch.stack(rows)

    def times(self) -> list[Any]:
        times = [1000.0 * (1 - step / self.steps) for step in range(self.steps)]
        return times if self.python_time else [torch.full((self.batch,), t) for t in times]


def walk(
    denoiser: nn.Module, request: Request, prompt: torch.Tensor | None = None, device: str = "cpu"
) -> Iterator[torch.Tensor]:
    """A sampler that stops after every step, so that two can be interleaved; yields the latent."""
    x, prompt = request.latent().to(device), (request.embeds() if prompt is None else prompt).to(device)
    unconditional = isinstance(getattr(denoiser, "denoiser", denoiser), Unconditional)
    for t in [t.to(device) if isinstance(t, torch.Tensor) else t for t in request.times()]:
        with torch.no_grad():
            velocity = denoiser(x, t) if unconditional else denoiser(x, t, prompt)
            x = x - velocity / request.steps
        yield x


def sample(
    denoiser: nn.Module, request: Request, prompt: torch.Tensor | None = None, device: str = "cpu"
) -> torch.Tensor:
    """The latent after the last step."""
    *_, last = walk(denoiser, request, prompt, device)
    return last


def sample_on_gpu(denoiser: nn.Module, request: Request) -> torch.Tensor:
    """As ``sample``, all its tensors on the GPU; the latent comes back to the CPU."""
    return sample(denoiser, request, device="cuda").cpu()


def guided(denoiser: nn.Module, request: Request, mode: str = "separate", scale: float = 3.0) -> torch.Tensor:
    """Classifier-free guidance: two calls a step, the same under ``cache_context``, or one call on a doubled batch."""
    x, cond = request.latent(), request.embeds()
    none = torch.zeros_like(cond)
    both = torch.cat([none, cond])
    with torch.no_grad():
        for t in request.times():
            if mode == "batched":
                v_none, v_cond = denoiser(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
            else:
                named = getattr(denoiser, "cache_context", None) if mode == "context" else None
                with named("uncond") if named else nullcontext():
                    v_none = denoiser(x, t, none)
                with named("cond") if named else nullcontext():
                    v_cond = denoiser(x, t, cond)
            x = x - (v_none + scale * (v_cond - v_none)) / request.steps
    return x


ITEMS = (Request(seed=0, prompt=0), Request(seed=50, prompt=50))


def calibration(kind: type[TextDiT] = TextDiT, sampler: Any = sample, items: Sequence[Request] = ITEMS) -> Calibration:
    """Profiled without sensitivities, on a new model."""
    return diffcache.profile(make(kind), items, sample=sampler, sensitivity_prompts=0, verbose=False)


def compiled(recipe: Recipe | None = None, kind: type[TextDiT] = TextDiT, **options: Any) -> CachedDenoiser:
    """A new model under a recipe (by default every other step at first order, residual of the blocks)."""
    recipe = recipe or diffcache.recipes.uniform(interval=2, start=2, predictor="taylor", order=1)
    options = {"sample": sample, "verbose": False, **options}
    return diffcache.compile(make(kind), list(ITEMS), recipe=recipe, **options)


@functools.cache
def shared_calibration() -> Calibration:
    """One calibration for tests that change neither the model nor the calibration."""
    return calibration()


def row(
    site: Any,
    cells: str,
    weights: Sequence[float] = (2.0, -1.0),
    gate: GateSpec | None = None,
    online: Online = Online(),  # noqa: B008  (frozen)
) -> Row:
    """A row from its printed form.

    C compute, r reuse the newest, f forecast from the newest ``len(weights)``, g what ``online`` and the gate say.
    """
    made: list[Any] = []
    for step, letter in enumerate(cells):
        if letter == "g":
            made.append(online)
            continue
        computed = [s for s in range(step - 1, -1, -1) if made[s] is COMPUTE]
        count = 1 if letter == "r" else min(len(weights), len(computed))
        chosen = (1.0,) if count == 1 else tuple(weights[:count])
        made.append(COMPUTE if letter == "C" else Forecast(tuple(computed[:count]), chosen))
    return Row(site.name, site.residual, tuple(made), gate)


def schedule_of(
    found: Calibration,
    rows: dict[str, str],
    gate: GateSpec | None = None,
    online: Online = Online(),  # noqa: B008  (frozen)
    weights: Sequence[float] = (2.0, -1.0),
    **options: Any,
) -> Schedule:
    """A schedule from printed rows, by site name or role."""
    sites = {**{s.role: s for s in found.sites.values()}, **found.sites}
    made = tuple(row(sites[name], cells, weights, gate, online) for name, cells in rows.items())
    return Schedule(found.pattern.steps, made, clock=found.profile.clock, **options)


class Quiet(warnings.catch_warnings):
    """Fails the test at any warning of ours: nothing inside may fall back to a full run."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        warnings.filterwarnings("error", message="diffcache")
        return entered
