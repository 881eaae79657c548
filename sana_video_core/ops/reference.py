"""The operators of the network in plain torch: short, exact, with the state as argument and result.

Layout everywhere: tokens ``[B, N, C]`` contiguous, ordered frame, row, column; heads are consecutive channel groups.
Two precisions. ``quality``: sums, denominator and rotation in float32, one rounding at the end. ``parity``: the rounding
of the official half-precision run at every step (model spec 1.13, causal spec 1.3). In float32 they agree to rounding. What
is said to be float32 inside is float64 where the input is: that is the truth which errors are measured against.
Sources: model spec 1.5-1.10, causal spec 1-2. Not covered: fused kernels (the other files of this folder).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ATTENTION_EPS = 1e-8  # of the linear attention's denominator (model spec 1.7)
E4M3_MAX, E4M3_LEAST = 448.0, 1e-30  # the format's largest value; the smallest largest value that a scale is made for


class Contribution(NamedTuple):
    """What one block of frames adds to a layer's attention state.

    ``vk`` ``[B, H, Dv, Dk]``: sum over tokens of v k'^T with rotated keys, value index first; float32 (float64 of float64).
    ``ksum`` ``[B, H, 1, D]``: sum of the un-rotated keys; as ``vk``, or the model dtype in parity mode.
    """

    vk: Tensor
    ksum: Tensor


class Rows(NamedTuple):
    """Rows in E4M3: ``values`` ``[..., C]`` times ``scale``, float32: ``[..., 1]``, or ``[]`` where one serves all."""

    values: Tensor
    scale: Tensor


def _wide(x: Tensor) -> Tensor:
    """x in float32; as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis; float32 inside, also for the product with ``weight`` (model spec 1.5)."""
    y = _wide(x)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else weight.to(y.dtype) * y).to(x.dtype)


def _per_frame(x: Tensor, rows: Tensor) -> Tensor:
    """View ``[B, N, C]`` tokens as ``[B, F, N/F, C]`` for modulation rows ``[B, F, C]`` (F = 1 or latent frames)."""
    return x.unflatten(1, (rows.shape[1], -1))


def modulate_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, *, offset: Tensor | None = None) -> Tensor:
    """LayerNorm without affine, then ``* (1 + scale) + shift``; rows are ``[B, F, C]`` (model spec 1.10).

    ``offset`` ``[B, 1, C]`` is added to x before (``onto.py``)."""
    x = x if offset is None else x + offset
    y = _per_frame(F.layer_norm(x, x.shape[-1:], eps=eps), shift)
    return (y * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, extra: Tensor | None = None) -> Tensor:
    """``x + gate * y``, or ``x + gate * (y + extra)``, with gate rows ``[B, F, C]``."""
    y = y if extra is None else y + extra
    return (_per_frame(x, gate) + gate[:, :, None] * _per_frame(y, gate)).flatten(1, 2)


def residual_norm(x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """``x + y`` and its :func:`modulate_norm`."""
    total = x + y
    return total, modulate_norm(total, shift, scale, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent channel pairs of ``x [B, N, H, D]`` by angles ``[N, D/2]``; in the dtype of the table or of x,
    whichever is wider, result in the dtype of ``x`` (model spec 1.6)."""
    pairs = x.to(torch.promote_types(x.dtype, cos.dtype)).unflatten(-1, (-1, 2))
    a, b = pairs.unbind(-1)
    c, s = cos[:, None], sin[:, None]
    return torch.stack((a * c - b * s, a * s + b * c), -1).flatten(-2).to(x.dtype)


