"""Gemma-2 as SANA-Video's text encoder, of any size, in plain torch (vae/text spec 4.2-4.3).

The decoder stack only: the last hidden state after the final norm is the caption embedding. Key names are
``model.layers.N....`` as in transformers and ComfyUI. The attention soft-cap is off by default: the library versions that
SANA-Video was trained and published with did not apply it (vae/text spec 4.2). Not covered: tokens (``encode.py``),
generation, sliding windows (prompts are far shorter than the 4,096 of the public model).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError


@dataclass(frozen=True)
class GemmaConfig:
    """Sizes; the defaults are gemma-2-2b. ``query_pre_attn_scalar`` None means the head dimension."""

    vocab_size: int = 256000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    query_pre_attn_scalar: float | None = None
    softcap: float | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> GemmaConfig:
        """Read our own or a transformers config; unknown entries are ignored."""
        try:
            data = json.loads(text)
            known = {f.name for f in fields(cls)}
            return cls(**{k: v for k, v in data.items() if k in known})
        except (ValueError, AttributeError, TypeError) as e:
            raise CheckpointError("The text encoder's config cannot be read", found=str(e)) from None


# The embedded text encoder. ComfyUI fixes Gemma-2's head dimension at 256, so one wide head serves both.
MINI_CONFIG = GemmaConfig(vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=3,
                          num_attention_heads=1, num_key_value_heads=1, head_dim=256)


class GemmaNorm(nn.Module):
    """RMSNorm with weight ``1 + w``, in float32."""

    def __init__(self, width: int, eps: float, **kw):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.zeros(width, **kw))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * (1 + self.weight.float())).to(x.dtype)


class _Attention(nn.Module):
    def __init__(self, c: GemmaConfig, **kw):
        super().__init__()
        self.c = c
        wide, narrow = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, wide, bias=False, **kw)
        self.k_proj = nn.Linear(c.hidden_size, narrow, bias=False, **kw)
        self.v_proj = nn.Linear(c.hidden_size, narrow, bias=False, **kw)
        self.o_proj = nn.Linear(wide, c.hidden_size, bias=False, **kw)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.c.head_dim)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = _rotate_halves(q, *angles), _rotate_halves(k, *angles)
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scale = (self.c.query_pre_attn_scalar or self.c.head_dim) ** -0.5
        if self.c.softcap:
            scores = torch.tanh((q @ k.transpose(-1, -2)) * scale / self.c.softcap) * self.c.softcap
            y = scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32).to(v.dtype) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return self.o_proj(y.transpose(1, 2).flatten(2))


def _rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class _MLP(nn.Module):
    def __init__(self, c: GemmaConfig, **kw):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False, **kw)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False, **kw)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False, **kw)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class _Layer(nn.Module):
    def __init__(self, c: GemmaConfig, **kw):
        super().__init__()
        self.self_attn, self.mlp = _Attention(c, **kw), _MLP(c, **kw)
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            setattr(self, f"{name}_layernorm", GemmaNorm(c.hidden_size, c.rms_norm_eps, **kw))

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), angles, mask))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class _Stack(nn.Module):
    def __init__(self, c: GemmaConfig, **kw):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size, **kw)
        self.layers = nn.ModuleList(_Layer(c, **kw) for _ in range(c.num_hidden_layers))
        self.norm = GemmaNorm(c.hidden_size, c.rms_norm_eps, **kw)


class Gemma2(nn.Module):
    """``[B, L]`` token ids and mask to ``[B, L, hidden]``: the last hidden state after the final norm."""

    def __init__(self, config: GemmaConfig, dtype: torch.dtype | None = None, device=None):
        super().__init__()
        self.config = config
        self.model = _Stack(config, dtype=dtype, device=device)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """mask 1 = valid; padding on the right. Rows at padded positions are defined but mean nothing."""
        x = self.model.embed_tokens(ids)
        x = x * x.new_full((), self.config.hidden_size ** 0.5)
        length = ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        allowed = causal & mask.bool()[:, None, None, :]
        angles = self._angles(length, x)
        for layer in self.model.layers:
            x = layer(x, angles, allowed)
        return self.model.norm(x)

    def _angles(self, length: int, x: Tensor) -> tuple[Tensor, Tensor]:
        half = torch.arange(0, self.config.head_dim, 2, dtype=torch.float32, device=x.device) / self.config.head_dim
        angle = torch.arange(length, dtype=torch.float32, device=x.device)[:, None] * self.config.rope_theta ** -half
        angle = torch.cat((angle, angle), -1)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)
