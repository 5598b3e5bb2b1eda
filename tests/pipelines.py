"""Small untrained diffusers pipelines, built without files; their guidance takes one call or two."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from benchmarks.models.digits.pipeline import DigitsPipeline, WordEncoder

STEPS = 8


def _autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(8,),
        norm_num_groups=4,
        sample_size=8,
    ).eval()


def dit_pipeline() -> DiTPipeline:
    """Guidance as one call on a doubled batch; images only, whatever ``output_type`` says."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        sample_size=8,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=1000,
        norm_elementwise_affine=False,
        activation_fn="gelu-approximate",
    )
    return _quiet(DiTPipeline(transformer.eval(), _autoencoder(), DDIMScheduler()))


def unet_pipeline() -> StableDiffusionPipeline:
    """A U-Net with guidance as one call on a doubled batch; prompts come as embeddings."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        layers_per_block=1,
        sample_size=8,
    )
    return _quiet(
        StableDiffusionPipeline(
            vae=_autoencoder(),
            text_encoder=None,
            tokenizer=None,
            unet=unet.eval(),
            scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def digits_pipeline() -> DigitsPipeline:
    """Guidance as two calls, each inside ``cache_context``."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=1,
        out_channels=1,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        axes_dims_rope=[4, 6, 6],
    )
    return _quiet(DigitsPipeline(transformer.eval(), FlowMatchEulerDiscreteScheduler(), WordEncoder().eval()))


def embeds(seed: int) -> dict[str, Any]:
    """A prompt for ``unet_pipeline``."""
    cond = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(seed))
    return {"prompt_embeds": cond, "negative_prompt_embeds": torch.zeros(1, 5, 8), "num_inference_steps": STEPS}


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe: Any, item: dict[str, Any], seed: int, **more: Any) -> torch.Tensor:
    """One generation's latents, or its images where the pipeline gives no latents."""
    arguments = {"num_inference_steps": STEPS, "output_type": "latent", **item, **more}
    return torch.as_tensor(pipe(generator=torch.Generator().manual_seed(seed), **arguments).images)
