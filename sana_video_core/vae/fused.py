"""The Wan 2.1 decoder as the operators of ``ops/frames.py`` in a row, channels last all the way.

On a CPU in float32, a latent frame a pass; on a CUDA card in bfloat16 several of them. Works on any module tree with the
official names (the core's ``WanVAE``, ComfyUI's), whose weights it copies or views in the layout of the operators. Every
latent frame sees what it would see alone, and the cache holds what the plain decoder's holds, so a video may change between
the two at any latent frame. :data:`stream_latents` chooses; elsewhere it is the plain decoder, bit for bit.
Not covered: encoding, gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops import Constraint, operator
from ..ops.frames_cpu import onednn_missing

GROUP = 4  # most latent frames a pass: more gain nothing (the frames before a pass weigh 1 / 8 of it), and need memory
_STAGE = 4  # a stage of the decoder: three residual blocks and an up-step
_WIDTH = 96  # of the public model, for which the following is counted
_LAST = 4 * 64 * _WIDTH  # values of one tensor of the last stage for a latent pixel of one latent frame
# Values for one latent pixel: the cache (vae/text spec 1.4, with borders) and the rooms of windows; for each latent frame of a
# pass, the frames that are alive at one time, all of the last stage: residual, window, sums, result, next window.
_CACHE, _ALIVE = 155_000 + 2 * _LAST, 5 * _LAST


@operator
def stream_latents(latent: Tensor, network: nn.Module, cache) -> Iterator[Tensor]:
    """Pixels ``[B, 3, 1 or 4, 8H, 8W]`` of each raw latent frame of ``[B, z, T, H, W]``, continuing what ``cache`` has seen."""
    for i in range(latent.shape[2]):
        yield network.decoder(network.conv2(latent[:, :, i:i + 1]), cache.rewind())


def _kernel(weight: Tensor, like: Tensor) -> Tensor:
    """A convolution's weight as ``[out, ..., in]`` contiguous; no copy where it lies channels last already."""
    return weight.detach().to(like.device, like.dtype).movedim(1, -1).contiguous()


class _Conv:
    """Weight and bias of a convolution in the operators' layout."""

    def __init__(self, module: nn.Module, like: Tensor):
        self.weight, self.bias = _kernel(module.weight, like), module.bias.detach().to(like.device, like.dtype)

    @functools.cached_property
    def pairs(self) -> Tensor:
        """The weight for two frames at a time."""
        return ops.frame_weights(self.weight)

    def product(self, frames: Tensor) -> Tensor:
        """A convolution of size one on ``[frames, ..., in]``: a product a frame, so that its bits do not depend on the others."""
        out = frames.new_empty(*frames.shape[:-1], len(self.bias))
        for frame, goal in zip(frames, out):
            torch.addmm(self.bias, frame.flatten(0, -2), self.weight.flatten(1).t(), out=goal.flatten(0, -2))
        return out


def _gamma(module: nn.Module, like: Tensor) -> Tensor:
    return module.gamma.detach().to(like.device, like.dtype).flatten()


class _Block:
    """Weights of a residual block."""

    def __init__(self, module: nn.Module, like: Tensor):
        layers = module.residual
        self.norms = _gamma(layers[0], like), _gamma(layers[3], like)
        self.convs = _Conv(layers[2], like), _Conv(layers[6], like)
        self.shortcut = None if isinstance(module.shortcut, nn.Identity) else _Conv(module.shortcut, like)


class _Flow:
    """What goes through the decoder: frames, and what the next convolution reads (None: not made yet): a ``window`` or, for two
    frames at a time, the sums of ``pairs``.

    Held here alone, so that the memory of each is free as soon as what follows is there.
    """

    def __init__(self, x: Tensor | None, window: Tensor | None):
        self.x, self.window, self.pairs = x, window, None


