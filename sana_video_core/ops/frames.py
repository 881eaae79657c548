"""The operators of the video decoder in plain torch: the truth that their faster backends are held to.

Layout: *frames* ``[B, T, H, W, C]`` contiguous (torch's channels_last_3d, without its ambiguity at sizes of one). A *window*
``[B, 2 + T, H + 2, W + 2, C]`` is what a causal 3x3x3 convolution reads: the frames with a border of one zero pixel, and in
front of them room for the two frames before. What lies in the room is no input and may be overwritten: the *history*
``[B, 2, H + 2, W + 2, C]`` is an argument of its own, None where nothing came before (zeros).
Convolution weights are ``[out, (time,) height, width, in]`` contiguous. Source: vae/text spec 1.1, 1.4.
Not covered: the cache (``vae/fused.py``), gradients of the fused backends (``frames_fused.py``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .pairs import frame_sums, narrow, tap_sums

PAST = 2  # frames before its own that a causal convolution sees


def _channels_first(x: Tensor) -> Tensor:
    return x.movedim(-1, 1)


def open_window(x: Tensor, gamma: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """Window of frames ``x (+ residual)``, or of ``SiLU(x / |x| * sqrt(C) * gamma)`` with ``gamma [C]`` (norm over channels)."""
    if residual is not None:
        x = residual + x
    return F.pad(x if gamma is None else _activated(x, gamma), (0, 0, 1, 1, 1, 1, PAST, 0))


def _activated(x: Tensor, gamma: Tensor) -> Tensor:
    return F.silu(F.normalize(x, dim=-1) * (x.shape[-1] ** 0.5 * gamma))


def open_pairs(
    x: Tensor, history: Tensor | None, gamma: Tensor, residual: Tensor | None = None, keep: bool = False,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """What :func:`pair_conv` reads: the sums of frames of ``pairs.py`` for every two outputs, of normed frames with a border.

    T is even. Returns ``total = x + residual`` (None unless ``keep``), ``[B, T / 2, 4, H + 2, W + 2, C]`` of total normed as in
    :func:`open_window` (float16 for bfloat16), and the last two of the normed frames with a border: the next call's history.
    With ``keep`` a backend may write the total into ``x``.
    """
    total = x if residual is None else residual + x
    window = open_window(total, gamma)
    window[:, :PAST] = 0 if history is None else history
    wide = window.float() if x.dtype == torch.bfloat16 else window
    sums = frame_sums(wide, x.shape[1] // 2, 2)
    return total if keep else None, sums.to(narrow(x.dtype)), window[:, -PAST:].contiguous()


def frame_weights(weight: Tensor) -> Tensor:
    """The four sums of the taps in time for :func:`pair_conv`: ``[out, 3, 3, 3, in]`` -> ``[4, out, 3, 3, in]``.

    The last one changes its sign, because an accumulator adds.
    """
    sums = tap_sums(weight)
    sums[3].neg_()
    return sums


def pair_conv(sums: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    """A causal 3x3x3 convolution with a third fewer products, of what :func:`open_pairs` and :func:`frame_weights` made.

    ``[B, T / 2, 4, H + 2, W + 2, C]``, ``[4, C', 3, 3, C]``, bias ``[C']`` in the model's dtype -> ``[B, T, H, W, C']`` in it.
    """
    given = (sums.float(), weights.float()) if sums.dtype == torch.float16 else (sums, weights)
    m0, m1, m2, m3 = (
        F.conv2d(_channels_first(s.flatten(0, 1)), _channels_first(w)).movedim(1, -1)
        for s, w in zip(given[0].unbind(2), given[1]))
    both = torch.stack((m0 + m1 + m2, m1 - m2 + m3), 1) + bias
    return both.unflatten(0, sums.shape[:2]).flatten(1, 2).to(bias.dtype)


def _conv(x: Tensor, history: Tensor | None, room: int, weight: Tensor, bias: Tensor) -> Tensor:
    """3-D convolution without padding over (history, or zeros, and x after its room)."""
    before = x.new_zeros(x.shape[0], PAST, *x.shape[2:]) if history is None else history
    full = torch.cat((before, x[:, room:]), 1)
    return F.conv3d(_channels_first(full), _channels_first(weight), bias)


def causal_step(
    window: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor, residual: Tensor | None = None,
    gamma: Tensor | None = None, keep: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """A causal 3x3x3 convolution, and all that happens before the next one.

    Returns ``total = conv + bias + residual`` ``[B, T, H, W, C']`` (None unless ``keep``) and, when there is a gamma, the
    :func:`open_window` of total with it (None without).
    """
    total = _conv(window, history, PAST, weight, bias).movedim(1, -1)
    if residual is not None:
        total = residual + total
    return total.contiguous() if keep else None, None if gamma is None else open_window(total, gamma)


def time_double(x: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """Twice the frames: a causal convolution over three frames with 2C outputs, halves of which are two frames in turn.

    x ``[B, T, H, W, C]``, history ``[B, 2, H, W, C]`` or None, weight ``[2C, 3, 1, 1, C]`` -> ``[B, 2T, H, W, C]``.
    """
    y = _conv(x, history, 0, weight, bias).movedim(1, -1)
    return y.unflatten(-1, (2, -1)).movedim(-2, 2).flatten(1, 2).contiguous()


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Every frame at twice the size (nearest), then a 3x3 convolution with zero padding: ``[B, T, 2H, 2W, C']``."""
    y = F.interpolate(_channels_first(x.flatten(0, 1)), scale_factor=2.0, mode="nearest-exact")
    y = F.conv2d(y, _channels_first(weight), bias, padding=1)
    return y.movedim(1, -1).unflatten(0, x.shape[:2]).contiguous()


def pixel_conv(window: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """The last causal convolution, with a few outputs: pixels ``[B, out, T, H, W]``, channels first."""
    return _conv(window, history, PAST, weight, bias).contiguous()


def frame_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Single-head softmax attention inside each frame: ``[frames, tokens, C]`` each."""
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
