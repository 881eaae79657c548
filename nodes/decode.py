"""LATENT to IMAGE, latent frame group by group: exact, interruptible, with bounded memory.

The Wan decoder is a loop over latent frames with a cache of past activations, so decoding in groups gives the very
same pixels as one call (vae/text spec 1.5, 1.7). Not covered: films (the decoder there writes to a file).
"""

from __future__ import annotations

from collections.abc import Iterator

from comfy_api.latest import io

from ..sana_video_core.errors import SanaVideoError
from .common import CATEGORY, describe_vae, require_part, vae_geometry


class SanaVideoDecode(io.ComfyNode):
    """Streaming decode of short clips into one IMAGE batch."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SanaVideoDecode",
            display_name="SANA-Video Decode",
            category=CATEGORY,
            description="Turns the sampled latent into frames, a few at a time, exactly as in one go but with less memory. "
                        "Shows progress and can be cancelled at any time.",
            search_aliases=["vae decode", "latent to video", "streaming decode"],
            inputs=[
                io.Latent.Input("samples", tooltip="The latent from the sampler."),
                io.Vae.Input("vae", tooltip="VAE of 'Load SANA-Video', or of 'Load VAE'. 480p: Wan 2.1, 720p: LTX-2."),
            ],
            outputs=[io.Image.Output(display_name="frames", tooltip="All frames in order; connect to 'Create Video'.")],
        )

    @classmethod
    def execute(cls, samples, vae) -> io.NodeOutput:
        require_part(vae, "VAE", "Choose a VAE in 'Load SANA-Video', or connect 'Load VAE'")
        latent = samples["samples"]
        check_fit(latent, vae)
        return io.NodeOutput(decode_frames(vae, latent))


def check_fit(latent, vae) -> None:
    """Refuse a latent that the VAE was not made for."""
    geometry = vae_geometry(vae)
    if getattr(latent, "is_nested", False) or latent.ndim != 5:
        raise SanaVideoError("This latent is not a video latent", found=f"shape {list(getattr(latent, 'shape', []))}",
                             expected="[batch, channels, frames, height, width]",
                             action="Connect the LATENT of the sampler that the SANA-Video model ran in")
    if geometry is None or geometry[0] != latent.shape[1]:
        raise SanaVideoError(
            "The VAE does not fit the latent", expected=f"{latent.shape[1]} channels",
            found="a VAE without video latents" if geometry is None else describe_vae(geometry),
            action="16 channels: choose wan_2.1_vae.safetensors; 128 channels: the LTX-2 video VAE (models/vae)")
    strides = {16: (4, 8, 8), 128: (8, 32, 32)}
    wanted = strides.get(latent.shape[1])
    if wanted and geometry[1] != wanted:
        raise SanaVideoError("The VAE's stride does not fit the latent", found=describe_vae(geometry),
                             expected=describe_vae((latent.shape[1], wanted)),
                             action="Choose the VAE that belongs to the model (see the table in the README)")


def decode_frames(vae, latent):
    """IMAGE ``[B * frames, H, W, 3]`` in 0..1 for a raw LATENT ``[B, C, T, H, W]``."""
    import comfy.ldm.wan.vae
    import torch

    if not isinstance(vae.first_stage_model, comfy.ldm.wan.vae.WanVAE):
        frames = vae.decode(latent)  # other decoders bring their own way to bound memory
        return frames.reshape(-1, *frames.shape[-3:])
    time, stride = vae_geometry(vae)[1][:2]
    count = 1 + (latent.shape[2] - 1) * time
    height, width = latent.shape[3] * stride, latent.shape[4] * stride
    frames = torch.empty((latent.shape[0], count, height, width, 3), device=vae.output_device,
                         dtype=vae.vae_output_dtype())
    for row in range(latent.shape[0]):
        position = 0
        for group in stream(vae, latent[row:row + 1], latent.shape[0], row):
            frames[row, position:position + len(group)] = group
            position += len(group)
    return frames.reshape(-1, height, width, 3)


def stream(vae, latent, rows: int = 1, row: int = 0) -> Iterator:
    """Groups of frames ``[n, H, W, 3]`` of one latent ``[1, C, T, H, W]``: first 1 frame, then 8 at a time.

    The first group must hold one latent frame and every later one two; only the last may hold one (vae/text spec 1.7).
    """
    import comfy.model_management as management
    import comfy.utils
    from comfy.ldm.wan.vae import count_cache_layers

    network = vae.first_stage_model
    # Sized for a group, not for the clip: that is what lets a long clip decode on a small card.
    need = vae.memory_used_decode((1, latent.shape[1], min(latent.shape[2], 3), *latent.shape[3:]), vae.vae_dtype)
    management.load_models_gpu([vae.patcher], memory_required=need)
    starts = [0, *range(1, latent.shape[2], 2)]
    progress = comfy.utils.ProgressBar(rows * len(starts))
    cache: list = [None] * count_cache_layers(network.decoder)
    for step, start in enumerate(starts):
        management.throw_exception_if_processing_interrupted()
        z = latent[:, :, start:start + (1 if start == 0 else 2)].to(vae.device, vae.vae_dtype)
        try:
            with management.cuda_device_context(vae.device):
                pieces = network.decoder(network.conv2(z), feat_cache=cache, feat_idx=[0])
        except Exception as error:
            management.raise_non_oom(error)
            raise SanaVideoError(
                "Not enough memory to decode the video exactly", found=f"{latent.shape[4]}x{latent.shape[3]} latents",
                action="Use 'VAE Decode (Tiled)' instead; the sampled latent is kept, only the decoding runs again",
            ) from error
        for piece in pieces:
            pixels = vae.process_output(piece.to(vae.output_device, vae.vae_output_dtype(), copy=True))
            yield pixels[0].movedim(0, -1)
        progress.update_absolute(row * len(starts) + step + 1)
