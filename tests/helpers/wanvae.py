"""Wan VAEs with random weights that keep the size of what goes through them."""

from __future__ import annotations

import torch

from sana_video_core.vae.wan import WanVAE


def random_vae(dim: int = 16, seed: int = 0) -> WanVAE:
    """In evaluation mode, float32 on the CPU, without gradients."""
    generator = torch.Generator().manual_seed(seed)
    vae = WanVAE(dim).eval().requires_grad_(False)
    for name, p in vae.named_parameters():
        scale = p[0].numel() ** -0.5 if p.ndim > 1 and "gamma" not in name else 0.2
        p.copy_(torch.randn(p.shape, generator=generator) * scale + ("gamma" in name))
    return vae


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Size of the difference over the size of ``expected``."""
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).norm() / expected.double().norm())