class FusedDecoder:
    """The decoder of ``network`` for latents like ``like`` (device, dtype). Holds weights, no state of a video."""

    def __init__(self, network: nn.Module, like: Tensor):
        self._made_for = network, like.device, like.dtype
        decoder = network.decoder
        self.first, self.enter = _Conv(network.conv2, like), _Conv(decoder.conv1, like)
        self.middle = _Block(decoder.middle[0], like), _Block(decoder.middle[2], like)
        attention = decoder.middle[1]
        self.attention_norm = _gamma(attention.norm, like)
        self.qkv, self.proj = _Conv(attention.to_qkv, like), _Conv(attention.proj, like)
        self.stages = []
        layers = list(decoder.upsamples)
        for start in range(0, len(layers), _STAGE):
            blocks = [_Block(layer, like) for layer in layers[start:start + 3]]
            up = layers[start + 3] if start + 3 < len(layers) else None
            time = _Conv(up.time_conv, like) if hasattr(up, "time_conv") else None
            self.stages.append((blocks, time, None if up is None else _Conv(up.resample[1], like)))
        self.head_norm, self.head = _gamma(decoder.head[0], like), _Conv(decoder.head[2], like)

    def __call__(self, latent: Tensor, cache) -> Tensor:
        """Pixels ``[B, 3, T', 8H, 8W]`` of raw latents ``[B, z, T, H, W]``; a video's first latent frame comes alone."""
        cache.rewind()
        frames = latent.movedim(1, -1).contiguous()
        flow = _Flow(None, ops.open_window(self.first.product(frames.flatten(0, 1)).view_as(frames)))
        self._conv(flow, self.enter, cache, self.middle[0].norms[0])
        self._block(flow, self.middle[0], cache, None)
        flow.x = self._attention(flow.x)
        flow.window = ops.open_window(flow.x, self.middle[1].norms[0])
        self._block(flow, self.middle[1], cache, self.stages[0][0][0].norms[0])
        for stage, (blocks, time, up) in enumerate(self.stages):
            first = blocks[0].norms[0]
            if stage > 0 and _takes_pairs(flow.x, first):
                self._open_pairs(flow, flow.x, first, None, cache, False)
            elif flow.window is None:
                flow.window = ops.open_window(flow.x, first)
            norms = [*(block.norms[0] for block in blocks[1:]), self.head_norm if up is None else None]
            for block, following in zip(blocks, norms):
                self._block(flow, block, cache, following, keep=following is not self.head_norm)
            if time is not None:
                flow.x = self._double(flow.x, time, cache)
            if up is not None:
                flow.x = ops.upsample_conv(flow.x, up.weight, up.bias)
        return ops.pixel_conv(flow.window, self._history(flow.window, cache), self.head.weight, self.head.bias)

    def fits(self, network: nn.Module, latent: Tensor) -> bool:
        """Whether this was made of ``network`` for latents like this one."""
        return self._made_for == (network, latent.device, latent.dtype)

    def _block(self, flow: _Flow, block: _Block, cache, following: Tensor | None, keep: bool = True) -> None:
        """A residual block; leaves its frames (``keep``) and, if there is a norm ``following``, the next block's window."""
        residual, flow.x = flow.x, None
        self._conv(flow, block.convs[0], cache, block.norms[1], keep=False)
        if block.shortcut is not None:
            residual = block.shortcut.product(residual.flatten(0, 1)).unflatten(0, residual.shape[:2])
        self._conv(flow, block.convs[1], cache, following, keep, residual)

    def _conv(self, flow: _Flow, conv: _Conv, cache, gamma: Tensor | None, keep: bool = True,
              residual: Tensor | None = None) -> None:
        if flow.pairs is None:
            history = self._history(flow.window, cache)
            flow.x, flow.window = ops.causal_step(flow.window, history, conv.weight, conv.bias, residual, gamma, keep)
            return
        y, flow.pairs = ops.pair_conv(flow.pairs, conv.pairs, conv.bias), None
        if gamma is None:
            flow.x = y if residual is None else y.add_(residual)
        elif gamma is self.head_norm:
            flow.window = ops.open_window(y, gamma, residual)
        else:
            flow.x = self._open_pairs(flow, y, gamma, residual, cache, keep)

    @staticmethod
    def _open_pairs(flow: _Flow, x: Tensor, gamma: Tensor, residual: Tensor | None, cache, keep: bool) -> Tensor | None:
        """Make what the next convolution, of the cache's next slot, reads of ``x + residual``; returns that to ``keep`` it."""
        slot = cache.slot()
        history = None if cache.slots[slot] is None else _padded(cache.slots[slot], x)
        total, flow.pairs, last = ops.open_pairs(x, history, gamma, residual, keep)
        cache.slots[slot] = last[:, :, 1:-1, 1:-1].movedim(-1, 1)
        return total

    @staticmethod
    def _history(window: Tensor, cache) -> Tensor | None:
        """The frames before ``window``, of the cache's next slot, which gets the last two of both."""
        slot = cache.slot()
        history = None if cache.slots[slot] is None else _padded(cache.slots[slot], window)
        new = window[:, 2:]
        if new.shape[1] > 1:
            last = new[:, -2:].clone(memory_format=torch.contiguous_format)  # with the strides that _padded knows again
        else:
            last = torch.cat((torch.zeros_like(new) if history is None else history[:, 1:], new), 1)
        cache.slots[slot] = last[:, :, 1:-1, 1:-1].movedim(-1, 1)
        return history

    def _double(self, x: Tensor, conv: _Conv, cache) -> Tensor:
        """Twice the frames; the very first frame of a video stays one."""
        slot = cache.slot()
        seen = cache.slots[slot]
        if seen is None:
            cache.slots[slot] = cache.SEEN
            return x
        history = None
        if isinstance(seen, Tensor):
            history = seen.to(x).movedim(1, -1)
            history = F.pad(history, (0, 0, 0, 0, 0, 0, 2 - history.shape[1], 0)).contiguous()
        last = x[:, -2:] if history is None or x.shape[1] > 1 else torch.cat((history[:, 1:], x), 1)
        cache.slots[slot] = last.clone().movedim(-1, 1)
        return ops.time_double(x, history, conv.weight, conv.bias)

    def _attention(self, x: Tensor) -> Tensor:
        frames = x.flatten(0, 1).flatten(1, 2)
        normed = ops.rms_norm(frames, self.attention_norm, 1e-24 / frames.shape[-1])
        q, k, v = (t.contiguous() for t in self.qkv.product(normed).chunk(3, -1))
        return x + self.proj.product(ops.frame_attention(q, k, v)).view_as(x)


