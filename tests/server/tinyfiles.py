"""Tiny random model files in the official formats, and prompts for them. Made with the core alone: ComfyUI stays out."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import inprocess as ip
import sana_video_core as svc

WIDTH = 64  # of the tiny text encoder


def write_models(models: Path) -> None:
    """tiny.safetensors and tiny.pth (the same weights), wan_tiny.safetensors, gemma_tiny.safetensors in their folders."""
    from sana_video_core import checkpoint, dit

    spec = ip.tiny_spec(svc)
    generator = torch.Generator().manual_seed(5)
    state = {name: torch.randn(p.shape, generator=generator) * 0.1
             for name, p in dit.SanaVideoTransformer(spec).state_dict().items()}
    save_file(state, models / "diffusion_models" / "tiny.safetensors")
    torch.save({"state_dict": checkpoint.convert(state, spec, to="original")}, models / "diffusion_models" / "tiny.pth")
    write_vae(models / "vae" / "wan_tiny.safetensors")
    write_text_encoder(models / "text_encoders" / "gemma_tiny.safetensors")


def write_vae(path: Path) -> None:
    from sana_video_core.vae.wan import WanVAE

    torch.manual_seed(1)
    network = WanVAE(dim=8)
    state = {name: torch.randn(p.shape) * 0.05 if p.ndim > 3 else torch.ones(p.shape)
             for name, p in network.state_dict().items()}
    save_file(state, path)


def write_text_encoder(path: Path) -> None:
    from sana_video_core.text.gemma import Gemma2, GemmaConfig

    config = GemmaConfig(vocab_size=256, hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=3,
                         num_attention_heads=2, num_key_value_heads=1, head_dim=256)
    torch.manual_seed(2)
    state = {name: torch.randn(p.shape) * (0.1 if p.ndim > 1 else 0.02) for name, p in Gemma2(config).state_dict().items()}
    state["spiece_model"] = torch.frombuffer(bytearray(ip.tiny_tokenizer()), dtype=torch.uint8).clone()
    save_file(state, path, metadata={"config": config.to_json()})


def prompt(steps: int = 3, seed: int = 1, width: int = 64, height: int = 32, frames: int = 9, text: str = "a red ball",
           **changes: dict) -> dict:
    """An API prompt with the tiny files: loader 1, text 2, latent 3, KSampler 4, decode 5, SaveLatent 6, SaveImage 7.

    ``changes``: {"n3": {"width": ...}} puts inputs into a node.
    """
    graph = {
        "1": ip.node("SanaVideoLoader", model="tiny.safetensors", precision="auto", mode="auto",
                     text_encoder="gemma_tiny.safetensors", vae="wan_tiny.safetensors"),
        "2": ip.node("SanaVideoTextEncode", clip=("1", 1), prompt=text, negative_prompt="a blue square", motion_score=10,
                     instruction=True),
        "3": ip.node("SanaVideoEmptyLatent", model=("1", 0), width=width, height=height, frames=frames, batch_size=1),
        "4": ip.node("KSampler", model=("1", 0), seed=seed, steps=steps, cfg=4.0, sampler_name="euler", scheduler="simple",
                     positive=("2", 0), negative=("2", 1), latent_image=("3", 0), denoise=1.0),
        "5": ip.node("SanaVideoDecode", samples=("4", 0), vae=("1", 2)),
        "6": ip.node("SaveLatent", samples=("4", 0), filename_prefix="tiny"),
        "7": ip.node("SaveImage", images=("5", 0), filename_prefix="tiny"),
    }
    for key, inputs in changes.items():
        graph[key.removeprefix("n")]["inputs"].update(inputs)
    return graph


def saved_latent(server, outcome) -> torch.Tensor:
    """The tensor that the prompt's SaveLatent wrote."""
    file = next(item for item in outcome.files() if item["filename"].endswith(".latent"))
    return load_file(server.base / "output" / file["subfolder"] / file["filename"])["latent_tensor"]
