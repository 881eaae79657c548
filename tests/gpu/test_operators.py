"""The fused operators on a CUDA device against float32 truth, on random awkward shapes (``-m gpu``)."""

from __future__ import annotations

import random

import pytest
import torch

from sana_video_core import SPECS, ops
from sana_video_core.dit import SanaVideoTransformer
from sana_video_core.dit.embeddings import rope_table
from sana_video_core.ops import fused, reference

pytestmark = pytest.mark.gpu
CASES = 24
TOLERANCE = 2.0  # times the error of plain torch in bfloat16


def relative(found, expected) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def noise(generator, *shape, scale=1.0):
    return (torch.randn(shape, generator=generator, device="cuda") * scale).bfloat16()


def wide(args):
    return tuple(a.float() if isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 else a for a in args)


def first(value):
    return value[0] if isinstance(value, tuple) else value


def close_enough(ours, truth, args) -> None:
    """Our error is at most twice that of the same plain torch function in bfloat16, and three calls give the same bits."""
    expected, found = first(truth(*wide(args))), first(ours(*args))
    plain = relative(first(truth(*args)), expected)
    assert torch.isfinite(found).all()
    assert relative(found, expected) <= TOLERANCE * max(plain, 1e-3)
    for _ in range(3):
        assert torch.equal(first(ours(*args)), found)


def draw(seed: int):
    """(generator, batch, frames, height, width, heads, head dim) of a case."""
    pick = random.Random(seed)
    return (torch.Generator("cuda").manual_seed(seed), pick.randint(1, 4), pick.randint(1, 9), pick.randint(1, 17),
            pick.randint(1, 70), pick.randint(1, 5), pick.choice((16, 32, 48, 64, 112, 128)))


@pytest.mark.parametrize("seed", range(CASES))
def test_linear_attention(seed):
    g, batch, frames, height, width, heads, dim = draw(seed)
    tokens, channels = frames * height * width, heads * dim
    weights = [noise(g, channels, scale=0.1) + 1 for _ in range(2)]
    sums = (torch.rand(batch, heads, *shape, generator=g, device="cuda") for shape in ((dim, dim), (1, dim)))
    history = None if seed % 2 else ops.Contribution(*sums)
    args = (noise(g, batch, tokens, 3 * channels), *weights, *rope_table(frames, height, width, dim, start=seed, device="cuda"),
            heads, history)
    close_enough(fused.linear_attention, reference.linear_attention, args)
    ours, truth = fused.linear_attention(*args)[1], reference.linear_attention(*wide(args))[1]
    assert relative(ours.vk, truth.vk) < 4e-3 and relative(ours.ksum, truth.ksum) < 1e-5
    assert ours.vk.shape == truth.vk.shape and ours.ksum.shape == truth.ksum.shape


@pytest.mark.parametrize("seed", range(CASES))
def test_streaming_operators(seed):
    g, batch, frames, height, width, heads, dim = draw(seed)
    tokens, channels = frames * height * width, heads * dim
    x, y = noise(g, batch, tokens, channels), noise(g, batch, tokens, channels)
    shift, scale, gate = noise(g, batch, frames if seed % 2 else 1, 6, channels).unbind(2)[:3]
    close_enough(fused.modulate_norm, reference.modulate_norm, (x, shift, scale))
    close_enough(fused.gated_residual, reference.gated_residual, (x, y, gate))
    close_enough(fused.rms_norm, reference.rms_norm, (x, noise(g, channels, scale=0.1) + 1, 1e-6))
    tail = None if seed % 2 else noise(g, batch, 1, height * width, channels)
    assert torch.equal(fused.temporal_taps(x, frames, tail)[0], reference.temporal_taps(x, frames, tail)[0])


@pytest.mark.parametrize("seed", range(CASES))
def test_gated_depthwise(seed):
    g, batch, frames, height, width, heads, dim = draw(seed)
    hidden = 8 * heads + dim
    x = noise(g, batch, frames * height * width, 2 * hidden)
    bias = None if seed % 3 == 0 else noise(g, 2 * hidden)
    close_enough(fused.gated_depthwise, reference.gated_depthwise,
                 (x, noise(g, 2 * hidden, 1, 3, 3, scale=0.3), bias, (height, width)))


@pytest.mark.parametrize("batch", [1, 2])
def test_network_chooses_the_fused_operators_and_stays_close(batch):
    spec = SPECS["sana-video-mini"]
    torch.manual_seed(batch)
    exact = SanaVideoTransformer(spec, device="cuda").eval()
    for p in exact.parameters():
        p.data.copy_(torch.randn_like(p) * (0.3 if p.ndim < 2 else p[0].numel() ** -0.5))
    half = SanaVideoTransformer(spec, device="cuda", dtype=torch.bfloat16).eval()
    half.load_state_dict(exact.state_dict())
    exact.load_state_dict({k: t.float() for k, t in half.state_dict().items()})
    latent = torch.randn(batch, 16, 5, 12, 20, device="cuda").bfloat16()
    caption = torch.randn(batch, 300, spec.caption_channels, device="cuda").bfloat16()
    mask = (torch.arange(300, device="cuda") < torch.tensor([[90], [7]], device="cuda")[:batch]).long()
    times = torch.full((batch,), 500.0, device="cuda")
    with torch.inference_mode():
        truth = exact(latent.float(), times, caption.float(), mask)
        name, _, _ = ops.gated_depthwise.choose(torch.zeros(1, 4, 8, device="cuda").bfloat16(), None, None, (2, 2))
        assert name == "triton"
        found = half(latent, times, caption, mask)
        with ops.force("reference"):
            plain = half(latent, times, caption, mask)
    assert relative(found, truth) <= TOLERANCE * relative(plain, truth)


def test_training_uses_functions_with_a_gradient():
    spec = SPECS["sana-video-mini"]
    model = SanaVideoTransformer(spec, device="cuda", dtype=torch.bfloat16)
    latent = torch.randn(1, 16, 2, 4, 4, device="cuda").bfloat16()
    caption = torch.randn(1, 300, spec.caption_channels, device="cuda").bfloat16()
    for p in model.parameters():
        p.data.normal_(0, 0.1)
    model(latent, torch.tensor([300.0], device="cuda"), caption).float().square().mean().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "y_embedding" not in name)
