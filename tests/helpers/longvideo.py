"""Tiny random models for the tests of long video: one network, one VAE, captions, and comparisons of states."""

from __future__ import annotations

import os
from functools import lru_cache

import torch

from sana_video_core.dit import SanaVideoTransformer
from sana_video_core.specs import WAN21, ModelSpec
from sana_video_core.state import tensors
from sana_video_core.vae.wan import WanVAE

GRID = (4, 6)  # latent height and width; tokens are half of it
CASES = int(os.environ.get("SANA_VIDEO_CASES", "60"))  # random cases per property; 500 for a release


def tiny_spec(**changes) -> ModelSpec:
    sizes = {"name": "tiny-long", "depth": 2, "width": 24, "linear_head_dim": 12, "cross_heads": 2, "ffn_hidden": 32,
             "channels": 4, "patch": (1, 2, 2), "caption_channels": 8, "vae": WAN21, "causal": True} | changes
    return ModelSpec(**sizes)


@lru_cache(maxsize=8)
def tiny_model(seed: int = 0, parity: bool = False, depth: int = 2, channels: int = 4) -> SanaVideoTransformer:
    """A random network whose blocks all matter; never change its weights."""
    model = SanaVideoTransformer(tiny_spec(depth=depth, channels=channels), parity=parity).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        scale = 0.02 if p.ndim < 2 else p[0].numel() ** -0.5
        p.data = torch.randn(p.shape, generator=generator) * scale
        if name.endswith("norm.weight"):
            p.data += 1
        p.requires_grad_(False)
    return model


def caption(seed: int, tokens: int = 5, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """(embedding ``[B, L, 8]``, mask ``[B, L]``)."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(batch, tokens, 8, generator=generator), torch.ones(batch, tokens, dtype=torch.bool)


def latent(frames: int, seed: int = 0, batch: int = 1, channels: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, frames, *GRID, generator=generator)


@lru_cache(maxsize=4)
def tiny_vae(z_dim: int = 4) -> WanVAE:
    """A random Wan VAE of width 4."""
    torch.manual_seed(3)
    vae = WanVAE(dim=4, z_dim=z_dim).eval()
    for p in vae.parameters():
        if p.ndim > 3 and p.numel() > p.shape[0]:
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
        p.requires_grad_(False)
    return vae


def same_state(a, b) -> bool:
    """Every field and every bit."""
    plain = [v for v in a if not isinstance(v, tuple)] == [v for v in b if not isinstance(v, tuple)]
    mine, theirs = tensors(a), tensors(b)
    return plain and len(mine) == len(theirs) and all(
        x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y) for x, y in zip(mine, theirs, strict=True))
