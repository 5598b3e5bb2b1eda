"""Short clips of emoji that move in known ways: the data of the video model."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.models.emoji import data

FRAMES = 8
STYLE = "fluent 3d"


@dataclass(frozen=True)
class Pose:
    """Where and how large the picture stands: the frame reaches from -1 to 1, y points down, angles in radians."""

    scale: float = 0.65
    x: float = 0.0
    y: float = 0.0
    angle: float = 0.0


MOTIONS: dict[str, Callable[[float], Pose]] = {  # of time, from 0 to 1
    "moving right": lambda t: Pose(x=0.64 * t - 0.32),
    "moving left": lambda t: Pose(x=0.32 - 0.64 * t),
    "rising": lambda t: Pose(y=0.32 - 0.64 * t),
    "falling": lambda t: Pose(y=0.64 * t - 0.32),
    "growing": lambda t: Pose(scale=0.35 + 0.55 * t),
    "shrinking": lambda t: Pose(scale=0.9 - 0.55 * t),
    "turning": lambda t: Pose(angle=2 * math.pi * t * (FRAMES - 1) / FRAMES),
    "bouncing": lambda t: Pose(scale=0.6, y=0.38 - 0.7 * abs(math.sin(2 * math.pi * t))),
}


def clip(picture: Tensor, motion: str) -> Tensor:
    """Frames [8, 3, 64, 64] of a picture [3, 64, 64] on white, both in -1 .. 1."""
    poses = [MOTIONS[motion](frame / (FRAMES - 1)) for frame in range(FRAMES)]
    # The sampling grid goes from places in the frame to places in the picture, so it undoes the pose.
    undo = [
        [
            [math.cos(p.angle) / p.scale, math.sin(p.angle) / p.scale, 0.0],
            [-math.sin(p.angle) / p.scale, math.cos(p.angle) / p.scale, 0.0],
        ]
        for p in poses
    ]
    matrices = torch.tensor(undo)
    offsets = torch.tensor([[p.x, p.y] for p in poses])
    matrices[:, :, 2] = -(matrices[:, :, :2] @ offsets[:, :, None])[:, :, 0]
    shape = [FRAMES, *picture.shape]
    grid = F.affine_grid(matrices, shape, align_corners=False)
    ink = F.grid_sample(1 - picture.expand(shape), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return 1 - ink


def prompt(caption: str, motion: str) -> str:
    """How a clip is asked for: "red apple, bouncing"."""
    return f"{caption}, {motion}"


def split_of(caption: str, motion: str) -> str:
    """As for pictures: captions held out there are held out here, and a tenth of the (caption, motion) pairs."""
    if data.split_of(caption, STYLE) != "train":
        return data.split_of(caption, STYLE)
    return "pair" if data.chance(caption + "|" + motion) < data.HELD_OUT_PAIRS else "train"
