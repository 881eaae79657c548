"""The training set of the clip model: latents of rendered clips with several captions each, made once and kept on the GPU."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from ..mini.captions import caption
from ..mini.render import render
from ..mini.world import Scene, random_scene
from ..text.encode import Tokenizer, pad_rows
from ..text.prompts import motion_suffix
from ..vae.wan import WanVAE, normalize
from .vae import to_unit

TOKENS = 48  # of every caption row; at inference rows are padded to 300 and masked, which is the same
CAPTIONS = 4  # wordings a clip
CROSSING = 0.3  # share of scenes that are drawn until something crosses the picture


@dataclass
class ClipSet:
    """``latents [N, 16, T, h, w]`` half precision in the DiT's space; ``ids`` and ``mask [N, CAPTIONS, TOKENS]``."""

    latents: Tensor
    ids: Tensor
    mask: Tensor

    def batch(self, size: int, drop: float) -> tuple[Tensor, Tensor, Tensor]:
        """(latent float32, ids, mask) of random clips; a share ``drop`` of the captions is empty (begin mark only)."""
        device = self.latents.device
        pick = torch.randint(len(self.latents), (size,), device=device)
        wording = torch.randint(self.ids.shape[1], (size,), device=device)
        ids, mask = self.ids[pick, wording], self.mask[pick, wording].clone()
        mask[torch.rand(size, device=device) < drop, 1:] = 0
        return self.latents[pick].float(), ids, mask


def training_scene(rng: random.Random) -> Scene:
    """A scene of the training world; things that cross the picture, the hardest ones, come more often."""
    scene = random_scene(rng)
    if rng.random() < CROSSING:
        while not any(thing.motion in ("right", "left") for thing in scene.things):
            scene = random_scene(rng)
    return scene


def wordings(scene, rng: random.Random, tokenizer: Tokenizer) -> list[list[int]]:
    """Token rows of one scene's captions; half of them carry the motion score that the text node adds by default."""
    return [tokenizer(caption(scene, rng) + (motion_suffix(10) if n % 2 else "")) for n in range(CAPTIONS)]


@torch.no_grad()
def make_clips(vae: WanVAE, tokenizer: Tokenizer, count: int, seed: int, device, frames: int = 81, chunk: int = 16) -> ClipSet:
    """Render, encode and caption ``count`` clips of ``frames`` pixel frames."""
    rng = random.Random(seed)
    latents, rows = [], []
    for first in range(0, count, chunk):
        scenes = [training_scene(rng) for _ in range(min(chunk, count - first))]
        video = to_unit(render(scenes, frames=frames, start=0, device=device).permute(0, 4, 1, 2, 3))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            raw = vae.encode_parallel(video)[0]
        latents.append(normalize(raw.float()).half())
        for scene in scenes:
            rows += wordings(scene, rng, tokenizer)
    assert max(map(len, rows)) <= TOKENS, "a caption is longer than TOKENS"
    ids, mask = pad_rows(rows, TOKENS)
    shape = (count, CAPTIONS, TOKENS)
    return ClipSet(torch.cat(latents), ids.view(shape).to(device), mask.view(shape).to(device))
