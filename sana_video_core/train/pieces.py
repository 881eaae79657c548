"""Pieces of endless film for block-causal training: latents of one scene, or of one that is cut to another at a block border.

A piece begins as a film does (its first latent frame holds one pixel frame) and is encoded in one go, so the latents at a cut
are what the causal VAE makes of it. The encoder forgets within 11 latent frames (measured on the shipped VAE: what a piece
does not know of the frames before it changes latents by 0.03 at frame 5, 0.0003 at frame 10, of a std of 0.97), so what
follows the first block is also good as the middle of a film. Captions are embedded once: the text encoder stays as it is.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from ..mini.render import render
from ..mini.world import Scene
from ..text.encode import TextEncoder, pad_rows
from ..vae.wan import WanVAE, normalize
from .data import CAPTIONS, TOKENS, training_scene, wordings
from .vae import to_unit

BASE = 10  # latent frames a block (``spec.block_frames``); the first block of a film has one more
CAPTIONED = 2  # captions a piece: before and after its cut (twice the same scene where it has none)


@dataclass
class Pieces:
    """``latents [N, L, C, h, w]`` half precision in the network's space; ``cut [N]`` first latent frame of the second scene
    (L: there is none); ``text [N, 2, CAPTIONS, TOKENS, D]`` half precision and ``mask`` the same without D: the captions."""

    latents: Tensor
    cut: Tensor
    text: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.latents)

    def captions(self, pick: Tensor) -> tuple[Tensor, Tensor]:
        """(text ``[B, 2, TOKENS, D]`` float32, mask ``[B, 2, TOKENS]`` bool) of a random wording of each piece."""
        wording = torch.randint(self.text.shape[2], pick.shape, device=pick.device)
        return self.text[pick, :, wording].float(), self.mask[pick, :, wording].clone()

    def draw(self, size: int) -> Tensor:
        """Random piece numbers ``[size]``."""
        return torch.randint(len(self), (size,), device=self.latents.device)

    def draw_uncut(self, size: int, frames: int) -> Tensor:
        """Random numbers of pieces that show one scene in their first ``frames`` latent frames."""
        whole = (self.cut >= frames).nonzero()[:, 0]
        if not len(whole):
            raise ValueError(f"none of {len(self)} pieces goes on without a cut for {frames} latent frames: make more of them")
        return whole[torch.randint(len(whole), (size,), device=whole.device)]


def empty_caption(mask: Tensor) -> Tensor:
    """The mask of an empty caption: the begin mark only. The encoder is causal, so the first row is the same in both."""
    out = torch.zeros_like(mask)
    out[..., 0] = mask[..., 0]
    return out


def cut_video(scenes: list[Scene], others: list[Scene | None], cuts: list[int], frames: int, device, stride: int = 4) -> Tensor:
    """uint8 ``[B, frames, H, W, 3]``: each scene, from the pixel frame of latent frame ``cut`` on the other one (if any).

    The second scene is shown at the same time of the film, which is a random phase of it.
    """
    video = render(scenes, frames=frames, device=device)
    rows = [i for i, other in enumerate(others) if other is not None]
    if rows:
        second = render([others[i] for i in rows], frames=frames, device=device)
        for row, film in zip(rows, second):
            first = 1 + (cuts[row] - 1) * stride
            video[row, first:] = film[first:]
    return video


@torch.no_grad()
def make_pieces(vae: WanVAE, text: TextEncoder, count: int, seed: int, device, blocks: int, switch: float = 0.15,
                chunk: int = 8) -> Pieces:
    """Render, encode and caption ``count`` pieces of ``blocks`` blocks; a share ``switch`` of them is cut at a block border.

    With ``blocks`` 0 only captions are made: the latents have the right size and no frames.
    """
    rng = random.Random(seed)
    length = 1 + BASE * blocks if blocks else 0
    latents, rows, cuts = [], [], []
    for first in range(0, count, chunk):
        scenes = [training_scene(rng) for _ in range(min(chunk, count - first))]
        others = [training_scene(rng) if blocks > 1 and rng.random() < switch else None for _ in scenes]
        own = [length if other is None else 1 + BASE * rng.randrange(1, blocks) for other in others]
        video = to_unit(cut_video(scenes, others, own, 1 + 4 * max(length - 1, 0), device).permute(0, 4, 1, 2, 3))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            raw = vae.encode_parallel(video)[0]
        latents.append(normalize(raw.float()).half().transpose(1, 2)[:, :length])
        cuts += own
        for scene, other in zip(scenes, others):
            rows += wordings(scene, rng, text.tokenizer) + wordings(other or scene, rng, text.tokenizer)
    assert max(map(len, rows)) <= TOKENS, "a caption is longer than TOKENS"
    ids, mask = (t.to(device) for t in pad_rows(rows, TOKENS))
    embedded = torch.cat([text.network(i, m).half() for i, m in zip(ids.split(1024), mask.split(1024))])
    shape = (count, CAPTIONED, CAPTIONS, TOKENS)
    return Pieces(torch.cat(latents).contiguous(), torch.tensor(cuts, device=device), embedded.view(*shape, -1),
                  mask.view(shape).bool())
