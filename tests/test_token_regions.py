"""Ways to write a transformer's layer: those that run on a few tokens exactly, and those that must be refused."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from diffcache.cost import measure_cost
from diffcache.passes.apply_schedule import apply_schedule
from diffcache.passes.eliminate_dead_code import eliminate_dead_code
from diffcache.passes.flatten_inputs import flatten_inputs
from diffcache.passes.subset_tokens import TokenRow, subset_tokens
from diffcache.pipeline import run_passes
from diffcache.schedule import COMPUTE, SKIP
from diffcache.sites import Site
from diffcache.token_region import TokenRegion, token_region
from diffcache.tracing.bits import same_bits
from diffcache.tracing.captured import capture

TOKENS, CHANNELS, HEADS = 8, 8, 2
EVERY = torch.arange(TOKENS)


class Layer(nn.Module):
    """``mix`` is what a test overrides; its result is added to the stream, and a feed-forward follows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, CHANNELS), nn.Linear(CHANNELS, 4)
        self.q, self.k, self.v, self.out = (nn.Linear(CHANNELS, CHANNELS) for _ in range(4))
        self.norm, self.up, self.down = nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, 16), nn.Linear(16, CHANNELS)
        self.register_buffer("table", torch.randn(TOKENS, CHANNELS))
        self.register_buffer("pairs", torch.randn(TOKENS, TOKENS))
        self.setup()

    def setup(self) -> None:
        pass

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.shape[0], x.shape[1], HEADS, -1).transpose(1, 2)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        x = F.scaled_dot_product_attention(*(self.heads(f(x)) for f in (self.q, self.k, self.v)))
        return self.out(x.transpose(1, 2).flatten(2))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = self.first(x) * t[:, None, None]
        h = h + self.mix(self.norm(h))
        h = h + self.down(F.gelu(self.up(h)))
        return self.last(h)


class Softmax(Layer):
    """Attention written out, with a bias for each pair of tokens and a mask."""

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.heads(f(x)) for f in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + self.pairs
        scores = scores.masked_fill(self.pairs > 1.5, -1e4)
        return self.out((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(x.shape))


class Folded(Layer):
    """Heads folded into the batch, as U-Net code of old has it."""

    def fold(self, x: torch.Tensor) -> torch.Tensor:
        return self.heads(x).reshape(x.shape[0] * HEADS, x.shape[1], -1)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.fold(f(x)) for f in (self.q, self.k, self.v))
        empty = torch.zeros(q.shape[0], q.shape[1], k.shape[1])
        scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=0.5)
        x = torch.bmm(scores.softmax(-1), v)
        x = x.reshape(-1, HEADS, TOKENS, CHANNELS // HEADS).permute(0, 2, 1, 3)
        return self.out(x.reshape(x.shape[0], TOKENS, CHANNELS))


class Mask(Layer):
    """Fused attention with a mask of its own for each query."""

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.heads(f(x)) for f in (self.q, self.k, self.v))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=self.pairs[None, None])
        return self.out(x.transpose(1, 2).flatten(2))


class Module(Layer):
    """The attention module of ``torch.nn``, looking at something else than its queries."""

    def setup(self) -> None:
        self.attention = nn.MultiheadAttention(CHANNELS, HEADS, batch_first=True)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        y = self.k(x)
        return self.attention(x, y, y, need_weights=False)[0]


class Alone(Layer):
    """The same on itself: it makes queries, keys and values in one product."""

    def setup(self) -> None:
        self.attention = nn.MultiheadAttention(CHANNELS, HEADS, batch_first=True)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Rotary(Layer):
    """Complex rotary embedding, a positional table, and a root mean square written out."""

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) + self.table
        angles = torch.view_as_complex(self.table.reshape(TOKENS, CHANNELS // 2, 2))
        turned = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * angles
        return torch.view_as_real(turned).flatten(2)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.heads(f(x)) for f in (lambda y: self.turn(self.q(y)), lambda y: self.turn(self.k(y)), self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Registers(Layer):
    """Learned tokens before the stream's: all of them are always computed."""

    def setup(self) -> None:
        self.registers = nn.Parameter(torch.randn(1, 3, CHANNELS))

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.registers.expand(x.shape[0], -1, -1), x], dim=1)
        return super().mix(x)[:, 3:]


class Unbound(Layer):
    """Queries, keys and values of one product, turned in place."""

    def setup(self) -> None:
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        q = q.clone()
        q[..., ::2] = q[..., ::2] * 2
        q[..., 1:].mul_(0.5)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class PerToken(Layer):
    """No token looks at another."""

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.q(x).chunk(2, dim=-1)
        return torch.cat([a.sigmoid() * b, torch.stack([a, b], -1).amax(-1)], -1)


class Guarded(Layer):
    """Looks at a value of the stream to choose its way."""

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x) if bool((x.abs().amax() + 1) > 0) else x


