"""A stand-in for the embedded causal model: the same calls, tiny random weights, blocks of two latent frames.

As a program (``python minifilm.py BLOCK STEP ARGUMENTS``) it is ``run.py film`` on it, and ends in that step of that block as
abruptly as by a kill.
"""

from __future__ import annotations

import os
import sys
from functools import lru_cache
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    import conftest  # noqa: F401  (makes the core importable)

import torch
from torch import nn

from longvideo import tiny_model, tiny_spec, tiny_vae
from sana_video_core.dit import SanaVideoTransformer
from sana_video_core.mini import film
from sana_video_core.text.prompts import positive_text

SPEC = tiny_spec(name="tiny-mini-long", size=(48, 32), block_frames=2, flow_shift=3.0, cfg=1.0, steps=4)


class Text:
    """Random rows that depend on the whole text."""

    def __init__(self):
        self.network = nn.Linear(2, 2)
        nn.init.eye_(self.network.weight)
        nn.init.zeros_(self.network.bias)

    def _rows(self, texts):
        rows = [torch.randn(5, 8, generator=torch.Generator().manual_seed(sum(map(ord, t)) + len(t))) for t in texts]
        return torch.stack(rows), torch.ones(len(rows), 5, dtype=torch.int64)

    def positive(self, prompts, motion_score=10):
        return self._rows([positive_text(p, motion_score) for p in prompts])

    def negative(self, prompts):
        return self._rows(prompts)


@lru_cache(maxsize=1)
def parts():
    """(network, text encoder, VAE), as ``mini.load`` gives them."""
    network = SanaVideoTransformer(SPEC).eval()
    network.load_state_dict(tiny_model().state_dict())
    network.requires_grad_(False)
    return network, Text(), tiny_vae()


def model() -> film.LongModel:
    return film.LongModel(*parts())


if __name__ == "__main__":
    at = int(sys.argv[1]), int(sys.argv[2])
    film.load = lambda *args, **options: parts()
    film.Progress.step = lambda self, block, step, steps, x0: (block, step) == at and os._exit(9)
    sys.exit(film.main(sys.argv[3:]))
