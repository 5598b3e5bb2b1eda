"""Costs: hand-counted FLOPs of single operators, and what measuring must leave as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffcache.cost import Cost, measure_cost
from diffcache.tracing.captured import capture
from tests.denoisers import FAMILIES

B, N, D = 2, 6, 16


class Apply(nn.Module):
    """A module whose forward is one function of its input."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def cost_of(model: nn.Module, *args: Any, **kwargs: Any) -> Cost:
    with torch.no_grad():
        return measure_cost(capture(model, *args, **kwargs).graph_module, args, kwargs)


@pytest.mark.parametrize(
    ("function", "products", "elements"),
    [
        (lambda x: x @ x.transpose(1, 2), 2 * B * N * N * D, 1 + B * N * N),  # the transpose is a view: one
        (lambda x: torch.einsum("bnd,bmd->bnm", x, x), 2 * B * N * N * D, B * N * N),
        (lambda x: torch.baddbmm(x @ x.mT, x, x.mT), 4 * B * N * N * D, 2 + 2 * B * N * N),
        (lambda x: F.scaled_dot_product_attention(x, x, x), 4 * B * N * N * D, B * N * D),
        (lambda x: x.relu(), 0, B * N * D),
        (lambda x: torch.softmax(x, -1), 0, B * N * D),
    ],
)
def test_operators_match_a_count_by_hand(
    function: Callable[[torch.Tensor], torch.Tensor], products: int, elements: int
):
    assert cost_of(Apply(function), torch.randn(B, N, D)).total == products + elements


def test_linear_layer():
    cost = cost_of(nn.Sequential(nn.Linear(D, 3 * D)), torch.randn(B, N, D))
    assert cost.total == 2 * B * N * D * 3 * D + B * N * 3 * D


def test_convolution():
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1))
    assert cost_of(model, torch.randn(B, 3, 8, 8)).total == 2 * B * 5 * 8 * 8 * 3 * 9 + B * 5 * 8 * 8


def test_multihead_attention_on_its_fast_path():
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(D, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    cost = cost_of(Attend().eval(), torch.randn(B, N, D))
    products = 2 * B * N * 4 * D * D + 4 * B * N * N * D
    assert products <= cost.total < 1.2 * products


def test_transformer_encoder_on_its_fast_path():
    class Encode(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, 2 * D, batch_first=True), 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.encoder(x)

    cost = cost_of(Encode().eval(), torch.randn(B, N, D))
    products = 3 * (2 * B * N * (4 * D * D + 2 * D * 2 * D) + 4 * B * N * N * D)
    assert products <= cost.total < 1.2 * products


def test_inference_mode_counts_the_same():
    model, x = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, D)), torch.randn(B, N, D)
    with torch.inference_mode():
        inside = measure_cost(capture(model, x).graph_module, (x,), {})
    assert inside.total == cost_of(model, x).total


def test_no_computing_node_is_free_and_the_total_is_the_sum():
    entry = FAMILIES["flux"]
    args, kwargs = entry.make_inputs(1)
    graph = capture(entry.make_model(), *args, **kwargs).graph_module
    cost = measure_cost(graph, args, kwargs)
    assert all(cost.flops[node.name] >= 1 for node in graph.graph.nodes if node.op.startswith("call_"))
    assert cost.total == pytest.approx(sum(cost.flops.values()))
    assert cost.of(graph.graph.nodes) == pytest.approx(cost.total)


def test_buffers_random_state_and_arguments_are_left_alone():
    class Restless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(N))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.add_(x.mean((0, 2)))
            x[:, 0] = 0.0
            return x + torch.randn_like(x) + self.seen[:, None]

    model, x = Restless(), torch.randn(B, N, D)
    graph = capture(model, x).graph_module
    before, state, given = model.seen.clone(), torch.get_rng_state(), x.clone()
    measure_cost(graph, (x,), {})
    assert torch.equal(model.seen, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, given)


def test_foreign_arguments_are_refused():
    graph = capture(nn.Sequential(nn.Linear(D, D)), torch.randn(B, D)).graph_module
    with pytest.raises(ValueError, match="arguments of the captured call"):
        measure_cost(graph, (), {"nonsense": 1})