RUN = (Layer, Softmax, Folded, Mask, Module, Rotary, Registers, Unbound, PerToken, Guarded)


@dataclasses.dataclass
class Made:
    graph: fx.GraphModule
    site: Site
    flops: dict[str, float]


def inputs(step: int, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(batch, TOKENS, 4, generator=generator), torch.full((batch,), 1.0 - 0.1 * step)


def make(kind: type[Layer], batch: int = 2, prepare: Any = None) -> Made:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind().eval().requires_grad_(False)
    if prepare is not None:
        prepare(model)
    graph = capture(model, *inputs(0, batch)).graph_module
    cost = measure_cost(graph, inputs(0, batch))
    stream = next(node for node in graph.graph.nodes if node.name == "mul")
    value = next(node for node in graph.graph.nodes if node.target == "last").args[0]
    return Made(graph, Site("layer", "block", (value.name,), (stream.name,), "", 1.0, 1), cost.flops)


def region(made: Made) -> TokenRegion:
    return token_region(made.graph, made.site, made.flops)


def program(made: Made, row: TokenRow) -> fx.GraphModule:
    cell = SKIP if row.counts else COMPUTE
    options: Any = {"apply_schedule": {"sites": [row.site], "cells": [cell]}, "subset_tokens": {"token_rows": [row]}}
    passes = (flatten_inputs, apply_schedule, subset_tokens, eliminate_dead_code)
    return run_passes(made.graph, passes, options, title="layer")[0]


def run(module: fx.GraphModule, call: Any, history: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, Any]]:
    names = [str(node.target) for node in module.graph.nodes if node.op == "placeholder"][2:]
    result, written = module(*call, *(history[name] for name in names))
    places = (f"history_{row}_{value}_0" for row, value in module.meta["writes"])
    return result, dict(zip(places, written, strict=True))


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("kind", RUN)
@torch.no_grad()
def test_a_layer_runs_on_a_few_tokens(kind: type[Layer], batch: int) -> None:
    """With all tokens it is the layer bit for bit; when nothing changed, any tokens give the same. No size is told
    apart by its number: batch, tokens and channels are all eight once."""
    made = make(kind, batch)
    whole = region(made)
    row = TokenRow(0, made.site, whole)
    full = program(made, row)
    _, old = run(full, inputs(0, batch), {})
    expected, new = run(full, inputs(1, batch), {})
    every = {"tokens_0_0": EVERY.expand(batch, TOKENS)}
    result, written = run(program(made, dataclasses.replace(row, counts=(TOKENS,))), inputs(1, batch), old | every)
    assert same_bits(result, expected)
    assert set(written) == set(new)
    assert all(same_bits(written[name], new[name]) for name in new)
    few = {"tokens_0_0": torch.stack([torch.randperm(TOKENS)[:3].sort().values for _ in range(batch)])}
    part = program(made, dataclasses.replace(row, counts=(3,)))
    result, written = run(part, inputs(1, batch), new | few)
    torch.testing.assert_close(result, expected)
    assert all(torch.allclose(written[name], new[name], atol=1e-6) for name in new)
    _, written = run(part, inputs(1, batch), old | few)
    untouched = torch.ones(batch, TOKENS, dtype=torch.bool).scatter(1, few["tokens_0_0"], False)
    assert same_bits(written["history_0_0_0"][untouched], old["history_0_0_0"][untouched])


