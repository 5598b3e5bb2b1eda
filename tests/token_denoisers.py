"""Denoisers whose tokens meet in particular ways: frames and places apart, text and video in one run, two stacks.

For tests that look at structure only; the families that everything is tested over are in ``denoisers``.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.denoisers import Arguments, Draw, Entry, library_model

_LATTE = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 3,
    "sample_size": 8,
    "patch_size": 2,
    "cross_attention_dim": 16,
    "caption_channels": 12,
    "video_length": 3,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "attention_bias": True,
}
_COGVIDEO = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 12,
    "num_layers": 3,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 9,
    "patch_size": 2,
    "max_text_seq_length": 6,
}
_ALLEGRO = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "cross_attention_dim": 48,
    "sample_height": 8,
    "sample_width": 8,
    "sample_frames": 3,
    "caption_channels": 12,
    "patch_size": 2,
    "patch_size_t": 1,
}
_AURA = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "num_mmdit_layers": 2,
    "num_single_dit_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "caption_projection_dim": 32,
    "joint_attention_dim": 24,
    "out_channels": 4,
    "pos_embed_max_size": 256,
}
_MOTION = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
    "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
    "layers_per_block": 1,
    "cross_attention_dim": 8,
    "num_attention_heads": 2,
    "motion_num_attention_heads": 2,
    "norm_num_groups": 4,
    "in_channels": 4,
    "out_channels": 4,
}


def _latte_inputs(r: Draw) -> Arguments:
    # as many frames as places at scale 1 would hide which is which: 3 frames of 16 places
    return (r.latent(r.b, 4, 3, 8, 8), r.t_long(), r.randn(r.b, 7, 12)), {"return_dict": False}


def _square_latte_inputs(r: Draw) -> Arguments:
    return (r.latent(r.b, 4, 4, 4, 4), r.t_long(), r.randn(r.b, 7, 12)), {"return_dict": False}


def _cogvideo_inputs(r: Draw) -> Arguments:
    return (r.latent(r.b, 3, 4, 8, 8), r.randn(r.b, 6, 12), r.t_long()), {"return_dict": False}


def _allegro_inputs(r: Draw) -> Arguments:
    places = torch.tensor([(f, y, x) for f in range(3) for y in range(4) for x in range(4)])
    angles = torch.outer(torch.arange(4).float(), 0.5 ** torch.arange(4).float()).repeat(1, 2)
    tables = ((angles.cos(), angles.sin()),) * 3
    mask = torch.ones(r.b, 7)
    return (), {
        "hidden_states": r.latent(r.b, 4, 3, 8, 8),
        "encoder_hidden_states": r.randn(r.b, 7, 12),
        "timestep": r.t_long(),
        "encoder_attention_mask": mask,
        "image_rotary_emb": (tables, tuple(places.T.unsqueeze(1))),
        "return_dict": False,
    }


def _aura_inputs(r: Draw) -> Arguments:
    return (r.latent(r.b, 4, 8 * r.k, 8 * r.k), r.randn(r.b, 9, 24), r.t_sigma()), {"return_dict": False}


def _motion_inputs(r: Draw) -> Arguments:
    # the pipeline repeats the prompt for every frame
    return (r.latent(r.b, 4, 3, 8, 8), r.t_long(), r.randn(3 * r.b, 5, 8)), {"return_dict": False}


def _entry(name: str, target: str, config: dict[str, Any], inputs: Any, kind: str = "transformer") -> Entry:
    return Entry(name, kind, library_model(target, config), inputs, (1,), "diffusers")


TOKENS: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        _entry("latte", "LatteTransformer3DModel", _LATTE, _latte_inputs),
        _entry("square_latte", "LatteTransformer3DModel", {**_LATTE, "sample_size": 4, "video_length": 4},
               _square_latte_inputs),
        _entry("cogvideo", "CogVideoXTransformer3DModel", _COGVIDEO, _cogvideo_inputs),
        _entry("allegro", "AllegroTransformer3DModel", _ALLEGRO, _allegro_inputs),
        _entry("aura", "AuraFlowTransformer2DModel", _AURA, _aura_inputs),
        _entry("motion_unet", "UNetMotionModel", _MOTION, _motion_inputs, "unet"),
    )
}  # fmt: skip
