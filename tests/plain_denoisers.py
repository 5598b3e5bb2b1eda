"""Small transformers in plain PyTorch, each with one habit of research code that a capture has to deal with."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


def timestep_embedding(t: torch.Tensor, dim: int) -> torch.Tensor:
    rates = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device).float() / (dim // 2))
    angles = t[:, None].float() * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int = 2) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, elementwise_affine=False) for _ in range(2))
        self.attn = Attention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(approximate="tanh"), nn.Linear(2 * dim, dim))
        self.ada = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.ada(c)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class PlainDiT(nn.Module):
    """Patches, adaptive norms, a linear head: the layout that the variations below share."""

    def __init__(self, dim: int = 16, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Conv2d(4, dim, 2, 2)
        self.register_buffer("pos", torch.randn(1, 16, dim) * 0.1)
        self.t_mlp = nn.Sequential(nn.Linear(32, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.y_embed = nn.Embedding(11, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.head = nn.Linear(dim, 16)

    def run_blocks(self, x: torch.Tensor, c: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, c)
        return x

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        c = self.t_mlp(timestep_embedding(t, 32)) + self.y_embed(y)
        x = self.run_blocks(self.embed(x).flatten(2).transpose(1, 2) + self.pos, c, t)
        x = self.head(self.norm(x)).reshape(x.shape[0], 4, 4, 2, 2, 4)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(x.shape[0], 4, 8, 8)


class SkipDiT(PlainDiT):
    """Long skips kept in a Python list, as U-shaped transformers have them."""

    def __init__(self) -> None:
        super().__init__(depth=5)
        self.skips = nn.ModuleList(nn.Linear(32, 16) for _ in range(2))

    def run_blocks(self, x: torch.Tensor, c: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        kept = []
        for block in self.blocks[:2]:
            x = block(x, c)
            kept.append(x)
        x = self.blocks[2](x, c)
        for skip, block in zip(self.skips, self.blocks[3:], strict=True):
            x = block(skip(torch.cat([x, kept.pop()], dim=-1)), c)
        return x


class BranchDiT(PlainDiT):
    """A Python branch on the timestep's value: the second half of the blocks runs below 500 only."""

    def run_blocks(self, x: torch.Tensor, c: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        for index, block in enumerate(self.blocks):
            if index < 2 or t[0].item() < 500:
                x = block(x, c)
        return x


class ItemDiT(PlainDiT):
    """``.item()`` of the timestep in arithmetic, not in control flow."""

    def run_blocks(self, x: torch.Tensor, c: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        weight = 1.0 + t[0].item() / 1000
        for block in self.blocks:
            x = block(x * weight, c)
        return x


class CounterDiT(PlainDiT):
    """Counts its calls and skips a block at every other one: cannot be captured exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def run_blocks(self, x: torch.Tensor, c: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        for index, block in enumerate(self.blocks):
            if index != 1 or self.calls % 2 == 0:
                x = block(x, c)
        return x


class InplaceDiT(PlainDiT):
    """Writes into views of the token tensor between blocks."""

    def run_blocks(self, x: torch.Tensor, c: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, c)
            x[:, :4] *= 0.5
            x[:, 4:].add_(1.0)
        return x


class PythonCacheDiT(PlainDiT):
    """Fills a dictionary on itself at the first call; complex rotary embedding."""

    def __init__(self) -> None:
        super().__init__()
        self._cache: dict[int, torch.Tensor] = {}

    def run_blocks(self, x: torch.Tensor, c: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if x.shape[1] not in self._cache:
            angles = torch.outer(torch.arange(x.shape[1]).float(), 0.5 ** torch.arange(x.shape[2] // 2))
            self._cache[x.shape[1]] = torch.polar(torch.ones_like(angles), angles)
        turned = torch.view_as_complex(x.contiguous().reshape(*x.shape[:-1], -1, 2)) * self._cache[x.shape[1]]
        return super().run_blocks(torch.view_as_real(turned).flatten(2), c, t)


class HookedDiT(PlainDiT):
    """Hooks before and after its blocks, as offloading libraries install them."""

    def __init__(self) -> None:
        super().__init__()
        for index, block in enumerate(self.blocks):
            block.register_forward_pre_hook(lambda module, args, s=0.9 + 0.05 * index: (args[0] * s, *args[1:]))
            block.register_forward_hook(lambda module, args, output: output + 0.01 * args[0])


class RandomDiT(PlainDiT):
    """Draws noise from the global generator inside forward."""

    def run_blocks(self, x: torch.Tensor, c: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return super().run_blocks(x + 0.1 * torch.randn_like(x), c, t)
