"""The table of public SANA-Video models, one frozen row each. Facts: shared spec, model.md 1.1, 2.4, 3.8 and causal.md 6.

A new family member is one row here plus, at most, one new block class. Nothing here touches tensors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from .errors import SanaVideoError


@dataclass(frozen=True)
class VaeSpec:
    """Geometry of a latent space. ``stride`` is pixels per latent along (time, height, width)."""

    name: str
    channels: int
    stride: tuple[int, int, int]
    file_hint: str


WAN21 = VaeSpec("wan2.1", 16, (4, 8, 8), "wan_2.1_vae.safetensors or Wan2.1_VAE.pth (models/vae)")
LTX2 = VaeSpec("ltx-2", 128, (8, 32, 32), "the LTX-2 video VAE (models/vae)")
LTX23 = VaeSpec("ltx-2.3", 128, (8, 32, 32), "the LTX-2.3 video VAE (models/vae)")


@dataclass(frozen=True)
class ModelSpec:
    """Everything about a model that is not a weight.

    Sizes are in channels, ``patch`` is (time, height, width) latents per token, ``size`` is (width, height) in pixels,
    ``frames`` counts pixel frames. ``causal`` selects block-causal use (LongSANA); the weights' names do not tell.
    """

    name: str
    depth: int
    width: int
    linear_head_dim: int
    cross_heads: int
    ffn_hidden: int
    channels: int
    patch: tuple[int, int, int]
    caption_channels: int
    vae: VaeSpec
    caption_tokens: int = 300
    causal: bool = False
    hybrid: bool = False  # SANA-Video 2.0: softmax anchors, attention residuals
    size: tuple[int, int] = (832, 480)
    frames: int = 81
    fps: int = 16
    flow_shift: float = 8.0
    cfg: float = 6.0
    steps: int = 50
    block_frames: int = 10  # latent frames a block (causal use); the first block takes the remainder too
    motion_score: int = 10

    def __post_init__(self):
        if self.width % self.linear_head_dim:
            raise SanaVideoError(f"{self.name}: width {self.width} is not a multiple of head dim {self.linear_head_dim}")
        if self.width % self.cross_heads:
            raise SanaVideoError(f"{self.name}: width {self.width} is not a multiple of {self.cross_heads} cross heads")
        if self.linear_head_dim % 2:
            raise SanaVideoError(f"{self.name}: rotary embedding needs an even head dim, got {self.linear_head_dim}")

    @property
    def linear_heads(self) -> int:
        return self.width // self.linear_head_dim

    @property
    def pixel_step(self) -> tuple[int, int]:
        """Smallest step of (width, height) in pixels: VAE stride times patch."""
        return self.vae.stride[2] * self.patch[2], self.vae.stride[1] * self.patch[1]

    def latent_frames(self, frames: int) -> int:
        """Latent frames of ``frames`` pixel frames (``frames`` must be 1 + k * time stride)."""
        return (frames - 1) // self.vae.stride[0] + 1

    def pixel_frames(self, latent_frames: int) -> int:
        return (latent_frames - 1) * self.vae.stride[0] + 1


_2B_480P = ModelSpec(
    name="sana-video-2b-480p", depth=20, width=2240, linear_head_dim=112, cross_heads=20, ffn_hidden=6720,
    channels=16, patch=(1, 2, 2), caption_channels=2304, vae=WAN21,
)
_2B_720P = replace(_2B_480P, name="sana-video-2b-720p", channels=128, patch=(1, 1, 1), vae=LTX2, size=(1280, 704))
_LONGSANA = replace(_2B_480P, name="longsana-2b-480p", causal=True, flow_shift=7.0, cfg=1.0, steps=4)
_V2_5B = ModelSpec(
    name="sana-video-2.0-5b-720p", depth=32, width=2560, linear_head_dim=128, cross_heads=20, ffn_hidden=10240,
    channels=128, patch=(1, 1, 1), caption_channels=2304, vae=LTX23, hybrid=True, size=(1280, 736), frames=193,
    fps=24, flow_shift=12.0, cfg=8.0, motion_score=20,
)
# Our own small model: the same classes, files and latent space geometry (design 4).
_MINI = ModelSpec(
    name="sana-video-mini", depth=10, width=128, linear_head_dim=32, cross_heads=4, ffn_hidden=384,
    channels=16, patch=(1, 2, 2), caption_channels=128, vae=WAN21, size=(160, 96), frames=81,
    flow_shift=3.0, cfg=3.0, steps=20,
)
# Distilled to four steps without guidance on its own films (train/distill.py).
_MINI_LONG = replace(_MINI, name="sana-video-mini-long", causal=True, flow_shift=6.0, steps=4, cfg=1.0)

SPECS: dict[str, ModelSpec] = {s.name: s for s in (_2B_480P, _2B_720P, _LONGSANA, _V2_5B, _MINI, _MINI_LONG)}


def get_spec(name: str) -> ModelSpec:
    """The spec of that name; the error lists the known names."""
    try:
        return SPECS[name]
    except KeyError:
        raise SanaVideoError("Unknown model spec", found=name, expected=", ".join(SPECS)) from None


def require_frames(spec: ModelSpec, frames: int) -> int:
    """``frames`` if it is 1 + k * stride, else an error that names the nearest valid values."""
    stride = spec.vae.stride[0]
    if not isinstance(frames, int) or isinstance(frames, bool) or frames < 1 or (frames - 1) % stride:
        low = 1 if not isinstance(frames, int) or frames < 1 else 1 + (frames - 1) // stride * stride
        raise SanaVideoError(
            f"{spec.name} cannot make a clip of {frames} frames", expected=f"1 + {stride}k frames",
            action=f"Use {low} or {low + stride}",
        )
    return frames


def require_size(spec: ModelSpec, width: int, height: int) -> tuple[int, int]:
    """(width, height) if both are positive multiples of the pixel step, else an error with the nearest valid size."""
    steps = spec.pixel_step
    near = tuple(max(step, round(value / step) * step) if value == value and abs(value) < 1e9 else step
                 for value, step in zip((width, height), steps))
    if (width, height) != near:
        raise SanaVideoError(
            f"{spec.name} cannot make a video of {width}x{height}",
            expected=f"width a multiple of {steps[0]} and height a multiple of {steps[1]}",
            action=f"Use {near[0]}x{near[1]}",
        )
    return width, height


def safe_name(name: str) -> str:
    """``name`` reduced to letters, digits, dash, dot and underscore (for file names)."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "unnamed"
