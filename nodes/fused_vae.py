"""ComfyUI's Wan VAE through the core's decoder of operators: on a CPU in float32, on a CUDA card in bfloat16.

The VAE object stays ComfyUI's. It chooses the precision (``vae_dtype``: bfloat16 where the card has it; with --fp32-vae or
--fp16-vae its own modules decode), and its memory management makes room before every call. The fused decoder reads the weights
out of its modules, wherever they lie, and keeps the decoder's in its own layout (147 MB in bfloat16) for one video.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from ..sana_video_core.errors import SanaVideoError
from .common import bring

log = logging.getLogger(__name__)


def fused_cache(vae):
    """(a new cache for decoding a video of ``vae``, a Wan VAE, with the core's decoder; the name of its backend).

    (None, "") where it cannot, said in the log."""
    import torch

    from ..sana_video_core.vae.fused import stream_latents
    from ..sana_video_core.vae.wan import WanCache

    cache, probe = WanCache(), torch.empty(1, vae.latent_channels, 1, 1, 1, device=vae.device, dtype=vae.vae_dtype)
    backend, _, reasons = stream_latents.choose(probe, vae.first_stage_model, cache)
    if backend != "reference" and not vae.patcher.patches:
        return cache, backend
    log.info("ComfyUI's own modules decode: %s", "the VAE is patched" if backend != "reference" else
             "; ".join(reasons.values()) or "the plain decoder was asked for")
    return None, ""


def fused_frames(vae, latent, cache, action: str) -> Iterator:
    """Pixels ``[1, 3, 1 or 4, H, W]`` of each frame of a raw latent ``[1, C, T, H, W]``, on the device in the VAE's dtype.

    ``action``: what the user can do where the memory does not suffice.
    """
    import comfy.model_management as management

    from ..sana_video_core.vae.fused import memory_needed, stream_latents

    network = vae.first_stage_model
    width = network.decoder.head[0].gamma.shape[0]
    # For two latent frames a pass: more are taken where there is room, but no model has to leave for them.
    room = memory_needed(*latent.shape[3:], 2 if latent.shape[2] > 1 else 1, width)
    weights = sum(p.numel() for p in network.decoder.parameters()) * management.dtype_size(vae.vae_dtype)
    bring(vae.patcher, room + weights)
    frames = stream_latents(latent.to(vae.device, vae.vae_dtype), network, cache)
    while True:
        management.throw_exception_if_processing_interrupted()
        try:
            with management.cuda_device_context(vae.device):
                piece = next(frames, None)
        except Exception as error:
            management.raise_non_oom(error)
            raise SanaVideoError("Not enough memory to decode the video exactly", action=action,
                                 found=f"{latent.shape[4]}x{latent.shape[3]} latents") from error
        if piece is None:
            return
        yield piece
