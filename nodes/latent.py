"""An empty LATENT of a size and length that the connected model can make."""

from __future__ import annotations

from comfy_api.latest import io

from ..sana_video_core.errors import SanaVideoError
from ..sana_video_core.specs import ModelSpec, require_frames, require_size
from .common import CATEGORY, spec_of, whole_number

MAX_PIXELS = 16384
MAX_LATENT_FRAMES = 1024  # the model's table of positions ends here (model spec 1.6)
MAX_BATCH = 64


class SanaVideoEmptyLatent(io.ComfyNode):
    """Spec-aware counterpart of ComfyUI's empty video latents."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SanaVideoEmptyLatent",
            display_name="SANA-Video Empty Latent",
            category=CATEGORY,
            description="The empty canvas of a video: checks size and length against the model before anything is sampled.",
            search_aliases=["empty video latent", "resolution", "frames", "length", "size"],
            inputs=[
                io.Model.Input("model", tooltip="Tells which sizes and lengths are possible."),
                io.Int.Input("width", default=832, min=16, max=MAX_PIXELS, step=16,
                             tooltip="Width of the video in pixels. 480p: 832 (or 480 upright), 720p: 1280, mini: 160."),
                io.Int.Input("height", default=480, min=16, max=MAX_PIXELS, step=16,
                             tooltip="Height of the video in pixels. 480p: 480 (or 832 upright), 720p: 704, mini: 96."),
                io.Int.Input("frames", default=81, min=1, max=16384, step=4,
                             tooltip="Length in frames, at 16 frames a second: 81 is five seconds. 4n+1 with the Wan VAE "
                                     "(1, 5, ... 81), 8n+1 with the LTX-2 VAE."),
                io.Int.Input("batch_size", default=1, min=1, max=MAX_BATCH,
                             tooltip="How many videos are made at once. Each takes as much memory again."),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="To the sampler's latent input.")],
        )

    @classmethod
    def execute(cls, model, width, height, frames, batch_size) -> io.NodeOutput:
        import comfy.model_management
        import torch

        shape = latent_shape(spec_of(model), width, height, frames, batch_size)
        samples = torch.zeros(shape, device=comfy.model_management.intermediate_device())
        return io.NodeOutput({"samples": samples, "downscale_ratio_spacial": spec_of(model).vae.stride[1]})


def latent_shape(spec: ModelSpec, width, height, frames, batch_size) -> tuple[int, int, int, int, int]:
    """``[B, C, T, H, W]`` of a video in pixels; every number is checked, the error names the nearest valid one."""
    width, height = (whole_number(n, v, 1, MAX_PIXELS) for n, v in (("width", width), ("height", height)))
    longest = spec.pixel_frames(MAX_LATENT_FRAMES)
    frames = whole_number("frames", frames, 1, longest)
    batch = whole_number("batch_size", batch_size, 1, MAX_BATCH)
    width, height = require_size(spec, width, height)
    require_frames(spec, frames)
    time, down, across = spec.vae.stride
    rows, columns = height // down, width // across
    if max(rows // spec.patch[1], columns // spec.patch[2]) > MAX_LATENT_FRAMES:
        raise SanaVideoError("The picture is larger than the model's table of positions", found=f"{width}x{height}",
                             expected=f"at most {MAX_LATENT_FRAMES} tokens a side")
    return batch, spec.channels, (frames - 1) // time + 1, rows, columns
