"""Classifier-free guidance, and the bridge from a network (times, captions) to what a solver calls (levels).

A solver knows ``velocity(x, sigma)`` only. ``sigma`` is a 0-d tensor, or ``[F]`` with one level per latent frame.
Guidance runs in float32 whatever the network computes in (model spec 3.4). Not covered: which levels (``schedules.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import SanaVideoError

Velocity = Callable[[Tensor, Tensor], Tensor]
TIME_SCALE = 1000


class Caption(NamedTuple):
    """``embedding [B, L, D]`` and ``mask [B, L]`` (1 = valid, None = all)."""

    embedding: Tensor
    mask: Tensor | None = None


class Pair(NamedTuple):
    """The two halves of a guided call, both float32 like x."""

    negative: Tensor
    positive: Tensor


def guided(negative: Tensor, positive: Tensor, scale: float) -> Tensor:
    """``negative + scale * (positive - negative)`` in float32."""
    negative = negative.float()
    return negative + scale * (positive.float() - negative)


def network_times(sigma: Tensor, batch: int, scale: float = TIME_SCALE) -> Tensor:
    """Level(s) to network times: ``[B]`` for one level, ``[B, F]`` for one a frame."""
    times = torch.as_tensor(sigma, dtype=torch.float32) * scale
    return times.expand(batch) if times.ndim == 0 else times.expand(batch, -1)


def caption_batch(caption: Caption | tuple, batch: int, name: str = "caption") -> Caption:
    """``caption`` with the batch size of the latent: as it is, or one row for all."""
    caption = Caption(*caption)
    rows = caption.embedding.shape[0]
    if rows not in (1, batch):
        raise SanaVideoError(f"The {name} does not fit the number of videos", found=f"{rows} captions", expected=f"1 or {batch}")
    if rows == batch:
        return caption
    mask = None if caption.mask is None else caption.mask.expand(batch, -1)
    return Caption(caption.embedding.expand(batch, -1, -1), mask)


def _joined(negative: Caption, positive: Caption) -> Caption:
    """The batch [negative, positive]; missing masks become all ones when the other half has one."""
    masks = [c.mask for c in (negative, positive)]
    if all(m is None for m in masks):
        return Caption(torch.cat((negative.embedding, positive.embedding)))
    full = [torch.ones(c.embedding.shape[:2], dtype=torch.bool, device=c.embedding.device) if c.mask is None else c.mask.bool()
            for c in (negative, positive)]
    return Caption(torch.cat((negative.embedding, positive.embedding)), torch.cat(full))


def pair_velocity(
    model: Callable, positive: Caption, negative: Caption, *, one_batch: bool = True, scale: float = TIME_SCALE,
) -> Callable:
    """``(x, sigma) -> Pair`` of the network's two answers; ``scale`` takes what the solver asks with to times 0..1000.

    ``one_batch``: one call with the batch [negative, positive] as the official code does; otherwise two calls, for half the
    memory. Two captions of different length always take two calls.
    """
    positive, negative = Caption(*positive), Caption(*negative)
    same_length = negative.embedding.shape[1] == positive.embedding.shape[1]

    def call(x: Tensor, sigma: Tensor) -> Pair:
        batch = x.shape[0]
        halves = [caption_batch(negative, batch, "negative caption"), caption_batch(positive, batch)]
        times = network_times(sigma, batch, scale).to(x.device)
        if one_batch and same_length:
            both = _joined(*halves)
            v = model(torch.cat((x, x)), torch.cat((times, times)), both.embedding, both.mask).to(x.dtype)
            return Pair(*v.chunk(2))
        return Pair(*(model(x, times, c.embedding, c.mask).to(x.dtype) for c in halves))

    return call


def network_velocity(
    model: Callable, positive: Caption, negative: Caption | None = None, cfg: float = 1.0, *, one_batch: bool = True,
    scale: float = TIME_SCALE,
) -> Velocity:
    """``velocity(x, sigma)`` of a network; guided when ``cfg`` is not 1 and there is a negative caption."""
    if negative is not None and cfg != 1:
        pair = pair_velocity(model, positive, negative, one_batch=one_batch, scale=scale)
        return lambda x, sigma: guided(*pair(x, sigma), cfg)
    positive = Caption(*positive)

    def plain(x: Tensor, sigma: Tensor) -> Tensor:
        caption = caption_batch(positive, x.shape[0])
        times = network_times(sigma, x.shape[0], scale).to(x.device)
        return model(x, times, caption.embedding, caption.mask).to(x.dtype)

    return plain


def with_first_frame(velocity: Callable, first_frame: Tensor) -> Callable:
    """``velocity`` for a video whose first latent frame is known: it takes and returns frames 1.. only (model spec 3.7).

    ``first_frame [B, C, 1, H, W]`` is shown to the network at level 0 in every call; any solver can then run on the rest.
    """
    def call(rest: Tensor, sigma: Tensor):
        levels = torch.as_tensor(sigma, dtype=torch.float32, device=rest.device).expand(rest.shape[2])
        levels = torch.cat((levels.new_zeros(1), levels))
        v = velocity(torch.cat((first_frame.to(rest), rest), 2), levels)
        return Pair(*(part[:, :, 1:] for part in v)) if isinstance(v, Pair) else v[:, :, 1:]

    return call
