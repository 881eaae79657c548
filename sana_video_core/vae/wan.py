"""The Wan 2.1 video VAE of any width, with an explicit streaming cache (vae/text spec 1; stride 4, 8, 8).

One set of weights, two ways to run it. *Streaming* goes through time in the causal order with a :class:`WanCache`: one latent
frame at a time, so every partition of a video gives the same bits. *Parallel* (``encode_parallel``, ``decode_parallel``) does a
whole clip at once, differentiable, for training; it is the same function up to rounding. Names are the official ones, so
one file serves ComfyUI and the core. Latents here are raw; :func:`normalize` takes them to the DiT's space. On a CUDA card in
bfloat16 streaming decode can be ``vae/fused.py``'s: the same function, rounded less often.
Not covered: loading (``vae/loading.py``), tiling.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SanaVideoError
from .fused import stream_latents

WAN21_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
              0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
WAN21_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
             3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
TEMPORAL_STRIDE = 4
# The decoder's memory of the past ends after this many latent frames: a cache rebuilt from them is exact (spec 1.5).
DECODER_MEMORY = 38


def _statistics(latent: Tensor) -> tuple[Tensor, Tensor]:
    return _statistics_on(latent.device, latent.dtype)


@functools.lru_cache(maxsize=8)
def _statistics_on(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Kept, because making them on a card waits for it."""
    with torch.inference_mode(False):
        return tuple(torch.tensor(v, device=device, dtype=dtype).view(1, -1, 1, 1, 1) for v in (WAN21_MEAN, WAN21_STD))


def normalize(latent: Tensor) -> Tensor:
    """Raw VAE latent ``[B, 16, T, H, W]`` to the DiT's space."""
    mean, std = _statistics(latent)
    return (latent - mean) / std


def denormalize(latent: Tensor) -> Tensor:
    """DiT-space latent ``[B, 16, T, H, W]`` to a raw VAE latent."""
    mean, std = _statistics(latent)
    return latent * std + mean


class WanCache:
    """What a coder remembers of the frames before: one slot a causal convolution, in call order.

    A slot is None (nothing seen), :data:`SEEN` (a temporal up-step that has let the first frame pass) or a tensor of the last
    one or two input frames. ``decoder`` is a faster form of the network that a backend made for this video, None without.
    Belongs to one video; never shared.
    """

    SEEN = "seen"

    def __init__(self, slots: list | None = None):
        self.slots: list = [] if slots is None else slots
        self.decoder = None
        self._cursor = 0

    def rewind(self) -> WanCache:
        """Start a new pass over the convolutions."""
        self._cursor = 0
        return self

    def slot(self) -> int:
        """Index of the next slot."""
        if self._cursor == len(self.slots):
            self.slots.append(None)
        self._cursor += 1
        return self._cursor - 1

    def nbytes(self) -> int:
        return sum(s.numel() * s.element_size() for s in self.slots if isinstance(s, Tensor))


def _last_two(history: Tensor | None, x: Tensor) -> Tensor:
    """The last two frames of (history ++ x); a single new frame must not push the older one out."""
    if x.shape[2] < 2 and history is not None:
        x = torch.cat((history, x), 2)
    return x[:, :, -2:].clone()


class CausalConv3d(nn.Conv3d):
    """3-D convolution that sees the past only: zeros on the left of the first frame, cached frames later."""

    def __init__(self, cin: int, cout: int, kernel: int | tuple[int, int, int], padding: int | tuple = 0, stride=1, **kw):
        super().__init__(cin, cout, kernel, stride=stride, **kw)
        pad = (padding,) * 3 if isinstance(padding, int) else padding
        self.past, self.space = 2 * pad[0], (pad[1], pad[2])

    def forward(self, x: Tensor, cache: WanCache | None = None) -> Tensor:
        if self.past:
            missing = self.past
            if cache is not None:
                slot = cache.slot()
                history = cache.slots[slot]
                cache.slots[slot] = _last_two(history, x)
                if history is not None:
                    x = torch.cat((history.to(x.device), x), 2)
                    missing -= history.shape[2]
            if missing:
                x = F.pad(x, (0, 0, 0, 0, missing, 0))
        return F.conv3d(x, self.weight, self.bias, self.stride, (0, *self.space))


class ChannelNorm(nn.Module):
    """L2 normalisation over channels times sqrt(C) times gamma."""

    def __init__(self, channels: int, axes: int = 3, **kw):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * axes, **kw))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * (x.shape[1] ** 0.5 * self.gamma)


class ResidualBlock(nn.Module):
    """Norm, SiLU, conv, norm, SiLU, conv; a 1x1x1 shortcut where the width changes."""

    def __init__(self, cin: int, cout: int, **kw):
        super().__init__()
        self.residual = nn.Sequential(
            ChannelNorm(cin, **kw), nn.SiLU(), CausalConv3d(cin, cout, 3, 1, **kw),
            ChannelNorm(cout, **kw), nn.SiLU(), nn.Dropout(0.0), CausalConv3d(cout, cout, 3, 1, **kw),
        )
        self.shortcut = CausalConv3d(cin, cout, 1, **kw) if cin != cout else nn.Identity()

    def forward(self, x: Tensor, cache: WanCache | None) -> Tensor:
        y = x
        for layer in self.residual:
            y = layer(y, cache) if isinstance(layer, CausalConv3d) else layer(y)
        return self.shortcut(x) + y


