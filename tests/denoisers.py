"""Tiny denoisers for the test suite: one of every family, and modules that each hold one thing hard to capture.

    entry = FAMILIES["dit"]
    model = entry.make_model()                             # nn.Module in eval mode, weights from one seed
    args, kwargs = entry.make_inputs(step, batch=2, scale=1)
    model(*args, **kwargs)

Inputs move like a sampler's: the latent lies on the line from noise to data, the timestep falls with the step, and all
else is equal at every step. Parameters that a fresh model has constant (zero gates, unit norms, zero heads) are drawn
anew: a denoiser whose blocks are gated by zero computes nothing worth comparing.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from tests.plain_denoisers import (
    BranchDiT,
    CounterDiT,
    HookedDiT,
    InplaceDiT,
    ItemDiT,
    PlainDiT,
    PythonCacheDiT,
    RandomDiT,
    SkipDiT,
)

STEPS = 10
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Draw:
    """Draws one step's inputs: ``b`` is the batch size, ``k`` multiplies height and width."""

    def __init__(self, step: int, batch: int, scale: int) -> None:
        if not 0 <= step < STEPS:
            raise ValueError(f"step {step} is outside 0..{STEPS - 1}")
        self.b, self.k, self.sigma = batch, scale, 1.0 - step / STEPS
        self._generator = torch.Generator().manual_seed(1234)

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator)

    def latent(self, *shape: int) -> torch.Tensor:
        """``(1 - sigma) * data + sigma * noise``: the only tensor besides the timestep that a sampler changes."""
        clean, noise = self.randn(*shape), self.randn(*shape)
        return (1 - self.sigma) * clean + self.sigma * noise

    def t_sigma(self) -> torch.Tensor:
        return torch.full((self.b,), self.sigma)

    def t_float(self) -> torch.Tensor:
        return torch.full((self.b,), 1000 * self.sigma)

    def t_long(self) -> torch.Tensor:
        return torch.full((self.b,), round(1000 * self.sigma) - 1)

    def labels(self, classes: int) -> torch.Tensor:
        return torch.randint(0, classes, (self.b,), generator=self._generator)


@dataclass(frozen=True)
class Entry:
    """One denoiser with its inputs. ``kind``: "transformer", "unet" or "stress"; ``scales`` that it accepts."""

    name: str
    kind: str
    build: Callable[[], nn.Module]
    inputs: Callable[[Draw], Arguments]
    scales: tuple[int, ...] = (1, 2)
    requires: str = ""

    def make_model(self, seed: int = 0) -> nn.Module:
        """A new model; skips the test if the library that has its class is missing."""
        if self.requires and importlib.util.find_spec(self.requires) is None:
            pytest.skip(f"{self.requires} is not installed")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build()
            _redraw_constants(model)
        return model.eval()

    def make_inputs(self, step: int = 0, *, batch: int = 2, scale: int = 1) -> Arguments:
        return self.inputs(Draw(step, batch, scale))


@torch.no_grad()
def _redraw_constants(model: nn.Module) -> None:
    for parameter in model.parameters():
        if not torch.isfinite(parameter).all():
            parameter.normal_(0, 0.1)
        elif parameter.numel() > 1 and (parameter == parameter.flatten()[0]).all():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


# -- the table -------------------------------------------------------------------------------------------------------


def _plain_inputs(r: Draw) -> Arguments:
    return (r.latent(r.b, 4, 8, 8), r.t_long(), r.labels(10)), {}


