"""Denoisers and samplers that both sides run: tiny, random weights from one seed, fp32, non-trivial in every gate.

    subject = SUBJECTS["flux"]
    run = generate(subject.make(), subject, seed=0)      # run.latents, run.outputs: one per call of the denoiser

The sampler is Euler from sigma 1 to 0: ``x += (sigma_next - sigma) * output``. Its latents move a little at every step,
by amounts that differ, so that a gate with a middling threshold decides now one way, now the other.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Around = Callable[[int, str], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Subject:
    """A denoiser with what its sampler needs.

    ``inputs(latent, sigma, branch, prompt)`` gives the arguments of one call; ``branch`` is "cond", "uncond", or "both"
    for one call on a batch that holds the unconditional samples first; ``prompt`` draws the conditional embeds.
    ``guidance``: "none", "separate" (two calls a step, "cond" first) or "batched". ``blocks`` are the paths of the
    block lists in the order in which they run.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[torch.Tensor, float, str, int], Inputs]
    shape: tuple[int, ...]
    blocks: tuple[str, ...]
    steps: int = 24
    guidance: str = "none"
    speed: float = 1.0
    prompt: int = 100

    def make(self) -> nn.Module:
        """A new denoiser; always the same weights. Peers change modules in place, so every run gets its own."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            model = self.build()
            _redraw_constants(model)
        return model.eval().requires_grad_(False)

    def guided(self, how: str) -> Subject:
        """The same denoiser with another way of guidance."""
        return replace(self, name=f"{self.name}-{how}", guidance=how)

    def sigmas(self) -> list[float]:
        """Noise levels, ``steps + 1`` of them, from 1 down to 0."""
        return [1.0 - step / self.steps for step in range(self.steps + 1)]

    def timestep(self, step: int) -> float:
        """The timestep of a step on the usual scale of 1000 to 0."""
        return 1000.0 * self.sigmas()[step]

    def block_paths(self, model: nn.Module) -> list[str]:
        """Paths of all blocks in the order in which they run."""
        return [f"{name}.{i}" for name in self.blocks for i in range(len(model.get_submodule(name)))]

    def latent(self, seed: int) -> torch.Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(seed))

    def sample(self, denoiser: Any, seed: int) -> torch.Tensor:
        """One generation, each seed with a prompt of its own: for ``compile(..., sample=subject.sample)``."""
        return generate(denoiser, replace(self, prompt=self.prompt + seed), seed).latents


@dataclass(frozen=True)
class Generation:
    """The latents after the last step and what every call of the denoiser gave."""

    latents: torch.Tensor
    outputs: tuple[torch.Tensor, ...]


@torch.no_grad()
def generate(denoiser: Any, subject: Subject, seed: int, around: Around | None = None) -> Generation:
    """Run the sampler. ``around(step, branch)`` is a context for each call; by default the denoiser's cache context."""
    x, outputs = subject.latent(seed), []
    around = around or _cache_context(denoiser, subject)
    sigmas = subject.sigmas()
    for step in range(subject.steps):
        called = {}
        for branch in {"none": ("cond",), "separate": ("cond", "uncond"), "batched": ("both",)}[subject.guidance]:
            args, kwargs = subject.inputs(x, sigmas[step], branch, subject.prompt)
            with around(step, branch):
                output = denoiser(*args, **kwargs)
            called[branch] = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
            outputs.append(called[branch].clone())
        if "both" in called:
            called["uncond"], called["cond"] = called["both"].chunk(2)
        direction = called["cond"]
        if "uncond" in called:
            direction = called["uncond"] + 2.0 * (direction - called["uncond"])
        x = x + subject.speed * (sigmas[step + 1] - sigmas[step]) * direction[:, : x.shape[1]]
    return Generation(x, tuple(outputs))


def _cache_context(denoiser: Any, subject: Subject) -> Around:
    if subject.guidance != "separate" or not hasattr(denoiser, "cache_context"):
        return lambda step, branch: nullcontext()
    return lambda step, branch: denoiser.cache_context(branch)