def _per_frame(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1)


def _to_video(frames: Tensor, batch: int) -> Tensor:
    return frames.unflatten(0, (batch, -1)).transpose(1, 2)


class FrameAttention(nn.Module):
    """Single-head attention inside each frame."""

    def __init__(self, channels: int, **kw):
        super().__init__()
        self.norm = ChannelNorm(channels, 2, **kw)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1, **kw)
        self.proj = nn.Conv2d(channels, channels, 1, **kw)

    def forward(self, x: Tensor, cache: WanCache | None) -> Tensor:
        frames = _per_frame(x)
        qkv = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2)[:, None]
        y = F.scaled_dot_product_attention(*qkv.chunk(3, -1))[:, 0]
        return x + _to_video(self.proj(y.transpose(1, 2).reshape_as(frames)), x.shape[0])


class Downsample(nn.Module):
    """Half the size in space, and in time when ``temporal``; the very first frame passes the time step alone."""

    def __init__(self, channels: int, temporal: bool, **kw):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2, **kw))
        if temporal:
            self.time_conv = CausalConv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1), **kw)

    def forward(self, x: Tensor, cache: WanCache | None) -> Tensor:
        x = _to_video(self.resample(_per_frame(x)), x.shape[0])
        if not hasattr(self, "time_conv"):
            return x
        if cache is None:
            return torch.cat((x[:, :, :1], self.time_conv(x)), 2) if x.shape[2] > 1 else x
        slot = cache.slot()
        history, cache.slots[slot] = cache.slots[slot], x[:, :, -1:].clone()
        return x if history is None else self.time_conv(torch.cat((history.to(x.device), x), 2))


class Upsample(nn.Module):
    """Twice the size in space with half the channels, and in time when ``temporal``; the first latent frame stays one."""

    def __init__(self, channels: int, temporal: bool, **kw):
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(channels, channels // 2, 3, padding=1, **kw))
        if temporal:
            self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1), (1, 0, 0), **kw)

    def forward(self, x: Tensor, cache: WanCache | None) -> Tensor:
        if hasattr(self, "time_conv"):
            x = self._double(x, cache)
        return _to_video(self.resample(_per_frame(x)), x.shape[0])

    def _double(self, x: Tensor, cache: WanCache | None) -> Tensor:
        if cache is None:
            return torch.cat((x[:, :, :1], self._interleave(self.time_conv(x[:, :, 1:]))), 2) if x.shape[2] > 1 else x
        slot = cache.slot()
        history = cache.slots[slot]
        if history is None:
            cache.slots[slot] = WanCache.SEEN
            return x
        own = WanCache([None if history is WanCache.SEEN or history == WanCache.SEEN else history])
        y = self.time_conv(x, own)
        cache.slots[slot] = own.slots[0]
        return self._interleave(y)

    @staticmethod
    def _interleave(y: Tensor) -> Tensor:
        return torch.stack(y.chunk(2, 1), 3).flatten(2, 3)


def _run(layers, x: Tensor, cache: WanCache | None) -> Tensor:
    for layer in layers:
        cached = isinstance(layer, (CausalConv3d, ResidualBlock, FrameAttention, Downsample, Upsample))
        x = layer(x, cache) if cached else layer(x)
    return x


def _middle(channels: int, **kw) -> nn.Sequential:
    return nn.Sequential(ResidualBlock(channels, channels, **kw), FrameAttention(channels, **kw),
                         ResidualBlock(channels, channels, **kw))


class Encoder(nn.Module):
    """Pixels ``[B, 3, T, H, W]`` to ``[B, 2z, T', H/8, W/8]``."""

    def __init__(self, dim: int, z_dim: int, **kw):
        super().__init__()
        widths = [dim, dim, 2 * dim, 4 * dim, 4 * dim]
        self.conv1 = CausalConv3d(3, dim, 3, 1, **kw)
        layers: list[nn.Module] = []
        for stage, (cin, cout) in enumerate(zip(widths, widths[1:])):
            layers += [ResidualBlock(cin, cout, **kw), ResidualBlock(cout, cout, **kw)]
            if stage < 3:
                layers.append(Downsample(cout, temporal=stage > 0, **kw))
        self.downsamples = nn.Sequential(*layers)
        self.middle = _middle(widths[-1], **kw)
        self.head = nn.Sequential(ChannelNorm(widths[-1], **kw), nn.SiLU(), CausalConv3d(widths[-1], 2 * z_dim, 3, 1, **kw))

    def forward(self, x: Tensor, cache: WanCache | None) -> Tensor:
        return _run((self.conv1, *self.downsamples, *self.middle, *self.head), x, cache)


