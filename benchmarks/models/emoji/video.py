"""Text to a short clip of an emoji that moves: a small Wan transformer over frames of the pictures' autoencoder.

    python -m benchmarks.models.emoji.video --minutes 120

Interrupted runs go on from the checkpoint, and so does a run that is given more minutes.
"""

import argparse
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from benchmarks.models.emoji import autoencoder, clips, data
from benchmarks.models.emoji.prompts import DIM, PromptEncoder, phrase_tokenizer
from benchmarks.models.emoji.train import GROUPS, PROMPT_DROP, is_matrix
from benchmarks.models.training import Trainer, optimizers

FOLDER = Path(__file__).parent / "video"
assert issubclass(AutoencoderKL, ModelMixin)  # diffusers loads a component only if its module has this name


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


class Draw:
    """Random latents of training clips with their prompts' embeddings; some prompts are empty."""

    def __init__(self, vae: AutoencoderKL, encoder: PromptEncoder, batch: int, seed: int):
        known = data.load().where(captions=encoder.config["captions"], styles=(clips.STYLE,))
        pictures = autoencoder.to_input(torch.from_numpy(known.pixels))
        latents, prompts = [], []
        for caption, picture in zip(known.captions, pictures, strict=True):
            for motion in clips.MOTIONS:
                if clips.split_of(caption, motion) == "train":
                    frames = clips.clip(picture, motion).to(vae.device)
                    with torch.no_grad():
                        latents.append(vae.encode(frames).latent_dist.mode().half().transpose(0, 1))
                    prompts.append(clips.prompt(caption, motion))
        self.latents = torch.stack(latents) * vae.config["scaling_factor"]
        self.tokens = encoder.encode(prompts).last_hidden_state.to(vae.device)
        self.batch = batch
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Latents [batch, 16, 8, 8, 8] and token embeddings [batch, 10, 384]."""
        rows = torch.randint(len(self.latents), (self.batch,), generator=self.generator)
        kept = (torch.rand(self.batch, generator=self.generator) >= PROMPT_DROP).to(self.tokens)
        rows = rows.to(self.tokens.device)
        return self.latents[rows].float(), self.tokens[rows] * kept[:, None, None]


def build() -> WanTransformer3DModel:
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=5,
        attention_head_dim=32,
        in_channels=16,
        out_channels=16,
        text_dim=DIM,
        freq_dim=128,
        ffn_dim=640,
        num_layers=8,
        rope_max_seq_len=32,
    )
    for name, module in model.named_modules():  # residual branches and the output start as zero
        if name.endswith(("attn1.to_out.0", "attn2.to_out.0", "ffn.net.2")) or name == "proj_out":
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return model


def flow_loss(model: nn.Module, clean: Tensor, tokens: Tensor) -> Tensor:
    """Rectified flow: squared error of the velocity at a random point of the straight line from clip to noise."""
    noise = torch.randn_like(clean)
    sigma = torch.sigmoid(torch.randn(len(clean), device=clean.device))
    noisy = torch.lerp(clean, noise, sigma[:, None, None, None, None])
    velocity = model(noisy, timestep=1000 * sigma, encoder_hidden_states=tokens, return_dict=False)[0]
    return (velocity - (noise - clean)).square().mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120, help="of all runs from this checkpoint together")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="autocast, for hardware that multiplies in bfloat16")
    parser.add_argument("--vae", type=Path, default=autoencoder.FOLDER)
    parser.add_argument("--checkpoint", type=Path, default=data.CACHE / "video.ckpt")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    model = build().to(arguments.device)
    autocast = torch.bfloat16 if arguments.bf16 else None
    trainer = Trainer(model, optimizers(model, is_matrix, 0.01, 1e-3), horizon=150, autocast=autocast)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    if arguments.checkpoint.exists():
        trainer.load(arguments.checkpoint)
        print(f"going on from step {trainer.step}")
    torch.manual_seed(arguments.seed + trainer.step)
    vae = AutoencoderKL.from_pretrained(arguments.vae).to(arguments.device)
    captions = sorted(set(data.load().where(groups=GROUPS, styles=(clips.STYLE,)).captions))
    encoder = PromptEncoder.of(captions, list(clips.MOTIONS), joined=True, suffix="")
    draw = Draw(vae, encoder, arguments.batch, trainer.step)
    print(f"{len(draw.latents)} clips", flush=True)
    trainer.run(lambda: flow_loss(model, *draw()), arguments.minutes * 60, arguments.checkpoint, every=100)

    pipe = EmojiVideoPipeline(
        tokenizer=phrase_tokenizer(captions, list(clips.MOTIONS), suffix=""),
        text_encoder=encoder,
        vae=FrameAutoencoder.of(vae.cpu()),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        transformer=trainer.average.cpu(),
    )
    pipe.to(torch.float16).save_pretrained(arguments.folder)
    print(f"wrote {arguments.folder} after {trainer.step} steps")


if __name__ == "__main__":
    main()
