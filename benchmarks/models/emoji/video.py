"""Text to a short clip of an emoji that moves: a small Wan transformer over frames of the pictures' autoencoder.

    python -m benchmarks.models.emoji.video --minutes 120

Interrupted runs go on from the checkpoint, and so does a run that is given more minutes.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from torch import Tensor, nn

from benchmarks.models.emoji import autoencoder, clips, data
from benchmarks.models.emoji.prompts import DIM, PromptEncoder, phrase_tokenizer
from benchmarks.models.emoji.train import GROUPS, PROMPT_DROP, is_matrix, write_curve
from benchmarks.models.emoji.video_pipeline import EmojiVideoPipeline, FrameAutoencoder
from benchmarks.models.training import Trainer, optimizers

FOLDER = Path(__file__).parent / "video"


class Draw:
    """Random latents of the `wanted` clips with their prompts' embeddings; some prompts are empty."""

    def __init__(
        self,
        emoji: data.Emoji,
        vae: AutoencoderKL,
        encoder: PromptEncoder,
        batch: int,
        wanted: Callable[[str, str], bool] = lambda caption, motion: clips.split_of(caption, motion) == "train",
    ):
        known = emoji.where(captions=encoder.config["captions"], styles=(clips.STYLE,))
        pictures = autoencoder.to_input(torch.from_numpy(known.pixels))
        latents, prompts = [], []
        for caption, picture in zip(known.captions, pictures, strict=True):
            motions = [motion for motion in clips.MOTIONS if wanted(caption, motion)]
            if motions:
                frames = torch.cat([clips.clip(picture, motion) for motion in motions]).to(vae.device)
                with torch.no_grad():
                    encoded = vae.encode(frames).latent_dist.mode().half()
                latents += encoded.unflatten(0, (-1, clips.FRAMES)).transpose(1, 2)
                prompts += [clips.prompt(caption, motion) for motion in motions]
        self.latents = torch.stack(latents) * vae.config["scaling_factor"]
        self.tokens = encoder.encode(prompts).last_hidden_state.to(vae.device)
        self.batch = batch

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Latents [batch, 16, 8, 8, 8] and token embeddings [batch, 10, 384]."""
        rows = torch.randint(len(self.latents), (self.batch,), device=self.tokens.device)
        kept = (torch.rand(self.batch, device=self.tokens.device) >= PROMPT_DROP).to(self.tokens)
        return self.latents[rows].float(), self.tokens[rows] * kept[:, None, None]


EARLY = 0.4  # of the draws


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
    sigma = torch.sigmoid(torch.randn(len(clean), device=clean.device) + 0.5)
    # which way it goes is decided in almost pure noise; with less, the clip itself tells, and the words go unread
    early = 1 - 0.1 * torch.rand_like(sigma).square()
    sigma = torch.where(torch.rand_like(sigma) < EARLY, early, sigma)
    noisy = torch.lerp(clean, noise, sigma[:, None, None, None, None])
    velocity = model(noisy, timestep=1000 * sigma, encoder_hidden_states=tokens, return_dict=False)[0]
    return (velocity - (noise - clean)).square().mean()


def known_prompts() -> PromptEncoder:
    """MiniLM's embeddings of the captions and the motions."""
    captions = sorted(set(data.load().where(groups=GROUPS, styles=(clips.STYLE,)).captions))
    return PromptEncoder.of(captions, list(clips.MOTIONS), joined=True, suffix="")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120, help="of all runs from this checkpoint together")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vae", type=Path, default=autoencoder.FOLDER)
    parser.add_argument("--checkpoint", type=Path, default=data.CACHE / "video.ckpt")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    model = build()
    trainer = Trainer(model, optimizers(model, is_matrix, 0.01, 1e-3), horizon=150)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    if arguments.checkpoint.exists():
        trainer.load(arguments.checkpoint)
        print(f"going on from step {trainer.step}")
    torch.manual_seed(arguments.seed + trainer.step)
    vae = AutoencoderKL.from_pretrained(arguments.vae)
    encoder = known_prompts()
    draw = Draw(data.load(), vae, encoder, arguments.batch)
    print(f"{len(draw.latents)} clips", flush=True)
    trainer.run(lambda: flow_loss(model, *draw()), arguments.minutes * 60, arguments.checkpoint, every=100)

    pipe = EmojiVideoPipeline(
        tokenizer=phrase_tokenizer(encoder.config["captions"], encoder.config["styles"], suffix=""),
        text_encoder=encoder,
        vae=FrameAutoencoder.of(vae),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        transformer=trainer.average,
    )
    pipe.to(torch.float16).save_pretrained(arguments.folder)
    write_curve(trainer, arguments.batch, arguments.folder)
    print(f"wrote {arguments.folder} after {trainer.step} steps")


if __name__ == "__main__":
    main()
