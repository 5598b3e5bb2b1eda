"""The emoji pipelines: diffusers' own, at 64 x 64 pixels, with free prompts and with guidance on.

The folders load as diffusers' own classes too (`DiffusionPipeline.from_pretrained`), for prompts in the table, once
this module is imported: diffusers takes no component from a module that nobody has imported.
"""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusionPipeline
from torch import Tensor

from benchmarks.models.emoji import prompts
from benchmarks.models.emoji.data import SIDE

assert prompts.PromptEncoder  # a component of both pipelines: see above


class EmojiPipeline(FluxPipeline):
    """Text to a picture of 64 x 64 pixels by a multimodal diffusion transformer.

    >>> pipe = EmojiPipeline.from_pretrained("benchmarks/models/emoji/mmdit")
    >>> pipe("red apple, noto style", generator=torch.Generator().manual_seed(0)).images[0]
    """

    def encode_prompt(self, prompt: Any, *args: Any, prompt_embeds: Tensor | None = None, **options: Any) -> Any:
        if prompt_embeds is None and prompt is not None:
            embedded = self.text_encoder.encode([prompt] if isinstance(prompt, str) else prompt)
            dtype = self.transformer.dtype
            prompt_embeds = embedded.last_hidden_state.to(dtype)
            options["pooled_prompt_embeds"] = embedded.pooler_output.to(dtype)
            copies = options.get("num_images_per_prompt", 1)  # FluxPipeline repeats only what it encodes itself
            prompt_embeds = prompt_embeds.repeat_interleave(copies, dim=0)
            options["pooled_prompt_embeds"] = options["pooled_prompt_embeds"].repeat_interleave(copies, dim=0)
        return super().encode_prompt(prompt, *args, prompt_embeds=prompt_embeds, **options)

    def __call__(
        self, prompt: Any = None, num_inference_steps: int = 28, guidance_scale: float = 3.0, **options: Any
    ) -> Any:
        """As `FluxPipeline`; guidance above 1 is classifier-free: a second call of the denoiser in every step."""
        if guidance_scale > 1 and prompt is not None:
            options.setdefault("negative_prompt", "" if isinstance(prompt, str) else [""] * len(prompt))
        options = {"height": SIDE, "width": SIDE, "true_cfg_scale": guidance_scale} | options
        return super().__call__(prompt, num_inference_steps=num_inference_steps, **options)


class EmojiUNetPipeline(StableDiffusionPipeline):
    """Text to a picture of 64 x 64 pixels by a U-Net with cross-attention.

    >>> pipe = EmojiUNetPipeline.from_pretrained("benchmarks/models/emoji/unet")
    >>> pipe("red apple, noto style", generator=torch.Generator().manual_seed(0)).images[0]
    """

    def encode_prompt(self, prompt: Any, *args: Any, prompt_embeds: Tensor | None = None, **options: Any) -> Any:
        if prompt_embeds is None and prompt is not None:
            prompts = [prompt] if isinstance(prompt, str) else prompt
            prompt_embeds = self.text_encoder.encode(prompts).last_hidden_state
        return super().encode_prompt(prompt, *args, prompt_embeds=prompt_embeds, **options)

    def __call__(
        self, prompt: Any = None, num_inference_steps: int = 28, guidance_scale: float = 3.0, **options: Any
    ) -> Any:
        options = {"height": SIDE, "width": SIDE} | options
        return super().__call__(
            prompt, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, **options
        )


def export(pipe: DiffusionPipeline, folder: Path) -> None:
    """Write the folder in half precision, under the name of diffusers' own class."""
    pipe.to(torch.float16).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = next(
        base.__name__ for base in type(pipe).__mro__ if base.__module__.startswith("diffusers.")
    )
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
