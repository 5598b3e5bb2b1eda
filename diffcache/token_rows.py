"""Taking the rows of selected tokens out of a tensor and putting them back, with token numbers for each sample.

Token numbers are int64 [batch, k]. An ``axis`` holds the tokens; ``samples = (axis, each)`` says which axis holds the
samples and how many of its entries in a row belong to one (heads folded into the batch). Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def take_rows(
    value: torch.Tensor, tokens: torch.Tensor, axis: int, samples: tuple[int, int] = (0, 1), rank: int | None = None
) -> torch.Tensor:
    """The rows of the selected tokens; dense memory keeps its order of axes, so that kernels see what they would see.

    A table without samples (``value`` of size one there, or of lower ``rank`` than what it is broadcast to) gets them.
    """
    if rank is not None and rank > value.dim():
        value = value.reshape((1,) * (rank - value.dim()) + tuple(value.shape))
    strides = value.stride()
    order = sorted(range(value.dim()), key=lambda a: (-strides[a], a))
    if value.shape[samples[0]] == 1 and tokens.shape[0] * samples[1] > 1:
        shape = list(value.shape)
        shape[samples[0]] = tokens.shape[0] * samples[1]
        value = value.expand(shape)
        order = list(range(value.dim()))
    index = _index(tokens, value, axis, samples)
    if order == list(range(value.dim())):
        return value.gather(axis, index)
    rows = value.permute(order).gather(order.index(axis), index.permute(order))
    return rows.permute([order.index(a) for a in range(value.dim())])


def put_rows(
    kept: torch.Tensor, tokens: torch.Tensor, rows: torch.Tensor, axis: int, samples: tuple[int, int] = (0, 1)
) -> torch.Tensor:
    """``kept`` with the rows of the selected tokens replaced; a new tensor."""
    return kept.scatter(axis, _index(tokens, kept, axis, samples), rows)


def joint_tokens(parts: Sequence[torch.Tensor | None], lengths: Sequence[int]) -> torch.Tensor:
    """Token numbers in a sequence of streams end to end; None stands for all tokens of a stream.

    ``lengths`` are the streams' full lengths. At least one part is given.
    """
    given = next(part for part in parts if part is not None)
    offset, found = 0, []
    for part, length in zip(parts, lengths, strict=True):
        if part is None:
            every = torch.arange(offset, offset + length, device=given.device, dtype=given.dtype)
            part = every.expand(given.shape[0], length)
        else:
            part = part + offset
        found.append(part)
        offset += length
    return torch.cat(found, dim=1)


def blend_clusters(
    kept: torch.Tensor, tokens: torch.Tensor, rows: torch.Tensor, clusters: torch.Tensor, gamma: float, count: int
) -> torch.Tensor:
    """Every token moves towards what is fresh in its cluster: ``gamma * mean(fresh) + (1 - gamma) * kept``.

    ClusCa (Zheng et al. 2025). ``kept`` [batch, tokens, channels] has the fresh ``rows`` [batch, k, channels] in it;
    they stay as they are. ``clusters`` [batch, tokens] are numbers below ``count``; a cluster without a fresh token
    keeps what it has.
    """
    names = torch.arange(count, device=clusters.device)
    fresh = (clusters.gather(1, tokens)[:, None] == names[:, None]).to(rows.dtype)  # [batch, count, k]
    size = fresh.sum(-1, keepdim=True)
    means = (fresh @ rows) / size.clamp(min=1)
    wide = clusters[..., None].expand(kept.shape)
    near = means.gather(1, wide)
    moved = torch.where(size.expand(means.shape).gather(1, wide) > 0, gamma * near + (1 - gamma) * kept, kept)
    return put_rows(moved, tokens, rows, 1)


def _index(tokens: torch.Tensor, value: torch.Tensor, axis: int, samples: tuple[int, int]) -> torch.Tensor:
    """Token numbers in the shape of the rows to take from ``value`` or to put into it."""
    at, each = samples
    if each > 1:
        tokens = tokens.repeat_interleave(each, 0)
    shape = [1] * value.dim()
    shape[at], shape[axis] = tokens.shape
    wide = list(value.shape)
    wide[axis] = tokens.shape[1]
    if at > axis:  # the view below needs the samples before the tokens
        tokens = tokens.t().contiguous()
    return tokens.reshape(shape).expand(wide)
