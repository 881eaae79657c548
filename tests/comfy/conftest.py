"""ComfyUI in this process, with the pack loaded and tiny files in its folders."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import inprocess as ip


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """ComfyUI with the pack loaded and tiny files in its folders; the value is the network's spec."""
    work = tmp_path_factory.mktemp("comfy")
    ip.start(work)
    core = ip.pack_module("sana_video_core")
    spec = ip.tiny_spec(core)
    network = ip.pack_module("sana_video_core.dit").SanaVideoTransformer(spec)
    generator = torch.Generator().manual_seed(5)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    save_file(network.state_dict(), work / "diffusion_models" / "tiny.safetensors")
    ip.tiny_vae(work / "vae" / "wan_tiny.safetensors")
    ip.tiny_gemma(work / "text_encoders" / "gemma_tiny.safetensors")
    import folder_paths

    folder_paths.filename_list_cache.clear()
    world = type("World", (), {})()
    world.work, world.spec, world.network = work, spec, network.eval()
    return world
