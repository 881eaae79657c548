"""The layers of the Linear DiT: norms, embedders, linear and cross attention, Mix-FFN, block, final layer.

Module and parameter names are the official ones, so one key space serves checkpoints, LoRAs and quantisation. Every
matrix product is a ``Linear`` of the ``operations`` namespace handed in (``torch.nn`` or ComfyUI's casting layers): the
1x1 convolutions, the temporal convolution and the patch embedding too. Source: model spec 1.3-1.11, causal spec 1-2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..specs import ModelSpec
from ..state import LayerState
from .embeddings import patchify

# Working memory that one pass of the FFN's hidden layer may take where it does not fit as a whole; a whole one may take half as
# much again. Frames are independent there, so more passes give the same values; this bounds the peak on small cards and stays
# far above the size where a GPU is no longer full. A clip of 832x480x81 in bf16 goes as a whole, a CFG pair in three passes.
FFN_PASS_BYTES = 600_000_000


class Context(NamedTuple):
    """What every block of one forward pass reads.

    ``grid`` (frames, height, width) in tokens; ``rows`` time modulation ``[B, F, 6, C]`` (F = 1 or frames);
    ``text`` ``[B, L, C]``; ``mask`` ``[B, L]`` bool or None; ``cos``, ``sin`` rotary table; ``lengths`` valid text
    tokens of each row when known (then ``mask`` says the same); ``read`` this block's keys and values of the text where they
    have been made before (then ``text`` may be None).
    """

    grid: tuple[int, int, int]
    rows: Tensor
    text: Tensor | None
    mask: Tensor | None
    cos: Tensor
    sin: Tensor
    lengths: tuple[int, ...] | None = None
    read: tuple[Tensor, Tensor] | None = None


class Text(NamedTuple):
    """A prompt as the network reads it: ``features`` ``[B, L, C]`` or None, ``mask`` and ``lengths`` as in :class:`Context`,
    ``read``: keys and values of every block, where they are kept."""

    features: Tensor | None
    mask: Tensor | None
    lengths: tuple[int, ...] | None
    read: tuple[tuple[Tensor, Tensor], ...] = ()


def takes_rows(linear: nn.Module, x: Tensor) -> bool:
    """Whether ``linear`` wants inputs like ``x`` as :class:`ops.Rows`, and so their scaling done by what makes them.

    A layer class says so with a method of this name (``nodes/fp8_layers.py``); those of torch do not.
    """
    wants = getattr(linear, "takes_rows", None)
    return wants is not None and wants(x)


def scale_of(linear: nn.Module, x: Tensor) -> Tensor | None:
    """The scale ``[]`` at which a linear that :func:`takes_rows` wants all of them; None: each at its own, or no rows at all.

    What cannot see a whole row makes rows only at such a scale. A method ``input_scale_of`` of the layer's class gives it.
    """
    return linear.input_scale_of(x) if takes_rows(linear, x) else None


def takes_pairs(linear: nn.Module, u: Tensor, frames: int, tail: Tensor | None) -> bool:
    """Whether ``linear``, a temporal convolution, is multiplied for two frames at a time (``ops/pairs.py``): on a card, where
    there is a second frame."""
    return frames > 1 and _multiplies(linear, u) and ops.time_pairs.choose(u, frames, tail)[0] != "reference"


def _multiplies(linear: nn.Module, x: Tensor) -> bool:
    """Whether ``linear`` is a plain product with its own weight in the dtype of x, and nothing around it, so that another product
    can take its place (``ops/pairs.py``, ``ops/onto.py``)."""
    weight = linear.weight
    return (
        not torch.compiler.is_compiling()
        and type(weight) in (Tensor, nn.Parameter) and weight.dtype == x.dtype and untouched(linear)
        and not (torch.is_grad_enabled() and weight.requires_grad))


def untouched(module: nn.Module) -> bool:
    """Whether nobody has put a hook or a forward of their own on the module."""
    return "forward" not in vars(module) and not module._forward_hooks and not module._forward_pre_hooks


def add_onto(linear: nn.Module, x: Tensor, y: Tensor, gate: Tensor | None = None, offset: Tensor | None = None) -> Tensor | None:
    """``x + gate * linear(y)`` in the place of x, but for what all tokens get alike, ``[B or 1, 1, C]``: that is added to
    ``offset`` and returned (None: there is nothing)."""
    given = ops.Onto.of(y, x, gate, offset)
    linear(given)
    return given.offset


def adds_rows(linear: nn.Module, x: Tensor, gate: Tensor) -> bool:
    """Whether ``linear`` adds its output to tokens like ``x`` itself, times ``gate``, where it gets :class:`ops.OntoRows`.

    A method of this name in the layer's class says so, as with :func:`takes_rows`.
    """
    adds = getattr(linear, "adds_rows", None)
    return adds is not None and untouched(linear) and adds(x, gate)


def _modulated(linear: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor | ops.Rows:
    """``ops.modulate_norm`` in the form that ``linear`` reads."""
    if takes_rows(linear, x):
        return ops.modulate_norm_fp8(x, shift, scale, given=linear.input_scale_of(x))
    return ops.modulate_norm(x, shift, scale)


def _in_all_rows(x: Tensor, whole: Tensor) -> Tensor:
    """``x``, one row for all, in each of ``whole``, which may be overwritten and may begin with x; other x as they are."""
    if len(x) == len(whole):
        return x
    if x.data_ptr() != whole.data_ptr():
        whole[:1] = x
    whole[1:] = x
    return whole


def _here(p: Tensor, x: Tensor) -> Tensor:
    """A raw parameter on the device of ``x`` (a partly offloaded model keeps some on the CPU)."""
    return p if p.device == x.device else p.to(x.device, non_blocking=True)


def _official_layout(x: Tensor) -> Tensor:
    """``x [B, N, C]`` with tokens fastest in memory, as the official code has it after its convolutions.

    A Linear then rounds before it adds the bias; in half precision that changes bits, so parity mode repeats it.
    """
    return x.transpose(1, 2).contiguous().transpose(1, 2)


class RMSNorm(nn.Module):
    """RMSNorm over the last axis with a raw weight."""

    def __init__(self, width: int, eps: float, dtype=None, device=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, _here(self.weight, x), self.eps)


class PatchEmbed(nn.Module):
    """Latent to tokens: a convolution with kernel = stride, written as one Linear (parity mode rounds as the convolution)."""

    def __init__(self, spec: ModelSpec, operations, options: dict[str, Any], **kw):
        super().__init__()
        self.patch, self.parity = spec.patch, options["parity"]
        self.proj = operations.Linear(spec.channels * spec.patch[0] * spec.patch[1] * spec.patch[2], spec.width, **kw)

    def forward(self, latent: Tensor) -> Tensor:
        """``[B, C, T, H, W]`` -> ``[B, N, width]``."""
        if self.parity:
            kernel = self.proj.weight.view(-1, latent.shape[1], *self.patch)
            return F.conv3d(latent, kernel, self.proj.bias, self.patch).flatten(2).transpose(1, 2).contiguous()
        return self.proj(patchify(latent, self.patch))


class TimeEmbed(nn.Module):
    """Sinusoid (256) -> Linear, SiLU, Linear."""

    def __init__(self, width: int, operations, **kw):
        super().__init__()
        self.mlp = nn.Sequential(operations.Linear(256, width, **kw), nn.SiLU(), operations.Linear(width, width, **kw))

    def forward(self, sinusoid: Tensor) -> Tensor:
        return self.mlp(sinusoid)


class _CaptionMLP(nn.Module):
    def __init__(self, spec: ModelSpec, operations, **kw):
        super().__init__()
        self.fc1 = operations.Linear(spec.caption_channels, spec.width, **kw)
        self.fc2 = operations.Linear(spec.width, spec.width, **kw)

    def forward(self, caption: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(caption), approximate="tanh"))


class CaptionEmbed(nn.Module):
    """Caption features to model width."""

    def __init__(self, spec: ModelSpec, operations, **kw):
        super().__init__()
        self.y_proj = _CaptionMLP(spec, operations, **kw)

    def forward(self, caption: Tensor) -> Tensor:
        return self.y_proj(caption)


class LinearAttention(nn.Module):
    """ReLU linear attention with rotary positions; reads and returns the recurrent sums."""

    def __init__(self, spec: ModelSpec, operations, options: dict[str, Any], **kw):
        super().__init__()
        self.heads, self.parity, self.eps = spec.linear_heads, options["parity"], options["attention_eps"]
        self.qkv = operations.Linear(spec.width, 3 * spec.width, bias=False, **kw)
        self.q_norm = RMSNorm(spec.width, 1e-5, **kw)
        self.k_norm = RMSNorm(spec.width, 1e-5, **kw)
        self.proj = operations.Linear(spec.width, spec.width, **kw)

    def forward(
        self, x: Tensor | ops.Rows, ctx: Context, history: LayerState | None, last: int = 0,
    ) -> tuple[Tensor, ops.Contribution]:
        """Output of all tokens, or of the ``last`` ones only, and this block's own contribution (always of all tokens)."""
        mixed, own = self.mix(x, ctx, history, last)
        return self.proj(mixed), own

    def mix(
        self, x: Tensor | ops.Rows, ctx: Context, history: LayerState | None, last: int = 0,
    ) -> tuple[Tensor | ops.Rows, ops.Contribution]:
        """As ``forward``, before the output projection, in the form that this reads."""
        past = None if history is None else ops.Contribution(history.vk, history.ksum)
        qkv = self.qkv(x)
        out, own = ops.linear_attention(
            qkv, _here(self.q_norm.weight, qkv), _here(self.k_norm.weight, qkv), ctx.cos, ctx.sin, self.heads, past,
            parity=self.parity, eps=self.eps, given=scale_of(self.proj, qkv),
        )
        if isinstance(out, ops.Rows):
            return ops.Rows(out.values[:, -last:], out.scale), own
        out = out[:, -last:]  # [-0:] is everything
        return _official_layout(out) if self.parity else out, own


