"""Block-causal training in one forward pass: every block of a film beside its own noisy copy, no loop over blocks.

A row of a batch holds ``F`` latent frames: the blocks of a piece of film as *history* (what a state would hold: clean, time
0), and the later ones again as *targets* (noisy). A target reads the history blocks that a state with this window would
hold, and itself; a history block reads the ones before it, as its own commit did. So one pass trains all targets under the
conditions of sampling. Which frame reads which is data (:class:`Layout`), per row, so one compiled graph serves all of it.
The network is the one network: three of its operators are replaced for the length of a run (causal spec 1.1, 1.2, 2).
Not covered: noise and losses (``causal.py``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SanaVideoError
from ..ops import reference
from ..ops.reference import Contribution
from .fast import replaced_operators


class Arrangement(NamedTuple):
    """The frames of one kind of row, ``[F]`` or ``[F, F]`` each, on the CPU; frames at the end may be padding.

    ``source``: frame of the piece, counted from the row's first; ``block``: its block (-1: padding); ``target``: True in the
    noisy copies; ``reads``, ``before``, ``after``: see :class:`Layout`.
    """

    source: Tensor
    block: Tensor
    target: Tensor
    reads: Tensor
    before: Tensor
    after: Tensor

    @property
    def blocks(self) -> int:
        return int(self.block.max()) + 1


class Layout(NamedTuple):
    """Who reads what, for every row of a batch.

    ``reads [B, F, F]``: 1 where frame i reads the attention sums of frame j. ``before``, ``after`` ``[B, F, F]``: one 1 a
    row for the left and the right neighbour in time, none where there are zeros. ``text [B, F, K]``: one 1 for the caption, of
    the K in the row, that a frame reads. ``cos``, ``sin`` ``[B, F, S, D/2]``: the rotary table of each frame's place.
    """

    reads: Tensor
    before: Tensor
    after: Tensor
    text: Tensor
    cos: Tensor
    sin: Tensor


def arrange(lengths: Sequence[int], first: int, window: int, frames: int = 0) -> Arrangement:
    """History of all blocks of ``lengths`` but the last, then targets from block ``first`` on, padded to ``frames``.

    ``window``: as in :class:`~sana_video_core.state.RecurrentState` (0 = all history).
    """
    copies = [(i, False) for i in range(len(lengths) - 1)] + [(i, True) for i in range(first, len(lengths))]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    used = sum(lengths[i] for i, _ in copies)
    total = frames or used
    if not 0 <= first < len(lengths) or total < used:
        raise SanaVideoError("The blocks do not fit a training row", found=f"{used} frames, first target {first}",
                             expected=f"at most {total} frames and a target below {len(lengths)}")
    at, ranges = 0, {}
    for copy in copies:
        ranges[copy] = (at, at + lengths[copy[0]])
        at = ranges[copy][1]
    source, block = torch.zeros(total, dtype=torch.int64), torch.full((total,), -1)
    target = torch.zeros(total, dtype=torch.bool)
    reads, before, after = torch.eye(total), torch.zeros(total, total), torch.zeros(total, total)
    for (i, noisy), (a, b) in ranges.items():
        source[a:b], block[a:b], target[a:b] = torch.arange(starts[i], starts[i] + b - a), i, noisy
        for j in [(j, False) for j in range(max(0, i - window) if window else 0, i)] + [(i, noisy)]:
            reads[a:b, slice(*ranges[j])] = 1
        inner = torch.arange(a, b - 1)
        before[inner + 1, inner] = 1
        after[inner, inner + 1] = 1
        if i:
            before[a, ranges[i - 1, False][1] - 1] = 1
    return Arrangement(source, block, target, reads, before, after)


class BlockCausal:
    """The three operators that look across frames or at the text, following ``self.layout``."""

    def __init__(self):
        self.layout: Layout | None = None

    def attention(
        self, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, heads: int,
        history: Contribution | None = None, *, parity: bool = False, norm_eps: float = 1e-5,
        eps: float = reference.ATTENTION_EPS, given: None = None,
    ) -> tuple[Tensor, Contribution]:
        """As ``reference.linear_attention`` (quality), with the sums of each frame ``[B, F, H, D, D]`` added as the layout
        says; float32 whatever autocast says. ``cos`` and ``sin`` are not read: both copies of a frame have one place. The
        contribution returned is that of the frames."""
        reads, angles = self.layout.reads, [t.flatten(0, 2) for t in (self.layout.cos, self.layout.sin)]
        batch, frames, _ = reads.shape
        with torch.autocast(qkv.device.type, enabled=False):
            q, k, v = (t.float() for t in qkv.chunk(3, -1))
            q = F.relu(reference.rms_norm(q, q_weight, norm_eps)).unflatten(-1, (heads, -1))
            k = F.relu(reference.rms_norm(k, k_weight, norm_eps)).unflatten(-1, (heads, -1))
            turned = [reference.rotate(t.flatten(0, 1), *angles).unflatten(0, (batch, frames, -1)) for t in (q, k)]
            q_rot, k_rot = (t.transpose(2, 3) for t in turned)  # [B, F, H, S, D]
            q, k, v = (t.unflatten(1, (frames, -1)).transpose(2, 3) for t in (q, k, v.unflatten(-1, (heads, -1))))
            vk, ksum = v.transpose(-1, -2) @ k_rot, k.sum(-2, True)
            seen_vk, seen_ksum = ((reads @ t.flatten(2)).view_as(t) for t in (vk, ksum))
            out = (q_rot @ seen_vk.transpose(-1, -2)) / (q @ seen_ksum.transpose(-1, -2) + eps)
            return out.transpose(2, 3).flatten(3).flatten(1, 2).to(qkv.dtype), Contribution(vk, ksum)

    def taps(self, u: Tensor, frames: int, tail: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As ``reference.temporal_taps``; the neighbours are those of the layout. Products with 0 and 1 are exact."""
        x = u.unflatten(1, (frames, -1))
        left, right = ((m.to(u.dtype) @ x.flatten(2)).view_as(x) for m in (self.layout.before, self.layout.after))
        return torch.cat((left, x, right), -1).flatten(1, 2), x[:, -1:]

    def cross(
        self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, lengths=None, norm=None, given=None,
    ) -> Tensor:
        """As ``reference.softmax_attention``; the K captions of a row stand one after another and a frame reads its own."""
        text = self.layout.text
        batch, frames, captions = text.shape
        k, v = ((text.to(t.dtype) @ t.unflatten(1, (captions, -1)).flatten(2)).view(batch * frames, -1, t.shape[-1])
                for t in (k, v))
        own = mask.unflatten(1, (captions, -1))  # [B, K, L]
        seen = (text.bool()[..., None] & own[:, None]).any(2).flatten(0, 1)
        out = reference.softmax_attention(q.unflatten(1, (frames, -1)).flatten(0, 1), k, v, heads, seen, norm=norm)
        return out.unflatten(0, (batch, frames)).flatten(1, 2)


@contextlib.contextmanager
def block_causal_operators() -> Iterator[BlockCausal]:
    """Within the block the network runs by the ``layout`` of what is handed out; set it before every call."""
    own = BlockCausal()
    with replaced_operators(linear_attention=own.attention, temporal_taps=own.taps, softmax_attention=own.cross):
        yield own