class Decoder(nn.Module):
    """``[B, z, T', H/8, W/8]`` to pixels ``[B, 3, T, H, W]``, not clamped."""

    def __init__(self, dim: int, z_dim: int, **kw):
        super().__init__()
        widths = [4 * dim, 4 * dim, 4 * dim, 2 * dim, dim]
        self.conv1 = CausalConv3d(z_dim, widths[0], 3, 1, **kw)
        self.middle = _middle(widths[0], **kw)
        layers: list[nn.Module] = []
        for stage, (cin, cout) in enumerate(zip(widths, widths[1:])):
            cin = cin if stage == 0 else cin // 2  # an up-step halves the channels
            layers += [ResidualBlock(cin, cout, **kw), ResidualBlock(cout, cout, **kw), ResidualBlock(cout, cout, **kw)]
            if stage < 3:
                layers.append(Upsample(cout, temporal=stage < 2, **kw))
        self.upsamples = nn.Sequential(*layers)
        self.head = nn.Sequential(ChannelNorm(dim, **kw), nn.SiLU(), CausalConv3d(dim, 3, 3, 1, **kw))

    def forward(self, x: Tensor, cache: WanCache | None) -> Tensor:
        return _run((self.conv1, *self.middle, *self.upsamples, *self.head), x, cache)


class WanVAE(nn.Module):
    """Wan 2.1 VAE with base width ``dim`` (96 in the public file)."""

    def __init__(self, dim: int = 96, z_dim: int = 16, dtype: torch.dtype | None = None, device=None):
        super().__init__()
        kw = {"dtype": dtype, "device": device}
        self.dim, self.z_dim = dim, z_dim
        self.encoder = Encoder(dim, z_dim, **kw)
        self.conv1 = CausalConv3d(2 * z_dim, 2 * z_dim, 1, **kw)
        self.conv2 = CausalConv3d(z_dim, z_dim, 1, **kw)
        self.decoder = Decoder(dim, z_dim, **kw)

    def encode_moments_stream(self, video: Tensor, cache: WanCache) -> Iterator[Tensor]:
        """(mean ++ log-variance) of each whole latent frame in ``video``: 1 pixel frame first, then 4 each.

        A trailing remainder is dropped (vae/text spec 1.6)."""
        start = 0
        fresh = not cache.slots
        while start + (size := 1 if fresh else TEMPORAL_STRIDE) <= video.shape[2]:
            yield self.conv1(self.encoder(video[:, :, start:start + size], cache.rewind()))
            start, fresh = start + size, False

    def encode(self, video: Tensor, cache: WanCache | None = None) -> Tensor:
        """Posterior mean (raw latent) ``[B, z, T', H/8, W/8]`` of pixels ``[B, 3, T, H, W]`` in -1..1."""
        self._check_video(video)
        moments = list(self.encode_moments_stream(video, WanCache() if cache is None else cache))
        return torch.cat(moments, 2)[:, : self.z_dim]

    def decode_stream(self, latent: Tensor, cache: WanCache) -> Iterator[Tensor]:
        """Pixels of each latent frame in turn: 1 frame for a video's first latent, 4 for every later one; not clamped."""
        self._check_latent(latent)
        yield from stream_latents(latent, self, cache)

    def decode(self, latent: Tensor, cache: WanCache | None = None) -> Tensor:
        """Pixels ``[B, 3, T, H, W]`` (about -1..1, not clamped) of a raw latent; with a cache, the continuation of a video."""
        return torch.cat(list(self.decode_stream(latent, WanCache() if cache is None else cache)), 2)

    def rebuild_cache(self, latent: Tensor) -> WanCache:
        """The decoder's cache after ``latent`` (the last :data:`DECODER_MEMORY` latent frames, or all if there are fewer)."""
        cache = WanCache()
        for _ in self.decode_stream(latent[:, :, -DECODER_MEMORY:], cache):
            pass
        return cache

    def encode_parallel(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, log-variance) of a whole clip at once; frames must be 1 + 4k. Differentiable."""
        return self.conv1(self.encoder(video, None)).chunk(2, 1)

    def decode_parallel(self, latent: Tensor) -> Tensor:
        """Pixels of a whole clip at once. Differentiable."""
        return self.decoder(self.conv2(latent), None)

    def _check_video(self, video: Tensor) -> None:
        if video.ndim != 5 or video.shape[1] != 3 or video.shape[2] < 1 or video.shape[3] % 8 or video.shape[4] % 8:
            raise SanaVideoError("The video does not fit the Wan 2.1 VAE", found=f"shape {list(video.shape)}",
                                 expected="[batch, 3, frames, height, width], height and width multiples of 8")

    def _check_latent(self, latent: Tensor) -> None:
        if latent.ndim != 5 or latent.shape[1] != self.z_dim or latent.shape[2] < 1:
            raise SanaVideoError("The latent does not fit the Wan 2.1 VAE", found=f"shape {list(latent.shape)}",
                                 expected=f"[batch, {self.z_dim}, frames, height, width]")
