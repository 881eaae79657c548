"""Image to video: a picture becomes frame 0 of the latent and stays as it is."""

from __future__ import annotations

from comfy_api.latest import io

from ..sana_video_core.errors import SanaVideoError
from .common import CATEGORY, choice, describe_vae, require_part, vae_geometry

FITS = ["crop", "stretch"]


class SanaVideoFirstFrame(io.ComfyNode):
    """Writes an encoded picture into latent frame 0 and masks it (model spec 3.7)."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SanaVideoFirstFrame",
            display_name="SANA-Video First Frame",
            category=CATEGORY,
            description="Makes the video start from your picture: the first frame is kept, the rest is sampled from it.",
            search_aliases=["image to video", "i2v", "start image", "ti2v"],
            inputs=[
                io.Latent.Input("latent", tooltip="The empty latent: it sets the size and length of the video."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model."),
                io.Image.Input("image", tooltip="The picture to start from. Of several, the first is taken."),
                io.Combo.Input("fit", options=FITS, default="crop",
                               tooltip="When the picture's shape differs from the video's: crop keeps the proportions and cuts "
                                       "the edges, stretch keeps the edges and bends the proportions."),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="To the sampler's latent input.")],
        )

    @classmethod
    def execute(cls, latent, vae, image, fit) -> io.NodeOutput:
        import comfy.utils
        import torch

        require_part(vae, "VAE", "Choose a VAE in 'Load SANA-Video', or connect 'Load VAE'")
        choice("fit", fit, FITS)
        samples = latent["samples"]
        geometry = vae_geometry(vae)
        if samples.ndim != 5 or geometry is None or geometry[0] != samples.shape[1]:
            raise SanaVideoError("The VAE does not fit the latent", found=geometry and describe_vae(geometry),
                                 expected=f"{samples.shape[1]} channels in a video latent",
                                 action="Use the VAE of the model that the latent was made for")
        if image.shape[0] < 1 or not bool(torch.isfinite(image[:1]).all()):
            raise SanaVideoError("The picture cannot be used", found="no picture, or values that are not numbers")
        height, width = samples.shape[3] * geometry[1][1], samples.shape[4] * geometry[1][2]
        picture = comfy.utils.common_upscale(image[:1, ..., :3].movedim(-1, 1), width, height, "bicubic",
                                             "center" if fit == "crop" else "disabled")
        frame = vae.encode(picture.movedim(1, -1).clamp(0, 1))
        out = latent.copy()  # ComfyUI shares outputs between nodes: the given dict and tensors stay as they are
        out["samples"] = samples.clone()
        out["samples"][:, :, :1] = frame[:, :, :1].to(samples)
        out["noise_mask"] = torch.ones((1, 1, *samples.shape[2:]), device=samples.device)
        out["noise_mask"][:, :, 0] = 0
        return io.NodeOutput(out)
