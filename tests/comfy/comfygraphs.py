"""Graphs of the in-process tests and small tools around them; ``world`` (conftest.py) provides the files they name."""

from __future__ import annotations

import itertools

import torch

import inprocess as ip
from inprocess import node

STEPS = 3
CLOSE = 3e-4  # three guided steps of a random network amplify the rounding of another batch size


def graph(model="tiny.safetensors", precision="auto", prompt="a red ball", width=64, height=32, frames=9, **extra):
    """Nodes 1-3 (loader, text, latent) and the given further nodes; SaveLatent makes node 4 run."""
    base = {
        "1": node("SanaVideoLoader", model=model, precision=precision, mode="auto", text_encoder="gemma_tiny.safetensors",
                  vae="wan_tiny.safetensors"),
        "2": node("SanaVideoTextEncode", clip=("1", 1), prompt=prompt, negative_prompt="a blue square", motion_score=10,
                  instruction=True),
        "3": node("SanaVideoEmptyLatent", model=("1", 0), width=width, height=height, frames=frames, batch_size=1),
    }
    base.update({key.lstrip("n"): value for key, value in extra.items()})
    base["99"] = node("SaveLatent", samples=("4", 0), filename_prefix="x")
    return base


def ksampler(**changes):
    """A KSampler on nodes 1-3."""
    inputs = {"model": ("1", 0), "seed": 1, "steps": STEPS, "cfg": 4.0, "sampler_name": "euler", "scheduler": "simple",
              "positive": ("2", 0), "negative": ("2", 1), "latent_image": ("3", 0), "denoise": 1.0}
    return node("KSampler", **(inputs | changes))


def sampled(outcome):
    """The latent of node 4 of a run that must have worked."""
    assert outcome.ok, outcome.error
    latent = outcome.output("4")["samples"]
    assert torch.isfinite(latent).all()
    return latent


def by_hand(world, positive, negative, sigmas, cfg, noise, step):
    """A plain loop over the core's network in the normalised space; ``step(x, v, sigma, after)`` gives the next x."""
    mean, std = (torch.tensor(v).view(1, 16, 1, 1, 1) for v in (
        ip.pack_module("sana_video_core.vae.wan").WAN21_MEAN, ip.pack_module("sana_video_core.vae.wan").WAN21_STD))
    x = noise
    with torch.no_grad():
        for sigma, after in itertools.pairwise(sigmas):
            time = sigma.expand(1) * 1000
            v = [world.network(x, time, c[0][0], c[0][1]["attention_mask"]) for c in (negative, positive)]
            x = step(x, v[0] + cfg * (v[1] - v[0]), sigma, after)
    return x * std + mean


def relative(a, b):
    return float((a - b).norm() / b.norm())


def advanced(solver, schedule, cfg=4.0, steps=STEPS):
    return {
        "n10": node("SanaVideoSampler", solver=solver),
        "n11": node("SanaVideoSigmas", model=("1", 0), schedule=schedule, steps=steps, denoise=1.0),
        "n12": node("RandomNoise", noise_seed=1),
        "n13": node("CFGGuider", model=("1", 0), positive=("2", 0), negative=("2", 1), cfg=cfg),
        "n4": node("SamplerCustomAdvanced", noise=("12", 0), guider=("13", 0), sampler=("10", 0), sigmas=("11", 0),
                   latent_image=("3", 0)),
    }
