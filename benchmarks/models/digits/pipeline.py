"""Prompts such as "a bold slanted seven" to 8x8 pictures, by diffusers' own transformer and sampler.

The pipeline is small so that it runs in seconds on a laptop; nothing in it is simplified otherwise: double and single
stream blocks, rotary positions, a pooled and a per-token text embedding, classifier-free guidance in two calls.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel, ImagePipelineOutput
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor, nn

SIDE = 8  # pixels; every pixel is one image token
PIL_SCALE = 16  # a picture of 8x8 pixels is too small to look at

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STYLES = ("bold", "thin", "slanted")
FILLERS = ("a", "the", "digit", "handwritten", "and")
WORDS = (*NUMBERS, *STYLES, *FILLERS)


class WordEncoder(ModelMixin, ConfigMixin):
    """An embedding table over a closed vocabulary: per-token embeddings and a pooled one."""

    @register_to_config
    def __init__(self, words: Sequence[str] = WORDS, max_words: int = 8, dim: int = 64):
        super().__init__()
        self.ids = {word: number for number, word in enumerate(words, start=1)}  # 0 is padding
        self.tokens = nn.Embedding(len(words) + 1, dim)
        self.pooled = nn.Linear(dim, dim)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Word numbers, one row for each prompt, padded; the empty prompt is the unconditional one."""
        rows = [[self._word_id(word) for word in re.findall(r"[^\s,.]+", prompt.lower())] for prompt in prompts]
        longest = self.config["max_words"]
        for prompt, row in zip(prompts, rows, strict=True):
            if len(row) > longest:
                raise ValueError(f"the prompt {prompt!r} has {len(row)} words, at most {longest} are understood")
        return torch.tensor([row + [0] * (longest - len(row)) for row in rows])

    def _word_id(self, word: str) -> int:
        if word not in self.ids:
            raise ValueError(f"unknown word {word!r}; the vocabulary is: {', '.join(self.ids)}")
        return self.ids[word]

    def forward(self, word_ids: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.tokens(word_ids)
        return tokens, self.pooled(tokens.mean(dim=1))


class DigitsPipeline(DiffusionPipeline):
    """Text to a picture of a handwritten digit.

    >>> pipe = DigitsPipeline.from_pretrained("benchmarks/models/digits/pipeline")
    >>> pipe("a bold seven", generator=torch.Generator().manual_seed(0)).images[0]
    """

    model_cpu_offload_seq = "text_encoder->transformer"
    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        text_encoder: WordEncoder,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, text_encoder=text_encoder)

    def encode_prompt(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token embeddings [batch, words, dim] and pooled embeddings [batch, dim]."""
        word_ids = self.text_encoder.tokenize(prompts).to(self._execution_device)
        tokens, pooled = self.text_encoder(word_ids)
        return tokens.to(self.transformer.dtype), pooled.to(self.transformer.dtype)

    def prepare_latents(
        self, batch: int, generator: torch.Generator | list[torch.Generator] | None, latents: Tensor | None
    ) -> Tensor:
        """Noise of one channel at each of the 64 image tokens, or the latents that were given."""
        shape = (batch, SIDE * SIDE, 1)
        device, dtype = self._execution_device, self.transformer.dtype
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        if latents.shape != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, these prompts need {shape}")
        return latents.to(device, dtype)

    def set_timesteps(self, num_inference_steps: int) -> Tensor:
        """Even steps of noise level; samplers that bring their own spacing keep it."""
        spacing = {}
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            # Without this the sampler's last step goes from 0.001 to 0 and is wasted.
            spacing["sigmas"] = np.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps)
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device, **spacing)
        return self.scheduler.timesteps

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_inference_steps: int = 28,
        guidance_scale: float = 2.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Guidance above 1 costs a second, unconditional call of the denoiser in every step."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        conditions = {"cond": self.encode_prompt(prompts)}
        if guidance_scale > 1:
            conditions["uncond"] = self.encode_prompt([""] * len(prompts))
        latents = self.prepare_latents(len(prompts), generator, latents)
        img_ids, txt_ids = position_ids(self.text_encoder.config["max_words"], latents)
        timesteps = self.set_timesteps(num_inference_steps)

        with self.progress_bar(total=len(timesteps)) as progress:
            for step, t in enumerate(timesteps):
                velocity = {}
                for name, (tokens, pooled) in conditions.items():
                    with self.transformer.cache_context(name):
                        velocity[name] = self.transformer(
                            hidden_states=latents,
                            timestep=t.expand(len(prompts)).to(latents.dtype) / 1000,
                            pooled_projections=pooled,
                            encoder_hidden_states=tokens,
                            txt_ids=txt_ids,
                            img_ids=img_ids,
                            return_dict=False,
                        )[0]
                latents = self.scheduler.step(guide(velocity, guidance_scale), t, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    here = locals()  # a comprehension has locals of its own
                    tensors = {name: here[name] for name in callback_on_step_end_tensor_inputs}
                    latents = (callback_on_step_end(self, step, t, tensors) or {}).pop("latents", latents)
                progress.update()

        self.maybe_free_model_hooks()
        images = to_images(latents, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def guide(velocity: dict[str, Tensor], scale: float) -> Tensor:
    """Classifier-free guidance where there is an unconditional prediction."""
    if "uncond" not in velocity:
        return velocity["cond"]
    return velocity["uncond"] + scale * (velocity["cond"] - velocity["uncond"])


def position_ids(num_words: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of every image token; words have no place, as in every prompt-as-a-bag model of this family."""
    img_ids = torch.zeros(SIDE, SIDE, 3, device=like.device, dtype=like.dtype)
    img_ids[..., 1] = torch.arange(SIDE, device=like.device)[:, None]
    img_ids[..., 2] = torch.arange(SIDE, device=like.device)[None, :]
    return img_ids.reshape(-1, 3), torch.zeros(num_words, 3, device=like.device, dtype=like.dtype)


def to_images(latents: Tensor, output_type: str) -> Any:
    """Latents in -1 .. 1 (ink is -1, paper 1) as "pil", "np" (NHWC), "pt" (NCHW) or the "latent" itself."""
    if output_type == "latent":
        return latents
    pixels = (latents.float() / 2 + 0.5).clamp(0, 1).reshape(-1, 1, SIDE, SIDE)
    if output_type == "pt":
        return pixels
    array = VaeImageProcessor.pt_to_numpy(pixels)
    if output_type == "np":
        return array
    if output_type == "pil":
        size = (SIDE * PIL_SCALE, SIDE * PIL_SCALE)
        return [image.resize(size, Image.Resampling.NEAREST) for image in VaeImageProcessor.numpy_to_pil(array)]
    raise ValueError(f"output_type {output_type!r} is none of 'pil', 'np', 'pt', 'latent'")
