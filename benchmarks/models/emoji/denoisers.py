"""The emoji denoisers: diffusers' own classes at a small size, their losses, and the pipelines they go into."""

from functools import lru_cache
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    UNet2DConditionModel,
)
from torch import Tensor, nn

from benchmarks.models.emoji.pipeline import EmojiPipeline, EmojiUNetPipeline
from benchmarks.models.emoji.prompts import DIM, PromptEncoder

SIDE = 8  # latents


def build_mmdit() -> FluxTransformer2DModel:
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,  # 2 x 2 latents of 16 channels, as FluxPipeline packs them
        num_layers=4,
        num_single_layers=8,
        num_attention_heads=6,
        attention_head_dim=32,
        axes_dims_rope=(8, 12, 12),
        joint_attention_dim=DIM,
        pooled_projection_dim=2 * DIM,
    )
    # Blocks start as the identity and the output as zero: a transformer trained for minutes needs that.
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (name.endswith("norm.linear") or ".norm1" in name or name == "proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return model


def flow_loss(model: nn.Module, clean: Tensor, tokens: Tensor, pooled: Tensor) -> Tensor:
    """Rectified flow: squared error of the velocity at a random point of the straight line from picture to noise."""
    clean = FluxPipeline._pack_latents(clean, *clean.shape)
    noise = torch.randn_like(clean)
    sigma = torch.sigmoid(torch.randn(len(clean), device=clean.device))  # the middle is where there is most to learn
    velocity = model(
        hidden_states=torch.lerp(clean, noise, sigma[:, None, None]),
        timestep=sigma,
        pooled_projections=pooled,
        encoder_hidden_states=tokens,
        txt_ids=torch.zeros(tokens.shape[1], 3, device=clean.device),
        img_ids=image_ids(clean.device),
        return_dict=False,
    )[0]
    return (velocity - (noise - clean)).square().mean()


@lru_cache(1)
def image_ids(device: torch.device) -> Tensor:
    """Places of the tokens, made once: a copy from the host would keep a training step from becoming a CUDA graph."""
    return FluxPipeline._prepare_latent_image_ids(1, SIDE // 2, SIDE // 2, device, torch.float32)


def mmdit_pipeline(model: nn.Module, vae: AutoencoderKL, encoder: PromptEncoder, tokenizer: Any) -> DiffusionPipeline:
    return EmojiPipeline(
        transformer=model,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder,
        tokenizer_2=tokenizer,
    )


def build_unet() -> UNet2DConditionModel:
    model = UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=16,
        out_channels=16,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        mid_block_type=None,  # the deepest resolution is 2 x 2
        block_out_channels=(64, 128, 192),
        layers_per_block=2,
        cross_attention_dim=DIM,
        attention_head_dim=4,  # diffusers reads it as the number of heads
        norm_num_groups=16,
    )
    for name, module in model.named_modules():  # residual branches start as zero
        if name == "conv_out" or name.endswith((".conv2", ".proj_out", "to_out.0", "net.2")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return model


def unet_sampler() -> DDIMScheduler:
    """v-prediction; the last training step is pure noise, so that sampling starts where training has been."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def v_loss(model: nn.Module, clean: Tensor, tokens: Tensor, pooled: Tensor) -> Tensor:
    """Squared error of v = alpha noise - sigma picture (Salimans and Ho, 2022)."""
    alphas = noise_schedule(clean.device)
    steps = torch.randint(len(alphas), (len(clean),), device=clean.device)
    alpha, sigma = (part.sqrt()[:, None, None, None] for part in (alphas[steps], 1 - alphas[steps]))
    noise = torch.randn_like(clean)
    predicted = model(alpha * clean + sigma * noise, steps, tokens, return_dict=False)[0]
    return (predicted - (alpha * noise - sigma * clean)).square().mean()


@lru_cache(1)
def noise_schedule(device: torch.device) -> Tensor:
    """Share of the picture left, in squares, after each of the training steps; made once, as `image_ids`."""
    return unet_sampler().alphas_cumprod.to(device)


def unet_pipeline(model: nn.Module, vae: AutoencoderKL, encoder: PromptEncoder, tokenizer: Any) -> DiffusionPipeline:
    return EmojiUNetPipeline(
        unet=model,
        scheduler=unet_sampler(),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


KINDS = {"mmdit": (build_mmdit, flow_loss, mmdit_pipeline), "unet": (build_unet, v_loss, unet_pipeline)}