def test_what_is_kept() -> None:
    """Keys and values; with the module of ``torch.nn``, which makes them itself, what they are made of."""
    assert len(region(make(Layer)).kept) == 2
    assert len(region(make(Module)).kept) == 1
    assert region(make(PerToken)).kept == ()
    assert region(make(Layer)).bytes_kept == 2 * 4 * 2 * TOKENS * CHANNELS
    assert region(make(Registers)).bytes_kept == 2 * 4 * 2 * (TOKENS + 3) * CHANNELS


# -- refusals ---------------------------------------------------------------------------------------------------------


class Causal(Layer):
    def mix(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.heads(f(x)) for f in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class Convolved(Layer):
    def setup(self) -> None:
        self.conv = nn.Conv1d(CHANNELS, CHANNELS, 3, padding=1)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.q(x).transpose(1, 2)).transpose(1, 2)


class Centred(Layer):
    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(1, keepdim=True)


class Turned(Layer):
    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x).flip(1)


class Pairs(Layer):
    """Two neighbours as one token."""

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x).reshape(x.shape[0], TOKENS // 2, 2 * CHANNELS).roll(1, dims=-1).reshape(x.shape)


class Across(Layer):
    """A product over the tokens."""

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return (self.q(x).transpose(1, 2) @ self.pairs).transpose(1, 2)


class Unknown(Layer):
    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bnc,nm->bmc", self.q(x), self.pairs)


class Sliced(Layer):
    """Writes into some of the tokens."""

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        y = self.q(x).clone()
        y[:, :4] *= 2
        return y


class Pooled(Layer):
    def setup(self) -> None:
        self.pool = nn.GroupNorm(2, TOKENS)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(x)


@torch.library.custom_op("diffcache_test::relu", mutates_args=())
def relu(x: torch.Tensor) -> torch.Tensor:
    """Goes by the name of an op that it is not."""
    return x - x.mean(1, keepdim=True)


class Namesake(Layer):
    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.diffcache_test.relu(self.q(x))


class Batched(Layer):
    """Tokens of all samples in one axis."""

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x.reshape(-1, CHANNELS)).reshape(x.shape)


@pytest.mark.parametrize(
    ("kind", "node"),
    [(Alone, "attention"), (Causal, "scaled_dot_product_attention"), (Convolved, "conv"), (Centred, "mean"),
     (Turned, "flip"), (Pairs, "reshape"), (Across, "matmul"), (Unknown, "einsum"), (Namesake, "relu"),
     (Sliced, ""), (Pooled, "pool"), (Batched, "reshape")],
)  # fmt: skip
def test_what_mixes_tokens_is_refused_by_name(kind: type[Layer], node: str) -> None:
    with pytest.raises(ValueError, match=rf"'layer' cannot run on a few tokens: .*'[^']*{node}"):
        region(make(kind))


def test_a_hook_on_a_layer_is_refused() -> None:
    """It may look at all tokens."""
    with pytest.raises(ValueError, match=r"'q' .* is not known to treat tokens one by one"):
        region(
            make(
                Layer,
                prepare=lambda model: model.q.register_forward_hook(lambda m, a, out: out - out.mean(1, keepdim=True)),
            )
        )


def test_values_without_tokens_are_refused() -> None:
    made = make(Layer)
    flat = dataclasses.replace(made.site, values=("t",), anchors=(None,))
    with pytest.raises(ValueError, match=r"has the shape \(2,\), expected \[batch, tokens, channels\]"):
        token_region(made.graph, flat, made.flops)


@pytest.mark.parametrize("counts", [(0,), (TOKENS + 1,), (None,), (1, 1)])
def test_counts_that_do_not_fit_are_refused(counts: tuple[int | None, ...]) -> None:
    made = make(Layer)
    with pytest.raises(ValueError, match=r"has \(8,\) tokens in its values"):
        program(made, TokenRow(0, made.site, region(made), counts))


def test_a_region_of_another_capture_is_refused() -> None:
    made, other = make(Layer), make(Folded)
    with pytest.raises(ValueError, match=r"names nodes .* that this graph lacks"):
        program(made, TokenRow(0, made.site, region(other)))