def linear_attention(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, heads: int,
    history: Contribution | None = None, *, parity: bool = False, norm_eps: float = 1e-5, eps: float = ATTENTION_EPS,
    given: Tensor | None = None,
) -> tuple[Tensor | Rows, Contribution]:
    """ReLU linear attention with rotary numerator over one block of frames (model spec 1.7, causal spec 1.1).

    qkv ``[B, N, 3C]`` (thirds q, k, v); q/k RMSNorm weights ``[C]`` act over all channels; cos/sin ``[N, D/2]``.
    ``history`` is the sum of the earlier blocks' contributions. Returns ``[B, N, C]`` in the dtype of qkv and this block's
    own contribution (without history). Inside the block every token sees every token. ``given``: see :func:`given_fp8`.
    """
    dtype = qkv.dtype
    q, k, v = qkv.chunk(3, -1)
    if not parity:
        q, k, v = _wide(q), _wide(k), _wide(v)
    q = F.relu(rms_norm(q, q_weight, norm_eps)).unflatten(-1, (heads, -1))
    k = F.relu(rms_norm(k, k_weight, norm_eps)).unflatten(-1, (heads, -1))
    v = v.unflatten(-1, (heads, -1))
    q_rot, k_rot = _wide(rotate(q, cos, sin)), _wide(rotate(k, cos, sin))
    own = Contribution(_wide(v).permute(0, 2, 3, 1) @ k_rot.permute(0, 2, 1, 3), k.permute(0, 2, 1, 3).sum(-2, True))
    vk, ksum = own
    if history is not None:
        vk, ksum = vk + history.vk, ksum + history.ksum
    if parity:  # the official shapes [D, D] x [D, N]: the other order of the same products rounds differently
        out = vk @ q_rot.permute(0, 2, 3, 1)
        z = 1 / (ksum @ q.permute(0, 2, 3, 1) + eps)
        return _at((out * z).permute(0, 3, 1, 2).flatten(2).to(dtype), given), own
    out = q_rot.permute(0, 2, 1, 3) @ vk.transpose(-1, -2)
    z = 1 / (q.permute(0, 2, 1, 3) @ ksum.transpose(-1, -2) + eps)
    return _at((out * z).permute(0, 2, 1, 3).flatten(2).to(dtype), given), own


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, lengths: tuple[int, ...] | None = None,
    norm: tuple[Tensor, float] | None = None, *, given: Tensor | None = None,
) -> Tensor | Rows:
    """Cross attention of ``q [B, N, C]`` over text ``k, v [B, L, C]``; ``mask [B, L]`` True = valid (model spec 1.8).

    ``lengths``: how many leading text tokens of each row are valid, where the caller knows. Leaving the others out is the
    same as masking them, and keeps torch's attention without a mask available. ``norm``: weight and eps of an RMSNorm over
    all channels of q that comes first. ``given``: see :func:`given_fp8`.
    """
    if given is not None:
        return given_fp8(softmax_attention(q, k, v, heads, mask, lengths, norm), given)
    if norm is not None:
        q = rms_norm(q, *norm)
    if lengths is not None:
        if len(set(lengths)) > 1:
            return torch.cat([softmax_attention(q[i:i + 1], k[i:i + 1], v[i:i + 1], heads, None, (n,))
                              for i, n in enumerate(lengths)])
        k, v, mask = k[:, :lengths[0]], v[:, :lengths[0]], None
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    bias = None if mask is None else mask[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)


def gated_depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, grid: tuple[int, int], overwrite: bool = False, out: Tensor | None = None,
    *, given: Tensor | None = None,
) -> Tensor | Rows:
    """SiLU, depthwise 3x3 with zero padding on every frame, then ``a * SiLU(g)`` of the two halves (model spec 1.9).

    x ``[B', N, 2E]`` with N a multiple of ``h*w`` -> ``[B', N, E]``; weight ``[2E, 1, 3, 3]``. ``overwrite``: the caller
    does not need x again, so its memory may be used. ``out``: where the result goes, of its shape and contiguous. ``given``:
    see :func:`given_fp8`; out is then in E4M3.
    """
    if given is not None:
        values = given_fp8(gated_depthwise(x, weight, bias, grid, overwrite), given).values
        return Rows(values if out is None else out.copy_(values), given)
    batch, tokens, channels = x.shape
    frames = F.silu(x, inplace=overwrite).reshape(-1, *grid, channels).permute(0, 3, 1, 2)  # a channels-last view, no copy
    frames = F.conv2d(frames, weight, bias, padding=1, groups=channels)
    a, g = frames.permute(0, 2, 3, 1).reshape(batch, tokens, channels).chunk(2, -1)
    return torch.mul(a, F.silu(g), out=out)


