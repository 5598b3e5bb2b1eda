"""The video pipeline: diffusers' `WanPipeline` over frames of the pictures' autoencoder."""

from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, WanPipeline
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from benchmarks.models.emoji import clips, data, prompts

# components of the pipeline: diffusers finds classes only in modules that are imported, and that have this name
assert issubclass(AutoencoderKL, ModelMixin)
assert prompts.PromptEncoder


class FrameAutoencoder(AutoencoderKL):
    """The pictures' autoencoder on clips [batch, channels, frames, height, width], each frame alone."""

    def decode(self, z: Tensor, return_dict: bool = True, **options: Any) -> Any:
        if z.ndim == 4:
            return super().decode(z, return_dict=return_dict, **options)
        frames = super().decode(z.transpose(1, 2).flatten(0, 1), return_dict=False, **options)[0]
        return (frames.unflatten(0, (z.shape[0], z.shape[2])).transpose(1, 2),)

    @classmethod
    def of(cls, vae: AutoencoderKL) -> "FrameAutoencoder":
        """The same weights, with what `WanPipeline` asks of an autoencoder's configuration."""
        other = cls.from_config(vae.config)
        other.load_state_dict(vae.state_dict())
        channels = vae.config["latent_channels"]
        spread = [1 / vae.config["scaling_factor"]] * channels
        other.register_to_config(
            scale_factor_temporal=1,
            scale_factor_spatial=8,
            z_dim=channels,
            latents_mean=[0.0] * channels,
            latents_std=spread,
        )
        return other


class EmojiVideoPipeline(WanPipeline):
    """Text to 8 frames of 64 x 64 pixels.

    >>> pipe = EmojiVideoPipeline.from_pretrained("benchmarks/models/emoji/video")
    >>> pipe("red apple, bouncing", generator=torch.Generator().manual_seed(0)).frames[0]
    """

    _optional_components: ClassVar = [*WanPipeline._optional_components]

    def encode_prompt(self, prompt: Any, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        """Embeddings [batch, 10, 384] of the prompts, and of the empty one for guidance."""
        tokens = options.get("prompt_embeds")
        if tokens is None:
            tokens = self.text_encoder.encode([prompt] if isinstance(prompt, str) else prompt).last_hidden_state
            tokens = tokens.repeat_interleave(options.get("num_videos_per_prompt", 1), dim=0)
        tokens = tokens.to(self._execution_device, self.transformer.dtype)
        return tokens, torch.zeros_like(tokens)

    def __call__(
        self,
        prompt: Any = None,
        num_inference_steps: int = 28,
        guidance_scale: float = 3.0,
        num_frames: int = clips.FRAMES,
        **options: Any,
    ) -> Any:
        options = {"height": data.SIDE, "width": data.SIDE} | options
        # WanPipeline adds a frame wherever no frames are merged in time.
        return super().__call__(
            prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_frames=num_frames - 1,
            **options,
        )