def library_model(name: str, config: dict[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import diffusers

        return getattr(diffusers, name)(**config)

    return build


def _flux_inputs(r: Draw) -> Arguments:
    side = 4 * r.k
    ids = torch.zeros(side, side, 3)
    ids[..., 1], ids[..., 2] = torch.arange(side)[:, None], torch.arange(side)[None]
    return (), {
        "hidden_states": r.latent(r.b, side * side, 4),
        "encoder_hidden_states": r.randn(r.b, 12, 32),
        "pooled_projections": r.randn(r.b, 32),
        "timestep": r.t_sigma(),
        "img_ids": ids.reshape(-1, 3),
        "txt_ids": torch.zeros(12, 3),
        "return_dict": False,
    }


def _unet_inputs(r: Draw) -> dict[str, Any]:
    return {
        "sample": r.latent(r.b, 4, 16 * r.k, 16 * r.k),
        "timestep": torch.tensor(round(1000 * r.sigma) - 1),
        "encoder_hidden_states": r.randn(r.b, 6, 8),
        "return_dict": False,
    }


def _sdxl_inputs(r: Draw) -> Arguments:
    ids = torch.tensor([1024.0, 1024, 0, 0, 1024, 1024]).repeat(r.b, 1)
    return (), {**_unet_inputs(r), "added_cond_kwargs": {"text_embeds": r.randn(r.b, 16), "time_ids": ids}}


_FLUX = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 4, 8),
}
_DIT = {
    "in_channels": 4,
    "out_channels": 8,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "attention_bias": True,
    "num_layers": 3,
    "norm_type": "ada_norm_zero",
    "num_embeds_ada_norm": 8,
    "patch_size": 2,
    "sample_size": 8,
}
_SD3 = {
    "sample_size": 16,
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 4,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "caption_projection_dim": 32,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 64,
    "out_channels": 4,
    "pos_embed_max_size": 96,
}
_PIXART = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 3,
    "cross_attention_dim": 16,
    "sample_size": 8,
    "patch_size": 2,
    "caption_channels": 32,
    "use_additional_conditions": False,
}
_WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 256,
    "ffn_dim": 32,
    "num_layers": 3,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 32,
}
_AUDIO = {
    "sample_size": 16,
    "in_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_attention_heads": 2,
    "out_channels": 4,
    "cross_attention_dim": 16,
    "time_proj_dim": 8,
    "global_states_input_dim": 8,
    "cross_attention_input_dim": 8,
}
_SD15 = {
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
    "out_channels": 4,
    "in_channels": 4,
    "layers_per_block": 2,
    "sample_size": 16,
}
_SDXL = {
    **_SD15,
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (2, 4, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 16 + 6 * 8,
}


def _dit_inputs(r: Draw) -> Arguments:
    return (), {"hidden_states": r.latent(r.b, 4, 8, 8), "timestep": r.t_long(), "class_labels": r.labels(4)}


def _sd3_inputs(r: Draw) -> Arguments:
    return (), {
        "hidden_states": r.latent(r.b, 4, 8 * r.k, 8 * r.k),
        "encoder_hidden_states": r.randn(r.b, 20, 32),
        "pooled_projections": r.randn(r.b, 64),
        "timestep": r.t_float(),
    }


def _pixart_inputs(r: Draw) -> Arguments:
    mask = torch.ones(r.b, 7)
    mask[:, -2:] = 0
    return (r.latent(r.b, 4, 8 * r.k, 8 * r.k),), {
        "encoder_hidden_states": r.randn(r.b, 7, 32),
        "timestep": r.t_long(),
        "encoder_attention_mask": mask,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _wan_inputs(r: Draw) -> Arguments:
    text = r.randn(r.b, 12, 16)
    return (r.latent(r.b, 4, 2, 8 * r.k, 8 * r.k), r.t_long(), text), {}


def _audio_inputs(r: Draw) -> Arguments:
    angles = torch.outer(torch.arange(16 * r.k + 1).float(), 0.5 ** torch.arange(2).float()).repeat(1, 2)
    return (), {
        "hidden_states": r.latent(r.b, 4, 16 * r.k),
        "timestep": r.t_sigma(),
        "encoder_hidden_states": r.randn(r.b, 6, 8),
        "global_hidden_states": r.randn(r.b, 1, 8),
        "rotary_embedding": (angles.cos(), angles.sin()),
    }


def _positional_inputs(r: Draw) -> Arguments:
    given = _unet_inputs(r)
    return (given["sample"], int(given["timestep"]), given["encoder_hidden_states"]), {"return_dict": False}


def _table() -> dict[str, Entry]:
    library = [
        ("class_dit", "transformer", "DiTTransformer2DModel", _DIT, _dit_inputs),
        ("flux", "transformer", "FluxTransformer2DModel", _FLUX, _flux_inputs),
        ("sd3", "transformer", "SD3Transformer2DModel", _SD3, _sd3_inputs),
        ("pixart", "transformer", "PixArtTransformer2DModel", _PIXART, _pixart_inputs),
        ("wan", "transformer", "WanTransformer3DModel", _WAN, _wan_inputs),
        ("stable_audio", "transformer", "StableAudioDiTModel", _AUDIO, _audio_inputs),
        ("sdxl_unet", "unet", "UNet2DConditionModel", _SDXL, _sdxl_inputs),
        ("unet_python_timestep", "unet", "UNet2DConditionModel", _SD15, _positional_inputs),
    ]
    plain = [("dit", "transformer", PlainDiT), ("skip_dit", "transformer", SkipDiT), ("branch", "stress", BranchDiT),
             ("item", "stress", ItemDiT), ("counter", "stress", CounterDiT), ("inplace", "stress", InplaceDiT),
             ("python_cache", "stress", PythonCacheDiT), ("hooks", "stress", HookedDiT),
             ("random", "stress", RandomDiT)]  # fmt: skip
    entries = [Entry(name, kind, build, _plain_inputs, scales=(1,)) for name, kind, build in plain]
    for name, kind, target, config, inputs in library:
        scales = (1,) if name == "class_dit" else (1, 2)
        entries.append(Entry(name, kind, library_model(target, config), inputs, scales, "diffusers"))
    return {entry.name: entry for entry in entries}


FAMILIES: dict[str, Entry] = _table()

# Those that one capture serves exactly; "counter" must be refused.
CAPTURABLE = tuple(name for name in FAMILIES if name != "counter")