def scaled_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x / scale`` in E4M3 and its float32 scale ``[]``, one for all of x: the largest value becomes the format's largest.

    A NaN makes the scale NaN and an infinite value makes it infinite, and every product with it NaN.
    """
    return _e4m3(x.float(), x.abs().amax().float())


def row_fp8(x: Tensor) -> Rows:
    """As :func:`scaled_fp8` with a scale for each row, ``[..., 1]``."""
    return Rows(*_e4m3(x.float(), x.abs().amax(-1, keepdim=True).float()))


def given_fp8(x: Tensor, given: Tensor) -> Rows:
    """As :func:`scaled_fp8` with the scale ``given []`` that a calibration has found; what lies beyond the format is cut."""
    return Rows((x.float() * given.reciprocal()).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), given)


def _at(x: Tensor, given: Tensor | None) -> Tensor | Rows:
    """How operators that take ``given`` end: :func:`given_fp8`, without a scale x as it is."""
    return x if given is None else given_fp8(x, given)


def _e4m3(x: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Products only, which round the same everywhere: torch divides by a number in another way on a card than on a CPU."""
    scale, inverse = e4m3_scale(largest)
    return (x * inverse).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def e4m3_scale(largest: Tensor) -> tuple[Tensor, Tensor]:
    """The scale that goes with a largest size, and its inverse; float32."""
    largest = largest.clamp(min=E4M3_LEAST)
    return largest * (1 / E4M3_MAX), largest.reciprocal() * E4M3_MAX


def temporal_taps(u: Tensor, frames: int, tail: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Gather each token's three neighbours in time for the 3-tap temporal convolution (causal spec 2).

    u ``[B, T*S, C]`` -> ``[B, T*S, 3C]`` (previous | same | next frame) and this block's own tail ``[B, 1, S, C]``.
    Left of the first frame stands ``tail`` of the block before (zeros when None), right of the last frame zeros.
    """
    x = u.unflatten(1, (frames, -1))
    left = torch.zeros_like(x[:, :1]) if tail is None else tail.to(x)
    taps = torch.cat((torch.cat((left, x[:, :-1]), 1), x, torch.cat((x[:, 1:], torch.zeros_like(left)), 1)), -1)
    return taps.flatten(1, 2), x[:, -1:]


def _rows(x: Tensor, given: Tensor | None = None) -> Rows:
    """:func:`row_fp8`, or :func:`given_fp8` a scale that is given."""
    return row_fp8(x) if given is None else given_fp8(x, given)


def modulate_norm_fp8(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, *, given: Tensor | None = None) -> Rows:
    """:func:`modulate_norm` as the :class:`Rows` that a product reads."""
    return _rows(modulate_norm(x, shift, scale, eps), given)


def residual_norm_fp8(
    x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, *, given: Tensor | None = None,
) -> tuple[Tensor, Rows]:
    """:func:`residual_norm` with the norm as :class:`Rows`."""
    total, normed = residual_norm(x, y, shift, scale, eps)
    return total, _rows(normed, given)


def gated_residual_fp8(x: Tensor, y: Tensor, gate: Tensor, *, given: Tensor) -> tuple[Tensor, Rows]:
    """:func:`gated_residual`, and the same as :class:`Rows`."""
    total = gated_residual(x, y, gate)
    return total, given_fp8(total, given)


def temporal_taps_fp8(
    u: Tensor, frames: int, tail: Tensor | None = None, *, given: Tensor | None = None,
) -> tuple[Rows, Tensor]:
    """:func:`temporal_taps` with the taps as :class:`Rows`."""
    taps, own_tail = temporal_taps(u, frames, tail)
    return _rows(taps, given), own_tail