class CrossAttention(nn.Module):
    """Softmax attention over the text, q/k RMSNorm over all channels."""

    def __init__(self, spec: ModelSpec, operations, options: dict[str, Any], **kw):
        super().__init__()
        self.heads, self.parity = spec.cross_heads, options["parity"]
        self.q_linear = operations.Linear(spec.width, spec.width, **kw)
        self.kv_linear = operations.Linear(spec.width, 2 * spec.width, **kw)
        self.q_norm = RMSNorm(spec.width, options["cross_eps"], **kw)
        self.k_norm = RMSNorm(spec.width, options["cross_eps"], **kw)
        self.proj = operations.Linear(spec.width, spec.width, **kw)

    def read(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the text ``[B, L, C]``."""
        k, v = self.kv_linear(text).chunk(2, -1)
        return self.k_norm(k), v

    def forward(self, x: Tensor | ops.Rows, ctx: Context) -> Tensor:
        return self.proj(self.mix(_official_layout(x) if self.parity and isinstance(x, Tensor) else x, ctx))

    def mix(self, x: Tensor | ops.Rows, ctx: Context) -> Tensor | ops.Rows:
        """As ``forward``, before the output projection, in the form that this reads."""
        k, v = self.read(ctx.text) if ctx.read is None else ctx.read
        q = self.q_linear(x)
        q = q.expand(len(k), -1, -1) if len(q) < len(k) else q  # one row for all
        norm = _here(self.q_norm.weight, q), self.q_norm.eps
        return ops.softmax_attention(q, k, v, self.heads, ctx.mask, ctx.lengths, norm, given=scale_of(self.proj, q))


class _Conv(nn.Module):
    """A named holder, so that the official key ``<layer>.conv.weight`` exists."""

    def __init__(self, conv: nn.Module):
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class _DepthwiseGate(nn.Conv2d):
    """Holds the depthwise weight; called through ``ops.gated_depthwise``, so that a fused kernel can take its place."""

    def forward(
        self, x: Tensor, grid: tuple[int, int], out: Tensor | None = None, given: Tensor | None = None,
    ) -> Tensor | ops.Rows:
        bias, weight = None if self.bias is None else _here(self.bias, x).to(x.dtype), _here(self.weight, x).to(x.dtype)
        return ops.gated_depthwise(x, weight, bias, grid, not torch.is_grad_enabled(), out, given=given)


class MixFFN(nn.Module):
    """Up, SiLU, depthwise 3x3, gate, down on every frame; then a residual 3-tap convolution in time."""

    def __init__(self, spec: ModelSpec, operations, **kw):
        super().__init__()
        width, hidden = spec.width, spec.ffn_hidden
        self.inverted_conv = _Conv(operations.Linear(width, 2 * hidden, **kw))
        self.depth_conv = nn.Module()
        self.depth_conv.conv = _DepthwiseGate(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, **kw)
        self.point_conv = _Conv(operations.Linear(hidden, width, bias=False, **kw))
        self.t_conv = operations.Linear(3 * width, width, bias=False, **kw)

    def spatial(self, x: Tensor | ops.Rows, grid: tuple[int, int]) -> Tensor:
        """The part of every frame by itself: ``[B, N, C]`` -> ``[B, N, C]``.

        Where the hidden layer would be large, it is made in pieces: frames of all rows one after the other, so that a piece is
        one matrix and its bias goes into the product.
        """
        values = x.values if isinstance(x, ops.Rows) else x
        hidden, frame = self.point_conv.conv.in_features, grid[0] * grid[1]
        frames = values.shape[0] * values.shape[1] // frame
        frame_bytes = frame * 2 * hidden * max(2, values.element_size())
        if 2 * frames * frame_bytes <= 3 * FFN_PASS_BYTES or torch.is_grad_enabled():
            wide = self.inverted_conv(x)
            return self.point_conv(self.depth_conv.conv(wide, grid, given=scale_of(self.point_conv.conv, wide)))
        passes = -(-frames // max(1, FFN_PASS_BYTES // frame_bytes))
        size = -(-frames // passes) * frame
        gated = None
        for start, piece in enumerate(_pieces(x, size)):
            wide = self.inverted_conv(piece)
            if gated is None:
                given = scale_of(self.point_conv.conv, wide)
                kind = wide.dtype if given is None else torch.float8_e4m3fn
                gated = wide.new_empty(values.shape[0], values.shape[1], hidden, dtype=kind)
            goal = gated.view(1, -1, hidden)[:, start * size:(start + 1) * size]
            self.depth_conv.conv(wide, grid, goal, given)
            del wide  # before the next one is made
        return self.point_conv(gated if given is None else ops.Rows(gated, given))

    def forward(
        self, x: Tensor | ops.Rows, grid: tuple[int, int, int], tail: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``[B, N, C]`` -> the two parts whose sum is the output, and this block's tail ``[B, 1, S, C]``.

        The second part may come as the four products ``[B, 4, pairs, C]`` of every two frames (``ops.pair_residual``).
        """
        u = self.spatial(x, grid[1:])
        if takes_pairs(self.t_conv, u, grid[0], tail):
            return u, self.t_conv(ops.AlongTime.of(u, grid[0], tail)), u.unflatten(1, (grid[0], -1))[:, -1:]
        if takes_rows(self.t_conv, u):
            taps, own_tail = ops.temporal_taps_fp8(u, grid[0], tail, given=self.t_conv.input_scale_of(u))
        else:
            taps, own_tail = ops.temporal_taps(u, grid[0], tail)
        return u, self.t_conv(taps), own_tail

    def add_onto(
        self, x: Tensor, normed: Tensor | ops.Rows, grid: tuple[int, int, int], tail: Tensor | None, gate: Tensor,
    ) -> Tensor:
        """``x + gate * forward(normed)`` in the place of x; returns the block's tail. For a ``t_conv`` that :func:`adds_rows`."""
        u, frames = self.spatial(normed, grid[1:]), grid[0]
        given = scale_of(self.t_conv, u)
        if given is None:
            self.t_conv(ops.OntoRows(ops.temporal_taps_fp8(u, frames, tail)[0], x, gate, u))
        else:
            self.t_conv(ops.OntoRows(ops.framed_fp8(u, frames, tail, given=given), x, gate, u, frames))
        return u.unflatten(1, (frames, -1))[:, -1:]


def _pieces(x: Tensor | ops.Rows, size: int) -> list[Tensor] | list[ops.Rows]:
    """Tokens of all rows one after the other, ``size`` at a time."""
    if isinstance(x, ops.Rows):
        values = _pieces(x.values, size)
        scales = _pieces(x.scale, size) if x.scale.ndim else [x.scale] * len(values)
        return [ops.Rows(*parts) for parts in zip(values, scales)]
    return list(x.reshape(1, -1, x.shape[-1]).split(size, 1))


class Block(nn.Module):
    """One transformer block (model spec 1.10). ``forward`` reads ``history`` and returns what a commit would store."""

    def __init__(self, spec: ModelSpec, operations, options: dict[str, Any], **kw):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.zeros(6, spec.width, **kw))
        self.attn = LinearAttention(spec, operations, options, **kw)
        self.cross_attn = CrossAttention(spec, operations, options, **kw)
        self.mlp = MixFFN(spec, operations, **kw)

    def forward(
        self, x: Tensor, ctx: Context, history: LayerState | None = None, spend: bool = False, alike: bool = False,
    ) -> tuple[Tensor, LayerState]:
        """Tokens ``[B, N, C]`` and the state that a commit would store. ``spend``: x may be overwritten.

        ``alike``, with spend and no history: the rows of x are the same until texts tell them apart, so one is made up to there;
        the state is of that one.
        """
        whole, x = x, x[:1] if alike else x
        table = _here(self.scale_shift_table, x).to(ctx.rows.dtype)
        shift1, scale1, gate1, shift2, scale2, gate2 = (table + ctx.rows).unbind(2)
        shift1, scale1, gate1 = shift1[:len(x)], scale1[:len(x)], gate1[:len(x)]
        past = None if history is None else history.tail
        normed, offset = _modulated(self.attn.qkv, x, shift1, scale1), None
        if self._adds_onto(x, gate1, ctx.grid[0], past):
            mixed, own = self.attn.mix(normed, ctx, history)
            x = x if spend else x.clone()
            offset = add_onto(self.attn.proj, x, mixed, gate1)
            del mixed  # its memory is wanted below
            seen = self.cross_attn.mix(x if offset is None else ops.Shifted.of(x, offset), ctx)
            x = _in_all_rows(x, whole)
            offset = add_onto(self.cross_attn.proj, x, seen, None, offset)
            del seen
            normed = ops.modulate_norm(x, shift2, scale2, offset=offset)
        elif self._adds_rows(x, gate1):
            return self._forward_onto_rows(
                x if spend else x.clone(), whole, normed, ctx, history, (gate1, shift2, scale2, gate2))
        else:
            attended, own = self.attn(normed, ctx, history)
            x, normed = self._attend_and_norm(x, whole, attended, ctx, gate1, shift2, scale2)
            del attended
        spatial, temporal, tail = self.mlp(normed, ctx.grid, past)
        if temporal.ndim == 4:
            x = ops.pair_residual(x, spatial, gate2, temporal, ctx.grid[0], offset=offset)
        else:
            x = ops.gated_residual(x, spatial, gate2, temporal)
        return x, LayerState(own.vk, own.ksum, tail)

    def _forward_onto_rows(
        self, x: Tensor, whole: Tensor, normed: Tensor | ops.Rows, ctx: Context, history: LayerState | None,
        rows: tuple[Tensor, ...],
    ) -> tuple[Tensor, LayerState]:
        """As ``forward`` after the first norm, each part added to x by the product that ends it (``ops/onto_fp8.py``)."""
        gate1, shift2, scale2, gate2 = rows
        mixed, own = self.attn.mix(normed, ctx, history)
        asking = self.attn.proj(ops.OntoRows(mixed, x, gate1, given=scale_of(self.cross_attn.q_linear, x)))
        del mixed, normed  # their memory is wanted below
        seen = self.cross_attn.mix(asking, ctx)
        x = _in_all_rows(x, whole)
        self.cross_attn.proj(ops.OntoRows(seen, x))
        del asking, seen
        normed = _modulated(self.mlp.inverted_conv.conv, x, shift2, scale2)
        tail = self.mlp.add_onto(x, normed, ctx.grid, None if history is None else history.tail, gate2)
        return x, LayerState(own.vk, own.ksum, tail)

    def _adds_rows(self, x: Tensor, gate: Tensor) -> bool:
        """Whether all that is added to the tokens is added in E4M3 by its own product."""
        return (
            not torch.compiler.is_compiling() and not torch.is_grad_enabled()
            and all(map(untouched, (self.attn, self.cross_attn, self.mlp)))
            and all(adds_rows(linear, x, gate) for linear in (self.attn.proj, self.cross_attn.proj, self.mlp.t_conv)))

    def _attend_and_norm(
        self, x: Tensor, whole: Tensor, attended: Tensor, ctx: Context, gate: Tensor, shift: Tensor, scale: Tensor,
    ) -> tuple[Tensor, Tensor | ops.Rows]:
        """The tokens after both attentions, and their norm for the feed-forward layers."""
        queries, up = self.cross_attn.q_linear, self.mlp.inverted_conv.conv
        given = scale_of(queries, x)
        if given is None:
            x = asking = ops.gated_residual(x, attended, gate)
        else:
            x, asking = ops.gated_residual_fp8(x, attended, gate, given=given)
        seen = self.cross_attn(asking, ctx)
        x = _in_all_rows(x, whole)
        if takes_rows(up, x):
            return ops.residual_norm_fp8(x, seen, shift, scale, given=up.input_scale_of(x))
        return ops.residual_norm(x, seen, shift, scale)

    def _adds_onto(self, x: Tensor, gate: Tensor, frames: int, past: Tensor | None) -> bool:
        """Whether both attentions' outputs are added within their projections (``ops/onto.py``), which changes tokens in their
        place, and the end of the block takes what those leave out."""
        linears = self.attn.proj, self.cross_attn.q_linear, self.cross_attn.proj
        return (
            not torch.is_grad_enabled() and takes_pairs(self.mlp.t_conv, x, frames, past)
            and all(_multiplies(linear, x) for linear in linears)
            and untouched(self.attn) and untouched(self.cross_attn)
            and ops.add_product.choose(x, x, linears[0].weight, gate)[0] != "reference")

    def contribution(self, x: Tensor, ctx: Context, history: LayerState | None = None) -> LayerState:
        """What ``forward`` would store, computing only the last frame after the attention's sums."""
        frame = ctx.grid[1] * ctx.grid[2]
        table = _here(self.scale_shift_table, x).to(ctx.rows.dtype)
        shift1, scale1, gate1, shift2, scale2, _ = (table + ctx.rows).unbind(2)
        attended, own = self.attn(_modulated(self.attn.qkv, x, shift1, scale1), ctx, history, frame)
        x = ops.gated_residual(x[:, -frame:], attended, gate1[:, -1:])
        _, normed = ops.residual_norm(x, self.cross_attn(x, ctx), shift2[:, -1:], scale2[:, -1:])
        tail = self.mlp.spatial(normed, ctx.grid[1:])
        return LayerState(own.vk, own.ksum, tail[:, None])


class FinalLayer(nn.Module):
    """Modulated norm with the time embedding itself (not the block rows), then Linear to patches (model spec 1.11)."""

    def __init__(self, spec: ModelSpec, operations, **kw):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.zeros(2, spec.width, **kw))
        out = spec.channels * spec.patch[0] * spec.patch[1] * spec.patch[2]
        self.linear = operations.Linear(spec.width, out, **kw)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x ``[B, N, C]``, time ``[B, F, C]``."""
        shift, scale = (_here(self.scale_shift_table, x).to(time.dtype) + time[:, :, None]).unbind(2)
        return self.linear(ops.modulate_norm(x, shift, scale))
