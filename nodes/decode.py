"""LATENT to IMAGE, latent frame group by group: exact, interruptible, with bounded memory; a run folder to VIDEO.

The Wan decoder is a loop over latent frames with a cache of past activations, so decoding in groups gives the very
same pixels as one call (vae/text spec 1.5, 1.7). A film never becomes one batch of frames: it goes block by block into its
video file (``film.py``).
"""

from __future__ import annotations

from collections.abc import Iterator

from comfy_api.latest import io

from ..sana_video_core.errors import SanaVideoError
from .common import CATEGORY, describe_vae, finite, require_part, vae_geometry
from .fused_vae import fused_cache, fused_frames

TILED = "Use 'VAE Decode (Tiled)' instead; the sampled latent is kept, only the decoding runs again"


class SanaVideoDecode(io.ComfyNode):
    """Streaming decode: a short clip into one IMAGE batch, a film into its video file."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SanaVideoDecode",
            display_name="SANA-Video Decode",
            category=CATEGORY,
            description="Turns the sampled latent into frames, a few at a time, exactly as in one go but with less memory. "
                        "With a "
                        "run folder: turns the film in it into a video file, block by block, however long it is.",
            search_aliases=["vae decode", "latent to video", "streaming decode", "film"],
            inputs=[
                io.Latent.Input("samples", optional=True, tooltip="The latent from the sampler. Not needed with a run folder."),
                io.Vae.Input("vae", tooltip="VAE of 'Load SANA-Video', or of 'Load VAE'. 480p: Wan 2.1, 720p: LTX-2."),
                io.String.Input("run_folder", default="", optional=True,
                                tooltip="The film to decode: the run folder of 'SANA-Video Block Sampler'. Every block that is "
                                        "finished is decoded, none twice. Empty: the latent."),
                io.Float.Input("fps", default=16.0, min=1.0, max=120.0, step=0.01, optional=True,
                               tooltip="Frames a second of the video."),
            ],
            outputs=[
                io.Image.Output(display_name="frames", tooltip="All frames of the latent in order; connect to 'Create Video'. "
                                                               "A film "
                                                               "gives none: use video."),
                io.Video.Output(display_name="video", tooltip="Connect to 'Save Video'. A film's video is copied, not encoded "
                                                              "again."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, run_folder="", **others):
        """Runs again when the film in the run folder has grown or changed."""
        from .film import film_stamp

        return film_stamp(run_folder)

    @classmethod
    def execute(cls, vae, samples=None, run_folder="", fps=16.0) -> io.NodeOutput:
        require_part(vae, "VAE", "Choose a VAE in 'Load SANA-Video', or connect 'Load VAE'")
        fps = finite("fps", fps, 1.0, 120.0)
        if isinstance(run_folder, str) and run_folder.strip():
            return decode_film(run_folder.strip(), vae, fps)
        if samples is None:
            raise SanaVideoError("There is nothing to decode", found="neither a latent nor a run folder",
                                 action="Connect the sampler's LATENT, or name the run folder of a film")
        latent = samples["samples"]
        check_fit(latent, vae)
        frames = decode_frames(vae, latent)
        return io.NodeOutput(frames, clip_video(frames, fps))


def clip_video(frames, fps: float):
    """ComfyUI's VIDEO of a batch of frames; encoded only when something saves it."""
    from fractions import Fraction

    from comfy_api.latest import InputImpl, Types

    return InputImpl.VideoFromComponents(Types.VideoComponents(images=frames, frame_rate=Fraction(fps).limit_denominator(1001)))


def decode_film(name: str, vae, fps: float) -> io.NodeOutput:
    """VIDEO of the film in the run folder ``name``, as far as it is finished."""
    import comfy.utils
    from comfy_execution.graph_utils import ExecutionBlocker

    from ..sana_video_core.film import Film
    from .film import film_file, film_video, run_folder

    with Film(run_folder(name, must_exist=True)) as film:
        video = film_file(film, vae, fps)
        video.open()
        done = film.finished()
        if not done:
            raise SanaVideoError("The film has no finished block yet", found=name, action="Let the block sampler run first")
        bar = comfy.utils.ProgressBar(done)
        try:
            for block in range(video.blocks, done):
                video.begin(block)
                bar.update_absolute(block + 1, done)
            video.catch_up()
        finally:
            video.settle()
    return io.NodeOutput(ExecutionBlocker("A film stays on disk: use the video output of 'SANA-Video Decode'"),
                         film_video(video.path))


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

    from ..sana_video_core.film.transfer import to_cpu

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
        groups = stream(vae, latent[row:row + 1], latent.shape[0], row)
        for group in to_cpu(groups) if vae.output_device.type == "cpu" else groups:
            frames[row, position:position + len(group)] = group
            position += len(group)
    return frames.reshape(-1, height, width, 3)


def stream(vae, latent, rows: int = 1, row: int = 0) -> Iterator:
    """Groups of frames ``[n, H, W, 3]`` in 0..1 of one latent ``[1, C, T, H, W]``, in order; where they are made."""
    import comfy.utils

    cache, _ = fused_cache(vae)
    if cache is None:
        yield from _stream_natively(vae, latent, rows, row)
        return
    frames = latent.shape[2]
    progress = comfy.utils.ProgressBar(rows * frames)
    for i, piece in enumerate(fused_frames(vae, latent, cache, TILED)):
        yield vae.process_output(piece.to(vae.vae_output_dtype(), copy=True))[0].movedim(0, -1).contiguous()
        progress.update_absolute(row * frames + i + 1)


def _stream_natively(vae, latent, rows: int, row: int) -> Iterator:
    """:func:`stream` with ComfyUI's modules: first 1 frame, then 8 at a time.

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
                action=TILED) from error
        for piece in pieces:
            pixels = vae.process_output(piece.to(vae.output_device, vae.vae_output_dtype(), copy=True))
            yield pixels[0].movedim(0, -1)
        progress.update_absolute(row * len(starts) + step + 1)
