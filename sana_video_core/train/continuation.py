"""The figure at the end of the long-video runs: how far a film that goes on from true latents leaves the true film.

Every motion of the world is determined by two blocks of it, so the truth is known. Uses the sampler of inference.
"""

from __future__ import annotations

import torch

from ..mini import WINDOW
from ..sampling.blocks import Condition, Recipe, prefill, sample_blocks
from ..sampling.guidance import Caption
from ..sampling.plan import BlockPlan
from .pieces import BASE, Pieces, empty_caption


@torch.no_grad()
def continuation_errors(network, pieces: Pieces, recipe: Recipe, window: int = WINDOW) -> str:
    """One line: mean squared error of the latents of each block after the first two, in parts of the variance in time.

    1 is as wrong as the film's own mean picture. ``pieces`` must have no cuts.
    """
    device = pieces.latents.device
    pick = torch.arange(len(pieces), device=device)
    text, mask = pieces.captions(pick)
    condition = Condition(Caption(text[:, 0], mask[:, 0]), Caption(text[:, 0], empty_caption(mask[:, 0])))
    film = pieces.latents.float().transpose(1, 2)
    past = (1 + BASE, BASE)
    options = {"spec": network.spec, "device": device, "window": window}
    state = prefill(network, film[:, :, :sum(past)], condition, lengths=past, cfg=recipe.cfg, **options)
    count = (film.shape[2] - sum(past)) // BASE
    plan = BlockPlan((BASE,) * count, state.blocks, state.position)
    spread = film.var(2, unbiased=False).mean()
    errors = []
    for block in sample_blocks(network, plan, condition, size=tuple(film.shape[3:]), recipe=recipe, seed=5, state=state,
                               batch=len(pieces), **options):
        truth = film[:, :, block.start:block.start + BASE]
        errors.append(float((block.latent - truth).square().mean() / spread))
    return f"continuation of {len(pieces)} films, {recipe.count} steps: error by block " + " ".join(f"{e:.4f}" for e in errors)
