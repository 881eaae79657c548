"""The reference operators in float64, the truth that errors are measured against: nothing in them is rounded to less."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from kernelcases import flat

from sana_video_core import ops
from sana_video_core.dit.embeddings import rope_table
from sana_video_core.ops import onto_fp8, reference

BATCH, FRAMES, HEIGHT, WIDTH, HEADS, DIM = 2, 3, 2, 5, 2, 6
SIZE, CHANNELS = HEIGHT * WIDTH, HEADS * DIM
TOKENS = FRAMES * SIZE


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def normed(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def heads_of(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def linear_attention(qkv, q_weight, k_weight, cos, sin, _, past=None):
    """By the matrix of all tokens, turned as complex numbers."""
    q, k, v = qkv.chunk(3, -1)
    q, k = heads_of(normed(q, q_weight, 1e-5).clamp(min=0)), heads_of(normed(k, k_weight, 1e-5).clamp(min=0))
    v, turns = heads_of(v), torch.complex(cos.double(), sin.double())
    pairs = (torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous()) for t in (q, k))
    turned = [torch.view_as_real(t * turns).flatten(-2) for t in pairs]
    own = v.mT @ turned[1], k.sum(-2, True)
    vk, ksum = (0 * own[0], 0 * own[1]) if past is None else past
    above = turned[0] @ turned[1].mT @ v + turned[0] @ vk.double().mT
    return (above / ((q * (ksum + own[1])).sum(-1, True) + 1e-8)).transpose(1, 2).flatten(2), *own


def softmax_attention(q, k, v, _, mask, lengths, norm):
    q, k, v = heads_of(normed(q, *norm)), heads_of(k), heads_of(v)
    rows = [((q[i] @ k[i, :, :n].mT) / math.sqrt(DIM)).softmax(-1) @ v[i, :, :n] for i, n in enumerate(lengths)]
    return (torch.stack(rows).transpose(1, 2).flatten(2),)


def modulate_norm(x, shift, scale):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    return (x * (1 + scale.repeat_interleave(SIZE, 1)) + shift.repeat_interleave(SIZE, 1),)


def gated_depthwise(x, weight, bias, grid):
    x = F.pad((x * x.sigmoid()).unflatten(1, (FRAMES, *grid)), (0, 0, 1, 1, 1, 1))
    taps = [x[:, :, i:i + grid[0], j:j + grid[1]] * weight[:, 0, i, j] for i in range(3) for j in range(3)]
    a, g = (sum(taps) + bias).flatten(1, 3).chunk(2, -1)
    return (a * g * g.sigmoid(),)


def temporal_taps(u, frames, tail):
    whole = torch.cat((tail.flatten(1, 2), u, 0 * tail.flatten(1, 2)), 1)
    return torch.cat([whole[:, i * SIZE:i * SIZE + TOKENS] for i in range(3)], -1), u[:, None, -SIZE:]


X, ROWS = noise(BATCH, TOKENS, CHANNELS), noise(BATCH, FRAMES, CHANNELS)
TEXT, WEIGHT = noise(BATCH, 7, CHANNELS), noise(CHANNELS)
TABLE = rope_table(FRAMES, HEIGHT, WIDTH, DIM)  # this and what is past are float32
ATTENTION = noise(BATCH, TOKENS, 3 * CHANNELS), WEIGHT + 1, WEIGHT - 1, *TABLE, HEADS
PAST = ops.Contribution(noise(BATCH, HEADS, DIM, DIM).float(), noise(BATCH, HEADS, 1, DIM).float().abs())
CASES = {
    "rms_norm": (lambda *args: (normed(*args),), (X, WEIGHT, 1e-6)),
    "modulate_norm": (modulate_norm, (X, ROWS, ROWS.flip(1))),
    "gated_residual": (lambda x, y, gate: (x + gate.repeat_interleave(SIZE, 1) * y,), (X, X.flip(1), ROWS)),
    "linear_attention": (linear_attention, ATTENTION),
    "linear_attention, history": (linear_attention, (*ATTENTION, PAST)),
    "softmax_attention": (softmax_attention, (X, TEXT, TEXT.flip(1), HEADS, None, (4, 7), (WEIGHT, 1e-6))),
    "gated_depthwise": (gated_depthwise, (X, noise(CHANNELS, 1, 3, 3), WEIGHT, (HEIGHT, WIDTH))),
    "temporal_taps": (temporal_taps, (X, FRAMES, noise(BATCH, 1, SIZE, CHANNELS))),
}


@pytest.mark.parametrize("name", CASES)
def test_float64_stays_float64(name):
    by_hand, args = CASES[name]
    found, expected = flat(getattr(reference, name.split(",")[0])(*args)), by_hand(*args)
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # the dtype too


@pytest.mark.parametrize("frames", [0, FRAMES])
def test_products_of_e4m3_are_summed_in_float64(frames):
    scale = torch.tensor(0.011)
    y = onto_fp8.framed_fp8(X, frames, given=scale) if frames else reference.row_fp8(X)
    weight, gate = ops.Rows(*reference.scaled_fp8(noise(CHANNELS, (3 if frames else 1) * CHANNELS))), ROWS[:, :1]
    values = y.values.double() * y.scale.double()
    if frames:
        padded = values.unflatten(0, (BATCH, -1))
        values = torch.cat([padded[:, i * SIZE:i * SIZE + TOKENS] for i in range(3)], -1)
    expected = X + gate * (values @ (weight.values.double() * weight.scale.double()).mT + WEIGHT)
    torch.testing.assert_close(onto_fp8.add_product_fp8(X.clone(), y, weight, WEIGHT, gate, frames=frames), expected,
                               rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_are_summed_in_float32(dtype):
    qkv, *others = ATTENTION
    out, own = reference.linear_attention(qkv.to(dtype), *others)
    assert out.dtype == dtype and own.vk.dtype == own.ksum.dtype == torch.float32
    assert reference.rms_norm(X.to(dtype), others[0], 1e-6).dtype == dtype