@torch.no_grad()
def _redraw_constants(model: nn.Module) -> None:
    """Zero gates, unit norms and zero heads are drawn anew: blocks gated by zero would make every cache exact."""
    for parameter in model.parameters():
        if not torch.isfinite(parameter).all():
            parameter.normal_(0, 0.1)
        elif parameter.numel() > 1 and (parameter == parameter.flatten()[0]).all():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def _fixed(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _prompt(branch: str, prompt: int, batch: int, *shape: int) -> torch.Tensor:
    """The embeds of the prompt, of the empty prompt, or of both, the empty one first."""
    cond, uncond = _fixed(prompt, batch, *shape), _fixed(200, batch, *shape)
    return {"cond": cond, "uncond": uncond, "both": torch.cat([uncond, cond])}[branch]


def _doubled(x: torch.Tensor, branch: str) -> torch.Tensor:
    return torch.cat([x, x]) if branch == "both" else x


# -- the table -------------------------------------------------------------------------------------------------------


def _build(name: str, config: dict[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import diffusers

        return getattr(diffusers, name)(**config)

    return build


_FLUX = {
    "patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 4, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8),
}  # fmt: skip
_DIT = {
    "in_channels": 4, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 16, "attention_bias": True,
    "num_layers": 5, "norm_type": "ada_norm_zero", "num_embeds_ada_norm": 8, "patch_size": 2, "sample_size": 8,
}  # fmt: skip
_SD3 = {
    "sample_size": 8, "patch_size": 1, "in_channels": 4, "num_layers": 5, "attention_head_dim": 8,
    "num_attention_heads": 4, "caption_projection_dim": 32, "joint_attention_dim": 32, "pooled_projection_dim": 64,
    "out_channels": 4, "pos_embed_max_size": 16,
}  # fmt: skip
_WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
    "text_dim": 16, "freq_dim": 64, "ffn_dim": 48, "num_layers": 5, "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32,
}  # fmt: skip
_UNET = {
    "block_out_channels": (8, 16, 16), "norm_num_groups": 4, "cross_attention_dim": 8, "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "out_channels": 4, "in_channels": 4, "layers_per_block": 2, "sample_size": 16,
}  # fmt: skip


def _flux_inputs(x: torch.Tensor, sigma: float, branch: str, prompt: int) -> Inputs:
    ids = torch.zeros(4, 4, 3)
    ids[..., 1], ids[..., 2] = torch.arange(4)[:, None], torch.arange(4)[None]
    return (), {
        "hidden_states": _doubled(x, branch),
        "encoder_hidden_states": _prompt(branch, prompt, len(x), 6, 32),
        "pooled_projections": _prompt(branch, prompt, len(x), 32),
        "timestep": torch.full((len(_doubled(x, branch)),), sigma),
        "img_ids": ids.reshape(-1, 3),
        "txt_ids": torch.zeros(6, 3),
        "return_dict": False,
    }


def _dit_inputs(x: torch.Tensor, sigma: float, branch: str, prompt: int) -> Inputs:
    labels = {"cond": [3], "uncond": [5], "both": [5, 3]}[branch]
    return (), {
        "hidden_states": _doubled(x, branch),
        "timestep": torch.full((len(labels) * len(x),), round(1000 * sigma) - 1),
        "class_labels": torch.tensor(labels).repeat_interleave(len(x)),
        "return_dict": False,
    }


def _sd3_inputs(x: torch.Tensor, sigma: float, branch: str, prompt: int) -> Inputs:
    return (), {
        "hidden_states": _doubled(x, branch),
        "encoder_hidden_states": _prompt(branch, prompt, len(x), 6, 32),
        "pooled_projections": _prompt(branch, prompt, len(x), 64),
        "timestep": torch.full((len(_doubled(x, branch)),), 1000 * sigma),
        "return_dict": False,
    }


def _wan_inputs(x: torch.Tensor, sigma: float, branch: str, prompt: int) -> Inputs:
    return (), {
        "hidden_states": _doubled(x, branch),
        "timestep": torch.full((len(_doubled(x, branch)),), round(1000 * sigma) - 1),
        "encoder_hidden_states": _prompt(branch, prompt, len(x), 6, 16),
        "return_dict": False,
    }


def _unet_inputs(x: torch.Tensor, sigma: float, branch: str, prompt: int) -> Inputs:
    # positional: DeepCache takes the timestep from the second argument
    timestep = torch.tensor(round(1000 * sigma) - 1)
    return (_doubled(x, branch), timestep, _prompt(branch, prompt, len(x), 6, 8)), {"return_dict": False}


SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject("flux", _build("FluxTransformer2DModel", _FLUX), _flux_inputs, (1, 16, 4),
                ("transformer_blocks", "single_transformer_blocks")),
        Subject("dit", _build("DiTTransformer2DModel", _DIT), _dit_inputs, (1, 4, 8, 8), ("transformer_blocks",)),
        Subject("sd3", _build("SD3Transformer2DModel", _SD3), _sd3_inputs, (1, 4, 8, 8), ("transformer_blocks",)),
        Subject("wan", _build("WanTransformer3DModel", _WAN), _wan_inputs, (1, 4, 2, 8, 8), ("blocks",)),
        Subject("unet", _build("UNet2DConditionModel", _UNET), _unet_inputs, (1, 4, 16, 16),
                ("down_blocks", "up_blocks")),
    )
}  # fmt: skip
SUBJECTS["wan-separate"] = SUBJECTS["wan"].guided("separate")
SUBJECTS["wan-batched"] = SUBJECTS["wan"].guided("batched")
