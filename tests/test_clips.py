"""Clips move as their prompts say."""

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("PIL")

from benchmarks.models.emoji import clips


def disc(radius: float = 0.8) -> Tensor:
    """A black disc on white, [3, 64, 64] in -1 .. 1."""
    places = (torch.arange(64) + 0.5) / 32 - 1
    inside = places[:, None] ** 2 + places**2 < radius**2
    return (1 - 2 * inside.float()).expand(3, 64, 64)


def ink(frames: Tensor) -> Tensor:
    return (1 - frames[:, 0]) / 2


def centres(frames: Tensor) -> np.ndarray:
    """Of the ink of every frame: x and y, from -1 to 1."""
    places = (torch.arange(64) + 0.5) / 32 - 1
    weights = ink(frames)
    x = (weights.sum(dim=1) * places).sum(dim=1) / weights.sum(dim=(1, 2))
    y = (weights.sum(dim=2) * places).sum(dim=1) / weights.sum(dim=(1, 2))
    return torch.stack([x, y], dim=1).numpy()


@pytest.mark.parametrize("motion", clips.MOTIONS)
def test_the_ink_is_where_and_as_large_as_the_pose_says(motion: str):
    frames = clips.clip(disc(), motion)
    assert frames.shape == (clips.FRAMES, 3, 64, 64)
    assert frames.max() <= 1 + 1e-6
    assert frames.min() >= -1 - 1e-6
    poses = [clips.MOTIONS[motion](frame / (clips.FRAMES - 1)) for frame in range(clips.FRAMES)]
    np.testing.assert_allclose(centres(frames), [(pose.x, pose.y) for pose in poses], atol=0.02)
    area = [np.pi * (0.8 * pose.scale * 32) ** 2 for pose in poses]
    np.testing.assert_allclose(ink(frames).sum(dim=(1, 2)), area, rtol=0.02)


def test_a_quarter_turn_is_clockwise():
    right_half = torch.ones(3, 64, 64)
    right_half[:, :, 40:] = -1
    frames = clips.clip(right_half, "turning")
    assert clips.MOTIONS["turning"](2 / 7).angle == pytest.approx(np.pi / 2)
    x, y = centres(frames)[2]
    assert abs(x) < 0.02
    assert y > 0.2  # y points down


def test_captions_held_out_for_pictures_are_held_out_for_clips():
    splits = {motion: clips.split_of("broccoli", motion) for motion in clips.MOTIONS}
    assert set(splits.values()) == {"caption"}
    assert set(clips.split_of("tiger face", motion) for motion in clips.MOTIONS) == {"pair"}
    assert {clips.split_of(f"thing {i}", "rising") for i in range(100)} == {"train", "pair", "caption"}
