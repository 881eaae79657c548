"""Small random checkpoints for the tests, in every naming and container."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from sana_video_core.checkpoint import convert
from sana_video_core.checkpoint.keys import key_table
from sana_video_core.specs import SPECS, ModelSpec

BASE = SPECS["sana-video-2b-480p"]


def small_spec(**changes) -> ModelSpec:
    """A network of a few thousand weights; its heads cannot be guessed from its width."""
    sizes = {"name": "small", "depth": 2, "width": 24, "linear_head_dim": 12, "cross_heads": 4, "ffn_hidden": 36,
             "caption_channels": 20} | changes
    return replace(BASE, **sizes)


def random_state(spec: ModelSpec, naming: str = "original", dtype=torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    """A complete state dict."""
    generator = torch.Generator().manual_seed(seed)
    state = {key: torch.randn(entry.original, generator=generator).to(dtype) for key, entry in key_table(spec).items()}
    return {key: tensor.contiguous() for key, tensor in convert(state, spec, naming).items()}


def meta_state(spec: ModelSpec, naming: str = "original") -> dict[str, torch.Tensor]:
    """A complete state dict without memory, of any size."""
    state = {key: torch.empty(entry.original, device="meta") for key, entry in key_table(spec).items()}
    return convert(state, spec, naming)


def shapes(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """{name: shape}."""
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def diffusers_config(spec: ModelSpec, class_name: str = "SanaVideoTransformer3DModel") -> dict:
    """The transformer/config.json that diffusers writes."""
    return {
        "_class_name": class_name, "in_channels": spec.channels, "out_channels": spec.channels,
        "num_attention_heads": spec.linear_heads, "attention_head_dim": spec.linear_head_dim, "num_layers": spec.depth,
        "num_cross_attention_heads": spec.cross_heads, "cross_attention_head_dim": spec.width // spec.cross_heads,
        "cross_attention_dim": spec.width, "caption_channels": spec.caption_channels,
        "mlp_ratio": spec.ffn_hidden / spec.width, "patch_size": list(spec.patch),
    }


def diffusers_folder(folder: Path, spec: ModelSpec, state: dict, shards: int = 1,
                     class_name: str = "SanaVideoTransformer3DModel") -> Path:
    """A diffusers repository with a transformer folder of one or several files."""
    inner = folder / "transformer"
    inner.mkdir(parents=True)
    (inner / "config.json").write_text(json.dumps(diffusers_config(spec, class_name)))
    if shards == 1:
        save_file(state, inner / "diffusion_pytorch_model.safetensors")
    else:
        sharded(inner, "diffusion_pytorch_model", state, shards)
    return folder


def sharded(folder: Path, stem: str, state: dict, shards: int) -> Path:
    """Shards and their index in ``folder``; returns the index."""
    names = sorted(state)
    weight_map = {}
    for n in range(shards):
        file = f"{stem}-{n + 1:05d}-of-{shards:05d}.safetensors"
        part = names[n::shards]
        save_file({key: state[key] for key in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """True when both hold the same names, dtypes and bits."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)
