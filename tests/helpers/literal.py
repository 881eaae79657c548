"""SANA-Video 2B written down literally, as a second opinion: real convolutions, complex rotation, dense masks, no state.

Shares no code with the core's network. Slow and for tiny sizes only.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from sana_video_core.specs import ModelSpec


def rms(x, weight, eps):
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


class Literal:
    """Model spec 1.2-1.12 and causal spec 1-2 with the original weights ``w``; blocks of frames by explicit masks."""

    def __init__(self, spec: ModelSpec, w: dict, dtype: torch.dtype = torch.float64):
        self.s, self.dtype = spec, dtype
        self.w = {k: v.to(dtype) for k, v in w.items() if v.is_floating_point()}
        self.smallest = float("inf")  # denominator met by a query that is not all zero

    def lin(self, x, name):
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def angles(self, f, h, w):
        d = self.s.linear_head_dim
        side = 2 * (d // 6)
        rows = []
        for t in range(f):
            for y in range(h):
                for x in range(w):
                    row = []
                    for position, n in ((t, d - 2 * side), (y, side), (x, side)):
                        row += [position / 10000 ** (2 * i / n) for i in range(n // 2)]
                    rows.append(row)
        return torch.polar(torch.ones(len(rows), d // 2, dtype=torch.float64), torch.tensor(rows, dtype=torch.float64))

    def attention(self, a, p, turn, seen):
        b, n, width = a.shape
        q, k, v = self.lin(a, p + "attn.qkv").chunk(3, -1)
        q, k = (F.relu(rms(x, self.w[f"{p}attn.{name}.weight"], 1e-5)) for x, name in ((q, "q_norm"), (k, "k_norm")))
        q, k, v = (x.view(b, n, -1, self.s.linear_head_dim).transpose(1, 2) for x in (q, k, v))
        pairs = (torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous()) for x in (q, k))
        rq, rk = (torch.view_as_real(x * turn).flatten(-2).to(self.dtype) for x in pairs)
        weights = (rq @ rk.transpose(-1, -2)) * seen
        sums = ((q @ k.transpose(-1, -2)) * seen).sum(-1, keepdim=True)
        self.smallest = min([self.smallest, *sums[q.amax(-1, keepdim=True) > 0].tolist()])
        out = weights @ v / (sums + 1e-8)
        return self.lin(out.transpose(1, 2).reshape(b, n, width), p + "attn.proj")

    def cross(self, x, text, mask, p):
        b, n, width = x.shape
        q = rms(self.lin(x, p + "cross_attn.q_linear"), self.w[p + "cross_attn.q_norm.weight"], 1e-6)
        k, v = self.lin(text, p + "cross_attn.kv_linear").chunk(2, -1)
        k = rms(k, self.w[p + "cross_attn.k_norm.weight"], 1e-6)
        q, k, v = (t.view(b, -1, self.s.cross_heads, width // self.s.cross_heads).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) - 1e4 * (1 - mask.to(self.dtype))[:, None, None]
        return self.lin((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, width), p + "cross_attn.proj")

    def ffn(self, a, p, grid, blocks):
        f, h, w = grid
        b, _, width = a.shape
        image = a.view(b * f, h, w, width).permute(0, 3, 1, 2)
        y = F.silu(F.conv2d(image, self.w[p + "mlp.inverted_conv.conv.weight"], self.w[p + "mlp.inverted_conv.conv.bias"]))
        y = F.conv2d(y, self.w[p + "mlp.depth_conv.conv.weight"], self.w[p + "mlp.depth_conv.conv.bias"], padding=1,
                     groups=y.shape[1])
        y = F.conv2d(y[:, :y.shape[1] // 2] * F.silu(y[:, y.shape[1] // 2:]), self.w[p + "mlp.point_conv.conv.weight"])
        u = y.view(b, f, width, h * w).transpose(1, 2)
        out = torch.empty_like(u)
        start = 0
        for n in blocks:  # the frame before a block is seen, the frame after it is not
            piece = torch.cat((u[:, :, start - 1:start] if start else torch.zeros_like(u[:, :, :1]), u[:, :, start:start + n]), 2)
            mixed = F.conv2d(F.pad(piece, (0, 0, 0, 1)), self.w[p + "mlp.t_conv.weight"])
            out[:, :, start:start + n] = u[:, :, start:start + n] + mixed
            start += n
        return out.permute(0, 2, 3, 1).reshape(b, f * h * w, width)

    def __call__(self, latent, times, caption, mask, blocks):
        """times ``[B, F]``; ``blocks``: latent frames of each block."""
        s, latent = self.s, latent.to(self.dtype)
        grid = tuple(n // p for n, p in zip(latent.shape[2:], s.patch))
        b, space = latent.shape[0], grid[1] * grid[2]
        x = F.conv3d(latent, self.w["x_embedder.proj.weight"], self.w["x_embedder.proj.bias"], stride=s.patch).flatten(2).mT
        frequency = torch.exp(-math.log(10000.0) * torch.arange(128, dtype=torch.float32) / 128)
        angle = times.trunc()[..., None] * frequency
        wave = torch.cat((angle.cos(), angle.sin()), -1).to(self.dtype)
        t = self.lin(F.silu(self.lin(wave, "t_embedder.mlp.0")), "t_embedder.mlp.2")
        rows = self.lin(F.silu(t), "t_block.1").repeat_interleave(space, 1)
        text = F.gelu(self.lin(caption.to(self.dtype), "y_embedder.y_proj.fc1"), approximate="tanh")
        text = self.lin(text, "y_embedder.y_proj.fc2")
        text = rms(text, self.w["attention_y_norm.weight"], 1e-5)
        turn = self.angles(*grid)
        block = torch.repeat_interleave(torch.arange(len(blocks)), torch.tensor(blocks) * space)
        seen = (block[:, None] >= block[None]).to(self.dtype)
        for i in range(s.depth):
            p = f"blocks.{i}."
            m = self.w[p + "scale_shift_table"].flatten() + rows
            shift1, scale1, gate1, shift2, scale2, gate2 = m.chunk(6, -1)
            norm = F.layer_norm(x, x.shape[-1:], eps=1e-6)
            x = x + gate1 * self.attention(norm * (1 + scale1) + shift1, p, turn, seen)
            x = x + self.cross(x, text, mask, p)
            norm = F.layer_norm(x, x.shape[-1:], eps=1e-6)
            x = x + gate2 * self.ffn(norm * (1 + scale2) + shift2, p, grid, blocks)
        shift, scale = (self.w["final_layer.scale_shift_table"] + t[:, :, None]).repeat_interleave(space, 1).unbind(2)
        x = self.lin(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift, "final_layer.linear")
        x = x.view(b, *grid, *s.patch, -1)
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(latent.shape)