def _takes_pairs(x: Tensor, gamma: Tensor) -> bool:
    """Whether frames go through the convolutions by twos: an even number of them, so that a video's pairs are the same in any
    partition (after the first stage a latent frame has two or four), where the kernels run."""
    return (x.shape[1] % 2 == 0 and ops.open_pairs.choose(x, None, gamma)[0] != "reference"
            and ("triton", str(x.device)) not in ops.pair_conv.faults)


def _padded(slot: Tensor, like: Tensor) -> Tensor:
    """A slot ``[B, C, 1 or 2, H, W]`` as the history ``[B, 2, H + 2, W + 2, C]`` of a window: what it is a view of, if it is."""
    batch, channels, count, height, width = slot.shape
    line, plane = (width + 2) * channels, (height + 2) * (width + 2) * channels
    whole = (2 * plane, plane, line, channels, 1)
    if count == 2 and slot.movedim(1, -1).stride() == whole and slot.storage_offset() == line + channels \
            and slot.device == like.device and slot.dtype == like.dtype:
        return slot.as_strided((batch, 2, height + 2, width + 2, channels), whole, 0)
    frames = slot.to(like).movedim(1, -1)
    return F.pad(frames, (0, 0, 1, 1, 1, 1, 2 - count, 0)).contiguous()


def memory_needed(height: int, width: int, group: int, dim: int = _WIDTH) -> int:
    """Bytes for decoding latents of ``height`` x ``width``, ``group`` of them a pass, beside the weights."""
    return int((_CACHE + group * _ALIVE) * (dim / _WIDTH) * height * width) * 2


def group_that_fits(latent: Tensor, free: int, dim: int = _WIDTH) -> int:
    """Latent frames a pass: :data:`GROUP`, or fewer where ``free`` bytes do not hold them."""
    batch, _, _, height, width = latent.shape
    return next((n for n in (GROUP, 2) if batch * memory_needed(height, width, n, dim) < free), 1)


def _free_memory(device: torch.device) -> int:
    """Bytes that torch can still get, with those that it keeps for itself."""
    statistics = torch.cuda.memory_stats(device)
    kept = statistics.get("reserved_bytes.all.current", 0) - statistics.get("active_bytes.all.current", 0)
    return torch.cuda.mem_get_info(device)[0] + kept


def stream_latents_fused(latent: Tensor, network: nn.Module, cache) -> Iterator[Tensor]:
    """See :data:`stream_latents`; the work is done for up to :data:`GROUP` latent frames at a time."""
    width = network.decoder.head[0].gamma.shape[0]
    return _stream(latent, network, cache, group_that_fits(latent, _free_memory(latent.device), width))


def stream_latents_cpu(latent: Tensor, network: nn.Module, cache) -> Iterator[Tensor]:
    """See :data:`stream_latents`; a latent frame at a time, so that a video has the same bits in any partition."""
    return _stream(latent, network, cache, 1)


def _stream(latent: Tensor, network: nn.Module, cache, group: int) -> Iterator[Tensor]:
    if cache.decoder is None or not cache.decoder.fits(network, latent):
        cache.decoder = FusedDecoder(network, latent)
    start = 0
    while start < latent.shape[2]:
        fresh = all(slot is None for slot in cache.slots)
        piece = latent[:, :, start:start + (1 if fresh else group)]
        pixels = cache.decoder(piece, cache)
        start += piece.shape[2]
        yield from pixels.split(pixels.shape[2] // piece.shape[2], 2)


def _is_wan(latent: Tensor, network: nn.Module, cache) -> str | None:
    """Reason to refuse a network of another layout, or one that trains."""
    decoder = network.decoder
    if len(decoder.upsamples) != 3 * _STAGE + 3 or len(decoder.middle) != 3:
        return "needs the layers of the Wan 2.1 decoder"
    if torch.is_grad_enabled() and (latent.requires_grad or any(p.requires_grad for p in decoder.parameters())):
        return "has no backward pass"
    return None


def _fits_card(latent: Tensor, network: nn.Module, cache) -> str | None:
    """Reason to refuse what the kernels do not do."""
    if reason := _is_wan(latent, network, cache):
        return reason
    width = network.decoder.head[0].gamma.shape[0]
    if latent.shape[1] % 16 or width % 16:
        return f"needs channels and a width in multiples of 16, these are {latent.shape[1]} and {width}"
    return None


stream_latents.add("triton", stream_latents_fused, Constraint(
    devices=("cuda",), dtypes=(torch.bfloat16,), capability=(8, 0), triton=True, inference_only=True, check=_fits_card))
stream_latents.add("onednn", stream_latents_cpu, Constraint(
    devices=("cpu",), dtypes=(torch.float32,), inference_only=True,
    check=lambda *call: onednn_missing() or _is_wan(*call)))
