"""ComfyUI's VAE object decoded by the core's operators: the same frames, whichever node asks, under ComfyUI's management."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from safetensors.torch import save_file

import inprocess as ip
from wanvae import random_vae


@pytest.fixture
def vae(world, tmp_path):
    """ComfyUI's VAE object of a width that the fused decoder takes."""
    path = tmp_path / "wan_16.safetensors"
    save_file({name: t.contiguous() for name, t in random_vae(16).state_dict().items()}, path)
    return ip.pack_module("nodes.loading").load_vae(str(path), world.spec)


@pytest.fixture
def allowed(world, monkeypatch):
    """The card's form of the fused decoder allowed on the CPU in float32, with the CPU's operators; counts its passes."""
    fused = ip.pack_module("sana_video_core.vae.fused")
    backends = fused.stream_latents.backends
    function, constraint = backends["triton"]
    monkeypatch.setitem(backends, "triton", (function, dataclasses.replace(
        constraint, devices=("cpu",), dtypes=(torch.float32,), triton=False)))
    monkeypatch.setattr(fused, "_free_memory", lambda device: 1 << 50)
    passes, call = [], fused.FusedDecoder.__call__
    monkeypatch.setattr(fused.FusedDecoder, "__call__", lambda self, latent, cache: (
        passes.append(latent.shape[2]), call(self, latent, cache))[1])
    return passes


def latents(frames: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 16, frames, 2, 3, generator=torch.Generator().manual_seed(frames))


@torch.inference_mode()
def test_decode_gives_the_frames_of_comfyuis_modules(vae, allowed):
    decode = ip.pack_module("nodes.decode")
    latent = latents(7, batch=2)
    found = decode.decode_frames(vae, latent)
    assert allowed == [1, 4, 2, 1, 4, 2]
    with ip.pack_module("sana_video_core.ops").force("reference"):
        expected = decode.decode_frames(vae, latent)
    assert len(allowed) == 6 and found.shape == (2 * 25, 16, 24, 3)
    assert torch.allclose(found, expected, atol=1e-5) and expected.std() > 0.1
    assert torch.allclose(found, vae.decode(latent).reshape(found.shape), atol=1e-5)


@torch.inference_mode()
def test_a_film_goes_on_where_it_was_and_after_a_resume(vae, allowed):
    import comfy.latent_formats

    stream = ip.pack_module("nodes.film").NativeStream(vae)
    latent = comfy.latent_formats.Wan21().process_in(latents(9))
    stream.start(None)
    pieces = [torch.cat(list(stream.decode(block))) for block in latent.split((3, 1, 5), 2)]
    assert [len(p) for p in pieces] == [9, 4, 20] and pieces[0].dtype == torch.uint8
    whole = ip.pack_module("nodes.decode").decode_frames(vae, latents(9))
    assert (torch.cat(pieces).int() - (whole * 255).int()).abs().max() <= 1
    stream.start(latent[:, :, :4])
    assert (torch.cat(list(stream.decode(latent[:, :, 4:]))).int() - pieces[2].int()).abs().max() <= 1
    with ip.pack_module("sana_video_core.ops").force("reference"):
        plain = ip.pack_module("nodes.film").NativeStream(vae)
    assert stream.key == f"{plain.key} triton"  # frames of two decoders never share a fragment's name


@torch.inference_mode()
def test_room_is_made_by_comfyui_before_the_work(vae, allowed, monkeypatch):
    import comfy.model_management as management

    asked = []
    monkeypatch.setattr(management, "load_models_gpu", lambda models, memory_required=0: asked.append((models, memory_required)))
    ip.pack_module("nodes.decode").decode_frames(vae, latents(5))
    needed = ip.pack_module("sana_video_core.vae.fused").memory_needed
    (models, memory), = asked
    assert models == [vae.patcher] and needed(2, 3, 2, 16) < memory < needed(2, 3, 2, 16) + 20e6


@torch.inference_mode()
def test_interrupt_and_lack_of_memory_reach_the_user(vae, allowed, monkeypatch):
    import comfy.model_management as management

    decode = ip.pack_module("nodes.decode")
    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        decode.decode_frames(vae, latents(5))
    assert not allowed

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ip.pack_module("sana_video_core.vae.fused").FusedDecoder, "__call__", full)
    with pytest.raises(ip.pack_module("sana_video_core.errors").SanaVideoError, match="Not enough memory.*Tiled"):
        decode.decode_frames(vae, latents(5))


@torch.inference_mode()
def test_a_patched_vae_and_one_of_another_width_use_comfyuis_modules(world, vae, allowed, tmp_path, caplog,
                                                                             monkeypatch):
    caplog.set_level(logging.INFO)
    module = ip.pack_module("nodes.fused_vae")
    assert module.fused_cache(vae)[1] == "triton"
    narrow = ip.pack_module("nodes.loading").load_vae(str(ip.tiny_vae(tmp_path / "wan_8.safetensors", dim=8)), world.spec)
    assert module.fused_cache(narrow)[1] == "onednn"
    vae.patcher.patches["decoder.conv1.weight"] = []
    assert module.fused_cache(vae) == (None, "") and "patched" in caplog.text
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert module.fused_cache(narrow) == (None, "") and "multiples of 16" in caplog.text and "without oneDNN" in caplog.text


@torch.inference_mode()
def test_a_cpu_decodes_clips_and_films_by_onednn(vae):
    decode, ops = ip.pack_module("nodes.decode"), ip.pack_module("sana_video_core.ops")
    assert ip.pack_module("nodes.fused_vae").fused_cache(vae)[1] == "onednn"
    found = decode.decode_frames(vae, latents(4))
    with ops.force("reference"):
        assert torch.allclose(found, decode.decode_frames(vae, latents(4)), atol=1e-5)
    assert torch.allclose(found, vae.decode(latents(4)).reshape(found.shape), atol=1e-5)
    assert ip.pack_module("nodes.film").NativeStream(vae).key.endswith(" onednn")


@torch.inference_mode()
def test_a_model_that_lies_where_it_should_is_not_loaded_again(vae, allowed, monkeypatch):
    """Nor is one trusted that core has moved, patched or left without the memory it needs."""
    import comfy.model_management as management

    bring, calls, plain = ip.pack_module("nodes.common").bring, [], management.load_models_gpu
    monkeypatch.setattr(management, "load_models_gpu", lambda models, **options: (calls.append(models), plain(models, **options)))
    for expected in (1, 1):
        bring(vae.patcher, 1 << 20)
        assert len(calls) == expected
    bring(vae.patcher, 1 << 60)
    assert len(calls) == 2
    management.unload_all_models()
    bring(vae.patcher, 1 << 20)
    assert len(calls) == 3
    vae.patcher.patches_uuid = "other"
    bring(vae.patcher, 1 << 20)
    assert len(calls) == 4
